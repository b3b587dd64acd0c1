"""Our figures beside optimum-benchmark's: the same weights in float32, the same prompt and new tokens, on the CPU.

`python -m tests.lab.optimum_benchmark --theirs PYTHON --model CHECKPOINT --out DIR`. PYTHON is the interpreter of an
environment that holds optimum-benchmark, which wants another transformers than we do. Each contender runs in a process
of its own, round after round in alternating order; every sample goes to DIR/side_by_side.jsonl, of which
`python -m tests.lab.pages` makes the table.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records.environment import Environment
from bench.records.record import latency_records
from bench.records.store import append, read_records
from bench.run.executor import run_module, run_process, worker_environment
from bench.worker.machine import fingerprint
from quantize.checkpoint import Checkpoint, open_checkpoint, verify
from quantize.errors import UserError
from quantize.schema import to_data
from quantize.shell import guarded
from quantize.variant import REFERENCE
from tests.lab.records import SideBySideRecord, read_lab

RESULTS_NAME = "side_by_side.jsonl"
PROGRAM = Path(__file__).with_name("theirs.py")
TIMEOUT_S = 1800.0  # of one process

OURS, THEIRS, ASLEEP = "quantable", "optimum-benchmark", "optimum-benchmark, wait asleep"
CONTENDERS = (OURS, THEIRS, ASLEEP)
"""optimum-benchmark as it comes, and with one thing changed from outside: its launcher sleeps while it waits."""

Outcome = dict[str, Any]
"""The fields of a SideBySideRecord that one process gives."""


def run_bench(checkpoint: Checkpoint, prompt: int, new: int) -> Outcome:
    """Our whole command, as one types it, on a folder with this checkpoint alone: one round, no perplexity."""
    with tempfile.TemporaryDirectory(prefix="quantable-") as name:
        folder, records = Path(name) / "checkpoints", Path(name) / "records.jsonl"
        folder.mkdir()
        (folder / checkpoint.path.name).symlink_to(checkpoint.path.resolve(), target_is_directory=True)
        options = ["--records", str(records), "--no-quality", "--device", "cpu", "--dtype", "float32", "--rounds", "1"]
        work = ["--prompt", str(prompt), "--new", str(new)]
        start = time.perf_counter()
        ended = run_module("bench", str(folder), *options, *work, timeout_s=TIMEOUT_S)
        wall_s = time.perf_counter() - start
        found = read_records(records) if records.is_file() else []
    measured = [record.latency for record in latency_records(found) if record.latency is not None]
    failed = next((record.reason for record in found if record.reason), None)
    return {
        "wall_s": wall_s,
        "prefill_s": tuple(seconds for latency in measured for seconds in latency.prefill_s),
        "decode_s": tuple(steps for latency in measured for steps in latency.decode_s),
        "raw": {"records": to_data(found)},
        "reason": None if measured else failed or ended.verdict()[1],
    }


def run_theirs(python: Path, request: Mapping[str, Any]) -> Outcome:
    """One run of optimum-benchmark in its interpreter (tests.lab.theirs), whatever becomes of it."""
    wall_s, result = run_inside(python, request)
    if isinstance(result, str):
        return {"wall_s": wall_s, "reason": result}
    prefill_s = tuple(result["latency"]["prefill"]["values"])
    outcome = {"wall_s": wall_s, "prefill_s": prefill_s, "raw": result}
    try:
        steps = steps_of(result["latency"]["per_token"]["values"], passes=len(prefill_s), new=request["new"])
        return {**outcome, "decode_s": steps}
    except ValueError as error:
        return {**outcome, "reason": str(error)}


def run_inside(python: Path, request: Mapping[str, Any]) -> tuple[float, dict[str, Any] | str]:
    """PROGRAM in a fresh process of that interpreter: its wall seconds, and its result or why there is none.

    The environment is our workers' (offline, quiet), but our packages are not on its path.
    """
    environment = {name: value for name, value in worker_environment(None).items() if name != "PYTHONPATH"}
    environment.update(LOG_TO_FILE="0", LOG_LEVEL="WARNING")
    with tempfile.TemporaryDirectory(prefix="quantable-") as folder:
        asked, result = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        start = time.perf_counter()
        command = [str(python), "-P", str(PROGRAM), str(asked), str(result)]
        ended = run_process(command, timeout_s=TIMEOUT_S, environment=environment)
        wall_s = time.perf_counter() - start
        return wall_s, json.loads(result.read_text(encoding="utf-8")) if result.is_file() else ended.verdict()[1]


def steps_of(per_token_s: Sequence[float], *, passes: int, new: int) -> tuple[tuple[float, ...], ...]:
    """The decode steps of each pass, out of the `per_token` values of optimum-benchmark 0.6.0.

    It keeps one list of times for all passes of a session and, after each pass, appends the gaps between all times so
    far: the first pass stands there `passes` times, and each seam between two passes counts as a token that took a
    whole prompt pass. The gaps appended last hold every pass once; without the seams they are the steps. Raises
    ValueError for a list of another length.
    """
    if len(per_token_s) != sum(one * new - 1 for one in range(1, passes + 1)):
        raise ValueError(f"{len(per_token_s)} per-token values for {passes} passes of {new} tokens: another version?")
    last = per_token_s[len(per_token_s) - (passes * new - 1) :]
    return tuple(tuple(last[start : start + new - 1]) for start in range(0, passes * new, new))


def side_by_side(arguments: argparse.Namespace) -> None:
    """Run all contenders in alternating order and append a record of each run.

    Raises UserError before anything runs for bad input or an interpreter without optimum-benchmark, and at the end
    where we or they have no figures.
    """
    shape = {name: getattr(arguments, name) for name in ("prompt", "new", "iterations", "duration_s")} | {"seed": 0}
    if min(arguments.prompt, arguments.iterations, arguments.rounds, arguments.new - 1, arguments.duration_s + 1) < 1:
        raise UserError("--prompt, --iterations and --rounds must be at least 1, --new 2 and --duration 0")
    checkpoint = open_checkpoint(arguments.model)
    if checkpoint.variant != REFERENCE:
        raise UserError(f"{arguments.model} is quantized: give --model the checkpoint of --variant {REFERENCE.name}")
    verify(checkpoint)  # this also brings the files into memory, for the first contender as for the others
    ours = fingerprint("cpu")
    python, found = interpreter(arguments.theirs)
    theirs = Environment(cpu=ours.cpu, cpu_cores=ours.cpu_cores, **found)
    path = arguments.out / RESULTS_NAME
    old = read_lab(path, SideBySideRecord) if path.exists() else []
    first = max((one.round + 1 for one in old), default=0)  # rounds of two calls are never taken for one
    known = {**shape, "model": checkpoint.path.name, "content_sha256": checkpoint.content_sha256}
    without = {OURS, THEIRS}
    with tempfile.TemporaryDirectory(prefix="quantable-") as folder:
        copy = readable_copy(checkpoint, Path(folder) / checkpoint.path.name)
        for number in range(first, first + arguments.rounds):
            for contender in CONTENDERS if number % 2 == 0 else reversed(CONTENDERS):  # so that drift treats all alike
                if contender == OURS:
                    outcome = run_bench(checkpoint, arguments.prompt, arguments.new)
                else:
                    outcome = run_theirs(python, {"model": str(copy), **shape, "asleep": contender == ASLEEP})
                when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                facts = {**known, **outcome, "environment": ours if contender == OURS else theirs}
                record = SideBySideRecord(when, contender, number, **facts)
                append(path, record)
                without -= set() if record.reason else {contender}
                how = record.reason or f"{record.wall_s:.1f} s"
                print(f"round {number + 1}: {contender}: {how}", file=sys.stderr, flush=True)
    print(f"the table: python -m tests.lab.pages {path}")
    if without:
        names = " and ".join(sorted(without))
        raise UserError(f"no figures of {names}, so that nothing can be compared: see the reason in {path}")


def interpreter(named: str) -> tuple[Path, dict[str, Any]]:
    """The interpreter, absolute, and what it measures with. Raises UserError for none, or none with optimum-benchmark.

    Links are kept, for they lead to its environment.
    """
    found = shutil.which(named)
    if found is None:
        raise UserError(f"no interpreter {named}: give --theirs the python of an environment with optimum-benchmark")
    _, facts = run_inside(python := Path(found).absolute(), {})
    if isinstance(facts, str):
        raise UserError(f"{python} cannot import optimum-benchmark ({facts}): install it there")
    return python, facts


def readable_copy(checkpoint: Checkpoint, folder: Path) -> Path:
    """A folder of links to the checkpoint's files, its config.json such that an older transformers reads it too.

    transformers 5 writes `rope_parameters`; version 4 looks for `rope_theta` beside it, and takes a default without.
    """
    folder.mkdir()
    for file in checkpoint.path.resolve().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    if (base := (config.get("rope_parameters") or {}).get("rope_theta")) is not None:
        config.setdefault("rope_theta", base)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return its exit code: 0, or 2 for bad input or a tool without figures."""
    cli = argparse.ArgumentParser(prog="side_by_side", description=__doc__)
    add = cli.add_argument
    add("--theirs", metavar="PYTHON", required=True, help="interpreter that can import optimum_benchmark")
    add("--model", metavar="CHECKPOINT", type=Path, required=True, help="a half-precision checkpoint")
    add("--out", metavar="DIR", type=Path, required=True, help=f"where {RESULTS_NAME} goes")
    add("--prompt", metavar="N", type=int, default=256, help="prompt tokens (default %(default)s)")
    add("--new", metavar="M", type=int, default=16, help="new tokens (default %(default)s)")
    add("--iterations", type=int, default=3, help="passes it times at least (default %(default)s)")
    add(
        "--duration",
        metavar="S",
        dest="duration_s",
        type=int,
        default=10,
        help="seconds at least (default: its own, 10)",
    )
    add("--rounds", type=int, default=3, help="processes of each contender (default %(default)s)")
    return guarded("side_by_side", lambda: side_by_side(cli.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
