"""What an engine offers, and the loop that measures it in its own interpreter: imports the standard library alone.

PYTHON -m bench.engines.NAME REQUEST.json RESULT.jsonl
"""

import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from bench.worker.memory import memory_view


class Engine(Protocol):
    """A model loaded by an engine, one sequence at a time.

    version: of the engine's package; computes: in what, and what else of its choices counts, for the row.
    """

    version: str
    computes: str

    def prefill(self, tokens: list[int]) -> None:
        """Run a prompt into an empty cache; the first new token is chosen when it returns."""

    def step(self) -> None:
        """Decode one more token, the likeliest."""

    def log_probabilities(self, tokens: list[int]) -> Any:
        """What it expects behind each token but the last: float32 [n - 1, vocabulary], natural logarithms.

        Or float32 [n - 1], of the tokens that came, from an engine that gives no more.
        """


Start = Callable[[str, str, int], Engine]
"""(folder, compute dtype, positions) -> the loaded model."""


def serve(start: Start) -> int:
    """Do what REQUEST.json asks and append a line for each piece of work to RESULT.jsonl as it is done."""
    request_path, result_path = map(Path, sys.argv[1:])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    view = memory_view("cpu")
    view.reset_peak()
    engine = start(request["folder"], request["dtype"], request["positions"])
    loaded = {"load_peak_bytes": view.peak_bytes(), "baseline_bytes": view.current_bytes()}

    def emit(scenario: int | None, measure: Callable[[], dict[str, Any]]) -> None:
        view.reset_peak()
        started = time.perf_counter()
        figures, wall_s = measure(), time.perf_counter() - started
        known = {"version": engine.version, "computes": engine.computes, "text_sha256": request["text_sha256"]}
        memory = {**loaded, "run_peak_bytes": view.peak_bytes()}
        with result_path.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"scenario": scenario, "wall_s": wall_s, **known, **memory, **figures}) + "\n")

    for one in request["scenarios"]:
        emit(one["number"], partial(latency, engine, one["prompts"], one["decode_steps"], request["rule"]))
    if request["blocks"]:
        emit(None, partial(quality, engine, request["blocks"], request["expected"], keep=request["keep"]))
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


def quality(engine: Engine, blocks: list[list[int]], expected: str | None, *, keep: bool) -> dict[str, Any]:
    """Perplexity over the blocks, and where whole rows are given the divergence from those in `expected`, a .npy file.

    keep: write that file, float16 [tokens, vocabulary], instead of reading it. The sums are those of
    bench.worker.quality.
    """
    import numpy as np

    loss, tokens, vocabulary, rows = 0.0, 0, None, list[Any]()
    kept = None if keep or expected is None or not Path(expected).is_file() else np.load(expected, mmap_mode="r")
    divergences, flips = list[Any](), 0
    for block, own in zip(blocks, map(engine.log_probabilities, blocks), strict=True):
        came = own if own.ndim == 1 else own[np.arange(len(own)), block[1:]]
        loss -= float(came.astype(np.float64).sum())
        if own.ndim == 2:
            vocabulary = own.shape[1]
            if keep:
                rows.append(own.astype(np.float16))
            elif kept is not None:
                reference = kept[tokens : tokens + len(own)].astype(np.float32)
                reference -= np.log(np.exp(reference).sum(-1, keepdims=True))
                chances = np.exp(reference)
                terms = np.where(chances > 0, chances * (reference - own), 0)
                divergences.append(terms.sum(-1, dtype=np.float64))
                choice = reference[np.arange(len(own)), own.argmax(-1)]
                flips += int((choice < reference.max(-1)).sum())
        tokens += len(own)
    if not math.isfinite(loss):
        raise FloatingPointError("its output is not finite (NaN or infinity)")
    if keep and rows and expected is not None:
        Path(expected).parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(expected).with_suffix(".partial.npy")
        np.save(unfinished, np.concatenate(rows))
        unfinished.replace(expected)
    found: dict[str, Any] = {"perplexity": math.exp(loss / tokens), "tokens": tokens, "vocabulary": vocabulary}
    if divergences:
        each = np.concatenate(divergences)
        median, p99 = (float(np.quantile(each, share)) for share in (0.5, 0.99))
        found["divergence"] = {"mean": float(each.mean()), "median": median, "p99": p99, "flips": flips / len(each)}
    return found
