"""`bench`: measure every checkpoint of a folder against its reference, and keep a record of each run."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.records.environment import differences
from bench.records.record import Record, append_record, family_of, may_be_reference, read_records
from bench.records.scenario import SCENARIOS, Scenario
from bench.records.steady import Rule
from bench.records.stopping import Enough, Rounds
from bench.run.executor import Executor, Settings, WorkerExecutor
from bench.run.plan import PlannedRun, RunKey, key_of, missing, plan, planned_keys, with_references
from bench.run.probe import Machine, probe
from bench.run.target import Candidate, candidate_of
from bench.worker.request import QualityRequest, TaskRequest
from quantize.checkpoint import find_checkpoints, verify
from quantize.errors import UserError
from quantize.progress import Progress, silent
from quantize.variant import REFERENCE, check_kernel

RECORDS_NAME = "records.jsonl"
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Outcome:
    """What a `bench` leaves: the records of its plan, the last one of each run, older runs' included.

    path: the records file; measured: how many of the records are new; rounds: how many there are, and `stopped` why no
    more (bench.records.stopping).
    """

    path: Path
    records: tuple[Record, ...]
    measured: int
    rounds: int
    stopped: Enough

    @property
    def failed(self) -> tuple[Record, ...]:
        """The records without figures."""
        return tuple(record for record in self.records if record.status != "ok")

    @property
    def usable(self) -> bool:
        """Whether each family's reference has figures in every scenario: else there is no ratio."""
        latency = [record for record in self.records if record.kind == "latency"]
        wanted = {(family_of(record.subject), record.scenario) for record in latency}
        measured = {
            (family_of(record.subject), record.scenario)
            for record in latency
            if record.status == "ok" and may_be_reference(record.subject)
        }
        return wanted == measured


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and how; every default is what the table is made with.

    scenarios:    None for `published` and `chat`.
    rounds, rule: how many processes for each checkpoint, each measuring all scenarios; when one of them has enough.
    device:       "cpu", "cuda", or "auto": the GPU where there is one.
    dtype:        compute dtype of all runs. None: on a GPU the reference's half dtype, on a CPU float32, or
                  bfloat16 where that is clearly faster.
    kernel:       of the AWQ layers: "native" or a kernel's name, None or "auto" for what is fastest. A row measured on
                  a kernel of the user's choice stands beside the same row without.
    timeout_s:    for one process. threads: CPU threads of each process, None for torch's choice.
    quality:      measure perplexity and divergence too; quality_data: on this text (a file, or hub:NAME) in place of
                  the built-in one.
    tasks:        names of lm-eval tasks or of our groups; task_folder: task files of the user's own; task_limit:
                  questions of each.
    fresh:        set an existing records file aside and measure everything.
    """

    scenarios: tuple[Scenario, ...] | None = None
    rounds: Rounds = field(default_factory=Rounds)
    rule: Rule = field(default_factory=Rule)
    device: str = "auto"
    dtype: str | None = None
    kernel: str | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    threads: int | None = None
    quality: bool = True
    quality_data: str | None = None
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    task_limit: int | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise UserError("--timeout must be above 0 seconds")
        if self.threads is not None and self.threads < 1:
            raise UserError("--threads must be at least 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}; there are: {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            raise UserError(f"unknown device {self.device!r}; there are: {', '.join(DEVICES)}")
        check_kernel(self.kernel)


def bench(
    directory: Path | str,
    options: BenchOptions | None = None,
    *,
    records: Path | str | None = None,
    progress: Progress = silent,
    probe_machine: Callable[[str, int | None], Machine] = probe,
    executor_for: Callable[[Settings, Path], Executor] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Measure every finished checkpoint in `directory` and append the records of each run to the records file.

    records:    the file, None for records.jsonl in the folder. What it has an ok record of is not run again.
    progress:   told the run that begins, how many are done, and of how many.
    probe_machine, executor_for, now: replaced in tests.

    Raises UserError before anything runs: no checkpoints, no reference, damaged files, no CUDA, a records
    file from another machine. A run that fails is a record and no exception; KeyboardInterrupt loses no
    finished run.
    """
    options = options or BenchOptions()
    folder = Path(directory)
    candidates = [candidate_of(checkpoint, kernel=options.kernel) for checkpoint in find_checkpoints(folder)]
    check_references(candidates, folder)
    path = Path(records) if records is not None else folder / RECORDS_NAME
    return measure(
        candidates,
        path,
        options,
        progress=progress,
        probe_machine=probe_machine,
        executor_for=executor_for,
        now=now,
    )


def measure(
    candidates: Sequence[Candidate],
    path: Path,
    options: BenchOptions,
    *,
    progress: Progress = silent,
    probe_machine: Callable[[str, int | None], Machine] = probe,
    executor_for: Callable[[Settings, Path], Executor] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Measure these candidates, each family's reference among them, into the records file `path`: see `bench`."""
    began = now()
    quality = quality_request(options.quality_data)
    tasks = expand_tasks(options)
    if options.fresh:
        set_aside(path)
    old = read_records(path) if path.exists() else []

    progress("looking at the machine", 0, 0)
    machine = probe_machine(options.device, options.threads)
    _check_same(path, old, machine, candidates)
    if options.quality:
        _check_same_text(path, old, quality)
    dtypes = compute_dtypes(candidates, machine, options.dtype, old)
    settings = Settings(
        machine.device,
        dtypes,
        machine.environment,
        options.timeout_s,
        options.threads,
        rule=options.rule,
        quality=quality,
        tasks=TaskRequest(tasks, _text(options.task_folder), options.task_limit) if tasks else None,
        expectations=expectation_paths(path, candidates, dtypes, quality.label) if options.quality else {},
        plan={"rounds": options.rounds.to_json()},
    )
    series = _Series(path, list(old), settings, (executor_for or _worker_executor)(settings, path), progress)
    done, verified = 0, set[Path]()
    round_s = 0.0
    while (stopped := options.rounds.enough(done, series.records, now() - began, round_s)) is None:
        numbers = range(options.rounds.least) if done == 0 else [done]
        scenarios = list(options.scenarios or SCENARIOS.values())
        runs = plan(candidates, scenarios, numbers, quality=options.quality, tasks=tasks)
        round_began = now()
        series.carry_out(runs, verified)
        done = max(numbers) + 1
        round_s = (now() - round_began) / len(numbers)
    shutil.rmtree(_expectations_folder(path), ignore_errors=True)
    return Outcome(path, series.latest(), series.measured, done, stopped)


@dataclass
class _Series:
    """The runs of one bench, as they are carried out; `records` are all that the file holds."""

    path: Path
    records: list[Record]
    settings: Settings
    executor: Executor
    progress: Progress
    measured: int = 0
    wanted: set[RunKey] = field(default_factory=set)

    def carry_out(self, runs: Sequence[PlannedRun], verified: set[Path]) -> None:
        """Run what of these has no ok record yet, each record written as its run ends."""
        device, dtypes = self.settings.device, self.settings.compute_dtypes
        self.wanted |= planned_keys(runs, device=device, compute_dtypes=dtypes)
        left = missing(runs, self.records, device=device, compute_dtypes=dtypes)
        kept = {model for model, path in self.settings.expectations.items() if path.is_file()}
        left = with_references(left, runs, kept)
        for checkpoint in filter(None, (run.candidate.checkpoint for run in left)):
            if checkpoint.path not in verified:
                self.progress(f"checking the files of {checkpoint.path.name}", 0, 0)
                verify(checkpoint)
                verified.add(checkpoint.path)
        for number, run in enumerate(left):
            work = "quality" if run.round is None else f"round {run.round + 1}"
            self.progress(f"{run.subject.name}, {work}", number, len(left))
            for record in self.executor(run):
                append_record(self.path, record)
                self.records.append(record)
                self.measured += 1

    def latest(self) -> tuple[Record, ...]:
        """The last record of each work that was wanted."""
        return tuple({key_of(record): record for record in self.records if key_of(record) in self.wanted}.values())


def quality_request(data: str | None) -> QualityRequest:
    """What to judge on. Raises UserError for a text that cannot be read."""
    if data is None:
        return QualityRequest()
    from quantize.calibration import HUB_PREFIX, PARAGRAPH, text_from

    text = PARAGRAPH.join(text_from(data))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    name = data if data.startswith(HUB_PREFIX) else Path(data).name
    return QualityRequest(data=data if name == data else str(Path(data).resolve()), label=f"{name}, sha256 {digest}")


def expand_tasks(options: BenchOptions) -> tuple[str, ...]:
    """The names of the tasks asked for, groups taken apart; none where none were.

    Raises UserError for one that lm-eval does not know, before anything runs.
    """
    if not options.tasks:
        return ()
    from bench.worker.tasks import check_names, expand

    names = expand(options.tasks)
    check_names(names, options.task_folder)
    return names


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _expectations_folder(path: Path) -> Path:
    return path.with_suffix(".expectations")


def expectation_paths(
    path: Path, candidates: Iterable[Candidate], dtypes: Mapping[str, str], label: str
) -> dict[str, Path]:
    """Where each reference's expectations are kept while the bench lasts: another file for other contents or text."""
    found: dict[str, Path] = {}
    for subject in (candidate.subject for candidate in candidates):
        if may_be_reference(subject):
            key = f"{subject.content_sha256} {dtypes[family_of(subject)]} {label}"
            name = f"{subject.base_model}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
            found.setdefault(subject.base_model, _expectations_folder(path) / name)
    return found


def _worker_executor(settings: Settings, path: Path) -> Executor:
    return WorkerExecutor(settings, log=path.with_suffix(".log"))


def check_references(candidates: Sequence[Candidate], folder: Path) -> None:
    """Raises UserError for a checkpoint whose family has no reference, with the command that makes one."""
    with_reference = {family_of(one.subject) for one in candidates if may_be_reference(one.subject)}
    for candidate in candidates:
        checkpoint, family = candidate.checkpoint, family_of(candidate.subject)
        if checkpoint is not None and family not in with_reference:
            raise UserError(
                f"{folder} holds no reference of {family}: make it with "
                f"`quantize {checkpoint.manifest.source.id} --variant {REFERENCE.name} --out {folder}`"
            )


def compute_dtypes(
    candidates: Iterable[Candidate], machine: Machine, dtype: str | None, old: Sequence[Record]
) -> dict[str, str]:
    """The compute dtype of each family's runs, quantized or not: one, so that the rows compare.

    On a CPU it is what the probe found, or what it had found when the records were begun; on a GPU the
    reference's own half dtype.
    """
    found = {}
    begun = [record.environment.get("cpu_dtype") for record in old if record.device == machine.device]
    for candidate in candidates:
        if may_be_reference(candidate.subject):
            chosen = next((one for one in begun if one), None) or machine.cpu_dtype
            found[family_of(candidate.subject)] = dtype or chosen or candidate.half_dtype
    return found


def set_aside(path: Path) -> Path | None:
    """Rename the file to the first free name with a number; None when there is no file."""
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return aside


def _check_same(path: Path, old: Sequence[Record], machine: Machine, candidates: Iterable[Candidate]) -> None:
    """Figures of two machines, other libraries or a checkpoint's earlier contents are not mixed."""
    contents = {candidate.subject.name: candidate.subject.content_sha256 for candidate in candidates}
    for record in old:
        name = record.subject.name
        if contents.get(name, record.subject.content_sha256) != record.subject.content_sha256:
            raise UserError(
                f"{name} is not what {path} has records of: use --fresh to begin again, or --records for another file"
            )
        differing = differences(record.environment, machine.environment) if record.device == machine.device else []
        if differing:
            raise UserError(
                f"{path} was measured elsewhere ({differing[0]}): use --fresh to begin again, or "
                "--records for another file"
            )


def _check_same_text(path: Path, old: Sequence[Record], quality: QualityRequest) -> None:
    """Perplexities on two texts do not stand in one table."""
    for record in old:
        if record.quality is not None and record.quality.text != quality.label:
            raise UserError(
                f"{path} holds perplexities on another text ({record.quality.text}, now {quality.label}): use --fresh "
                "to begin again, or --records for another file"
            )
