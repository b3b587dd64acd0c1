"""PyTorch's own int4 kernel for CPUs, its packed weights dequantized for long prompts."""

import functools

import torch
from torch import Tensor

from quantize.int4.weight import Int4Weight
from quantize.kernels.base import Int4Linear, Kernel

LONG_PROMPT_TOKENS = 96  # from here on, dequantizing once and multiplying is no slower than the int4 kernel
ROW_BLOCKS = (64, 32)  # rows that are packed together: with AVX-512, with AVX2
COPY_WEIGHTS = 2**19  # dequantized at a time: what stays near the processor until it is multiplied with
INT4_DTYPE = torch.bfloat16  # the kernel is fast in it alone, and adds up in float32


def scale_and_zero(weight: Int4Weight) -> Tensor:
    """The kernel computes (code - 8) * scale + zero' a group, so zero' = (8 - zero) * scale: [groups, out, 2]."""
    scales = weight.scales.t().float()
    return torch.stack([scales, (8 - weight.zeros.t().float()) * scales], dim=-1).to(INT4_DTYPE).contiguous()


class TorchCpuLinear(Int4Linear):
    """One copy of the weights, packed as `torch._convert_weight_to_int4pack_for_cpu` packs them, serves both ways."""

    packed: Tensor
    scale_and_zero: Tensor
    scales: Tensor

    def __init__(self, weight: Int4Weight, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(weight, None if bias is None else bias.to(dtype))
        self.register_buffer("packed", torch._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32), 1))
        self.register_buffer("scale_and_zero", scale_and_zero(weight))
        self.register_buffer("scales", weight.scales.t().contiguous())

    def matmul(self, x: Tensor) -> Tensor:
        if x.shape[0] < LONG_PROMPT_TOKENS:
            out = torch._weight_int4pack_mm_for_cpu(x.to(INT4_DTYPE), self.packed, self.group_size, self.scale_and_zero)
            return out.to(x.dtype)
        scale, shift = self.scale_and_zero.float().unbind(dim=-1)
        scales = self.scales.float()
        # Minus zero times scale. Zeros are whole numbers, so they come back exactly from the rounded pair.
        shifts = (shift / scale - 8).round_().mul_(scales).unsqueeze(1)
        out = x.new_empty((x.shape[0], self.out_features))
        many = max(1, COPY_WEIGHTS // (self.in_features * row_block())) * row_block()
        for rows in (slice(start, start + many) for start in range(0, self.out_features, many)):
            weight = unpack_int4pack(self.packed[rows], self.in_features)  # float32 [in, rows]
            grouped = weight.view(-1, self.group_size, weight.shape[1])
            # In one pass, and exact: each product is of 15 bits, and so is their sum of the float32's 24.
            torch.addcmul(shifts[..., rows], grouped, scales.unsqueeze(1)[..., rows], out=grouped)
            torch.mm(x, weight.to(x.dtype), out=out[:, rows])
        return out


@functools.cache
def row_block() -> int:
    """How many rows torch packs together on this processor; 0 where it packs in another way."""
    probe = torch.arange(max(ROW_BLOCKS) * 32, dtype=torch.int32).view(-1, 32) * 7 // 3 % 16
    packed = torch._convert_weight_to_int4pack_for_cpu(probe, 1)
    return next((rows for rows in ROW_BLOCKS if torch.equal(unpack_int4pack(packed, 32, rows).t().int(), probe)), 0)


def unpack_int4pack(packed: Tensor, in_features: int, rows: int | None = None) -> Tensor:
    """Undo `torch._convert_weight_to_int4pack_for_cpu`: uint8 [out, in / 2] -> float32 codes [in, out].

    Rows are packed in blocks of `rows` (None: as this processor does), feature by feature: the low half-bytes hold the
    block's first half, the high ones its second. Rows left over are packed in pairs (ATen's int4mm_kernel.cpp)."""
    rows, out_features = row_block() if rows is None else rows, packed.shape[0]
    whole = out_features // rows * rows
    codes = torch.empty((in_features, out_features), dtype=torch.float32)
    flat = packed.view(-1)
    blocks = flat[: whole * in_features // 2].view(whole // rows, in_features, rows // 2).transpose(0, 1)
    pairs = flat[whole * in_features // 2 :].view(in_features, (out_features - whole) // 2, 1)
    for halved, target in ((blocks, codes[:, :whole]), (pairs, codes[:, whole:])):
        halves = target.view(in_features, halved.shape[1], 2, halved.shape[2])
        halves[:, :, 0].copy_(halved & 0xF)
        halves[:, :, 1].copy_(halved >> 4)
    return codes


def _unsupported_on_cpu(weight: Int4Weight, device: torch.device, dtype: torch.dtype) -> str | None:
    out_features, in_features = weight.codes.shape
    if device.type != "cpu":
        return "runs on a CPU"
    if out_features % 16 or in_features % 2:
        return f"needs output features in sixteens, the layer has {out_features}"
    if not row_block():
        return "this CPU's packing is not one that quantable can unpack"
    return None


TORCH_CPU = Kernel(
    name="torch-cpu",
    unsupported_reason=_unsupported_on_cpu,
    prepare=TorchCpuLinear,
    way=lambda tokens: "torch int4" if tokens < LONG_PROMPT_TOKENS else "dequantize + matmul",
    compute_dtype=lambda tokens, dtype: INT4_DTYPE if tokens < LONG_PROMPT_TOKENS else dtype,
)
