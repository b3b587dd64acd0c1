"""Our figures beside optimum-benchmark's: the same weights in float32, the same prompt and new tokens, on the CPU.

`python -m bench.lab.optimum_benchmark --theirs PYTHON --model FOLDER --out DIR`. PYTHON is the interpreter of an
environment that holds optimum-benchmark, which wants another transformers than we do. Each contender runs in a process
of its own, round after round in alternating order; every sample goes to DIR/side_by_side.jsonl, of which `report`
makes the table.
"""

import argparse
import inspect
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.records.environment import Environment
from bench.records.lab import SideBySideRecord
from bench.records.record import latency_records
from bench.records.store import append, read_only, read_records
from bench.run.executor import run_module, run_process, worker_environment
from bench.worker.machine import cpu_model_name, usable_cores
from quantize.checkpoint import MANIFEST_NAME, Checkpoint, find_checkpoints, open_checkpoint, verify
from quantize.errors import UserError
from quantize.schema import to_data
from quantize.shell import guarded
from quantize.variant import REFERENCE

RESULTS_NAME = "side_by_side.jsonl"
TIMEOUT_S = 1800.0
"""For one process."""


@dataclass(frozen=True)
class Shape:
    """What is measured, and the other tool's two ends of its timing: passes, and seconds it goes on for at least."""

    prompt: int
    new: int
    iterations: int
    duration_s: int
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt, self.iterations) < 1 or self.new < 2 or self.duration_s < 0:
            raise UserError("--prompt and --iterations must be at least 1, --new at least 2, --duration at least 0")


OURS, THEIRS, ASLEEP = "quantable", "optimum-benchmark", "optimum-benchmark, wait asleep"
CONTENDERS = (OURS, THEIRS, ASLEEP)
"""optimum-benchmark as it comes, and with one thing changed from outside: its launcher sleeps while it waits."""

Outcome = dict[str, Any]
"""The fields of a SideBySideRecord that one process gives."""

Work = Callable[[dict[str, Any]], dict[str, Any]]
"""A function of this kind runs in another interpreter: what it uses it imports itself, or PROGRAM does."""

PROGRAM = """import json, sys, time
from pathlib import Path
from typing import Any

{source}
if __name__ == "__main__":
    request, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps({name}(json.loads(request.read_text())), default=float))
"""


def run_bench(checkpoint: Checkpoint, shape: Shape) -> Outcome:
    """Our whole command, as one types it, on a folder with this checkpoint alone: one round, no perplexity."""
    with tempfile.TemporaryDirectory(prefix="quantable-") as name:
        folder, records = Path(name) / "checkpoints", Path(name) / "records.jsonl"
        folder.mkdir()
        (folder / checkpoint.path.name).symlink_to(checkpoint.path.resolve(), target_is_directory=True)
        arguments = [str(folder), "--records", str(records), "--no-quality", "--device", "cpu", "--dtype", "float32"]
        arguments += ["--prompt", str(shape.prompt), "--new", str(shape.new), "--rounds", "1"]
        start = time.perf_counter()
        ended = run_module("bench", *arguments, timeout_s=TIMEOUT_S)
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


def run_theirs(python: Path, model: Path, shape: Shape, *, asleep: bool) -> Outcome:
    """One run of optimum-benchmark in its interpreter, whatever becomes of it."""
    wall_s, result = run_inside(python, launched, {"model": str(model), **asdict(shape), "asleep": asleep})
    if isinstance(result, str):
        return {"wall_s": wall_s, "reason": result}
    prefill_s = tuple(result["latency"]["prefill"]["values"])
    outcome = {"wall_s": wall_s, "prefill_s": prefill_s, "raw": result}
    try:
        per_token_s = result["latency"]["per_token"]["values"]
        return {**outcome, "decode_s": steps_of(per_token_s, passes=len(prefill_s), new=shape.new)}
    except ValueError as error:
        return {**outcome, "reason": str(error)}


def steps_of(per_token_s: Sequence[float], *, passes: int, new: int) -> tuple[tuple[float, ...], ...]:
    """The decode steps of each pass, out of the `per_token` values of optimum-benchmark 0.6.0.

    It keeps one list of times for all passes of a session and, after each pass, appends the gaps between all times so
    far: the first pass stands there `passes` times, and each seam between two passes counts as a token that took a
    whole prompt pass. The gaps appended last hold every pass once; without the seams they are the steps. A list that
    has each step once is taken as it is. Raises ValueError for a list of another length.
    """
    if len(per_token_s) == passes * (new - 1):
        return tuple(tuple(per_token_s[one * (new - 1) : (one + 1) * (new - 1)]) for one in range(passes))
    if len(per_token_s) != sum(one * new - 1 for one in range(1, passes + 1)):
        raise ValueError(f"{len(per_token_s)} per-token values for {passes} passes of {new} tokens: another version?")
    last = per_token_s[len(per_token_s) - (passes * new - 1) :]
    return tuple(tuple(last[one * new : one * new + new - 1]) for one in range(passes))


def side_by_side(arguments: argparse.Namespace) -> list[SideBySideRecord]:
    """Run all contenders in alternating order and append a record of each run.

    Raises UserError before anything runs for bad input or an interpreter without optimum-benchmark, and at the end
    where we or they have no figures.
    """
    shape = Shape(arguments.prompt, arguments.new, arguments.iterations, arguments.duration)
    if arguments.rounds < 1:
        raise UserError("--rounds must be at least 1")
    checkpoint = reference_in(arguments.model)
    verify(checkpoint)  # this also brings the files into memory, for the first contender as for the others
    theirs = interpreter(arguments.theirs)
    our_environment = environment_of(Path(sys.executable), theirs=False)
    their_environment = environment_of(theirs, theirs=True)
    path = arguments.out / RESULTS_NAME
    first = next_round(path)
    records: list[SideBySideRecord] = []
    with tempfile.TemporaryDirectory(prefix="quantable-") as folder:
        copy = readable_copy(checkpoint, Path(folder) / checkpoint.path.name)
        for number in range(first, first + arguments.rounds):
            for contender in CONTENDERS if number % 2 == 0 else reversed(CONTENDERS):  # so that drift treats all alike
                if contender == OURS:
                    outcome = run_bench(checkpoint, shape)
                else:
                    outcome = run_theirs(theirs, copy, shape, asleep=contender == ASLEEP)
                record = SideBySideRecord(
                    when=datetime.now(UTC).isoformat(timespec="seconds"),
                    contender=contender,
                    round=number,
                    model=checkpoint.path.name,
                    content_sha256=checkpoint.content_sha256,
                    **asdict(shape),
                    environment=our_environment if contender == OURS else their_environment,
                    **outcome,
                )
                append(path, record)
                records.append(record)
                how = record.reason or f"{record.wall_s:.1f} s"
                print(f"round {number + 1}: {contender}: {how}", file=sys.stderr, flush=True)
    print(f"the table: report {path}")
    for name in (OURS, THEIRS):
        if all(one.reason for one in records if one.contender == name):
            raise UserError(f"{name} has no figures, so that nothing can be compared: see its reason in {path}")
    return records


def next_round(path: Path) -> int:
    """The first round after those in a record file, so that rounds of two calls are never taken for one."""
    return max((one.round + 1 for one in read_only(path, SideBySideRecord)), default=0) if path.exists() else 0


def reference_in(folder: Path) -> Checkpoint:
    """The half-precision checkpoint that this folder is or holds. Raises UserError when there is none, or several."""
    found = [open_checkpoint(folder)] if (folder / MANIFEST_NAME).is_file() else find_checkpoints(folder)
    references = [checkpoint for checkpoint in found if checkpoint.variant == REFERENCE]
    if not references:
        make = f"`quantize SOURCE --variant {REFERENCE.name} --out {folder}`"
        raise UserError(f"{folder} holds no half-precision checkpoint: make one with {make}")
    if len(references) > 1:
        names = ", ".join(checkpoint.path.name for checkpoint in references)
        raise UserError(f"{folder} holds several half-precision checkpoints ({names}): give --model one of them")
    return references[0]


def interpreter(named: str) -> Path:
    """The interpreter, absolute; links are kept, for they lead to its environment. Raises UserError for none."""
    found = shutil.which(named)
    if found is None:
        raise UserError(f"no interpreter {named}: give --theirs the python of an environment with optimum-benchmark")
    return Path(found).absolute()


def environment_of(python: Path, *, theirs: bool) -> Environment:
    """What an interpreter measures with, and the machine. Raises UserError when it lacks what it needs."""
    modules = ["transformers.generation", "transformers.models.auto.modeling_auto"]
    if theirs:
        inside = ("backends.pytorch.backend", "scenarios.inference.scenario", "launchers.process.launcher")
        modules = [f"optimum_benchmark.{module}" for module in inside] + modules
    _, found = run_inside(python, facts, {"modules": modules})
    if isinstance(found, str):
        needed = "optimum-benchmark" if theirs else "quantable[models]"
        raise UserError(f"{python} cannot import {needed} ({found}): install it there")
    return Environment(cpu=cpu_model_name(), cpu_cores=usable_cores(), **found)


def readable_copy(checkpoint: Checkpoint, folder: Path) -> Path:
    """A folder of links to the checkpoint's files, its config.json such that an older transformers reads it too.

    transformers 5 writes `rope_parameters`; version 4 looks for `rope_theta` beside it, and takes a default without.
    """
    folder.mkdir()
    for file in checkpoint.path.resolve().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    config = {**({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}), **config}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="side_by_side", description=__doc__)
    p.add_argument("--theirs", metavar="PYTHON", required=True, help="interpreter that can import optimum_benchmark")
    checkpoint = "a half-precision checkpoint, or the folder it is in"
    p.add_argument("--model", metavar="FOLDER", type=Path, required=True, help=checkpoint)
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help=f"where {RESULTS_NAME} goes")
    p.add_argument("--prompt", metavar="N", type=int, default=256, help="prompt tokens (default %(default)s)")
    p.add_argument("--new", metavar="M", type=int, default=16, help="new tokens (default %(default)s)")
    p.add_argument("--iterations", type=int, default=3, help="passes it times at least (default %(default)s)")
    at_least = "seconds it times at least (default: its own, %(default)s)"
    p.add_argument("--duration", metavar="S", type=int, default=10, help=at_least)
    p.add_argument("--rounds", type=int, default=3, help="processes of each contender (default %(default)s)")
    return p


# What runs in the other interpreter: the sources of these functions, without the rest.


def launched(request: dict[str, Any]) -> dict[str, Any]:
    """optimum-benchmark through its Python interface; everything not named here has its default.

    Its process launcher polls without a pause until the measuring process is done. With `asleep` the same call waits in
    the kernel; nothing else differs. launcher_cpu_s: processor seconds of this process, which only waits.
    """
    from multiprocessing.connection import Connection

    import optimum_benchmark as theirs  # type: ignore[import-not-found]

    if request["asleep"]:
        poll = Connection.poll
        Connection.poll = lambda self, timeout=0.2: poll(self, timeout)  # type: ignore[method-assign]
    new = request["new"]
    config = theirs.BenchmarkConfig(
        name="side_by_side",
        launcher=theirs.ProcessConfig(),
        backend=theirs.PyTorchConfig(
            model=request["model"], device="cpu", torch_dtype="float32", task="text-generation", seed=request["seed"]
        ),
        scenario=theirs.InferenceConfig(
            latency=True,
            memory=False,
            iterations=request["iterations"],
            duration=request["duration_s"],
            input_shapes={"batch_size": 1, "sequence_length": request["prompt"]},
            generate_kwargs={"max_new_tokens": new, "min_new_tokens": new},
        ),
    )
    before_s = time.process_time()
    report = theirs.Benchmark.launch(config).to_dict()
    latencies = {name: target["latency"] for name, target in report.items() if target["latency"]}
    return {"launcher_cpu_s": time.process_time() - before_s, "latency": latencies}


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """Versions and threads of this interpreter, once it has imported what the contenders import."""
    import importlib
    import importlib.metadata
    import platform

    import torch

    for module in request["modules"]:
        importlib.import_module(module)
    names = ("torch", "transformers", "optimum-benchmark", "datasets", "accelerate", "tokenizers", "numpy")
    installed = {one.metadata["Name"].replace("_", "-"): one.version for one in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "libraries": {name: installed[name] for name in names if name in installed},
    }


def program_of(work: Work) -> str:
    """The text of a program that does this work, from a request file to a result file, without our packages."""
    return PROGRAM.format(source=inspect.getsource(work), name=work.__name__)


def run_inside(python: Path, work: Work, request: Mapping[str, Any]) -> tuple[float, dict[str, Any] | str]:
    """Do this work in a fresh process of that interpreter: its wall seconds, and its result or why there is none.

    The environment is our workers' (offline, quiet), but our packages are not on its path.
    """
    environment = {name: value for name, value in worker_environment(None).items() if name != "PYTHONPATH"}
    environment.update(LOG_TO_FILE="0", LOG_LEVEL="WARNING")
    with tempfile.TemporaryDirectory(prefix="quantable-") as folder:
        program, asked, result = (Path(folder) / name for name in ("program.py", "request.json", "result.json"))
        program.write_text(program_of(work), encoding="utf-8")
        asked.write_text(json.dumps(request), encoding="utf-8")
        start = time.perf_counter()
        command = [str(python), str(program), str(asked), str(result)]
        ended = run_process(command, timeout_s=TIMEOUT_S, environment=environment)
        wall_s = time.perf_counter() - start
        return wall_s, json.loads(result.read_text(encoding="utf-8")) if result.is_file() else ended.verdict()[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return its exit code: 0, or 2 for bad input or a tool without figures."""
    return guarded("side_by_side", lambda: side_by_side(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
