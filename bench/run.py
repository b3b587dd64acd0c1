"""`bench`: measure every checkpoint of a folder against its reference, and keep a record of each run."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.environment import differences
from bench.executor import Executor, Settings, WorkerExecutor
from bench.plan import PlannedRun, key_of, missing, plan, planned_keys
from bench.probe import Machine, probe
from bench.record import Record, append_record, read_records
from bench.scenario import SCENARIOS, Scenario
from quantize.checkpoint import Checkpoint, find_checkpoints, verify
from quantize.errors import UserError
from quantize.progress import Progress, silent
from quantize.variant import REFERENCE

RECORDS_NAME = "records.jsonl"
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Outcome:
    """What a `bench` leaves: the records of its plan, the last one of each run, older runs' included.

    path: the records file; measured: how many of the records are new.
    """

    path: Path
    records: tuple[Record, ...]
    measured: int

    @property
    def failed(self) -> tuple[Record, ...]:
        """The records without figures."""
        return tuple(record for record in self.records if record.status != "ok")

    @property
    def usable(self) -> bool:
        """Whether each base model's reference has figures in every scenario: else there is no ratio."""
        latency = [record for record in self.records if record.kind == "latency"]
        wanted = {(record.subject.base_model, record.scenario) for record in latency}
        measured = {
            (record.subject.base_model, record.scenario)
            for record in latency
            if record.status == "ok" and record.subject.variant == REFERENCE.name
        }
        return wanted == measured


def bench(
    directory: Path | str,
    *,
    scenarios: Sequence[Scenario] | None = None,
    rounds: int = 3,
    device: str = "auto",
    dtype: str | None = None,
    records: Path | str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    threads: int | None = None,
    quality: bool = True,
    fresh: bool = False,
    progress: Progress = silent,
    probe_machine: Callable[[str, int | None], Machine] = probe,
    executor_for: Callable[[Settings, Path], Executor] | None = None,
) -> Outcome:
    """Measure every finished checkpoint in `directory` and append one record a run to the records file.

    scenarios:  None for `published` and `chat`.
    rounds:     processes for each checkpoint, each measuring all scenarios.
    device:     "cpu", "cuda", or "auto": the GPU where there is one.
    dtype:      compute dtype of all runs. None: on a GPU the reference's half dtype, on a CPU float32, or
                bfloat16 where that is clearly faster.
    records:    the file, None for records.jsonl in the folder. What it has an ok record of is not run again.
    timeout_s:  for one process. threads: CPU threads of each process, None for torch's choice.
    quality:    measure perplexity too. fresh: set an existing records file aside and measure everything.
    progress:   told the run that begins, how many are done, and of how many.
    probe_machine, executor_for: replaced in tests.

    Raises UserError before anything runs: no checkpoints, no reference, damaged files, no CUDA, a records
    file from another machine. A run that fails is a record and no exception; KeyboardInterrupt loses no
    finished run.
    """
    _check_arguments(rounds, timeout_s, threads, dtype, device)
    folder = Path(directory)
    checkpoints = find_checkpoints(folder)
    check_references(checkpoints, folder)
    path = Path(records) if records is not None else folder / RECORDS_NAME
    if fresh:
        set_aside(path)
    old = read_records(path) if path.exists() else []

    progress("looking at the machine", 0, 0)
    machine = probe_machine(device, threads)
    _check_same(path, old, machine, checkpoints)
    dtypes = compute_dtypes(checkpoints, machine, dtype, old)
    runs = plan(checkpoints, list(scenarios or SCENARIOS.values()), rounds, quality=quality)
    left = missing(runs, old, device=machine.device, compute_dtypes=dtypes)
    for checkpoint in {run.checkpoint.path: run.checkpoint for run in left}.values():
        progress(f"checking the files of {checkpoint.path.name}", 0, 0)
        verify(checkpoint)

    settings = Settings(machine.device, dtypes, machine.environment, timeout_s, threads)
    executor = (executor_for or _worker_executor)(settings, path)
    new = _carry_out(left, executor, path, progress)
    wanted = planned_keys(runs, device=machine.device, compute_dtypes=dtypes)
    latest = {key_of(record): record for record in [*old, *new] if key_of(record) in wanted}
    return Outcome(path, tuple(latest.values()), len(new))


def _worker_executor(settings: Settings, path: Path) -> Executor:
    return WorkerExecutor(settings, log=path.with_suffix(".log"))


def _carry_out(runs: Sequence[PlannedRun], executor: Executor, path: Path, progress: Progress) -> list[Record]:
    done: list[Record] = []
    for number, run in enumerate(runs):
        work = "perplexity" if run.round is None else f"round {run.round + 1}"
        progress(f"{run.subject.name}, {work}", number, len(runs))
        records = executor(run)
        for record in records:
            append_record(path, record)
        done += records
    return done


def check_references(checkpoints: Sequence[Checkpoint], folder: Path) -> None:
    """Raises UserError for a base model without its reference, with the command that makes one."""
    with_reference = {one.manifest.base_model for one in checkpoints if one.variant == REFERENCE}
    for checkpoint in checkpoints:
        if checkpoint.manifest.base_model not in with_reference:
            raise UserError(
                f"{folder} holds no reference of {checkpoint.manifest.base_model}: make it with "
                f"`quantize {checkpoint.manifest.source.id} --variant {REFERENCE.name} --out {folder}`"
            )


def compute_dtypes(
    checkpoints: Iterable[Checkpoint], machine: Machine, dtype: str | None, old: Sequence[Record]
) -> dict[str, str]:
    """The compute dtype of each base model's runs, quantized or not: one, so that the rows compare.

    On a CPU it is what the probe found, or what it had found when the records were begun; on a GPU the
    reference's own half dtype.
    """
    found = {}
    begun = [record.environment.get("cpu_dtype") for record in old if record.device == machine.device]
    for checkpoint in checkpoints:
        if checkpoint.variant == REFERENCE:
            chosen = next((one for one in begun if one), None) or machine.cpu_dtype
            found[checkpoint.manifest.base_model] = dtype or chosen or half_dtype(checkpoint)
    return found


def half_dtype(checkpoint: Checkpoint) -> str:
    """bfloat16 where the checkpoint's config.json says so, else float16."""
    try:
        config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    named = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if named == "bfloat16" else "float16"


def set_aside(path: Path) -> Path | None:
    """Rename the file to the first free name with a number; None when there is no file."""
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return aside


def _check_same(path: Path, old: Sequence[Record], machine: Machine, checkpoints: Iterable[Checkpoint]) -> None:
    """Figures of two machines, other libraries or a checkpoint's earlier contents are not mixed."""
    contents = {checkpoint.path.name: checkpoint.content_sha256 for checkpoint in checkpoints}
    for record in old:
        name = record.subject.name
        if contents.get(name, record.subject.content_sha256) != record.subject.content_sha256:
            raise UserError(
                f"{name} is not the checkpoint that {path} has records of: use --fresh to begin again, or "
                "--records for another file"
            )
        differing = differences(record.environment, machine.environment) if record.device == machine.device else []
        if differing:
            raise UserError(
                f"{path} was measured elsewhere ({differing[0]}): use --fresh to begin again, or "
                "--records for another file"
            )


def _check_arguments(rounds: int, timeout_s: float, threads: int | None, dtype: str | None, device: str) -> None:
    if rounds < 1:
        raise UserError("--rounds must be at least 1")
    if timeout_s <= 0:
        raise UserError("--timeout must be above 0 seconds")
    if threads is not None and threads < 1:
        raise UserError("--threads must be at least 1")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    if device not in DEVICES:
        raise UserError(f"unknown device {device!r}; there are: {', '.join(DEVICES)}")
