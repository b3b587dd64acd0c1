"""PyTorch's own int4 kernel on CUDA (tinygemm): bfloat16 activations, weights packed for the tensor cores."""

import torch
from torch import Tensor

from quantize.int4.weight import Int4Weight
from quantize.kernels.base import Int4Linear, Kernel

INNER_K_TILES = 8


class TorchCudaLinear(Int4Linear):
    """Weights packed as `torch._convert_weight_to_int4pack` packs them; the arithmetic is that of the CPU's kernel."""

    packed: Tensor
    scale_and_zero: Tensor

    def __init__(self, weight: Int4Weight, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(weight, None if bias is None else bias.to(device, dtype))
        codes = weight.codes.to(device)
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        scales = weight.scales.to(device).t().float()
        shifts = (8 - weight.zeros.to(device).t().float()) * scales
        self.register_buffer("packed", torch._convert_weight_to_int4pack(pairs, INNER_K_TILES))
        self.register_buffer("scale_and_zero", torch.stack([scales, shifts], dim=-1).bfloat16().contiguous())

    def matmul(self, x: Tensor) -> Tensor:
        out = torch._weight_int4pack_mm(x.bfloat16(), self.packed, self.group_size, self.scale_and_zero)
        return out.to(x.dtype)


def _unsupported_reason(weight: Int4Weight, device: torch.device, dtype: torch.dtype) -> str | None:
    out_features, in_features = weight.codes.shape
    if device.type != "cuda":
        return "runs on CUDA"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    if out_features % 8 or in_features % (INNER_K_TILES * 16):
        wanted = f"output features in multiples of 8 and input features of {INNER_K_TILES * 16}"
        return f"needs {wanted}, the layer has {out_features} and {in_features}"
    return None


TORCH_CUDA = Kernel(
    name="torch-cuda",
    unsupported_reason=_unsupported_reason,
    prepare=TorchCudaLinear,
    describe=lambda tokens, dtype: "torch int4 (bfloat16)",
    compute_dtype=lambda tokens, dtype: torch.bfloat16,
)
