"""One attempt at a cell, in a process of its own: make and measure what is missing, and write what came of it."""

import os
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench import cli as bench_cli
from bench.run.checks import MeasuredElsewhere
from bench.sweep.cell import Attempt, Cell, contents_of, read_cells, standing
from quantize import cli as quantize_cli
from quantize.errors import UserError
from quantize.progress import Progress

WAIT_S = 24 * 3600.0  # for another copy of the same job, which may live on a node that was given up


def run_cell(out: Path, name: str) -> None:
    """Attempt a cell of the sweep in `out`, and write what came of it. Done before, it is kept."""
    from filelock import FileLock

    cell = next(cell for cell in read_cells(out) if cell.name == name)
    with FileLock(out / name / ".cell.lock", timeout=WAIT_S):
        if standing(out, cell).state == "done":
            return
        number = [os.environ.get(f"SLURM_{part}") for part in ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_ID")]
        job = f"{number[0]}_{number[1]}" if number[0] else number[2]
        attempt = Attempt(cell.name, cell.key, "running", job=job)
        attempt.write(out)
        try:
            amiss = carry_out(cell, out / name)
            ended = replace(attempt, state="done", reason="; ".join(amiss), contents=contents_of(out / name))
        except Exception as error:
            traceback.print_exc()
            known = isinstance(error, UserError)
            ended = replace(attempt, state="failed", reason=str(error) if known else f"{type(error).__name__}: {error}")
        replace(ended, seconds=round(time.time() - attempt.started, 1)).write(out)


def carry_out(cell: Cell, place: Path) -> list[str]:
    """Make a cell's checkpoints and measure them; what is amiss with some of them, a line each."""
    made = quantize_cli.parser().parse_args(["--out", str(place), *cell.options[0]])
    target = ["--suite", cell.suite, "--out", str(place)] if cell.suite else [str(place)]
    measured, amiss = bench_cli.parser().parse_args([*target, *cell.options[1]]), []
    for call in () if measured.dummy else cell.calls:
        try:
            quantize_cli.make(call, made, Progress())
        except UserError as error:
            if cell.suite or not getattr(error, "made", ()):
                raise
            amiss.append(str(error))  # others are made
    measure = partial(bench_cli.measure_suite, base_model=cell.name) if cell.suite else bench_cli.measure_folder
    try:
        outcome, _ = measure(measured)
    except MeasuredElsewhere:  # by an attempt on another kind of machine, whose figures stand in no table with these
        measured.fresh = True
        outcome, _ = measure(measured)
    amiss += bench_cli.outcome_lines(outcome)[:-2]
    if not outcome.usable:
        raise UserError("; ".join(("its reference has no figures", *amiss)))
    return amiss


if __name__ == "__main__":
    from bench.worker.worker import die_with

    die_with(int(sys.argv[3]))
    run_cell(Path(sys.argv[1]), sys.argv[2])
