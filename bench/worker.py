"""One process, one checkpoint: load it, measure it, write records. The only file of bench that loads a model.

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

from bench.clock import Clock, CudaClock, HostClock
from bench.device import Nvml, cuda_uuid, open_nvml
from bench.memory import MemoryView, memory_view
from bench.record import Kernels, Memory, Record, Status, append_record
from bench.request import Request
from bench.scenario import Scenario
from quantize.errors import UserError
from quantize.quiet import quiet_libraries

REASON_CHARACTERS = 300
NO_MEMORY_WORDS = ("can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory")

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


def work(request: Request, emit: Emit, *, load: Load | None = None) -> None:
    """Load the checkpoint and emit one record a scenario (or one of quality), failures included.

    load: replaces quantize.load in tests. A failure to load is a record for every scenario asked for.
    """
    asked: tuple[Scenario | None, ...] = request.scenarios or (None,)
    started_at, start = _now(), time.perf_counter()
    try:
        bench = _load(request, load)
    except Exception as error:
        status, reason = failure(error, request.checkpoint)
        wall_s = time.perf_counter() - start
        for scenario in asked:
            emit(request.record(status, started_at=started_at, wall_s=wall_s, scenario=scenario, reason=reason))
        return
    for scenario in asked:
        emit(_measured(request, bench, scenario))


def _load(request: Request, load: Load | None) -> Bench:
    import torch

    from quantize.footprint import weights_bytes

    if load is None:
        from quantize.loading import load as load_checkpoint

        load = load_checkpoint
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    on_cuda = torch.device(request.device).type == "cuda"
    view = memory_view("cuda" if on_cuda else "cpu")
    view.reset_peak()
    loaded = load(request.checkpoint, device=request.device, compute_dtype=getattr(torch, request.compute_dtype))
    load_peak_bytes = view.peak_bytes()
    view.reset_peak()
    return Bench(
        loaded=loaded,
        clock=CudaClock() if on_cuda else HostClock(),
        view=view,
        nvml=open_nvml(cuda_uuid()) if on_cuda else None,
        weights_bytes=weights_bytes(loaded.model),
        baseline_bytes=view.current_bytes(),
        load_peak_bytes=load_peak_bytes,
    )


def _measured(request: Request, bench: Bench, scenario: Scenario | None) -> Record:
    """The record of one scenario, or of quality where there is none."""
    started_at, start = _now(), time.perf_counter()
    figures: dict[str, Any] = {
        "kernels": Kernels(bench.loaded.prefill_kernel, bench.loaded.decode_kernel),
    }
    before = bench.nvml.state() if bench.nvml else None
    bench.view.reset_peak()
    status: Status = "ok"
    try:
        if scenario is None:
            figures["quality"] = _quality(request, bench)
        else:
            figures["latency"] = _latency(request, bench, scenario)
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
        )
        if before and after:
            figures["device_state"] = {"before": before.to_json(), "after": after.to_json()}
    except Exception as error:
        status, figures["reason"] = failure(error, request.checkpoint)
    wall_s = time.perf_counter() - start
    return request.record(status, started_at=started_at, wall_s=wall_s, scenario=scenario, **figures)


def _latency(request: Request, bench: Bench, scenario: Scenario) -> Any:
    from bench.latency import measure_latency

    return measure_latency(
        bench.loaded.model,
        scenario,
        bench.clock,
        repetitions=request.repetitions_for(scenario),
        warmups=request.warmups,
    )


def _quality(request: Request, bench: Bench) -> Any:
    from bench.quality import evaluation_blocks, perplexity

    blocks = evaluation_blocks(
        bench.loaded.tokenizer, blocks=request.quality_blocks, block_tokens=request.quality_block_tokens
    )
    return perplexity(bench.loaded.model, blocks)


def failure(error: Exception, checkpoint: str) -> tuple[Status, str]:
    """The status and the one-line reason of a run that raised this, without the checkpoint's folder.

    On a CPU torch has no error type for a failed allocation, so that its words decide.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    text = (lines[0] if lines else "no message").replace(f"{Path(checkpoint).parent}{os.sep}", "")
    if isinstance(error, UserError):
        return "unsupported", text[:REASON_CHARACTERS]
    no_memory = (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error).lower() for words in NO_MEMORY_WORDS)
    )
    return ("oom" if no_memory else "error"), f"{type(error).__name__}: {text}"[:REASON_CHARACTERS]


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
        work(request, lambda record: append_record(result, record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
