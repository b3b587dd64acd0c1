"""A race of AWQ quantizers in one run: the same model, the same calibration tokens, one process each.

`python -m bench.lab.race --out runs/race` appends a record of each to race.jsonl: seconds, peak memory, perplexity and
KL divergence. `report runs/race/race.jsonl` makes the table.
"""

import argparse
import json
import sys
from collections.abc import Container, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.records.lab import RaceRecord
from bench.records.store import append
from bench.run.executor import run_process, worker_environment
from quantize.cli import guarded
from quantize.errors import UserError

RACE_NAME = "race.jsonl"
TIMEOUT_S = 3 * 3600.0
"""For one contender."""


def parser() -> argparse.ArgumentParser:
    """The command line of the race."""
    p = argparse.ArgumentParser(prog="race", description=__doc__)
    p.add_argument("--source", default="smollm2-135m")
    p.add_argument("--out", type=Path, default=Path("runs/race"), help="folder for the results (default %(default)s)")
    p.add_argument("--blocks", type=int, default=48)
    p.add_argument("--block-tokens", type=int, default=256)
    p.add_argument("--group-size", type=int, default=64)
    p.add_argument("--contender", action="append", help="run only these (repeatable); default: all that can run")
    p.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds for one contender (default %(default)g)")
    p.add_argument(
        "--keep", action="store_true", help="do not run who left layers in --out before, only evaluate them again"
    )
    p.add_argument(
        "--other", type=Path, help="a .txt file of another kind of text; default: the licences installed here"
    )
    return p


def race(arguments: argparse.Namespace) -> list[RaceRecord]:
    """Run the contenders in turn, ours between the others, each evaluated on the same text; append their records."""
    from bench.lab.quantizers import CONTENDERS, OURS, Task
    from quantize.quiet import quiet_libraries

    names = arguments.contender or list(CONTENDERS)
    if not arguments.timeout > 0:
        raise UserError("--timeout must be above 0 seconds")
    for name in names:
        if name not in CONTENDERS:
            raise UserError(f"unknown contender {name!r}; there are: {', '.join(CONTENDERS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        from safetensors.torch import load_file, save_file
        from torch import equal

        from bench.lab.evaluate import Evaluation

        evaluation = Evaluation.prepare(arguments.source, arguments.blocks, arguments.block_tokens, arguments.other)
        blocks = arguments.out / "blocks.safetensors"
        if arguments.keep and blocks.is_file() and not equal(load_file(blocks)["blocks"], evaluation.blocks):
            raise UserError(f"{arguments.out} was raced on other calibration tokens: leave --keep out")
        save_file({"blocks": evaluation.blocks}, blocks)
    records: list[RaceRecord] = []
    for name in names if arguments.keep else turns(names, OURS):
        stem = arguments.out / name.replace(", ", "-").replace(" ", "-")
        task = asdict(Task(str(evaluation.folder), str(blocks), f"{stem}.safetensors", arguments.group_size))
        done = (kept(task, stem) if arguments.keep else None) or run_contender(name, task, stem, arguments.timeout)
        record = replace(evaluation.record(name), **done)
        if record.reason is None:
            with quiet_libraries():
                record = replace(record, **evaluation.figures(Path(task["out"]), arguments.group_size))
        records.append(record)
        append(arguments.out / RACE_NAME, record)
        print(f"{name}: {record.reason or f'{record.seconds:.1f} s'}", flush=True)
    print(f"the table: report {arguments.out / RACE_NAME}")
    return records


def turns(names: Sequence[str], ours: Container[str]) -> list[str]:
    """Who runs when: ours first and again after each of the others, which take long enough for the machine to change.

    The table takes the medians.
    """
    own = [name for name in names if name in ours]
    others = [[name, *own] for name in names if name not in ours]
    return own + [name for turn in others for name in turn]


def run_contender(name: str, task: dict[str, Any], stem: Path, timeout_s: float) -> dict[str, Any]:
    """One contender in a process of its own: its seconds and peak_bytes, or the reason why there are none.

    What it prints goes to a log file.
    """
    request_path = stem.with_suffix(".request.json")
    request_path.write_text(json.dumps(task))
    command = [sys.executable, "-P", "-m", "bench.lab.quantizers", name, str(request_path)]
    ended = run_process(command, timeout_s=timeout_s, environment=worker_environment(None))
    stem.with_suffix(".log").write_text(ended.output)
    return _quantized(stem) if ended.exit_code == 0 else {"reason": ended.verdict()[1]}


def kept(task: dict[str, Any], stem: Path) -> dict[str, Any] | None:
    """What a contender that was asked the same did before; None where it left nothing."""
    try:
        before = json.loads(stem.with_suffix(".request.json").read_text())
        return _quantized(stem) if before == task and Path(task["out"]).is_file() else None
    except (OSError, ValueError):
        return None


def _quantized(stem: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stem.with_suffix(".json").read_text())
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the race; return its exit code."""
    return guarded("race", lambda: race(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
