"""One process, one model: load it, measure it, write records. The only file of bench that measures a row.

python -m bench.worker REQUEST.json RESULT.jsonl
"""

import ctypes
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.records.gpu_state import GpuExtremes, GpuStates
from bench.records.record import Kernels, Memory, Record, Status
from bench.records.scenario import Scenario
from bench.records.store import append
from bench.worker.clock import Clock, clock_for
from bench.worker.gpu import Nvml, cuda_uuid, open_nvml
from bench.worker.memory import MemoryView, memory_view
from bench.worker.request import Request, Work
from quantize.errors import UserError
from quantize.quiet import quiet_libraries

REASON_CHARACTERS = 300
NO_MEMORY_WORDS = (
    *("can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory"),
    *("std::bad_alloc", "memoryerror"),
)
"""What an error, or a process that dies without a record, says in lower case where memory ran out."""

Load = Callable[..., Any]
Emit = Callable[[Record], None]


@dataclass(frozen=True)
class Bench:
    """A loaded checkpoint on its bench: the model and the instruments."""

    loaded: Any
    clock: Clock[Any]
    view: MemoryView
    nvml: Nvml | None
    weights_bytes: int
    baseline_bytes: int | None
    load_peak_bytes: int | None
    decode_bytes: int | None


def work(request: Request, emit: Emit, *, load: Load | None = None) -> None:
    """Load the model and emit one record a scenario, one of quality, one of tasks, failures included.

    load: replaces quantize.load in tests. A failure to load is a record for everything asked for.
    """
    started_at, start = _now(), time.perf_counter()
    try:
        bench = _load(request, load)
    except Exception as error:
        status, reason = failure(error, request.run.target.checkpoint)
        wall_s = time.perf_counter() - start
        for asked in request.run.works:
            emit(request.record(status, asked, started_at=started_at, wall_s=wall_s, reason=reason))
        return
    for asked in request.run.works:
        emit(_measured(request, bench, asked))


def _load(request: Request, load: Load | None) -> Bench:
    import torch

    from quantize.loading.footprint import decode_bytes, weights_bytes

    if request.settings.threads is not None:
        torch.set_num_threads(request.settings.threads)
    device_type = torch.device(request.settings.device).type
    view = memory_view(device_type)
    view.reset_peak()
    loaded = _loaded(request, getattr(torch, request.compute_dtype), load)
    load_peak_bytes = view.peak_bytes()
    view.reset_peak()
    spread = loaded.placement is not None  # weights that wait in RAM are not in the model between two passes
    return Bench(
        loaded=loaded,
        clock=clock_for(device_type),
        view=view,
        nvml=open_nvml(cuda_uuid()) if device_type == "cuda" else None,
        weights_bytes=loaded.weights_bytes if spread else weights_bytes(loaded.model),
        baseline_bytes=view.current_bytes(),
        load_peak_bytes=load_peak_bytes,
        decode_bytes=None if spread else decode_bytes(loaded.model),
    )


def _loaded(request: Request, dtype: Any, load: Load | None) -> Any:
    """The model that the request names: a checkpoint, or random weights drawn here."""
    target = request.run.target
    how: dict[str, Any] = {"device": request.settings.device, "compute_dtype": dtype, "kernel": target.subject.kernel}
    if target.dummy is not None:
        from quantize.loader import load_dummy

        asked = target.dummy
        return load_dummy(asked.spec, asked.variant, group_size=asked.group_size, **how)
    assert target.checkpoint is not None
    if load is None:
        from quantize.loader import load as load_checkpoint

        load = load_checkpoint
    return load(target.checkpoint, **how)


def _measured(request: Request, bench: Bench, asked: Work) -> Record:
    """The record of one scenario, of quality, or of tasks."""
    started_at, start = _now(), time.perf_counter()
    kind, scenario = asked
    figures: dict[str, Any] = {
        "kernels": Kernels(bench.loaded.prefill_kernel, bench.loaded.decode_kernel),
        "quantization": quantization_of(bench.loaded.model),
        "placement": bench.loaded.placement,
    }
    between = GpuExtremes()

    def sample() -> None:
        nonlocal between
        if bench.nvml is not None:
            between = between.with_sample(bench.nvml.state())

    before = bench.nvml.state() if bench.nvml else None
    bench.view.reset_peak()
    status: Status = "ok"
    cache: dict[str, int | None] = {}
    try:
        if scenario is not None:
            measured = _latency(request, bench, scenario, sample)
            figures |= {"latency": measured.latency, "prompt_sha256": measured.prompt_sha256}
            cache = {
                "kv_cache_bytes": measured.kv_cache_bytes,
                "kv_cache_formula_bytes": measured.kv_cache_formula_bytes,
            }
        elif kind == "quality":
            figures["quality"] = _quality(request, bench)
        else:
            figures["tasks"] = _tasks(request, bench)
        run_peak_bytes = bench.view.peak_bytes()
        after = bench.nvml.state() if bench.nvml else None
        figures["memory"] = Memory(
            weights_bytes=bench.weights_bytes,
            source=bench.view.source,
            baseline_bytes=bench.baseline_bytes,
            load_peak_bytes=bench.load_peak_bytes,
            run_peak_bytes=run_peak_bytes,
            nvml_process_bytes=after.process_bytes if after else None,
            nvml_device_bytes=after.device_bytes if after else None,
            reserved_peak_bytes=bench.view.reserved_peak_bytes(),
            decode_bytes=bench.decode_bytes,
            **cache,
        )
        if before and after:
            figures["device_state"] = GpuStates(before, between, after)
    except Exception as error:
        status, figures["reason"] = failure(error, request.run.target.checkpoint)
    wall_s = time.perf_counter() - start
    return request.record(status, asked, started_at=started_at, wall_s=wall_s, **figures)


def quantization_of(model: Any) -> dict[str, Any] | None:
    """What the loaded model says of its quantization: plain values alone, None for a model that is not quantized."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    values = dict(config) if isinstance(config, dict) else config.to_dict()
    return {name: value for name, value in values.items() if isinstance(value, str | int | float | bool | None)}


def _latency(request: Request, bench: Bench, scenario: Scenario, sample: Callable[[], None]) -> Any:
    import torch

    from bench.worker.latency import measure_latency

    return measure_latency(
        bench.loaded.model,
        scenario,
        bench.clock,
        request.settings.rule,
        compute_dtype=getattr(torch, request.compute_dtype),
        between=sample,
    )


def _quality(request: Request, bench: Bench) -> Any:
    from bench.worker.quality import evaluation_blocks, quality, reference_quality
    from bench.worker.reference_logprobs import ReferenceLogprobs

    asked = request.settings.quality
    model = bench.loaded.model
    blocks = evaluation_blocks(
        bench.loaded.tokenizer, blocks=asked.blocks, block_tokens=asked.block_tokens, data=asked.data
    )
    kept = ReferenceLogprobs(Path(request.reference_logprobs)) if request.reference_logprobs else None
    if kept is not None and request.run.is_reference:
        return reference_quality(model, blocks, kept, text=asked.label)
    there = kept if kept is not None and kept.path.is_file() else None
    return quality(model, blocks, text=asked.label, expected=there)


def _tasks(request: Request, bench: Bench) -> Any:
    from bench.worker.tasks import evaluate

    asked = request.settings.tasks
    folder = None if asked.folder is None else Path(asked.folder)
    return evaluate(bench.loaded.model, bench.loaded.tokenizer, request.run.tasks, folder=folder, limit=asked.limit)


def failure(error: Exception, checkpoint: str | None) -> tuple[Status, str]:
    """The status and the one-line reason of a run that raised this, without the checkpoint's folder.

    On a CPU torch has no error type for a failed allocation, so that its words decide.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    text = lines[0] if lines else "no message"
    text = without_folder(text, checkpoint)
    if isinstance(error, UserError):
        return "unsupported", text[:REASON_CHARACTERS]
    no_memory = (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error).lower() for words in NO_MEMORY_WORDS)
    )
    return ("oom" if no_memory else "error"), f"{type(error).__name__}: {text}"[:REASON_CHARACTERS]


def without_folder(text: str, checkpoint: str | None) -> str:
    """A message that names a checkpoint without the folder that it lies in: no path goes into a record."""
    return text if checkpoint is None else text.replace(f"{Path(checkpoint).parent}{os.sep}", "")


def die_with(parent_pid: int) -> None:
    """Have the kernel end this process when its parent ends: an orphan would disturb the next measurement."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def main(arguments: list[str] | None = None) -> int:
    """Do what REQUEST.json asks and append the records to RESULT.jsonl."""
    request_path, result_path = sys.argv[1:] if arguments is None else arguments
    request, result = Request.read(Path(request_path)), Path(result_path)
    if request.parent_pid is not None:
        die_with(request.parent_pid)
    with quiet_libraries():
        work(request, lambda record: append(result, record))
    return 0
