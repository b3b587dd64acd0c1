"""A whole suite in one command: its rows' records, and the crossover beside them. Imports no torch."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.records.crossover import CROSSOVER_NAME
from bench.records.record import Record
from bench.records.store import RECORDS_NAME, read_crossover
from bench.run.executor import append_log, run_module
from bench.run.run import Outcome, measure
from bench.suite.prompts import TokensOf
from bench.suite.suite import Suite, checkpoint_targets, dummy_targets
from bench.worker.options import BenchOptions
from quantize.errors import UserError
from quantize.progress import Progress, span
from quantize.quiet import quiet_libraries

CROSSOVER_GRACE = 3.0  # times its budget that the crossover may take, which it looks at between measurements


def run_suite(
    suite: Suite,
    out: Path,
    options: BenchOptions,
    *,
    dummy: bool = False,
    shape: str | None = None,
    scenarios: Sequence[str] = (),
    crossover_s: float | None = None,
    progress: Progress | None = None,
) -> tuple[Outcome, str | None]:
    """Measure the suite's rows into out/records.jsonl, then the crossover into out/crossover.jsonl, where none is kept.

    out:         holds the checkpoints, too, where the weights are not random.
    dummy:       random weights, in this shape or the suite's.
    scenarios:   names of the suite's, none for all; they take the place of those in `options`.
    crossover_s: how long the crossover may take, None for what the suite says, 0 for none.

    Returns what `bench` does, and why a wanted crossover is not there, or None. Raises UserError as `bench` does.
    """
    if shape is not None and not dummy:
        raise UserError("--shape is of random weights: add --dummy, or leave it out")
    budget_s = suite.crossover.budget_s if crossover_s is None else crossover_s
    if not budget_s >= 0:
        raise UserError("--crossover-time must be at least 0 seconds")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    targets = dummy_targets(suite, shape) if dummy else checkpoint_targets(suite, out)
    reference = next(target.checkpoint for target in targets if target.subject.may_be_reference)
    wanted = suite.scenarios_named(scenarios, _tokenizer_of(Path(reference)) if reference else None)
    outcome = measure(targets, out / RECORDS_NAME, replace(options, scenarios=wanted), progress)
    if not outcome.usable or budget_s == 0:
        return outcome, None
    (progress or Progress()).begin(f"measuring for {CROSSOVER_NAME}, about {span(budget_s)}")
    return outcome, _crossover(shape or suite.shape, out, budget_s, options, outcome.records[0])


def _crossover(shape: str, out: Path, budget_s: float, options: BenchOptions, record: Record) -> str | None:
    """Measure in a process of its own, on this record's device and in its dtype; why there is no crossover, or None."""
    path = out / CROSSOVER_NAME
    with contextlib.suppress(UserError):  # one that is damaged or not there is measured again
        kept = read_crossover(path)[0]
        if not options.fresh and (kept.device, kept.compute_dtype) == (record.device, record.compute_dtype):
            return None
    arguments = ["--shape", shape, "--device", record.device, "--out", str(out), "--budget", f"{budget_s:g}"]
    arguments += ["--dtype", record.compute_dtype] if record.compute_dtype else []
    timeout_s = 60.0 + CROSSOVER_GRACE * budget_s
    ended = run_module("bench.crossover", *arguments, timeout_s=timeout_s, threads=options.threads)
    if ended.exit_code == 0 and path.is_file():
        return None
    append_log((out / RECORDS_NAME).with_suffix(".log"), CROSSOVER_NAME, ended)
    lines = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else ended.verdict()[1]


def _tokenizer_of(checkpoint: Path) -> TokensOf:
    with quiet_libraries():
        from quantize.model.pretrained import tokenizer_of

        encode: TokensOf = tokenizer_of(checkpoint).encode
    return encode
