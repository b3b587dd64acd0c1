"""Linear layers that share an input (query, key and value; gate and up) run as one: one kernel in place of three.

What a kernel costs beside its products, in Python, to start and to wind down, it then costs once; a key projection
alone is also too small to keep a GPU's memory busy. autoawq merges query, key and value as well (its `fuse_layers`).
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from quantize.int4.weight import Int4Weight
from quantize.kernels.base import Int4Linear
from quantize.loading.device_map import Placement

ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Names that layers with one input have inside their module: of attention, of gated MLPs, and of experts.

autoawq's maps know them as well, but importing autoawq takes 150 MB and two seconds, which a loaded model has no other
use for.
"""


class MergedLinear(nn.Module):
    """Several layers' output features in one; `Part` hands out each layer's share of them."""

    def __init__(self, inner: Int4Linear, parts: int) -> None:
        super().__init__()
        self.inner = inner
        self._parts = parts
        self._x: Tensor | None = None
        self._out: Tensor | None = None
        self._taken = 0

    def take(self, x: Tensor, features: slice) -> Tensor:
        """These output features for x [..., in]: computed with the first part of an input, kept until the last."""
        if self._out is None or self._x is not x:
            self._x, self._out, self._taken = x, self.inner(x), 0
        out = self._out[..., features]
        self._taken += 1
        if self._taken == self._parts:
            self._x = self._out = None
        return out


class Part(nn.Module):
    """One of the layers in a MergedLinear: forward takes [..., in] and returns its [..., out], a view.

    All parts of a MergedLinear are called with the same tensor, one after another, and it is not changed in between.
    """

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
    that is called with another tensor computes anew, and costs what all parts together cost.
    """
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
    whole = Int4Weight(*(torch.cat([getattr(w, part) for w in weights]) for part in ("codes", "scales", "zeros")))
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return whole, None
    return whole, torch.cat([given.new_zeros(len(w.codes)) if bias is None else bias for w, bias in parts])


def replace_merged(model: nn.Module, sizes: Mapping[str, int], made: Int4Linear) -> None:
    """Put a prepared layer in the place of those that it stands for; sizes: each one's name and output features."""
    if len(sizes) == 1:
        model.set_submodule(next(iter(sizes)), made)
        return
    merged, start = MergedLinear(made, len(sizes)), 0
    for name, size in sizes.items():
        model.set_submodule(name, Part(merged, start, start + size))
        start += size
