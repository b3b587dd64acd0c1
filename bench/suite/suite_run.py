"""A whole suite in one command. Imports no torch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.records.store import RECORDS_NAME
from bench.run.run import Outcome, measure
from bench.suite.prompts import TokensOf
from bench.suite.suite import Suite, checkpoint_targets, dummy_targets
from bench.worker.options import BenchOptions
from quantize.errors import UserError
from quantize.progress import Progress
from quantize.quiet import quiet_libraries


def run_suite(
    suite: Suite,
    out: Path,
    options: BenchOptions,
    *,
    dummy: bool = False,
    shape: str | None = None,
    scenarios: Sequence[str] = (),
    progress: Progress | None = None,
) -> Outcome:
    """Measure the suite's rows into out/records.jsonl.

    out:         holds the checkpoints, too, where the weights are not random.
    dummy:       random weights, in this shape or the suite's.
    scenarios:   names of the suite's, none for all; they take the place of those in `options`.

    Returns and raises what `bench` does."""
    if shape is not None and not dummy:
        raise UserError("--shape is of random weights: add --dummy, or leave it out")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    targets = dummy_targets(suite, shape) if dummy else checkpoint_targets(suite, out)
    reference = next(target.checkpoint for target in targets if target.subject.may_be_reference)
    wanted = suite.scenarios_named(scenarios, _tokenizer_of(Path(reference)) if reference else None)
    return measure(targets, out / RECORDS_NAME, replace(options, scenarios=wanted), progress)


def _tokenizer_of(checkpoint: Path) -> TokensOf:
    with quiet_libraries():
        from quantize.model.pretrained import tokenizer_of

        encode: TokensOf = tokenizer_of(checkpoint).encode
    return encode
