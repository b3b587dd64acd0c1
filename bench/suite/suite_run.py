"""A whole suite in one command: its rows' records, and the crossover beside them. Imports no torch."""

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bench.records.crossover import CROSSOVER_NAME
from bench.records.store import RECORDS_NAME, read_crossover
from bench.run.executor import append_log, run_process, worker_environment
from bench.run.run import BenchOptions, Outcome, measure
from bench.suite.prompts import TokensOf
from bench.suite.suite import Suite, checkpoint_targets, dummy_targets
from quantize.errors import UserError
from quantize.progress import Progress, silent
from quantize.quiet import quiet_libraries

CROSSOVER_GRACE = 3.0
"""The crossover looks at its budget between measurements; so many times of it, and a minute to start, it may take."""


@dataclass(frozen=True)
class SuiteRun:
    """What to do of a suite.

    suite:       its rows and scenarios.
    out:         the folder for everything that is written, with the checkpoints in it where the weights are not random.
    dummy:       random weights.
    shape:       of these, None for the suite's.
    scenarios:   names of the suite's, none for all.
    crossover_s: how long the crossover may take, None for what the suite says, 0 for none.
    """

    suite: Suite
    out: Path
    dummy: bool = False
    shape: str | None = None
    scenarios: tuple[str, ...] = ()
    crossover_s: float | None = None

    def __post_init__(self) -> None:
        if self.shape is not None and not self.dummy:
            raise UserError("--shape is of random weights: add --dummy, or leave it out")
        if self.crossover_s is not None and self.crossover_s < 0:
            raise UserError("--crossover-time must be at least 0 seconds")

    @property
    def budget_s(self) -> float:
        """How long the crossover may take."""
        return self.suite.crossover_s if self.crossover_s is None else self.crossover_s


def run_suite(run: SuiteRun, options: BenchOptions, progress: Progress = silent) -> tuple[Outcome, str | None]:
    """Measure the suite's rows into out/records.jsonl, then the crossover into out/crossover.jsonl.

    options: how to measure; its scenarios are those of the run. What is measured already is kept, a crossover on the
    same device too, unless options.fresh. Returns what `bench` does, and why there is no crossover, None where there is
    one or none was wanted. Raises UserError as `bench` does, and for checkpoints that are not there.
    """
    suite, out = run.suite, run.out
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    targets = dummy_targets(suite, run.shape) if run.dummy else checkpoint_targets(suite, out)
    reference = next(target.checkpoint for target in targets if target.subject.may_be_reference)
    tokens_of = _tokenizer_of(Path(reference)) if reference else None
    scenarios = suite.scenarios_named(run.scenarios, tokens_of)
    outcome = measure(targets, out / RECORDS_NAME, replace(options, scenarios=scenarios), progress)
    if not outcome.usable or run.budget_s == 0:
        return outcome, None
    progress(f"writing {CROSSOVER_NAME}", 0, 0)
    return outcome, _crossover(run, options, outcome)


def _crossover(run: SuiteRun, options: BenchOptions, outcome: Outcome) -> str | None:
    """Where the ways to run a layer of this shape cross over, on the device and in the dtype of the records.

    It runs in a process of its own: this one holds no GPU. Returns why there is none, None where there is one.
    """
    record, path = outcome.records[0], run.out / CROSSOVER_NAME
    with contextlib.suppress(UserError):  # one that is damaged or not there is measured again
        kept = read_crossover(path)[0]
        if not options.fresh and (kept.device, kept.compute_dtype) == (record.device, record.compute_dtype):
            return None
    arguments = ["--shape", run.shape or run.suite.shape, "--device", record.device, "--out", str(run.out)]
    arguments += ["--dtype", record.compute_dtype] if record.compute_dtype else []
    ended = run_process(
        [sys.executable, "-P", "-m", "bench.crossover", *arguments, "--budget", f"{run.budget_s:g}"],
        timeout_s=60.0 + CROSSOVER_GRACE * run.budget_s,
        environment=worker_environment(options.threads),
    )
    if ended.exit_code == 0 and path.is_file():
        return None
    append_log((run.out / RECORDS_NAME).with_suffix(".log"), CROSSOVER_NAME, ended)
    lines = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else ended.verdict()[1]


def _tokenizer_of(checkpoint: Path) -> TokensOf:
    with quiet_libraries():
        from quantize.model.pretrained import tokenizer_of

        encode: TokensOf = tokenizer_of(checkpoint).encode
    return encode
