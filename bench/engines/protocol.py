"""What an engine offers, and the loop that measures it in its own interpreter: imports the standard library alone.

PYTHON -m bench.engines NAME REQUEST.json RESULT.jsonl
"""

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bench.worker.memory import memory_view

EXPECTED_NAME = "expected.npy"  # beside RESULT.jsonl, what `write_expected` leaves
UNSUPPORTED = 69  # what the process ends with where an engine is not installed or reads no such checkpoint


class Engine(Protocol):
    """A model loaded by an engine, one sequence at a time.

    version: of the engine's package; computes: in what, and what else of its choices counts, for the row.
    An engine with a tokenizer of its own has `ids_of`, (text) -> ids without first tokens."""

    version: str
    computes: str

    def prefill(self, tokens: list[int]) -> None:
        """Run a prompt into an empty cache; the first new token is chosen when it returns."""

    def step(self) -> None:
        """Decode one more token, the likeliest."""

    def log_probabilities(self, tokens: list[int]) -> Any:
        """What it expects behind each token but the last: float32 [n - 1, vocabulary], natural logarithms."""


class Asked(NamedTuple):
    """What an engine is started for.

    folder:    of the checkpoint; dtype: to compute in; chosen: whether the user asked for that one, else an engine may
    compute in what it takes by itself; positions: the most tokens of a sequence."""

    folder: str
    dtype: str
    chosen: bool
    positions: int


Start = Callable[[Asked], Engine]  # what each module of bench.engines has by the name `start`


def serve() -> int:
    """Load the model, do what REQUEST.json asks, and append a line to RESULT.jsonl as each piece of work is done."""
    name, request_path, result_path = sys.argv[1], *map(Path, sys.argv[2:])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    view = memory_view("cpu")
    view.reset_peak()
    try:
        start: Start = importlib.import_module(f"bench.engines.{name}").start
        engine = start(Asked(*(request[field] for field in Asked._fields)))
    except Exception as error:  # of whatever library: the last line is the reason of the row
        traceback.print_exception(error)
        reason = " ".join(str(error).split())
        refused = isinstance(error, ImportError | NotImplementedError)
        if isinstance(error, ModuleNotFoundError):
            reason += f": give --engine {name}=PATH/bin/python of an environment that has it"
        print(reason if refused else f"{type(error).__name__}: {reason}")
        return UNSUPPORTED if refused else 1
    computes, (text, ids) = engine.computes, request["spelling"]
    if text and (own := getattr(engine, "ids_of", None)) is not None and own(text) != ids:
        computes += ", its tokenizer gives other ids"
    loaded = {"load_peak_bytes": view.peak_bytes(), "baseline_bytes": view.current_bytes()}

    def emit(scenario: int | None, measure: Callable[[], dict[str, Any]]) -> None:
        view.reset_peak()
        started = time.perf_counter()
        figures, wall_s = measure(), time.perf_counter() - started
        known = {"version": engine.version, "computes": computes}
        memory = {**loaded, "run_peak_bytes": view.peak_bytes()}
        with result_path.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"scenario": scenario, "wall_s": wall_s, **known, **memory, **figures}) + "\n")

    for one in request["scenarios"]:
        emit(one["number"], partial(latency, engine, one["prompts"], one["decode_steps"], request["rule"]))
    if request["blocks"]:
        emit(None, partial(write_expected, engine, request["blocks"], result_path.with_name(EXPECTED_NAME)))
    return 0


def latency(engine: Engine, prompts: list[list[int]], decode_steps: int, rule: dict[str, Any]) -> dict[str, Any]:
    """Passes over all prompts after two that warm it up: seconds of each prompt and step, until the rule has enough."""
    prefill_s, decode_s, warmup_s = list[list[float]](), list[list[float]](), list[float]()
    spent_s = 0.0
    while spent_s < rule["max_time_s"] or len(prefill_s) < rule["min_passes"]:
        began, prompts_s, steps_s = time.perf_counter(), list[float](), list[float]()
        for prompt in prompts:
            prompts_s.append(_timed(partial(engine.prefill, prompt)))
            steps_s += [_timed(engine.step) for _ in range(decode_steps)]
        if len(warmup_s) < 2:
            warmup_s.append(time.perf_counter() - began)
            continue
        spent_s += time.perf_counter() - began
        prefill_s.append(prompts_s)
        decode_s.append(steps_s)
    return {"prefill_s": prefill_s, "decode_s": decode_s, "warmup_s": warmup_s}


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def log_softmax(logits: Any) -> Any:
    """Of a numpy array [n, vocabulary], along its rows."""
    import numpy as np

    moved = logits - logits.max(-1, keepdims=True)
    return moved - np.log(np.exp(moved).sum(-1, keepdims=True))


def write_expected(engine: Engine, blocks: list[list[int]], path: Path) -> dict[str, Any]:
    """What it expects behind each token but a block's last: a .npy file of float16 [tokens, vocabulary], 1e-5 off."""
    import numpy as np

    with path.open("wb") as file:  # written, not mapped, which would count as the engine's memory
        for number, block in enumerate(blocks):
            rows = engine.log_probabilities(block)
            if number == 0:
                shape = (sum(len(one) - 1 for one in blocks), rows.shape[1])
                np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
            file.write(rows.astype(np.float16).tobytes())
    return {}
