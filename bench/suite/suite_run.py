"""A whole suite in one command: its rows, the crossover, and the report's pages. Imports no torch.

Reports stand above this package, which imports nothing of them: their command writes the pages, as it would for a user.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bench.records.crossover import CROSSOVER_NAME, read_crossover
from bench.records.record import may_be_reference
from bench.run.executor import run_process, worker_environment
from bench.run.run import RECORDS_NAME, BenchOptions, Outcome, measure
from bench.suite.prompts import TokensOf
from bench.suite.suite import Suite, checkpoint_candidates, dummy_candidates
from quantize.errors import UserError
from quantize.progress import Progress, silent
from quantize.quiet import quiet_libraries

PAGE_TIMEOUT_S = 120.0

CROSSOVER_GRACE = 3.0
"""The crossover looks at its budget between measurements; so many times of it, and a minute to start, it may take."""


@dataclass(frozen=True)
class Campaign:
    """What to do of a suite.

    out: the folder for everything that is written, with the checkpoints in it where the weights are not random.
    dummy: random weights; shape: of these, None for the suite's. scenarios: names of the suite's, none for all.
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


@dataclass(frozen=True)
class Ran:
    """What a campaign leaves: the bench's outcome, the files written beside the records, what could not be written."""

    outcome: Outcome
    written: tuple[Path, ...]
    problems: tuple[str, ...]


def run_campaign(campaign: Campaign, options: BenchOptions, progress: Progress = silent) -> Ran:
    """Measure the suite's rows into out/records.jsonl, then the crossover, then write the pages.

    options: how to measure; its scenarios are those of the campaign. What is measured already is kept, a crossover on
    the same device too, unless options.fresh. Raises UserError as `bench` does, and for checkpoints that are not there;
    a crossover or a page that fails is a problem in what is returned.
    """
    suite, out = campaign.suite, campaign.out
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    candidates = dummy_candidates(suite, campaign.shape) if campaign.dummy else checkpoint_candidates(suite, out)
    tokens_of = None
    if not campaign.dummy:
        reference = next(one.checkpoint for one in candidates if may_be_reference(one.subject))
        tokens_of = _tokenizer_of(reference.path) if reference else None
    scenarios = suite.scenarios_named(campaign.scenarios, tokens_of)
    outcome = measure(candidates, out / RECORDS_NAME, replace(options, scenarios=scenarios), progress=progress)
    written: list[Path] = []
    problems: list[str] = []
    for step in _steps(campaign, options, outcome) if outcome.usable else []:
        progress(f"writing {step.name}", 0, 0)
        problem = step.take(out, options)
        if problem is None:
            written += [out / name for name in (step.name, *step.also)]
        else:
            problems.append(f"no {step.name}: {problem}")
    return Ran(outcome, tuple(written), tuple(problems))


@dataclass(frozen=True)
class _Step:
    """A command of this project that writes a file, run in a process of its own. keep: a file that is there stands."""

    name: str
    module: tuple[str, ...]
    also: tuple[str, ...] = ()
    keep: bool = False
    timeout_s: float = PAGE_TIMEOUT_S

    def take(self, out: Path, options: BenchOptions) -> str | None:
        """Run it. Returns why there is no file now, None when there is one."""
        if self.keep and (out / self.name).is_file():
            return None
        environment = worker_environment(options.threads)
        command = [sys.executable, "-P", "-m", *self.module]
        ended = run_process(command, timeout_s=self.timeout_s, environment=environment)
        if ended.exit_code == 0 and (out / self.name).is_file():
            return None
        with (out / RECORDS_NAME).with_suffix(".log").open("a", encoding="utf-8") as log:
            log.write(f"--- {self.name}\n{ended.output}\n")
        lines = [line for line in ended.output.splitlines() if line.startswith("error: ")]
        return lines[-1].removeprefix("error: ") if lines else ended.verdict()[1]


def _steps(campaign: Campaign, options: BenchOptions, outcome: Outcome) -> list[_Step]:
    """The crossover first, since the table shows it too."""
    out = str(campaign.out)
    pages = [
        _Step("table.md", ("reports", out, "--out", str(campaign.out / "table.md"))),
        _Step("published.md", ("reports", out, "--published", "--out", str(campaign.out / "published.md"))),
    ]
    if _budget_s(campaign) == 0:
        return pages
    plots = _Step("crossover.png", ("reports", out, "--plots"), also=("crossover.svg",))
    return [_crossover(campaign, options, outcome), *pages, plots]


def _crossover(campaign: Campaign, options: BenchOptions, outcome: Outcome) -> _Step:
    """Where the ways to run a layer of this shape change places, on the device and in the dtype of the records."""
    record, budget_s = outcome.records[0], _budget_s(campaign)
    return _Step(
        CROSSOVER_NAME,
        (
            "bench.crossover",
            *("--shape", campaign.shape or campaign.suite.shape),
            *("--device", record.device),
            *(("--dtype", record.compute_dtype) if record.compute_dtype else ()),
            *("--out", str(campaign.out)),
            *("--budget", f"{budget_s:g}"),
        ),
        keep=not options.fresh and _is_of(campaign.out / CROSSOVER_NAME, record.device, record.compute_dtype),
        timeout_s=60.0 + CROSSOVER_GRACE * budget_s,
    )


def _is_of(crossover: Path, device: str, dtype: str | None) -> bool:
    """Whether this file was measured on the device and in the dtype; False for one that is damaged or not there."""
    try:
        entry = read_crossover(crossover)[0]
    except UserError:
        return False
    return (entry.device, entry.compute_dtype) == (device, dtype)


def _budget_s(campaign: Campaign) -> float:
    return campaign.suite.crossover_s if campaign.crossover_s is None else campaign.crossover_s


def _tokenizer_of(checkpoint: Path) -> TokensOf:
    with quiet_libraries():
        from quantize.model.pretrained import tokenizer_of

        tokenizer = tokenizer_of(checkpoint)
    encode: TokensOf = tokenizer.encode
    return encode
