"""`bench`: measure every checkpoint of a folder against its reference, and keep a record of each run."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

from bench.records.broken import broken_subjects
from bench.records.comparison import widest_interval
from bench.records.record import Record
from bench.records.scenario import SCENARIOS, Scenario
from bench.records.stopping import RoundsStopReason
from bench.records.store import RECORDS_NAME, append, write
from bench.run import checks
from bench.run.engine import check_engines, engines_named, executor_for
from bench.run.executor import Executor
from bench.run.foreign import folder_of, foreign_folders, foreign_targets
from bench.run.plan import RunKey, in_engine, key_of, missing, plan, planned_keys, target_of, with_references
from bench.run.probe import Machine, probe
from bench.worker.options import BenchChoices, BenchOptions
from bench.worker.request import PlannedRun, QualityRequest, Settings, Target
from quantize.checkpoint import checkpoint_folders, find_checkpoints, is_model, open_checkpoint, verify
from quantize.files import only_writer
from quantize.progress import Progress, Step
from quantize.schema import with_choices


@dataclass(frozen=True)
class Outcome:
    """What a `bench` leaves. records: of its plan, the last one of each run; measured: how many of them are new."""

    path: Path
    records: tuple[Record, ...]
    measured: int
    rounds: int
    stopped: RoundsStopReason

    @property
    def failed(self) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.status != "ok")

    @property
    def broken(self) -> dict[str, str]:
        """Why a checkpoint's figures are of none that is sound, by its name."""
        return {subject.name: why for subject, why in broken_subjects(self.records).items()}

    @property
    def usable(self) -> bool:
        """Whether in some engine each baseline's reference has figures in every scenario: else there is no ratio."""
        latency = [record for record in self.records if record.kind == "latency"]
        references = [one for one in latency if one.status == "ok" and one.subject.may_be_reference]
        measured = {(one.subject.baseline, one.scenario) for one in references}
        incomplete = {one.subject.engine for one in latency if (one.subject.baseline, one.scenario) not in measured}
        return not latency or incomplete < {one.subject.engine for one in latency}


@dataclass(frozen=True)
class Instruments:
    """What a bench measures with; tests put others in their place. executor_for: of the settings and records file."""

    probe_machine: Callable[[str, int | None], Machine] = probe
    executor_for: Callable[[Settings, Path], Executor] = executor_for
    now: Callable[[], float] = time.monotonic  # in seconds
    check_models: Callable[[Sequence[Target], Sequence[Scenario], QualityRequest | None], None] = checks.check_models


def bench(
    directory: Path | str,
    options: BenchOptions | None = None,
    *,
    records: Path | str | None = None,
    reference: str | None = None,
    progress: Progress | None = None,
    **choices: Unpack[BenchChoices],
) -> Outcome:
    """Measure every checkpoint in `directory`, whoever made it, and append the records of each run to the records file.

    directory:  a folder of checkpoints, or one checkpoint of another maker: its folder or hub id.
    records:    the file, None for records.jsonl in the folder. What it has an ok record of is not run again.
    reference:  the base model of other makers' checkpoints, None for what their cards say or the folder has.
    progress:   told each step, and a line for each record.
    choices:    fields of BenchOptions by name, over those of `options`; of its `rounds`, too.

    Raises UserError before anything runs: no checkpoints, no reference, damaged files, no CUDA, a records file from
    another machine. A run that fails is a record and no exception; KeyboardInterrupt loses no finished run."""
    least = {"least": choices.pop("rounds")} if isinstance(choices.get("rounds"), int) else {}
    options, place = with_choices(options or BenchOptions(), "rounds", {**choices, **least}), Path(directory)
    folder = folder_of(place)
    alone = is_model(folder)  # whose records do not belong into it
    path = Path(records) if records is not None else (Path("runs") / place.name if alone else folder) / RECORDS_NAME
    targets = targets_in(folder, options.kernel, reference)
    if options.engines:
        check_engines(options)
        targets = [in_engine(target, name) for name in engines_named(options.engines) for target in targets]
        options = replace(options, device="cpu")
    return measure(targets, path, options, progress)


def targets_in(folder: Path, kernel: str | None = None, reference: str | None = None) -> list[Target]:
    """The finished checkpoints in a folder, whoever made them, and their base models; UserError where one lacks."""
    others = foreign_folders(folder) if folder.is_dir() else []
    checkpoints = [] if others and not checkpoint_folders(folder) else find_checkpoints(folder)
    ours = [target_of(checkpoint, kernel=kernel) for checkpoint in checkpoints]
    checks.check_references(ours, [checkpoint.manifest.source.id for checkpoint in checkpoints], folder)
    return [*ours, *(foreign_targets(folder, ours, reference, kernel) if others else [])]


def measure(
    targets: Sequence[Target],
    path: Path,
    options: BenchOptions,
    progress: Progress | None = None,
    instruments: Instruments | None = None,
) -> Outcome:
    """Measure these targets, each baseline's reference among them, into the records file `path`: see `bench`."""
    instruments, progress = instruments or Instruments(), progress or Progress()
    busy = f"another `bench` is measuring into {path}: wait for it, since each would measure the other's load"
    with only_writer(path.with_name(f".{path.name}.bench.lock"), busy):
        began = instruments.now()
        tasks = checks.expand_tasks(options.tasks, options.task_folder)
        old = checks.records_to_continue(path, fresh=options.fresh)
        scenarios = tuple(SCENARIOS.values()) if options.scenarios is None else options.scenarios
        quality = checks.quality_request(options.quality_data)
        judged = quality if options.quality else None
        progress.row(f"bench: {len(targets)} checkpoints, into {path}")
        progress.begin("looking at the models")
        if options.rounds.least < options.rounds.most:
            progress.grows_until_s = progress.clock() + options.rounds.max_time_s
        instruments.check_models(targets, scenarios, judged)
        progress.begin("looking at the machine")
        machine = instruments.probe_machine(options.device, options.threads)
        checks.check_continues(path, old, machine, targets, judged)
        dtypes = checks.compute_dtypes(targets, machine, options.dtype, old)
        facts = (targets, dtypes, quality.label, machine.environment)
        expected = checks.reference_logprobs_paths(*facts) if judged else {}
        settings = Settings(machine.device, dtypes, machine.environment, options, quality, expected)
        if options.fresh:
            checks.set_aside(path)
        for record in checks.kept_qualities(expected):
            if key_of(record) not in map(key_of, old):
                append(path, record)
                old.append(record)
        series = _Series(path, list(old), settings, instruments.executor_for(settings, path), progress)
        done, round_s = 0, 0.0
        while True:
            elapsed_s = instruments.now() - began
            stopped = options.rounds.stop_reason(done, lambda: widest_interval(series.latest()), elapsed_s, round_s)
            if stopped is not None:
                break
            numbers = range(options.rounds.least) if done == 0 else [done]
            round_began = instruments.now()
            series.carry_out(plan(targets, scenarios, numbers, quality=options.quality, tasks=tasks))
            done = max(numbers) + 1
            round_s = (instruments.now() - round_began) / len(numbers)
        checks.forget_old_logprobs(expected.values())
        return Outcome(path, series.latest(), series.measured, done, stopped)


@dataclass
class _Series:
    """The runs of one bench, as they are carried out: what the file holds, what was planned, what is sound."""

    path: Path
    records: list[Record]
    settings: Settings
    executor: Executor
    progress: Progress
    measured: int = 0
    wanted: set[RunKey] = field(default_factory=set)
    verified: set[str] = field(default_factory=set)

    def carry_out(self, runs: Sequence[PlannedRun]) -> None:
        """Run what of these has no ok record yet, each record written as its run ends."""
        device, dtypes = self.settings.device, self.settings.compute_dtypes
        self.wanted |= planned_keys(runs, device=device, compute_dtypes=dtypes)
        left = missing(runs, self.records, device=device, compute_dtypes=dtypes)
        kept = {model for model, path in self.settings.reference_logprobs.items() if Path(path).is_file()}
        left = with_references(left, runs, kept)
        for folder in dict.fromkeys(filter(None, (run.target.checkpoint for run in left))):
            if folder not in self.verified:
                self.progress.begin(f"checking the files of {Path(folder).name}")
                if not is_model(Path(folder)):  # whose files were hashed for its name in the records
                    verify(open_checkpoint(Path(folder)))
                self.verified.add(folder)
        self.progress.plan(step for run in left for step in _steps(run))
        rounds = max((run.round or 0) + 1 for run in runs)
        alone = len({run.subject.base_model for run in runs}) == 1
        for run in left:
            name = run.subject.name.removeprefix(f"{run.subject.base_model}-" if alone else "")
            work = "quality" if run.round is None else f"round {run.round + 1} of {rounds}"
            self.progress.begin(f"{name}, {work}", together=len(_steps(run)))
            for record in self.executor(run):
                append(self.path, record)
                self.records.append(record)
                expected = self.settings.reference_logprobs.get(run.subject.quality_baseline)
                if run.is_reference and record.quality and expected and Path(expected).is_file():
                    write(Path(expected).with_suffix(".jsonl"), [record])
                self.measured += 1
                self.progress.advance(seconds=record.wall_s)
                self.progress.row(f"{name}  {_line(record)}")
            self.progress.advance()

    def latest(self) -> tuple[Record, ...]:
        """The last record of each work that was wanted."""
        return tuple({key_of(record): record for record in self.records if key_of(record) in self.wanted}.values())


def _steps(run: PlannedRun) -> list[Step]:
    """A run's works, then what its process takes beside them."""
    kinds = [kind if scenario is None else scenario.name for kind, scenario in run.works]
    return [(kind, run.subject.name, 1.0) for kind in (*kinds, "load")]


def _line(record: Record) -> str:
    """What a record says, in half a line."""
    latency, quality, peak = record.latency, record.quality, record.memory and record.memory.run_peak_bytes
    said = [f"{record.status}: {record.reason}"] if record.reason else []
    said += [f"{score.name} {score.value:.3g}" for score in record.tasks or ()]
    if quality is not None:
        kld = f", KLD {quality.divergence.mean:.3g}" if quality.divergence else ""
        said.append(f"perplexity {quality.perplexity:.4g}{kld}")
    if latency is not None:
        steps = [step for steps in latency.decode_s for step in steps]
        said.append(f"prefill {statistics.median(latency.prefill_s):.3g} s")
        said += [f"decode {1000 * statistics.median(steps):.3g} ms"] if steps else []
        said += [f"peak {peak / 1e9:.2f} GB"] if peak else []
    of = record.kind if record.scenario is None else f"{record.scenario.name}  round {(record.round or 0) + 1}"
    return f"{of}: {', '.join(said)}"
