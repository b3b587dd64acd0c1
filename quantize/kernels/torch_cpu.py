"""PyTorch's own int4 kernel on a CPU, and for long prompts its packed weights dequantized into a matrix product."""

import functools

import torch
from torch import Tensor

from quantize.int4.weight import Int4Weight
from quantize.kernels.base import Int4Linear, Kernel, dtype_name

LONG_PROMPT_TOKENS = 64
"""From this many tokens on, dequantizing once and multiplying in float32 is no slower than the int4 kernel."""

ROW_BLOCKS = (64, 32)
"""Rows that are packed together: with AVX-512, with AVX2."""

INT4_DTYPE = torch.bfloat16
"""The int4 kernel is fast in bfloat16 alone; it adds up in float32."""


class TorchCpuLinear(Int4Linear):
    """One copy of the weights, packed as `torch._convert_weight_to_int4pack_for_cpu` packs them, serves both ways.

    The kernel computes (code - 8) * scale + zero' a group, so zero' = (8 - zero) * scale.
    """

    packed: Tensor
    scale_and_zero: Tensor
    scales: Tensor

    def __init__(self, weight: Int4Weight, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(weight, None if bias is None else bias.to(dtype))
        scales = weight.scales.t().float()
        shifts = (8 - weight.zeros.t().float()) * scales
        packed = torch._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32), 1)
        self.register_buffer("packed", packed)
        self.register_buffer("scale_and_zero", torch.stack([scales, shifts], dim=-1).to(INT4_DTYPE).contiguous())
        self.register_buffer("scales", weight.scales.t().contiguous())

    def matmul(self, x: Tensor) -> Tensor:
        if x.shape[0] < LONG_PROMPT_TOKENS:
            out = torch._weight_int4pack_mm_for_cpu(x.to(INT4_DTYPE), self.packed, self.group_size, self.scale_and_zero)
            return out.to(x.dtype)
        return x @ self.dequantized_t().to(x.dtype)

    def dequantized_t(self) -> Tensor:
        """The weight transposed, float32 [in, out], from the packed bytes and the exact float16 scales."""
        weight = unpack_int4pack(self.packed, self.in_features)
        grouped = weight.view(-1, self.group_size, self.out_features)
        grouped.sub_(self.zeros().unsqueeze(1)).mul_(self.scales.unsqueeze(1))
        return weight

    def zeros(self) -> Tensor:
        """The zero points, float32 [groups, out]: whole numbers, so they come back exactly from the rounded pair."""
        scale, shift = self.scale_and_zero.float().unbind(dim=-1)
        return (8 - shift / scale).round_()


@functools.cache
def row_block() -> int:
    """How many rows torch packs together on this processor; 0 where it packs in another way."""
    probe = torch.arange(max(ROW_BLOCKS) * 32, dtype=torch.int32).view(-1, 32) * 7 // 3 % 16
    packed = torch._convert_weight_to_int4pack_for_cpu(probe, 1)
    return next((rows for rows in ROW_BLOCKS if torch.equal(unpack_int4pack(packed, 32, rows).t().int(), probe)), 0)


def unpack_int4pack(packed: Tensor, in_features: int, rows: int | None = None) -> Tensor:
    """Undo `torch._convert_weight_to_int4pack_for_cpu`: uint8 [out, in / 2] -> float32 codes [in, out].

    Rows are packed in blocks of `rows` (None: as this processor does), feature by feature: the low half-bytes hold the
    block's first half, the high ones its second. What is left over of the rows is packed in pairs.
    (ATen/native/cpu/int4mm_kernel.cpp.)
    """
    rows = row_block() if rows is None else rows
    out_features = packed.shape[0]
    whole = out_features // rows * rows
    codes = torch.empty((in_features, out_features), dtype=torch.float32)
    flat = packed.view(-1)
    if whole:
        blocks = flat[: whole * in_features // 2].view(-1, in_features, rows // 2).transpose(0, 1)
        target = codes[:, :whole].view(in_features, -1, 2, rows // 2)
        target[:, :, 0].copy_(blocks & 0xF)
        target[:, :, 1].copy_(blocks >> 4)
    if whole < out_features:
        pairs = flat[whole * in_features // 2 :].view(in_features, -1)
        tail = codes[:, whole:].view(in_features, -1, 2)
        tail[:, :, 0].copy_(pairs & 0xF)
        tail[:, :, 1].copy_(pairs >> 4)
    return codes


def _unsupported_reason(weight: Int4Weight, device: torch.device, dtype: torch.dtype) -> str | None:
    out_features, in_features = weight.codes.shape
    if device.type != "cpu":
        return "runs on a CPU"
    if out_features % 16 or in_features % 2:
        return f"needs output features in sixteens, the layer has {out_features}"
    if not row_block():
        return "this CPU's packing is not one that quantable can unpack"
    return None


def _describe(tokens: int, dtype: torch.dtype) -> str:
    if tokens < LONG_PROMPT_TOKENS:
        return f"torch int4 ({dtype_name(INT4_DTYPE)})"
    return f"dequantize + matmul ({dtype_name(dtype)})"


TORCH_CPU = Kernel(
    name="torch-cpu",
    unsupported_reason=_unsupported_reason,
    prepare=TorchCpuLinear,
    describe=_describe,
    compute_dtype=lambda tokens, dtype: INT4_DTYPE if tokens < LONG_PROMPT_TOKENS else dtype,
)
