"""Our figures beside optimum-benchmark's: the same weights in float32, the same prompt and new tokens, on the CPU.

`python -m bench.lab.optimum_benchmark --theirs PYTHON --model FOLDER --out DIR`. PYTHON is the interpreter of an
environment that holds optimum-benchmark, which wants another transformers than we do. Each contender runs in a process
of its own, round after round in alternating order; every sample goes to DIR/side_by_side.jsonl.
"""

import argparse
import inspect
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.records.environment import cpu_model_name, usable_cores
from bench.records.ratio import Ratio, ratio_of
from bench.records.record import latency_records, read_records
from bench.run.executor import run_process, worker_environment
from quantize.checkpoint import MANIFEST_NAME, Checkpoint, find_checkpoints, open_checkpoint, verify
from quantize.cli import guarded
from quantize.errors import UserError
from quantize.variant import REFERENCE

SCHEMA_VERSION = 1
RESULTS_NAME = "side_by_side.jsonl"
TIMEOUT_S = 1800.0
TOLERANCE = 0.05
"""Prefill and decode agree when neither is more than this share away from the other tool's."""

WALL_SHARE = 0.5
"""How much of the other tool's wall time ours may take."""


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


@dataclass(frozen=True)
class Contender:
    """One row. work: which of WORKS it does, in our interpreter or in theirs; options: what is special about it."""

    name: str
    theirs: bool
    work: str
    options: Mapping[str, Any] = field(default_factory=dict)


OURS = Contender("quantable", False, "quantable")
THEIRS = Contender("optimum-benchmark", True, "launched", {"launcher": "process"})
ASLEEP = Contender("optimum-benchmark, wait asleep", True, "launched", {"launcher": "process", "asleep": True})
CONTENDERS = (OURS, THEIRS, ASLEEP)
"""optimum-benchmark as it comes, and with one thing changed from outside: its launcher sleeps while it waits."""

WHY = (
    Contender("optimum-benchmark, inline", True, "launched", {"launcher": "inline"}),
    Contender("generate, our libraries", False, "bare"),
    Contender("generate, their libraries", True, "bare"),
    Contender("generate, theirs, beside a busy loop", True, "bare", {"busy": True}),
)
"""What tells the reasons of a difference apart: its launcher, the libraries, a core that something else keeps busy."""


@dataclass(frozen=True)
class Run:
    """One process's outcome.

    wall_s: of the whole process, start and imports included; prefill_s: seconds of each prompt pass; decode_s: for each
    pass the seconds of each decode step; raw: what the tool itself reports, in its own words. reason: why there are no
    figures, else None.
    """

    contender: str
    round: int
    wall_s: float
    prefill_s: tuple[float, ...] = ()
    decode_s: tuple[tuple[float, ...], ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None

    @property
    def steps_s(self) -> list[float]:
        """Every decode step of every pass."""
        return [step for steps in self.decode_s for step in steps]


# What runs in another interpreter: the sources of the next four functions, without the rest of this file.


def launched(request: dict[str, Any]) -> dict[str, Any]:
    """optimum-benchmark through its Python interface; everything not named here has its default.

    Its process launcher polls without a pause until the measuring process is done. With `asleep` the same call waits in
    the kernel; nothing else differs. launcher_cpu_s: processor seconds of this process, which only waits.
    """
    from multiprocessing.connection import Connection

    from optimum_benchmark import (  # type: ignore[import-not-found]
        Benchmark,
        BenchmarkConfig,
        InferenceConfig,
        InlineConfig,
        ProcessConfig,
        PyTorchConfig,
    )

    if request.get("asleep"):
        poll = Connection.poll
        Connection.poll = lambda self, timeout=0.2: poll(self, timeout)  # type: ignore[method-assign]
    new = request["new"]
    config = BenchmarkConfig(
        name="side_by_side",
        launcher=InlineConfig() if request["launcher"] == "inline" else ProcessConfig(),
        backend=PyTorchConfig(
            model=request["model"], device="cpu", torch_dtype="float32", task="text-generation", seed=request["seed"]
        ),
        scenario=InferenceConfig(
            latency=True,
            memory=False,
            iterations=request["iterations"],
            duration=request["duration_s"],
            input_shapes={"batch_size": 1, "sequence_length": request["prompt"]},
            generate_kwargs={"max_new_tokens": new, "min_new_tokens": new},
        ),
    )
    before_s = time.process_time()
    report = Benchmark.launch(config).to_dict()
    latencies = {name: target["latency"] for name, target in report.items() if target["latency"]}
    return {"launcher_cpu_s": time.process_time() - before_s, "latency": latencies}


def bare(request: dict[str, Any]) -> dict[str, Any]:
    """`model.generate` as optimum-benchmark calls it, in this process, with nothing around it.

    busy: beside a process that keeps one core busy all along, as a launcher that polls does.
    """
    import torch
    from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

    marks: list[float] = []

    class Mark(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            marks.append(time.perf_counter())
            return scores

    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    ).eval()
    drawn = torch.Generator().manual_seed(request["seed"])
    prompt = torch.randint(0, model.config.vocab_size, (1, request["prompt"]), generator=drawn)
    new, prefill_s, decode_s = request["new"], [], []
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if request.get("busy") else None
    try:
        for number in range(2 + request["iterations"]):
            marks.clear()
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=False,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    logits_processor=LogitsProcessorList([Mark()]),
                )
            if number >= 2:
                prefill_s.append(marks[0] - start)
                decode_s.append([end - begin for begin, end in itertools.pairwise(marks)])
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()
    return {"prefill_s": prefill_s, "decode_s": decode_s}


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


def answer(work: Callable[[dict[str, Any]], dict[str, Any]], paths: list[str]) -> None:
    """Do what the request file asks and write the result file."""
    request_path, result_path = paths
    result = work(json.loads(Path(request_path).read_text()))
    Path(result_path).write_text(json.dumps(result, default=float))


WORKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"launched": launched, "bare": bare, "facts": facts}


def script_of(work: str) -> str:
    """The text of a program that does one of WORKS and needs none of our packages."""
    imports = (
        "import itertools, json, subprocess, sys, time\nfrom pathlib import Path\nfrom typing import Any, Callable\n"
    )
    sources = "\n\n".join(inspect.getsource(function) for function in (WORKS[work], answer))
    return f"{imports}\n\n{sources}\n\nif __name__ == '__main__':\n    answer({work}, sys.argv[1:])\n"


def run_inside(python: Path | str, work: str, request: Mapping[str, Any]) -> tuple[float, dict[str, Any] | str]:
    """Run one of WORKS in a fresh process of that interpreter: its wall seconds, and its result or why there is none.

    The environment is our workers' (offline, quiet), but our packages are not on its path.
    """
    environment = {name: value for name, value in worker_environment(None).items() if name != "PYTHONPATH"}
    environment.update(LOG_TO_FILE="0", LOG_LEVEL="WARNING")
    with tempfile.TemporaryDirectory(prefix="quantable-") as folder:
        script, asked, result = (Path(folder) / name for name in ("script.py", "request.json", "result.json"))
        script.write_text(script_of(work), encoding="utf-8")
        asked.write_text(json.dumps(dict(request)), encoding="utf-8")
        start = time.perf_counter()
        ended = run_process(
            [str(python), str(script), str(asked), str(result)], timeout_s=TIMEOUT_S, environment=environment
        )
        wall_s = time.perf_counter() - start
        if result.is_file():
            return wall_s, json.loads(result.read_text(encoding="utf-8"))
    return wall_s, ended.verdict()[1]


def run_bench(checkpoint: Checkpoint, shape: Shape, number: int) -> Run:
    """Our whole command, as one types it, on a folder with this checkpoint alone: one round, no perplexity."""
    with tempfile.TemporaryDirectory(prefix="quantable-") as name:
        folder, records = Path(name) / "checkpoints", Path(name) / "records.jsonl"
        folder.mkdir()
        (folder / checkpoint.path.name).symlink_to(checkpoint.path.resolve(), target_is_directory=True)
        command = [sys.executable, "-P", "-m", "bench", str(folder), "--records", str(records), "--no-quality"]
        command += ["--prompt", str(shape.prompt), "--new", str(shape.new), "--rounds", "1"]
        command += ["--device", "cpu", "--dtype", "float32"]
        start = time.perf_counter()
        ended = run_process(command, timeout_s=TIMEOUT_S, environment=worker_environment(None))
        wall_s = time.perf_counter() - start
        found = read_records(records) if records.is_file() else []
    measured = [record.latency for record in latency_records(found) if record.latency is not None]
    prefill_s = tuple(seconds for latency in measured for seconds in latency.prefill_s)
    decode_s = tuple(steps for latency in measured for steps in latency.decode_s)
    raw = {"records": [asdict(record) for record in found]}
    failed = next((record.reason for record in found if record.reason), None)
    reason = None if measured else failed or ended.verdict()[1]
    return Run(OURS.name, number, wall_s, prefill_s, decode_s, raw, reason)


def carry_out(contender: Contender, python: Path, model: Path, shape: Shape, number: int) -> Run:
    """One run of a contender in an interpreter, whatever becomes of it."""
    request = {"model": str(model), **asdict(shape), **contender.options}
    wall_s, result = run_inside(python, contender.work, request)
    if isinstance(result, str):
        return Run(contender.name, number, wall_s, reason=result)
    if contender.work == "bare":
        prefill_s, decode_s = tuple(result["prefill_s"]), tuple(tuple(steps) for steps in result["decode_s"])
        return Run(contender.name, number, wall_s, prefill_s, decode_s)
    latency = result["latency"]
    prefill_s = tuple(latency["prefill"]["values"])
    try:
        decode_s = steps_of(latency["per_token"]["values"], passes=len(prefill_s), new=shape.new)
    except ValueError as error:
        return Run(contender.name, number, wall_s, prefill_s, raw=result, reason=str(error))
    return Run(contender.name, number, wall_s, prefill_s, decode_s, result)


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


def side_by_side(arguments: argparse.Namespace) -> list[Run]:
    """Run all contenders in alternating order, keep every sample, print the table.

    Raises UserError before anything runs for bad input or an interpreter without optimum-benchmark, and at the end
    where we or they have no figures.
    """
    shape = Shape(arguments.prompt, arguments.new, arguments.iterations, arguments.duration)
    if arguments.rounds < 1:
        raise UserError("--rounds must be at least 1")
    checkpoint = reference_in(arguments.model)
    verify(checkpoint)  # this also brings the files into memory, for the first contender as for the others
    theirs = interpreter(arguments.theirs)
    environments = {
        python: environment_of(python, theirs=python == theirs) for python in (Path(sys.executable), theirs)
    }
    contenders = CONTENDERS + (WHY if arguments.why else ())
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="quantable-") as folder:
        copy = readable_copy(checkpoint, Path(folder) / checkpoint.path.name)
        for number in range(arguments.rounds):
            for contender in order(contenders, number):
                python = theirs if contender.theirs else Path(sys.executable)
                if contender == OURS:
                    run = run_bench(checkpoint, shape, number)
                else:
                    run = carry_out(contender, python, copy if contender.theirs else checkpoint.path, shape, number)
                runs.append(run)
                about = {"model": checkpoint.path.name, "content_sha256": checkpoint.content_sha256, **asdict(shape)}
                append_run(arguments.out / RESULTS_NAME, run, {**about, "environment": environments[python]})
                print(f"round {number + 1}: {contender.name}, {run.wall_s:.1f} s", file=sys.stderr, flush=True)
    print("\n".join([*table(runs), *findings(runs)]))
    for name in (OURS.name, THEIRS.name):
        if not good(runs, name):
            raise UserError(f"{name} has no figures, so that nothing can be compared: see its reason above")
    return runs


def order(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """The contenders as a round runs them: every other round backwards, so that drift treats all alike."""
    return list(contenders) if number % 2 == 0 else list(reversed(contenders))


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


def environment_of(python: Path, *, theirs: bool) -> dict[str, Any]:
    """What an interpreter measures with, and the machine. Raises UserError when it lacks what it needs."""
    modules = ["transformers.generation", "transformers.models.auto.modeling_auto"]
    if theirs:
        inside = ("backends.pytorch.backend", "scenarios.inference.scenario", "launchers.process.launcher")
        modules = [f"optimum_benchmark.{module}" for module in inside] + modules
    _, found = run_inside(python, "facts", {"modules": modules})
    if isinstance(found, str):
        needed = "optimum-benchmark" if theirs else "quantable[models]"
        raise UserError(f"{python} cannot import {needed} ({found}): install it there")
    return {"cpu": cpu_model_name(), "cpu_cores": usable_cores(), **found}


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


def append_run(path: Path, run: Run, about: Mapping[str, Any]) -> None:
    """One JSON line: the run with every sample, what was run, and on what."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    line = {"schema_version": SCHEMA_VERSION, "when": when, **asdict(run), **about}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def good(runs: Sequence[Run], name: str) -> list[Run]:
    """The runs of a contender that have figures, in the order of the rounds."""
    return [run for run in runs if run.contender == name and run.reason is None]


FIGURES: dict[str, Callable[[Run], list[float]]] = {
    "prefill": lambda run: list(run.prefill_s),
    "decode": lambda run: run.steps_s,
    "wall": lambda run: [run.wall_s],
}
"""The samples of each compared figure, by its name: seconds a prompt pass, a decoded token, the whole process."""


def ours_over(runs: Sequence[Run], name: str, figure: str) -> Ratio | None:
    """Our seconds over a contender's, round by round (each round's median); None where no round has both."""
    samples = FIGURES[figure]
    mine, other = ({run.round: samples(run) for run in good(runs, one)} for one in (OURS.name, name))
    both = sorted(mine.keys() & other.keys())
    if not both:
        return None
    return ratio_of([statistics.median(mine[one]) for one in both], [statistics.median(other[one]) for one in both])


def table(runs: Sequence[Run]) -> list[str]:
    """A line a contender: the median of all its samples, and our ratio to it with the spread over the rounds."""
    names = list(dict.fromkeys(contender.name for contender in CONTENDERS + WHY))
    titles = ("prefill s", "decode s/token", "wall s")
    lines = [f"{'':38}" + "".join(f"{title:>14}  {'ours / it':18}" for title in titles)]
    for name in (name for name in names if any(run.contender == name for run in runs)):
        ran = good(runs, name)
        if not ran:
            reason = next(run.reason for run in runs if run.contender == name)
            lines.append(f"{name:38}could not run: {reason}")
            continue
        cells = []
        for figure, samples in FIGURES.items():
            middle = statistics.median(sample for run in ran for sample in samples(run))
            ratio = None if name == OURS.name else ours_over(runs, name, figure)
            shown = f"{ratio.value:.3f} ({ratio.spread[0]:.2f}-{ratio.spread[1]:.2f})" if ratio else ""
            cells.append(f"{middle:14.4f}  {shown:18}")
        lines.append((f"{name:38}" + "".join(cells)).rstrip())
    return lines


def findings(runs: Sequence[Run]) -> list[str]:
    """In words: whether we are within the tolerance of each, how long we take, and what its own report is made of."""
    lines = []
    for name in (THEIRS.name, ASLEEP.name):
        for figure in ("prefill", "decode"):
            if ratio := ours_over(runs, name, figure):
                agree = 1 - TOLERANCE <= ratio.value <= 1 + TOLERANCE
                lines.append(f"{figure}: {'' if agree else 'not '}within {TOLERANCE:.0%} of {name} ({ratio.value:.3f})")
        if ratio := ours_over(runs, name, "wall"):
            agree = ratio.value <= WALL_SHARE
            lines.append(f"wall: {'' if agree else 'not '}at most {WALL_SHARE:g} of {name} ({ratio.value:.3f})")
        if ran := good(runs, name):
            cpu_s = statistics.median(run.raw["launcher_cpu_s"] for run in ran)
            lines.append(f"{name}: its launching process used {cpu_s:.1f} processor seconds while it only waited")
            latency = ran[-1].raw["latency"]
            per_token, steps = latency["per_token"], ran[-1].steps_s
            lines.append(
                f"{name}: its own per_token says p50 {per_token['p50']:.4f}, mean {per_token['mean']:.4f} s from "
                f"{per_token['count']} values; the {len(steps)} decode steps behind them have "
                f"median {statistics.median(steps):.4f}, mean {statistics.mean(steps):.4f} s"
            )
    return lines


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="side_by_side", description=__doc__)
    p.add_argument("--theirs", metavar="PYTHON", required=True, help="interpreter that can import optimum_benchmark")
    p.add_argument(
        "--model",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="a half-precision checkpoint, or the folder it is in",
    )
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help=f"where {RESULTS_NAME} goes")
    p.add_argument("--prompt", metavar="N", type=int, default=256, help="prompt tokens (default %(default)s)")
    p.add_argument("--new", metavar="M", type=int, default=16, help="new tokens (default %(default)s)")
    p.add_argument("--iterations", type=int, default=3, help="passes it times at least (default %(default)s)")
    p.add_argument(
        "--duration",
        metavar="S",
        type=int,
        default=10,
        help="seconds it times at least (default: its own, %(default)s)",
    )
    p.add_argument("--rounds", type=int, default=3, help="processes of each contender (default %(default)s)")
    p.add_argument("--why", action="store_true", help="also what tells the reasons of a difference apart")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return its exit code: 0, or 2 for bad input or a tool without figures."""
    return guarded("side_by_side", lambda: side_by_side(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
