"""How the files of a checkpoint hold a 4-bit layer: AWQ's two layouts, GPTQ's, compressed-tensors' and GGUF's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantize.errors import UserError
from quantize.int4.packing import BLOCK, GEMM_ORDER, PLAIN_ORDER, Q4_1_PART, gemv_zeros_width, unpack_words
from quantize.int4.weight import Int4Weight
from quantize.variant import GROUP_SIZES

Parts = Mapping[str, Tensor]
"""The tensors of one layer, by what follows the layer's name."""

MIDDLE = 8  # the zero point of symmetric codes: -8 to 7 are stored as 0 to 15


@dataclass(frozen=True)
class StoredLayer:
    """A layer as the files have it. order: which input each column of the codes belongs to, None for 0, 1, 2, ..."""

    weight: Int4Weight
    order: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """One way to store 4-bit layers.

    parts:  what follows a layer's name in the names of its tensors; the first is there for every 4-bit layer.
    unpack: (parts that are there, input features, the config's quantization) -> the layer."""

    parts: tuple[str, ...]
    unpack: Callable[[Parts, int, Mapping[str, Any]], StoredLayer]


def group_size_of(config: Mapping[str, Any]) -> int | None:
    """Of a checkpoint's quantization config; None for one group a row, and where it does not say."""
    size = next((config[key] for key in ("group_size", "q_group_size") if key in config), None)
    groups: Mapping[str, Any] = config.get("config_groups") or {}
    sizes = [size, *((group.get("weights") or {}).get("group_size") for group in groups.values())]
    return next((one for one in sizes if isinstance(one, int) and one > 0), None)


def format_of(config: Mapping[str, Any]) -> str:
    """The way of storing that a quantization config names, in lower case; makers use three keys for it."""
    return next((str(config[key]).lower() for key in ("version", "checkpoint_format", "format") if config.get(key)), "")


def regrouped(weight: Int4Weight, size: int | None = None) -> Int4Weight:
    """The same weight in groups of so many, by default of what kernels know: each of its own becomes several equal."""
    size = size or next((one for one in GROUP_SIZES if weight.group_size % one == 0), weight.group_size)
    times = weight.group_size // size
    return replace(weight, **{name: getattr(weight, name).repeat_interleave(times, 1) for name in ("scales", "zeros")})


def in_order(weight: Int4Weight, group_of_input: Tensor | None) -> StoredLayer:
    """A layer whose inputs belong to these groups (int [in], GPTQ's g_idx), its columns brought together by group."""
    plain = torch.arange(len(weight.codes[0])) // weight.group_size
    if group_of_input is None or not len(group_of_input) or torch.equal(group_of_input.long(), plain):
        return StoredLayer(regrouped(weight))
    order = torch.argsort(group_of_input.long(), stable=True)
    if not torch.equal(group_of_input.long()[order], plain):
        groups = f"{weight.scales.shape[1]} groups are not all of {weight.group_size} inputs"
        raise UserError(f"its {groups}, which no kernel here can run")
    return StoredLayer(regrouped(replace(weight, codes=weight.codes[:, order].contiguous())), order)


def _unpack_gemm(parts: Parts, in_features: int, config: Mapping[str, Any]) -> StoredLayer:
    codes, scales = unpack_words(parts["qweight"], GEMM_ORDER).t().contiguous(), parts["scales"].t().contiguous()
    zeros = torch.full_like(scales, MIDDLE, dtype=torch.uint8)
    if "qzeros" in parts:
        zeros = unpack_words(parts["qzeros"], GEMM_ORDER).t().contiguous()
    return in_order(Int4Weight(codes, scales, zeros), None)


def _unpack_gemv(parts: Parts, in_features: int, config: Mapping[str, Any]) -> StoredLayer:
    """The sizes tell the padding from the groups."""
    size = group_size_of(config) or in_features
    groups, width = in_features // size, gemv_zeros_width(in_features, size)
    if parts["qzeros"].shape[1] != width:
        raise UserError(f"its zero points are {parts['qzeros'].shape[1]} words wide, groups of {size} have {width}")
    codes, zeros = (unpack_words(parts[name], PLAIN_ORDER) for name in ("qweight", "qzeros"))
    return in_order(Int4Weight(codes, parts["scales"][:, :groups].contiguous(), zeros[:, :groups].contiguous()), None)


def _unpack_gptq(parts: Parts, in_features: int, config: Mapping[str, Any]) -> StoredLayer:
    """qweight int32 [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in].

    The first version of the format stores zero points less 1."""
    codes = unpack_words(parts["qweight"].t().contiguous(), PLAIN_ORDER)
    zeros = unpack_words(parts["qzeros"], PLAIN_ORDER).t().contiguous()
    shift = 0 if format_of(config) == "gptq_v2" else 1
    return in_order(Int4Weight(codes, parts["scales"].t().contiguous(), zeros + shift), parts.get("g_idx"))


def _unpack_ct(parts: Parts, in_features: int, config: Mapping[str, Any]) -> StoredLayer:
    """weight_packed int32 [out, in / 8], weight_scale [out, groups], weight_zero_point int32 [out / 8, groups]."""
    codes = unpack_words(parts["weight_packed"], PLAIN_ORDER)[:, :in_features].contiguous()
    scales, rows = parts["weight_scale"].contiguous(), len(codes)
    zeros = torch.full_like(scales, MIDDLE, dtype=torch.uint8)
    if "weight_zero_point" in parts:
        zeros = unpack_words(parts["weight_zero_point"].t().contiguous(), PLAIN_ORDER)[:, :rows].t().contiguous()
    return in_order(Int4Weight(codes, scales, zeros), parts.get("weight_g_idx"))


def _unpack_gguf(parts: Parts, in_features: int, config: Mapping[str, Any]) -> StoredLayer:
    """Q4_1's blocks of 32 inputs, as many to a group as the config says."""
    (blocks,) = parts.values()
    blocks = blocks.view(len(blocks), in_features // BLOCK, -1)
    scales, offsets = blocks[:, :, :4].contiguous().view(torch.float16).float().unbind(-1)
    codes = torch.cat((blocks[:, :, 4:] & 0xF, blocks[:, :, 4:] >> 4), -1).flatten(1)
    zeros, each = (-offsets / scales).round().to(torch.uint8), (group_size_of(config) or BLOCK) // BLOCK
    return in_order(Int4Weight(codes, scales[:, ::each].half(), zeros[:, ::each].contiguous()), None)


LAYOUTS = {
    "GEMM": Layout(("qweight", "qzeros", "scales"), _unpack_gemm),
    "GEMV": Layout(("qweight", "qzeros", "scales"), _unpack_gemv),
    "GPTQ": Layout(("qweight", "qzeros", "scales", "g_idx"), _unpack_gptq),
    "GGUF": Layout((Q4_1_PART,), _unpack_gguf),
    "CT": Layout(("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"), _unpack_ct),
}
"""By what a Variant calls its `version`."""
