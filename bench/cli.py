"""The command `bench`: parse, call, print."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from bench.records.scenario import SCENARIOS, Mode, Scenario, scenario_named
from bench.records.stopping import PassRule, RoundsRule, RoundsStopReason
from bench.worker.options import DEVICES, DTYPES, BenchOptions
from quantize.errors import UserError
from quantize.progress import progress_bar
from quantize.shell import Parser, called, command, reject, say

if TYPE_CHECKING:
    from bench.run.run import Outcome


def parser() -> Parser:
    about = "Measure memory, latency and perplexity of each checkpoint in DIR against the reference."
    cli = Parser(prog=called("bench"), description=f"{about} Or a whole table with --suite.")
    add = cli.add_argument
    whole: dict[str, Any] = {"type": int}
    seconds: dict[str, Any] = {"type": float, "metavar": "S"}
    least, noise, max_time_s = RoundsRule.least, RoundsRule.noise, RoundsRule.max_time_s
    named = f"what to measure ({', '.join(SCENARIOS)}; default: all); repeatable"
    place = "where `quantize --out` put the checkpoints, or one of another maker: its folder, or its hub id"
    add("directory", metavar="DIR", type=Path, nargs="?", help=place)
    add("--reference", metavar="MODEL", help="base model of another maker's checkpoint (default: as its card says)")
    add("--scenario", metavar="NAME", action="append", help=named)
    add("--prompt", metavar="N", **whole, help="a scenario of your own: prompt tokens")
    add("--new", metavar="M", **whole, help="a scenario of your own: new tokens (default 1)")
    add("--batch", metavar="B", **whole, help="a scenario of your own: prompts at once (default 1)")
    mode = "a scenario of your own: how to decode (default eager; graph on a GPU, compiled on a CPU); repeatable"
    add("--mode", choices=get_args(Mode), action="append", help=mode)
    add("--rounds", **whole, help=f"processes for each checkpoint, at least (default {least}; more where it is noisy)")
    width = f"enough when every ratio's 95%% interval reaches no further than this (default {noise:g})"
    add("--noise", metavar="SHARE", type=float, help=width)
    add("--max-time", **seconds, help=f"no further round that would end later than this (default {max_time_s:g})")
    add("--device", choices=DEVICES, default="auto", help="where to run (default %(default)s)")
    dtype = "compute dtype of all runs (default: float32 on a CPU, or bfloat16 where it is clearly faster; "
    add("--dtype", choices=DTYPES, help=f"{dtype}the reference's half dtype on a GPU)")
    kernel = "what AWQ layers run on: auto (the default), native (what the layout is named after) or a kernel's name"
    add("--kernel", metavar="NAME", help=kernel)
    engine = "run them in another engine, in its own environment's interpreter; repeatable, in turn, quantable for ours"
    add("--engine", dest="engines", metavar="NAME=PYTHON", action="append", help=engine)
    add("--records", metavar="FILE", type=Path, help="where the records go (default: DIR/records.jsonl)")
    timeout = f"seconds for one process (default {BenchOptions.timeout_s:g})"
    add("--timeout", dest="timeout_s", **seconds, default=BenchOptions.timeout_s, help=timeout)
    add("--threads", metavar="N", **whole, help="CPU threads of each run (default: torch's choice)")
    add("--no-speed", dest="speed", action="store_false", help="no latency, no peak: only what it loses")
    add("--no-quality", dest="quality", action="store_false", help="no perplexity, no divergence")
    text = "judge on this text (.txt, .json, .jsonl or hub:NAME) in place of the built-in one"
    add("--quality-data", metavar="FILE", help=text)
    tasks = "lm-eval tasks, comma-separated; `medical` stands for those of the model card"
    add("--tasks", metavar="NAMES", type=lambda names: tuple(filter(None, names.split(","))), default=(), help=tasks)
    add("--task-folder", metavar="DIR", help="holds lm-eval task files of your own")
    add("--task-limit", metavar="N", **whole, help="questions of each task (default: all)")
    add("--fresh", action="store_true", help="set an existing records file aside and measure everything")
    add("--quiet", action="store_true", help="no progress and no remarks: only what came of it, and errors")
    add("--json", action="store_true", help="what came of it as one JSON object")
    add = cli.add_argument_group("a whole table").add_argument
    add("--suite", metavar="NAME", help="biomistral, or a .toml file: its rows in place of DIR")
    add("--out", metavar="DIR", type=Path, help="where all of it goes (default: runs/NAME)")
    add("--dummy", action="store_true", help="random weights in the suite's shape: no checkpoints needed")
    add("--shape", metavar="PATH", help="a config.json whose shape --dummy takes in place of the suite's")
    return cli


STOPPED: dict[RoundsStopReason, str] = {
    "noise": "every ratio is known well enough (--noise)",
    "time": "the time is used up (--max-time); more would narrow the intervals",
    "rounds": "as many as are ever made",
}


def scenarios_from(arguments: argparse.Namespace) -> list[Scenario]:
    """The scenarios asked for, or all named ones. Raises UserError for unknown names, and --new or --batch alone."""
    wanted = [scenario_named(name) for name in dict.fromkeys(arguments.scenario or [])]
    if arguments.prompt is not None:
        new, batch = (1 if one is None else one for one in (arguments.new, arguments.batch))
        name = f"{arguments.prompt}/{new}" + (f" x{batch}" if batch > 1 else "")
        for mode in dict.fromkeys(arguments.mode or ["eager"]):
            called = name if mode == "eager" else f"{name}, {mode}"
            wanted.append(Scenario(called, prompt_tokens=arguments.prompt, new_tokens=new, batch=batch, mode=mode))
    elif arguments.new is not None or arguments.batch is not None or arguments.mode is not None:
        raise UserError("--new, --batch and --mode need --prompt: they make a scenario of your own")
    return wanted or list(SCENARIOS.values())


def outcome_lines(outcome: "Outcome") -> list[str]:
    """What is broken, what failed and why, how many rounds there were, and where the records are."""
    from bench.records.store import read_file

    broken = [f"{name} is broken: {why}" for name, why in outcome.broken.items()]
    reasons = Counter(f"{record.subject.name}: {record.status}: {record.reason}" for record in outcome.failed)
    lines = [reason + f" ({count} runs)" * (count > 1) for reason, count in reasons.items()]
    total = len(outcome.records)
    already = f" ({total - outcome.measured} of them measured before)" if outcome.measured < total else ""
    failed = f", {len(outcome.failed)} failed" if outcome.failed else ""
    rounds = f"{outcome.rounds} round{'s' * (outcome.rounds != 1)}: {STOPPED[outcome.stopped]}"
    found = f"{total} record{'s' * (total != 1)}{already}{failed}: {outcome.path}"
    return [*broken, *lines, *filter(None, [read_file(outcome.path).damage]), rounds, found]


def facts_of(outcome: "Outcome") -> dict[str, Any]:
    """What `--json` prints: of a run that failed, its row and kind of work and why."""
    facts = ("kind", "status", "reason")
    return {
        **{"records": str(outcome.path), "measured": outcome.measured, "total": len(outcome.records)},
        **{"rounds": outcome.rounds, "stopped": outcome.stopped, "usable": outcome.usable, "broken": outcome.broken},
        "failed": [{"name": run.subject.name} | {one: getattr(run, one) for one in facts} for run in outcome.failed],
    }


def run(arguments: argparse.Namespace, closing: Callable[[Path], str] | None = None) -> int:
    """Do what the command line says; 1 where something failed or is broken. closing: said of its path at the end."""
    outcome, then = measure_folder(arguments) if arguments.suite is None else measure_suite(arguments)
    if arguments.json:
        print(json.dumps(facts_of(outcome)))
    else:
        say(*outcome_lines(outcome))
        if closing and outcome.usable:
            say("", *closing(outcome.path).splitlines(), "")
        say(*then, quiet=arguments.quiet)
    if not outcome.usable:
        say("the reference has no figures, so that nothing can be compared: see its reason above", to=sys.stderr)
    return 1 if outcome.failed or outcome.broken or not outcome.usable else 0


def measure_folder(arguments: argparse.Namespace) -> tuple["Outcome", list[str]]:
    """Measure the checkpoints of a folder: what came of it, and how to make the table."""
    suite_only = ("out", "dummy", "shape")
    reject(arguments, suite_only, "is of a whole table: name it with --suite, or leave it out")
    directory = arguments.directory
    if directory is None:
        raise UserError("name the folder of the checkpoints: bench DIR")
    options = options_from(arguments, tuple(scenarios_from(arguments)) * arguments.speed, RoundsRule(), PassRule())
    from bench.records.store import RECORDS_NAME
    from bench.run.run import bench

    with progress_bar(quiet=arguments.quiet) as progress:
        outcome = bench(directory, options, records=arguments.records, reference=arguments.reference, progress=progress)
    return outcome, [f"the table: report {directory if outcome.path == directory / RECORDS_NAME else outcome.path}"]


def measure_suite(arguments: argparse.Namespace, base_model: str | None = None) -> tuple["Outcome", list[str]]:
    """Measure a whole table, or one model's part: what came of it, and how to make the tables."""
    from bench.suite.suite import suite_named
    from bench.suite.suite_run import run_suite

    suite = suite_named(arguments.suite, base_model)
    said_by_suite = ("directory", "prompt", "new", "batch", "mode", "kernel", "records", "reference", "engines")
    reject(arguments, said_by_suite, "does not go with --suite, which says what to measure: leave one of the two out")
    out = arguments.out or Path("runs") / Path(arguments.suite).stem
    options = options_from(arguments, None, suite.rounds, suite.rule)
    what = {"dummy": arguments.dummy, "shape": arguments.shape, "scenarios": arguments.scenario or ()}
    with progress_bar(quiet=arguments.quiet) as progress:
        outcome = run_suite(suite, out, options, **what, progress=progress)
    return outcome, [f"the tables: report {out} --all"] if outcome.usable else []


def options_from(
    arguments: argparse.Namespace, scenarios: tuple[Scenario, ...] | None, rounds: RoundsRule, rule: PassRule
) -> BenchOptions:
    """What the command line says, over these rules. Raises UserError for what is out of range."""
    for field, flag in (("least", "--rounds"), ("noise", "--noise"), ("max_time_s", "--max-time")):
        value = getattr(arguments, flag.strip("-").replace("-", "_"))
        try:
            rounds = rounds if value is None else replace(rounds, **{field: value})
        except UserError as error:
            raise UserError(str(error).replace(f"rounds.{field}", flag)) from None
    given = {name: value for name, value in vars(arguments).items() if name in BenchOptions.__dataclass_fields__}
    engines = tuple(arguments.engines or ())
    return BenchOptions(**given | {"scenarios": scenarios, "rounds": rounds, "rule": rule, "engines": engines})


def main(argv: Sequence[str] | None = None, closing: Callable[[Path], str] | None = None) -> int:
    """Run the command; return its exit code. closing: as `run` takes it."""
    return command(parser, lambda given: run(given, closing))(argv)
