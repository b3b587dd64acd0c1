"""One process, one model: load it, measure it, write records. The only file of bench that measures a row.

python -m bench.worker.worker REQUEST.json RESULT.jsonl
"""

import ctypes
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.records.gpu_state import GpuState, GpuStates, extremes_of
from bench.records.record import Kernels, Memory, Quality, Record, Status
from bench.records.store import append
from bench.worker.clock import Clock, clock_for
from bench.worker.gpu import Nvml, cuda_uuid, open_nvml
from bench.worker.memory import MemoryView, memory_view
from bench.worker.request import Request, Work
from quantize.errors import UserError
from quantize.quiet import quiet_libraries

REASON_CHARACTERS = 300
NO_MEMORY_WORDS = (
    "can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory", "std::bad_alloc",
    "memoryerror",
)  # fmt: skip
"""What an error, or a process that dies without a record, says in lower case where memory ran out."""


@dataclass(frozen=True)
class Bench:
    """A loaded checkpoint on its bench: the model and the instruments. memory: what loading it took."""

    loaded: Any
    clock: Clock
    view: MemoryView
    nvml: Nvml | None
    memory: Memory


def work(request: Request, emit: Callable[[Record], None]) -> None:
    """Load the model, emit a record a work, failures included; a failure to load is one of everything asked for."""
    started_at, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    try:
        bench = _load(request)
    except Exception as error:
        status, reason = failure(error, request.run.target.checkpoint)
        wall_s = time.perf_counter() - start
        for asked in request.run.works:
            emit(request.record(status, asked, started_at=started_at, wall_s=wall_s, reason=reason))
        return
    for asked in request.run.works:
        emit(_measured(request, bench, asked))


def _load(request: Request) -> Bench:
    import torch

    from quantize.loader import load, load_dummy
    from quantize.loading.device_map import decode_bytes, weights_bytes

    if request.settings.options.threads is not None:
        torch.set_num_threads(request.settings.options.threads)
    device_type = torch.device(request.settings.device).type
    view = memory_view(device_type)
    view.reset_peak()
    target, dtype = request.run.target, getattr(torch, request.compute_dtype)
    how: dict[str, Any] = {"device": device_type, "compute_dtype": dtype, "kernel": target.subject.kernel}
    if target.checkpoint is not None:
        loaded = load(target.checkpoint, **how)
    else:
        loaded = load_dummy(target.dummy or "", target.subject.variant, group_size=target.subject.q_group_size, **how)
    load_peak_bytes = view.peak_bytes()
    view.reset_peak()
    spread = loaded.placement is not None  # weights that wait in RAM are not in the model between two passes
    held_bytes = loaded.weights_bytes if spread else weights_bytes(loaded.model)
    read_bytes = None if spread else decode_bytes(loaded.model)
    memory = Memory(held_bytes, view.source, view.current_bytes(), load_peak_bytes, None, decode_bytes=read_bytes)
    nvml = open_nvml(cuda_uuid()) if device_type == "cuda" else None
    return Bench(loaded, clock_for(device_type), view, nvml, memory)


def _measured(request: Request, bench: Bench, asked: Work) -> Record:
    """The record of one scenario, of quality, or of tasks."""
    started_at, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    loaded = bench.loaded
    fields: dict[str, Any] = {"quantization": quantization_of(loaded.model), "placement": loaded.placement}
    fields["kernels"] = Kernels.of(loaded.kernel, asked[1])
    looks: list[GpuState] = []

    def look() -> None:
        if bench.nvml is not None:
            looks.append(bench.nvml.state())

    look()
    bench.view.reset_peak()
    status: Status = "ok"
    try:
        figures, held = _figures(request, bench, asked, look)
        held |= {"run_peak_bytes": bench.view.peak_bytes(), "reserved_peak_bytes": bench.view.reserved_peak_bytes()}
        look()
        if looks:
            before, *between, after = looks
            held |= {"nvml_process_bytes": after.process_bytes, "nvml_device_bytes": after.device_bytes}
            fields["device_state"] = GpuStates(before, extremes_of(between), after)
        fields |= figures | {"memory": replace(bench.memory, **held)}
    except Exception as error:
        status, fields["reason"] = failure(error, request.run.target.checkpoint)
    wall_s = time.perf_counter() - start
    return request.record(status, asked, started_at=started_at, wall_s=wall_s, **fields)


def _figures(
    request: Request, bench: Bench, asked: Work, between: Callable[[], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one work gives by Record's fields, and the bytes of its cache by Memory's. between: before each pass."""
    (kind, scenario), options, loaded = asked, request.settings.options, bench.loaded
    if scenario is not None:
        import torch

        from bench.worker.latency import measure_latency

        dtype = getattr(torch, request.compute_dtype)
        how: dict[str, Any] = {"compute_dtype": dtype, "between": between}
        latency, cache, sha256 = measure_latency(loaded.model, scenario, bench.clock, options.rule, **how)
        return {"latency": latency, "prompt_sha256": sha256}, cache
    if kind == "quality":
        return {"quality": _quality(request, loaded)}, {}
    from bench.worker.tasks import evaluate

    folder = Path(options.task_folder) if options.task_folder else None
    scores = evaluate(loaded.model, loaded.tokenizer, request.run.tasks, folder=folder, limit=options.task_limit)
    return {"tasks": scores}, {}


def _quality(request: Request, loaded: Any) -> Quality:
    from bench.worker.quality import evaluation_blocks, quality, reference_quality
    from quantize.calibration import check_blocks, first_tokens

    asked = request.settings.quality
    blocks = evaluation_blocks(loaded.tokenizer, blocks=asked.blocks, block_tokens=asked.block_tokens, data=asked.data)
    check_blocks(blocks, loaded.model, "use --no-quality")
    kept = Path(request.reference_logprobs) if request.reference_logprobs else None
    if kept is not None and request.run.is_reference:
        found = reference_quality(loaded.model, blocks, kept, text=asked.label)
    else:
        found = quality(loaded.model, blocks, text=asked.label, expected=kept if kept and kept.is_file() else None)
    return replace(found, first_tokens=tuple(first_tokens(loaded.tokenizer)))


def quantization_of(model: Any) -> dict[str, Any] | None:
    """What the loaded model says of its quantization: plain values alone, None for a model that is not quantized."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    values = dict(config) if isinstance(config, dict) else config.to_dict()
    return {name: value for name, value in values.items() if isinstance(value, str | int | float | bool | None)}


def failure(error: Exception, checkpoint: str | None) -> tuple[Status, str]:
    """The status and the one-line reason of a run that raised this, without the checkpoint's folder."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    text = without_folder(first, checkpoint)
    if isinstance(error, UserError | FloatingPointError):
        return "unsupported" if isinstance(error, UserError) else "broken", text[:REASON_CHARACTERS]
    traceback.print_exception(error)
    said = f"{type(error).__name__}: {error}".lower()  # on a CPU torch has no error type for a failed allocation
    no_memory = getattr(error, "errno", None) == errno.ENOMEM or any(words in said for words in NO_MEMORY_WORDS)
    return ("oom" if no_memory else "error"), f"{type(error).__name__}: {text}"[:REASON_CHARACTERS]


def without_folder(text: str, checkpoint: str | None) -> str:
    """A message that names a checkpoint without the folder that it lies in: no path goes into a record."""
    return text if checkpoint is None else text.replace(f"{Path(checkpoint).parent}{os.sep}", "")


def die_with(parent_pid: int) -> None:
    """Have the kernel end this process when its parent ends: an orphan would disturb the next measurement."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent_pid:
            os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str] | None = None) -> int:
    """Do what REQUEST.json asks and append the records to RESULT.jsonl."""
    request_path, result_path = sys.argv[1:] if arguments is None else arguments
    request, result = Request.read(Path(request_path)), Path(result_path)
    if request.parent_pid is not None:
        die_with(request.parent_pid)
    with quiet_libraries():
        work(request, lambda record: append(result, record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
