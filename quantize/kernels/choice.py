"""Which kernel runs a checkpoint: the one asked for, the one its layout is named after, or the fastest here."""

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from quantize.errors import UserError
from quantize.files import replace_file
from quantize.int4.weight import Int4Weight
from quantize.kernels import KERNELS, NATIVE, Kernel
from quantize.kernels.base import Int4Linear, KernelFault, check_layer
from quantize.schema import from_json, to_data
from quantize.variant import AUTO_KERNEL, NATIVE_KERNEL, check_kernel
from quantize.versions import version_of

PROBED_TOKENS = (1, 512)  # decode and prefill
PROBE_SAMPLES, PROBE_S = 7, 0.05  # calls at least, and seconds of them
FLUSHED_BYTES = 256 * 10**6  # written before each timed call on a GPU: its cache then holds no weights, as in a model
DECIDING_LIBRARIES = ("quantable", "torch", "triton", "autoawq", "autoawq-kernels")


@dataclass(frozen=True)
class LayerShape:
    """One distinct weight shape of a checkpoint: an example, and how many layers have it."""

    weight: Int4Weight
    count: int


Shapes = Sequence[LayerShape]


class KernelTiming(NamedTuple):
    """Seconds that all layers take on one kernel: decode for one token, prefill for a prompt of 512."""

    decode_s: float
    prefill_s: float


@dataclass(frozen=True)
class KernelChoice:
    """What a probe found: the fastest kernel, and how long each took that was tried."""

    kernel: str
    seconds: dict[str, KernelTiming]


def choose_kernel(
    wanted: str | None, shapes: Shapes, version: str, device: torch.device, dtype: torch.dtype, cache: Path | None
) -> Kernel:
    """The kernel for a checkpoint whose layers have these shapes.

    wanted: a name of KERNELS; "native", what the layout `version` is named after (NATIVE); None or "auto", the fastest
    by a short measured probe. cache: a JSON file that keeps what a probe found on this machine with these libraries.
    Raises UserError for an unknown name and where none of those meant can run every shape."""
    if wanted in (None, AUTO_KERNEL):
        names = [name for name in KERNELS if _unsupported_reason(KERNELS[name], shapes, device, dtype) is None]
        return KERNELS[_fastest(names, shapes, device, dtype, cache)]
    check_kernel(wanted)
    meant = NATIVE[version] if wanted == NATIVE_KERNEL else (str(wanted),)
    reasons = {name: _unsupported_reason(KERNELS[name], shapes, device, dtype) for name in meant}
    if able := [name for name, reason in reasons.items() if reason is None]:
        return KERNELS[able[0]]
    words = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UserError(f"the kernel asked for cannot run this checkpoint on {device} ({words}): use --kernel auto")


def _unsupported_reason(kernel: Kernel, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> str | None:
    return next((why for shape in shapes if (why := kernel.unsupported_reason(shape.weight, device, dtype))), None)


def _fastest(names: Sequence[str], shapes: Shapes, device: torch.device, dtype: torch.dtype, cache: Path | None) -> str:
    if len(names) == 1:
        return names[0]
    key = cache_key(names, shapes, device, dtype)
    known = _read(cache).get(key) if cache else None
    if known and known.kernel in names:
        return known.kernel
    seconds = {name: timing for name in names if (timing := probe_kernel(KERNELS[name], shapes, device, dtype))}
    if not seconds:
        raise KernelFault(f"no kernel gives right results here (tried {', '.join(names)})")
    chosen = best(seconds)
    if cache:
        with contextlib.suppress(OSError):  # a cache that cannot be written is done without
            cache.parent.mkdir(parents=True, exist_ok=True)
            kept = {**_read(cache), key: KernelChoice(chosen, seconds)}
            replace_file(cache, json.dumps(to_data(kept), indent=1).encode())
    return chosen


def best(seconds: dict[str, KernelTiming]) -> str:
    """The one that loses least over both phases: the smallest product of its slowdowns against each phase's fastest."""
    decode, prefill = map(min, zip(*seconds.values(), strict=True))
    return min(seconds, key=lambda name: seconds[name].decode_s / decode * (seconds[name].prefill_s / prefill))


@torch.no_grad()
def probe_kernel(kernel: Kernel, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> KernelTiming | None:
    """How long all layers take on this kernel, one of each shape timed; None for one that fails or is wrong."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    totals = [0.0, 0.0]
    for shape in shapes:
        try:
            layer = kernel.prepare(shape.weight, None, device, dtype)
            check_layer(kernel, layer, shape.weight, device, dtype)
        except Exception:  # whatever keeps a candidate from running well: others are there, and asked for by
            return None  # name it says what is wrong
        for place, tokens in enumerate(PROBED_TOKENS):
            x = torch.randn((tokens, layer.in_features), generator=torch.Generator().manual_seed(0)).to(device, dtype)
            call_seconds(layer, x, flushed)
            samples = list[float]()
            while len(samples) < PROBE_SAMPLES or sum(samples) < PROBE_S:
                samples.append(call_seconds(layer, x, flushed))
            totals[place] += shape.count * min(samples)  # what else runs slows some of them, and the choice is kept
    return KernelTiming(*totals)


def call_seconds(layer: Int4Linear, x: torch.Tensor, flushed: torch.Tensor | None) -> float:
    """Seconds of one call: by the GPU's events, `flushed` written before; where that is None by the host's clock."""
    if flushed is None:
        started = time.perf_counter()
        layer(x)
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    flushed.zero_()
    begin.record()
    layer(x)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def cache_key(names: Sequence[str], shapes: Shapes, device: torch.device, dtype: torch.dtype) -> str:
    """What a probe's outcome depends on, as a hash: device, libraries, candidates, shapes, how it measures."""
    on_cuda = device.type == "cuda"
    facts = {
        "device": torch.cuda.get_device_name(device) if on_cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": None if on_cuda else torch.get_num_threads(),
        "libraries": {name: version_of(name) for name in DECIDING_LIBRARIES},
        "kernels": list(names),
        "probe": [*PROBED_TOKENS, PROBE_SAMPLES, PROBE_S],
        "shapes": sorted([*shape.weight.codes.shape, shape.weight.group_size, shape.count] for shape in shapes),
        "dtype": str(dtype),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, KernelChoice]:
    """What is kept, by key; nothing where there is no such file or it is damaged."""
    with contextlib.suppress(OSError, UserError):
        return from_json(dict[str, KernelChoice], path.read_bytes(), str(path))
    return {}
