"""A checkpoint becomes a transformers model that runs here, and says which kernel really runs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.errors import UserError
from quantize.int4.packing import UNPACKERS
from quantize.int4.weight import Int4Weight
from quantize.kernels import Kernel
from quantize.kernels.choice import Shape, choose_kernel
from quantize.kernels.verify import check_layer
from quantize.loading.device_map import Placement, placement_for
from quantize.loading.footprint import weights_bytes
from quantize.loading.merged import layers_by_input, put_layers, stacked
from quantize.methods.bnb import bnb_layers
from quantize.model.pretrained import config_of, empty_model, model_of, tokenizer_of
from quantize.quiet import quiet_libraries
from quantize.source import TensorReader, Weights, cache_folder, open_weights
from quantize.variant import NATIVE_KERNEL

PREFILL_TOKENS = 1024
ReadInt4 = Callable[[str], tuple[Int4Weight, Tensor | None]]
"""A linear layer's name -> its 4-bit weight and its bias."""

VOCABULARY_CHUNK = 4096

MERGED_ON = ("cuda",)
"""Devices on which 4-bit layers with one input run as one (quantize.loading.merged): where starting a kernel counts."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to run (eval mode, on `device`), its tokenizer, and what its quantized layers run on.

    tokenizer: None for dummy weights, which have none.

    compute_dtype: what the activations are; prefill_kernel and decode_kernel: the kernel of the quantized linear
    layers for a long prompt and for one token; weights_bytes: parameters and buffers, each storage counted once;
    placement: how a model that is too big for one GPU is spread, None for one that is on `device` as a whole.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    compute_dtype: torch.dtype
    prefill_kernel: str
    decode_kernel: str
    weights_bytes: int
    placement: str | None = None


def load(
    path: Path | str,
    *,
    device: str = "cpu",
    compute_dtype: torch.dtype | None = None,
    kernel: str | None = None,
) -> Loaded:
    """Load a checkpoint that `quantize` made, on "cpu" or "cuda".

    compute_dtype: of the activations, and of the weights where they are not quantized and on CUDA or in the
    reference; default float32 on a CPU and float16 on CUDA. kernel: of AWQ checkpoints, the name of one of KERNELS,
    "native" for what the layout is named after, or "auto", the default: the fastest by a short probe, whose outcome is
    kept in the cache folder. Raises UserError for a folder that is no checkpoint, for CUDA where there is none, and
    for a kernel that cannot run here; KernelFault for one that gives wrong results; MemoryError for weights too big
    for all devices together (quantize.loading.device_map).
    """
    checkpoint = open_checkpoint(Path(path))
    target = torch_device(device)
    dtype = compute_dtype or (torch.float32 if target.type == "cpu" else torch.float16)
    with quiet_libraries():
        place = _place(checkpoint, target, dtype)
        model, prefill, decode = _LOADERS[checkpoint.variant.method](checkpoint, place, dtype, kernel)
        dummy = checkpoint.manifest.source.kind == "dummy"
        tokenizer = None if dummy else tokenizer_of(checkpoint.path)
        model.eval()
    size = place.weights_bytes or weights_bytes(model)
    return Loaded(model, tokenizer, target, dtype, prefill, decode, size, place.words)


def _place(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Placement:
    """The one device, or several where the model is too big for it. Raises MemoryError where it is for all."""
    if device.type == "cpu":
        return Placement(device)
    model = empty_model(checkpoint.path)
    quantized = bnb_layers(model) if checkpoint.variant.w_bit else ()
    return placement_for(model, checkpoint.variant, quantized, device, dtype)


def torch_device(name: str) -> torch.device:
    """The torch device of this name. Raises UserError when it is CUDA and there is none, or unknown."""
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: use cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("no CUDA device here (torch.cuda.is_available() is False): use --device cpu")
    return torch.device(name)


def _load_reference(
    checkpoint: Checkpoint, place: Placement, dtype: torch.dtype, kernel: str | None
) -> tuple[Any, str, str]:
    model = model_of(checkpoint.path, dtype=dtype, device_map=place.as_map())
    name = f"torch ({str(dtype).removeprefix('torch.')})"
    return model, name, name


def _load_bnb(checkpoint: Checkpoint, place: Placement, dtype: torch.dtype, kernel: str | None) -> tuple[Any, str, str]:
    model = model_of(checkpoint.path, dtype=dtype, device_map=place.as_map())
    _set_bnb_dtype(model, dtype)
    quantization = json.loads((checkpoint.path / "config.json").read_text())["quantization_config"]
    bits = quantization["bnb_4bit_quant_type"] if checkpoint.variant.w_bit == 4 else "int8"
    name = f"bitsandbytes {bits} ({str(dtype).removeprefix('torch.')})"
    return model, name, name


def _set_bnb_dtype(model: Any, dtype: torch.dtype) -> None:
    """Compute in `dtype`: transformers leaves a quantized checkpoint's other tensors in the dtype of the file."""
    from bitsandbytes.nn import Linear4bit

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
    model.tie_weights()


def _load_awq(checkpoint: Checkpoint, place: Placement, dtype: torch.dtype, kernel: str | None) -> tuple[Any, str, str]:
    config = config_of(checkpoint.path)
    del config.quantization_config
    model = empty_model(checkpoint.path, config=config, dtype=dtype)
    weights = open_weights(checkpoint.path)
    names = set(weights.names())
    quantized = sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))
    group_size = checkpoint.manifest.q_group_size
    if group_size is None or not quantized:
        raise UserError(f"{checkpoint.path} holds no AWQ layers: make it again with `quantize --force`")
    read = _int4_reader(weights, checkpoint, model, group_size)
    version = str(checkpoint.variant.version)
    chosen = place_int4_layers(model, quantized, read, version=version, kernel=kernel, place=place, dtype=dtype)
    fill_rest(model, weights, quantized, place, dtype)
    place.dispatch(model)
    return model, chosen.describe(PREFILL_TOKENS, dtype), chosen.describe(1, dtype)


def place_int4_layers(
    model: nn.Module,
    names: Sequence[str],
    read: ReadInt4,
    *,
    version: str,
    kernel: str | None,
    place: Placement,
    dtype: torch.dtype,
) -> Kernel:
    """Put 4-bit layers in the place of these linear layers, those with one input merged; return the kernel they run on.

    read: a layer's name -> its weight and bias; version: its layout; kernel: as `load` takes it. One layer of each
    shape is held against its dequantized weights: raises KernelFault for a kernel that gives wrong results.
    """
    device = place.main
    sizes: dict[str, tuple[int, int]] = {}
    for name in names:
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{name} is no linear layer of this architecture: make the checkpoint again")
        sizes[name] = linear.out_features, linear.in_features
    merge = device.type in MERGED_ON and kernel != NATIVE_KERNEL  # the layouts' names stand for layers run one by one
    together = layers_by_input(model, names, place) if merge else [(name,) for name in names]
    by_shape: dict[tuple[int, int], list[tuple[str, ...]]] = {}
    for several in together:
        by_shape.setdefault((sum(sizes[name][0] for name in several), sizes[several[0]][1]), []).append(several)
    shapes = [Shape(stacked([read(name) for name in found[0]])[0], len(found)) for found in by_shape.values()]
    chosen = choose_kernel(kernel, shapes, version, device, dtype, cache=cache_folder() / "kernels.json")
    for shape in shapes:
        check_layer(chosen, chosen.prepare(shape.weight, None, device, dtype), shape.weight, device, dtype)
    del shapes
    for several in together:
        weight, bias = stacked([read(name) for name in several])
        made = chosen.prepare(weight, bias, place.of(several[0]), dtype)
        put_layers(model, {name: sizes[name][0] for name in several}, made)
    return chosen


def _int4_reader(weights: Weights, checkpoint: Checkpoint, model: nn.Module, group_size: int) -> ReadInt4:
    unpack = UNPACKERS[checkpoint.variant.version or ""]
    names = set(weights.names())
    widths = {name: module.in_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def read(name: str) -> tuple[Int4Weight, Tensor | None]:
        tensors = {part: weights.get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")}
        bias = weights.get(f"{name}.bias") if f"{name}.bias" in names else None
        return unpack(tensors, widths[name], group_size), bias

    return read


def fill_rest(
    model: Any, weights: TensorReader, quantized: Sequence[str], place: Placement, dtype: torch.dtype
) -> None:
    """Fill what is not quantized: norms in the compute dtype, embeddings and the output head in half precision.

    quantized: the linear layers that are placed already. Raises UserError when a tensor is missing.
    """
    done = tuple(f"{name}." for name in quantized)
    for name in weights.names():
        if name.startswith(done):
            continue
        tensor, device = weights.get(name), place.of(name)
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf == "scales" and "scales" not in module._parameters:
            _wrap_activation(model, parent, tensor.to(device, dtype))
            continue
        half = isinstance(module, nn.Embedding) or module is model.get_output_embeddings()
        value = tensor.to(device) if half else tensor.to(device, dtype)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    _keep_half_embeddings(model, dtype)
    place_buffers(model, place)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise UserError(f"the checkpoint lacks {missing[0]}: make it again with `quantize --force`")


def place_buffers(model: nn.Module, place: Placement) -> None:
    """Bring buffers that no file holds (rotary frequencies) to where their module runs."""
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(place.of(name))


def _wrap_activation(model: Any, name: str, scales: Tensor) -> None:
    """AWQ scales that no weight could absorb live in a wrapper around the activation function."""
    from awq.modules.act import ScaledActivation

    model.set_submodule(name, ScaledActivation(model.get_submodule(name), scales))


class HalfEmbedding(nn.Module):
    """An embedding table stored in half precision that hands out rows in the compute dtype."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = embedding.weight
        self._embedding = (embedding,)  # in a tuple: not a submodule, its weight is counted here
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self._embedding[0](ids)
        return rows.to(self.dtype)


class HalfHead(nn.Module):
    """An output head stored in half precision: one token multiplies in it, more of them in the compute dtype.

    A CPU multiplies float16 matrices with one vector at memory speed and with several at a hundredth of float32's
    speed, so for several the rows are converted, a chunk of the vocabulary at a time.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.numel() == hidden.shape[-1]:
            logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight).to(hidden.dtype)
        else:
            chunks = [
                nn.functional.linear(hidden, rows.to(hidden.dtype))
                for rows in torch.split(self.weight, VOCABULARY_CHUNK)
            ]
            logits = torch.cat(chunks, dim=-1)
        return logits if self.bias is None else logits + self.bias.to(hidden.dtype)


def _keep_half_embeddings(model: Any, dtype: torch.dtype) -> None:
    """On a CPU that computes in float32, embeddings and head stay as stored, in half the bytes."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, nn.Linear) and head.weight.dtype != dtype:
        names = {module: name for name, module in model.named_modules()}
        model.set_submodule(names[head], HalfHead(head))
    if embedding.weight.dtype != dtype:
        if type(embedding) is not nn.Embedding:  # it scales its rows or more: no place for a wrapper
            embedding.to(dtype)
            return
        model.set_input_embeddings(HalfEmbedding(embedding, dtype))


_LOADERS: dict[str, Callable[[Checkpoint, Placement, torch.dtype, str | None], tuple[Any, str, str]]] = {
    "FP16": _load_reference,
    "AWQ": _load_awq,
    "RTN": _load_awq,
    "BnB.4": _load_bnb,
    "BnB.8": _load_bnb,
}
