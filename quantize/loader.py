"""A checkpoint, or random weights in a model's shape, becomes a transformers model that runs here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantize.dummy import dummy_config, dummy_weights, write_dummy_folder
from quantize.errors import UserError
from quantize.foreign import checkpoint_in
from quantize.loading.device_map import Placement, Running, placement_for, torch_device, weights_bytes
from quantize.loading.int4_layers import place_buffers
from quantize.methods import METHODS
from quantize.methods.base import Kernels
from quantize.model.pretrained import empty_model, tokenizer_of
from quantize.quiet import quiet_libraries
from quantize.source import cache_folder
from quantize.variant import VARIANTS


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what its quantized layers run on.

    model:          in eval mode; device: where its inputs go; compute_dtype: of its activations.
    tokenizer:      None for dummy weights, which have none.
    kernel:         tokens at once -> what the quantized linear layers run on.
    weights_bytes:  parameters and buffers, each storage counted once.
    placement:      how a model that is too big for one GPU is spread, None for one that is on `device` as a whole."""

    model: Any
    tokenizer: Any
    device: torch.device
    compute_dtype: torch.dtype
    kernel: Kernels
    weights_bytes: int
    placement: str | None = None


Loaded = LoadedModel  # the public name: `quantize.Loaded`


def load(
    path: Path | str, *, device: str = "cpu", compute_dtype: torch.dtype | None = None, kernel: str | None = None
) -> LoadedModel:
    """Load a checkpoint on "cpu" or "cuda", whoever made it; of half-precision folders the model itself.

    compute_dtype: of the activations, and of the weights where they are not quantized and on CUDA or in the
                   reference; default float32 on a CPU and float16 on CUDA.
    kernel:        of AWQ checkpoints, the name of one of KERNELS, "native" for what the layout is named after, or
                   "auto", the default: the fastest by a short probe, whose outcome is kept in the cache folder.

    Raises UserError for a folder that is no checkpoint, for CUDA where there is none, and for a kernel that cannot run
    here; KernelFault for one that gives wrong results; MemoryError for weights too big for all devices together."""
    checkpoint = checkpoint_in(Path(path))
    target, dtype = _setting(device, compute_dtype)
    variant, manifest = checkpoint.variant, checkpoint.manifest
    with quiet_libraries():
        on_cpu = target.type == "cpu"
        place = Placement(target) if on_cpu else placement_for(empty_model(checkpoint.path), variant, target, dtype)
        how = Running(variant, place, dtype, kernel, manifest.q_group_size)
        model, kernels = METHODS[variant.method].load(checkpoint.path, how)
        tokenizer = None if manifest.source.kind == "dummy" else tokenizer_of(checkpoint.path)
    return _loaded(model, tokenizer, how, kernels)


def load_dummy(
    spec: str,
    variant: str,
    *,
    device: str = "cpu",
    compute_dtype: torch.dtype | None = None,
    kernel: str | None = None,
    group_size: int | None = None,
) -> LoadedModel:
    """A model ready to run whose memory and speed are those of a real checkpoint of this variant and shape.

    spec:       a name of quantize.dummy.SHAPES or the path of a config.json.
    variant:    a name of VARIANTS; the weights are drawn at random, 4-bit codes evenly from all 16: no search runs.
    group_size: AWQ's, None for the largest that fits.

    device, compute_dtype, kernel: as `load` takes them. Raises what `load` does, UserError for an unknown spec as well.
    """
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}; there are: {', '.join(VARIANTS)}")
    target, dtype = _setting(device, compute_dtype)
    name, config = dummy_config(spec)
    with quiet_libraries(), torch.no_grad():
        model = empty_model(write_dummy_folder(config, name, cache_folder()))
        row = VARIANTS[variant]
        how = Running(row, placement_for(model, row, target, dtype), dtype, kernel, group_size)
        kernels = METHODS[row.method].draw(model, dummy_weights(model, target), how)
        place_buffers(model, how.place)
        how.place.dispatch(model)
    return _loaded(model, None, how, kernels)


def _loaded(model: Any, tokenizer: Any, how: Running, kernels: Kernels) -> LoadedModel:
    size = how.place.weights_bytes or weights_bytes(model)
    return LoadedModel(model.eval(), tokenizer, how.place.main, how.dtype, kernels, size, how.place.description)


def _setting(device: str, compute_dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    target = torch_device(device)
    return target, compute_dtype or (torch.float32 if target.type == "cpu" else torch.float16)
