"""4-bit layers in the place of a model's linear layers, and what is not quantized around them.

Layers that share an input (query, key and value; gate and up) run as one, to start fewer kernels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UserError
from quantize.int4.layouts import StoredLayer, regrouped
from quantize.int4.weight import Int4Weight
from quantize.kernels import Kernel
from quantize.kernels.base import check_layer
from quantize.kernels.choice import LayerShape, choose_kernel
from quantize.loading.device_map import Placement, Running
from quantize.model.names import put
from quantize.model.skeleton import Skeleton
from quantize.source import cache_folder
from quantize.variant import NATIVE_KERNEL

VOCABULARY_CHUNK = 4096  # rows of a half-precision output head that are converted at a time
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Names that layers with one input have inside their module: of attention, of gated MLPs, and of experts. autoawq's
maps know them as well, but importing autoawq takes 150 MB and two seconds."""


def place_int4_layers(skeleton: Skeleton, names: list[str], read: Callable[[str], StoredLayer], how: Running) -> Kernel:
    """Put 4-bit layers in the place of these linear layers, those with one input merged, and fill in the rest.

    Returns the kernel that they run on. read: a layer's name -> its weight; skeleton: the model, and everything else,
    biases as well. One layer of each shape is compared with its dequantized weights: raises KernelFault for a kernel
    that gives wrong results, and UserError when a tensor is missing."""
    model, place, device, dtype = skeleton.model, how.place, how.place.main, how.dtype

    def read_stacked(several: Sequence[str]) -> tuple[Int4Weight, Tensor | None]:
        biases = (skeleton.read(f"{name}.bias") if f"{name}.bias" in skeleton else None for name in several)
        layers = [read(name) for name in several]
        orders.update(zip(several, (layer.order for layer in layers), strict=True))
        return stacked([(layer.weight, bias) for layer, bias in zip(layers, biases, strict=True)])

    linears, orders = {name: model.get_submodule(name) for name in names}, dict[str, Tensor | None]()
    # A layout's name stands for layers one by one, and each may have an order of its own.
    merge = how.kernel != NATIVE_KERNEL and all(read(name).order is None for name in names[:1])
    together = layers_by_input(model, names, place) if merge else [(name,) for name in names]
    by_shape: dict[tuple[int, int], list[tuple[str, ...]]] = {}
    for several in together:
        rows = sum(linears[name].out_features for name in several)
        by_shape.setdefault((rows, linears[several[0]].in_features), []).append(several)
    shapes = [LayerShape(read_stacked(found[0])[0], len(found)) for found in by_shape.values()]
    cache = cache_folder() / "kernels.json"
    chosen = choose_kernel(how.kernel, shapes, str(how.variant.version), device, dtype, cache=cache)
    for shape in shapes:
        check_layer(chosen, chosen.prepare(shape.weight, None, device, dtype), shape.weight, device, dtype)
    del shapes
    for several in together:
        whole = read_stacked(several)
        if len(several) > 1 and any(orders[name] is not None for name in several):
            together += [(name,) for name in several]  # this loop's last ones: their inputs have orders of their own
            continue
        made: nn.Module = chosen.prepare(*whole, place.of(several[0]), dtype)
        del whole
        if (order := orders[several[0]]) is not None:
            made = Reordered(made, order.to(place.of(several[0])))
        replace_merged(model, {name: linears[name].out_features for name in several}, made)
    fill_rest(skeleton, names, how)
    return chosen


def fill_rest(skeleton: Skeleton, quantized: Sequence[str], how: Running) -> None:
    """Fill what is not quantized, norms in the compute dtype, the rest in half. Raises UserError for a missing one."""
    model, done = skeleton.model, tuple(f"{name}." for name in quantized)
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    for name in skeleton.stored:
        if name.startswith(done) or name not in skeleton or name in model.all_tied_weights_keys:
            continue
        parent, _, leaf = name.rpartition(".")
        module, tensor, device = modules[parent], skeleton.read(name), how.place.of(name)
        half = isinstance(module, nn.Embedding) or module is head
        own = module._buffers[leaf].dtype if leaf in module._buffers else how.dtype
        own = own if tensor.is_floating_point() else tensor.dtype
        put(model, name, tensor.to(device) if half else tensor.to(device, own))
    skeleton.forget_stacks()
    model.tie_weights()
    keep_half_embeddings(model, how.dtype)
    place_buffers(model, how.place)
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise UserError(f"the checkpoint lacks {missing[0]}: make it again with `quantize --force`")


def place_buffers(model: nn.Module, place: Placement) -> None:
    """Bring buffers that no file holds (rotary frequencies) to where their module runs."""
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(place.of(name))


class HalfHead(nn.Module):
    """An output head stored in half precision: one token multiplies in it, more of them in the compute dtype.

    For those, which a CPU is slow to multiply in float16, rows are converted a chunk of the vocabulary at a time."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.numel() == hidden.shape[-1]:
            # As a matrix: of a slice of a longer prompt torch makes a batch, and a copy of the weight for it.
            row = hidden.reshape(1, -1)
            if torch.compiler.is_compiling():  # one loop over the rows, faster than the product and rounded less
                logits = (self.weight.float() * row.float()).sum(dim=-1)
            else:
                logits = nn.functional.linear(row.to(self.weight.dtype), self.weight)
            logits = logits.to(hidden.dtype).view(*hidden.shape[:-1], -1)
        else:
            chunks = torch.split(self.weight, VOCABULARY_CHUNK)
            logits = torch.cat([nn.functional.linear(hidden, rows.to(hidden.dtype)) for rows in chunks], dim=-1)
        return logits if self.bias is None else logits + self.bias.to(hidden.dtype)


def keep_half_embeddings(model: Any, dtype: torch.dtype) -> None:
    """On a CPU that computes in float32, embeddings and head stay as stored, in half the bytes."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if module is head and isinstance(head, nn.Linear) and head.weight.dtype != dtype:
            model.set_submodule(name, HalfHead(head))
        elif type(module) is nn.Embedding and module.weight.dtype != dtype:
            module.register_forward_hook(lambda module, ids, rows: rows.to(dtype))
        elif isinstance(module, nn.Embedding):  # it scales its rows or more, and would round them
            module.to(dtype)


class Reordered(nn.Module):
    """A layer whose inputs stand in another order: forward takes [..., in] as the model has it."""

    order: Tensor

    def __init__(self, inner: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x.index_select(-1, self.order))


class MergedLinear(nn.Module):
    """Several layers' output features in one; `Part` hands out each layer's share of them."""

    def __init__(self, inner: Any, parts: int) -> None:
        super().__init__()
        self.inner = inner
        self._parts = parts
        self._last: list[Any] = [None, None, 0]  # x, out, parts taken; a module's own attributes are slow to set

    def take(self, x: Tensor, features: slice) -> Tensor:
        """These output features for x [..., in]: computed with the first part of an input, kept until the last."""
        last = self._last
        if last[0] is not x:
            last[:] = x, self.inner(x), 0
        out: Tensor = last[1][..., features]
        last[2] += 1
        if last[2] == self._parts:
            last[:] = None, None, 0
        return out


class Part(nn.Module):
    """One of the layers in a MergedLinear: forward takes [..., in] and returns its [..., out], a view.

    All parts of a MergedLinear are called with the same tensor, one after another, and it is not changed in between."""

    def __init__(self, merged: MergedLinear, start: int, stop: int) -> None:
        super().__init__()
        self.merged = merged
        self._features = slice(start, stop)
        self.in_features, self.out_features = merged.inner.in_features, stop - start

    def forward(self, x: Tensor) -> Tensor:
        return self.merged.take(x, self._features)


def layers_by_input(model: nn.Module, names: Sequence[str], place: Placement) -> list[tuple[str, ...]]:
    """These linear layers of a model, each in one tuple: those in one that read the same input on the same device.

    What reads the same input is told by its name and its neighbours. Where that is wrong, results stay right: a Part
    that is called with another tensor computes anew, and costs what all parts together cost."""
    known = dict.fromkeys(names)
    found = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):
        for leaves in ONE_INPUT:
            whole = [name for leaf in leaves if (name := f"{parent}.{leaf}") in known]
            for _, together in groupby(whole, key=lambda name: (model.get_submodule(name).in_features, place.of(name))):
                found.append(tuple(together))
    merged = [several for several in found if len(several) > 1]
    done = {name for several in merged for name in several}
    return [*merged, *((name,) for name in names if name not in done)]


def stacked(parts: Sequence[tuple[Int4Weight, Tensor | None]]) -> tuple[Int4Weight, Tensor | None]:
    """Weights [out_i, in] and biases [out_i] of layers with one input, as one weight [sum of out_i, in] and bias."""
    weights, biases = zip(*parts, strict=True)
    if len(parts) == 1:
        return parts[0]
    size = math.gcd(*(one.group_size for one in weights))  # into which the groups of all can be cut
    weights = tuple(regrouped(one, size) for one in weights)
    whole = Int4Weight(*(torch.cat([getattr(w, part) for w in weights]) for part in ("codes", "scales", "zeros")))
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return whole, None
    return whole, torch.cat([given.new_zeros(len(w.codes)) if bias is None else bias for w, bias in parts])


def replace_merged(model: nn.Module, sizes: Mapping[str, int], made: nn.Module) -> None:
    """Put a prepared layer in the place of those that it stands for; sizes: each one's name and output features."""
    if len(sizes) == 1:
        model.set_submodule(next(iter(sizes)), made)
        return
    merged, start = MergedLinear(made, len(sizes)), 0
    for name, size in sizes.items():
        model.set_submodule(name, Part(merged, start, start + size))
        start += size
