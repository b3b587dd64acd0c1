"""The command `bench`: parse, call, print."""

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.records.scenario import SCENARIOS, Scenario, scenario_named
from bench.records.stopping import PassRule, RoundsRule, RoundsStopReason
from bench.run.options import DEVICES, DTYPES, BenchOptions
from quantize.errors import UserError
from quantize.progress import progress_bar
from quantize.shell import Parser, called, command, reject, say

if TYPE_CHECKING:
    from bench.run.run import Outcome


def parser() -> Parser:
    """The command line."""
    known = ", ".join(SCENARIOS)
    cli = Parser(
        prog=called("bench"),
        description="Measure memory, latency and perplexity of each checkpoint in DIR against the reference, or a "
        "whole table with --suite.",
    )
    add = cli.add_argument
    seconds: dict[str, Any] = {"metavar": "S", "type": float}
    add("directory", metavar="DIR", type=Path, nargs="?", help="where `quantize --out` put the checkpoints")
    add("--scenario", metavar="NAME", action="append", help=f"what to measure ({known}; default: all); repeatable")
    add("--prompt", metavar="N", type=int, help="a scenario of your own: prompt tokens")
    add("--new", metavar="M", type=int, help="a scenario of your own: new tokens (default 1)")
    add("--batch", metavar="B", type=int, help="a scenario of your own: prompts at once (default 1)")
    add(
        "--rounds",
        type=int,
        help=f"processes for each checkpoint (default {RoundsRule.least}); more follow while the ratios are noisy",
    )
    add(
        "--noise",
        metavar="SHARE",
        type=float,
        help="enough when every ratio's 95%% interval is no wider than this to either side "
        f"(default {RoundsRule.noise:g})",
    )
    add(
        "--max-time",
        **seconds,
        help=f"no further round that would end later than this after the start (default {RoundsRule.max_time_s:g})",
    )
    add("--device", choices=DEVICES, default="auto", help="where to run (default %(default)s)")
    add(
        "--dtype",
        choices=DTYPES,
        help="compute dtype of all runs (default: float32 on a CPU, or bfloat16 where it is clearly faster; "
        "the reference's half dtype on a GPU)",
    )
    add(
        "--kernel",
        metavar="NAME",
        help="what AWQ layers run on: auto (the default), native (what the layout is named after) or a kernel's name",
    )
    add("--records", metavar="FILE", type=Path, help="where the records go (default: DIR/records.jsonl)")
    add("--timeout", **seconds, default=BenchOptions.timeout_s, help="seconds for one process (default %(default)g)")
    add("--threads", metavar="N", type=int, help="CPU threads of each run (default: torch's choice)")
    add("--no-quality", action="store_true", help="no perplexity, no divergence")
    add(
        "--quality-data",
        metavar="FILE",
        help="judge on this text (.txt, .json, .jsonl or hub:NAME) in place of the built-in one",
    )
    add(
        "--tasks",
        metavar="NAMES",
        type=lambda text: tuple(filter(None, text.split(","))),
        default=(),
        help="lm-eval tasks, comma-separated; `medical` stands for those of the model card",
    )
    add("--task-folder", metavar="DIR", type=Path, help="holds lm-eval task files of your own")
    add("--task-limit", metavar="N", type=int, help="questions of each task (default: all)")
    add(
        "--compare",
        metavar=("A.jsonl", "B.jsonl"),
        nargs=2,
        type=Path,
        help="compare two record files of the same checkpoints, and measure nothing",
    )
    add("--fresh", action="store_true", help="set an existing records file aside and measure everything")
    add("--quiet", action="store_true", help="no progress and no remarks: only what came of it, and errors")
    add("--json", action="store_true", help="what came of it as one JSON object")
    suite = cli.add_argument_group("a whole table")
    suite.add_argument("--suite", metavar="NAME", help="biomistral, or a .toml file: its rows in place of DIR")
    suite.add_argument("--out", metavar="DIR", type=Path, help="where all of it goes (default: runs/NAME)")
    suite.add_argument(
        "--dummy", action="store_true", help="random weights in the suite's shape: no checkpoints needed"
    )
    suite.add_argument(
        "--shape", metavar="PATH", help="a config.json whose shape --dummy takes in place of the suite's"
    )
    suite.add_argument(
        "--crossover-time",
        **seconds,
        help="seconds for the crossover of the kernels (default: the suite's; 0: leave it out)",
    )
    return cli


STOPPED: dict[RoundsStopReason, str] = {
    "noise": "every ratio is known well enough (--noise)",
    "time": "the time is used up (--max-time); more would narrow the intervals",
    "rounds": "as many as are ever made",
}


def scenarios_from(arguments: argparse.Namespace) -> list[Scenario]:
    """The scenarios asked for: the named ones, then the user's own; all named ones when none was asked for.

    Raises UserError for an unknown name, or --new or --batch without --prompt.
    """
    wanted = [scenario_named(name) for name in dict.fromkeys(arguments.scenario or [])]
    if arguments.prompt is not None:
        new = 1 if arguments.new is None else arguments.new
        batch = 1 if arguments.batch is None else arguments.batch
        name = f"{arguments.prompt}/{new}" + (f" x{batch}" if batch > 1 else "")
        wanted.append(Scenario(name, prompt_tokens=arguments.prompt, new_tokens=new, batch=batch))
    elif arguments.new is not None or arguments.batch is not None:
        raise UserError("--new and --batch need --prompt: the three make a scenario of your own")
    return wanted or list(SCENARIOS.values())


def outcome_lines(outcome: "Outcome") -> list[str]:
    """What is broken, what failed and why, how many rounds there were, and where the records are."""
    from bench.records.store import read_file

    broken = [f"{name} is broken: {why}" for name, why in outcome.broken.items()]
    reasons = Counter(f"{record.subject.name}: {record.status}: {record.reason}" for record in outcome.failed)
    lines = [f"{reason}" + (f" ({count} runs)" if count > 1 else "") for reason, count in reasons.items()]
    total = len(outcome.records)
    already = f" ({total - outcome.measured} of them measured before)" if outcome.measured < total else ""
    failed = f", {len(outcome.failed)} failed" if outcome.failed else ""
    damage = read_file(outcome.path).damage
    return [
        *broken,
        *lines,
        *([damage] if damage else []),
        f"{outcome.rounds} round{'' if outcome.rounds == 1 else 's'}: {STOPPED[outcome.stopped]}",
        f"{total} record{'' if total == 1 else 's'}{already}{failed}: {outcome.path}",
    ]


def facts_of(outcome: "Outcome") -> dict[str, Any]:
    """What `--json` prints: of a run that failed, its row and kind of work and why."""
    facts = ("kind", "status", "reason")
    return {
        **{"records": str(outcome.path), "measured": outcome.measured, "total": len(outcome.records)},
        **{"rounds": outcome.rounds, "stopped": outcome.stopped, "usable": outcome.usable, "broken": outcome.broken},
        "failed": [{"name": run.subject.name} | {one: getattr(run, one) for one in facts} for run in outcome.failed],
    }


SUITE_ONLY = ("out", "dummy", "shape", "crossover_time")
"""Options that mean something with --suite alone."""

NOT_WITH_SUITE = ("directory", "prompt", "new", "batch", "kernel", "records")
"""What the suite says itself, or --out."""


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; 1 where a run failed or a checkpoint is broken. Raises UserError."""
    if arguments.compare:
        from bench.compare import compare_files

        say(*compare_files(*arguments.compare).lines())
        return 0
    outcome, then = measure_folder(arguments) if arguments.suite is None else measure_suite(arguments)
    if arguments.json:
        print(json.dumps(facts_of(outcome)))
    else:
        say(*outcome_lines(outcome))
        say(*then, quiet=arguments.quiet)
    if not outcome.usable:
        say("the reference has no figures, so that nothing can be compared: see its reason above", to=sys.stderr)
    return 1 if outcome.failed or outcome.broken or not outcome.usable else 0


def measure_folder(arguments: argparse.Namespace) -> tuple["Outcome", list[str]]:
    """Measure the checkpoints of a folder: what came of it, and how to make the table."""
    reject(arguments, SUITE_ONLY, "is of a whole table: name it with --suite, or leave it out")
    directory = arguments.directory
    if directory is None:
        raise UserError("name the folder of the checkpoints: bench DIR")
    options = options_from(arguments, tuple(scenarios_from(arguments)), RoundsRule(), PassRule())
    from bench.records.store import RECORDS_NAME
    from bench.run.run import bench

    with progress_bar(quiet=arguments.quiet) as progress:
        outcome = bench(directory, options, records=arguments.records, progress=progress)
    return outcome, [f"the table: report {directory if outcome.path == directory / RECORDS_NAME else outcome.path}"]


def measure_suite(arguments: argparse.Namespace) -> tuple["Outcome", list[str]]:
    """Measure a whole table: what came of it, why there is no crossover if there is none, how to make the tables."""
    from bench.suite.suite import suite_named
    from bench.suite.suite_run import run_suite

    suite = suite_named(arguments.suite)
    reject(arguments, NOT_WITH_SUITE, "does not go with --suite, which says what to measure: leave one of the two out")
    out = arguments.out or Path("runs") / Path(arguments.suite).stem
    options = options_from(arguments, None, suite.rounds, suite.rule)
    with progress_bar(quiet=arguments.quiet) as progress:
        outcome, problem = run_suite(
            suite,
            out,
            options,
            dummy=arguments.dummy,
            shape=arguments.shape,
            scenarios=arguments.scenario or (),
            crossover_s=arguments.crossover_time,
            progress=progress,
        )
    missing = [f"no crossover: {problem}"] if problem else []
    return outcome, [*missing, f"the tables: report {out} --all"] if outcome.usable else []


ROUNDS_FLAGS = {"least": "--rounds", "noise": "--noise", "max_time_s": "--max-time"}
"""Options that stand for fields of RoundsRule."""


def options_from(
    arguments: argparse.Namespace, scenarios: tuple[Scenario, ...] | None, rounds: RoundsRule, rule: PassRule
) -> BenchOptions:
    """What the command line says, over these rules. Raises UserError for what is out of range."""
    for field, flag in ROUNDS_FLAGS.items():
        value = getattr(arguments, flag.strip("-").replace("-", "_"))
        try:
            rounds = rounds if value is None else replace(rounds, **{field: value})
        except UserError as error:
            raise UserError(str(error).replace(f"rounds.{field}", flag)) from None
    same = ("device", "dtype", "kernel", "threads", "quality_data", "tasks", "task_folder", "task_limit", "fresh")
    given = {name: getattr(arguments, name) for name in same}
    quality, timeout_s = not arguments.no_quality, arguments.timeout
    return BenchOptions(scenarios, rounds, rule, quality=quality, timeout_s=timeout_s, **given)


main = command(parser, run)
