"""The command `sweep`: many models, each with its variants and its reference, on many devices."""

import argparse
import json
import shlex
import sys
from collections import Counter
from pathlib import Path

from bench.sweep.cell import SWEEP_NAME, Attempt, cells_from, read_cells, standing
from bench.sweep.local import devices, run_local
from quantize.errors import UserError
from quantize.files import only_writer, write_whole
from quantize.schema import to_data
from quantize.shell import Parser, command, say, tell


def parser() -> Parser:
    about = "Quantize and measure many models, one at a time on each device. What is finished is kept."
    cli = Parser(prog="quantable sweep", description=about, epilog="then `report DIR`: a row a model, and its page")
    add = cli.add_argument
    add("models", nargs="*", metavar="SUITE|MODEL", help="a suite, or what `quantize` takes; none: those of before")
    add("--out", type=Path, required=True, metavar="DIR", help="a folder a model, and how each stands")
    add("--on", choices=("local", "slurm"), default="local", help="local: a process a GPU; slurm: a job a model")
    add("--status", action="store_true", help="only say what is done, runs, waits or failed, and why")
    add("--variant", action="append", metavar="NAME[,NAME]", help="of models (default all); the reference comes along")
    add("--merge", action="store_true", help="of a suite: make its merged models instead of downloading them")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute; cuda: a GPU a Slurm job")
    add("--quantize", metavar="OPTIONS", default="", help="options of `quantize`: --quantize='--blocks 96'")
    add("--bench", metavar="OPTIONS", default="", help="options of `bench`: --bench='--rounds 5 --no-quality'")
    add("--timeout", type=float, default=1440.0, metavar="MIN", help="minutes for one model (default %(default)g)")
    add("--slurm", action="append", default=[], metavar="NAME=VALUE", help="of sbatch: partition=gpu, mem=64G, qos=low")
    add("--json", action="store_true", help="how each stands as one JSON list")
    return cli


def run(given: argparse.Namespace) -> int:
    """Do what the command line says; 1 where a model failed."""
    out = given.out.resolve()
    if not given.status:
        with only_writer(out / ".sweep.lock", f"another `sweep` works in {out}: wait for it, or ask --status"):
            _carry_on(given, out)
    found = _standings(out)
    counts = Counter(one.state for one in found)
    lines = [*(one.line() for one in found), ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))]
    tell(found, lines, as_json=given.json)
    return int(counts["failed"] > 0)


def _carry_on(given: argparse.Namespace, out: Path) -> None:
    """Begin what waits and what failed of the models that are named, or of all."""
    slurm = dict(one.partition("=")[::2] for one in given.slurm)
    if not given.timeout > 0 or not all(slurm.values()):
        raise UserError("--timeout must be more than 0 minutes, and --slurm be NAME=VALUE")
    before = read_cells(out) if (out / SWEEP_NAME).exists() or not given.models else ()
    cells = before
    if given.models:
        from bench.cli import parser as bench_parser
        from quantize.cli import parser as quantize_parser

        device = ("--device", given.device)
        words = (*device, *shlex.split(given.quantize)), (*device, *shlex.split(given.bench))
        for options, some in zip((quantize_parser(), bench_parser()), words, strict=True):
            options.parse_args(["--out", str(out), *some])  # what is wrong with them is said before anything runs
        variants = [name for value in given.variant or ["all"] for name in value.split(",") if name]
        cells = cells_from(given.models, variants, given.merge, words)
        names = {cell.name for cell in cells}
        every = (*(cell for cell in before if cell.name not in names), *cells)
        write_whole(out / SWEEP_NAME, json.dumps(to_data(every), indent=1).encode())
    states = {one.name: one for one in _standings(out)}
    queued = {name for name, one in states.items() if one.job and one.state in ("waiting", "running")}
    left = [cell for cell in cells if states[cell.name].state != "done" and cell.name not in queued]
    if given.on == "local":
        run_local(out, left, devices(given.device), given.timeout * 60, lambda one: say(one.line(), to=sys.stderr))
    elif left:
        from bench.sweep.slurm import submit

        submit(out, left, max(1, round(given.timeout)), given.device == "cuda", slurm)


def _standings(out: Path) -> list[Attempt]:
    """How every cell of the sweep stands; Slurm is asked where it was given some."""
    cells = read_cells(out)
    found = [standing(out, cell) for cell in cells]
    if any(one.job and one.state in ("waiting", "running") for one in found):
        from bench.sweep.slurm import queue

        queued = queue()
        found = [standing(out, cell, queued) for cell in cells]
    return found


main = command(parser, run)
