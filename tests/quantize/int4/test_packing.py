"""The layouts, bit for bit against autoawq's own packers."""

import pytest
import torch
from torch import Tensor, nn

from quantize.int4.layouts import LAYOUTS
from quantize.int4.packing import PACKERS, gemv_zeros_width, pack_gemm, pack_gemv
from quantize.int4.weight import Int4Weight, round_to_nearest
from quantize.quiet import quiet_libraries

with quiet_libraries():
    from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV
    from awq.modules.linear.gemv import calculate_zeros_width
    from awq.utils.packing_utils import dequantize_gemm

# (out features, in features, group size): square, wide, tall, groups that leave the last GEMV word part empty.
# Output features in 32s: autoawq's own packer drops what is beyond the last 32 of them.
SHAPES = [(64, 128, 32), (128, 64, 64), (32, 256, 128), (576, 576, 64), (96, 1536, 64), (192, 640, 128), (32, 96, 32)]


def random_weight(out_features: int, in_features: int, group_size: int, seed: int = 0) -> Int4Weight:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand((out_features, 1), generator=generator) * 0.1 + 0.001
    return round_to_nearest(torch.randn((out_features, in_features), generator=generator) * spread, group_size)


def linear_of(weight: Int4Weight) -> nn.Linear:
    out_features, in_features = weight.codes.shape
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight.data = weight.dequantize()
    return linear


@pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
def test_gemm_is_autoawqs_bit_for_bit(out_features: int, in_features: int, group_size: int) -> None:
    weight = random_weight(out_features, in_features, group_size)
    theirs = WQLinear_GEMM.from_linear(
        linear_of(weight),
        4,
        group_size,
        scales=weight.scales.float().t().contiguous(),
        zeros=weight.zeros.float().t().contiguous(),
    )
    ours = pack_gemm(weight)
    for name in ("qweight", "qzeros", "scales"):
        assert torch.equal(ours[name], getattr(theirs, name)), name
        assert ours[name].dtype == getattr(theirs, name).dtype


@pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
def test_gemv_is_autoawqs_bit_for_bit(out_features: int, in_features: int, group_size: int) -> None:
    weight = random_weight(out_features, in_features, group_size)
    theirs = WQLinear_GEMV.from_linear(
        linear_of(weight), 4, group_size, scales=weight.scales.float(), zeros=weight.zeros.float()
    )
    ours = pack_gemv(weight)
    for name in ("qweight", "qzeros", "scales"):
        assert torch.equal(ours[name], getattr(theirs, name)), name
        assert ours[name].dtype == getattr(theirs, name).dtype


@pytest.mark.parametrize("layout", sorted(PACKERS))
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
def test_unpacking_gives_back_the_integers(layout: str, out_features: int, in_features: int, group_size: int) -> None:
    weight = random_weight(out_features, in_features, group_size, seed=1)
    again = LAYOUTS[layout].unpack(PACKERS[layout](weight), in_features, {"group_size": group_size}).weight
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(again, name), getattr(weight, name)), name


def test_autoawq_dequantizes_our_gemm_tensors_to_our_weights() -> None:
    weight = random_weight(64, 256, 64)
    packed = pack_gemm(weight)
    theirs: Tensor = dequantize_gemm(packed["qweight"], packed["qzeros"], packed["scales"], 4, 64)
    assert torch.equal(theirs.t().float(), weight.dequantize(torch.float16).float())


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("in_features", [128, 576 * 2, 1536, 4096, 14336])
def test_gemv_width_is_autoawqs(in_features: int, group_size: int) -> None:
    assert gemv_zeros_width(in_features, group_size) == calculate_zeros_width(in_features, group_size)


def test_a_wrong_nibble_order_would_be_seen() -> None:
    weight = random_weight(64, 128, 64)
    packed = pack_gemm(weight)
    packed["qweight"] = packed["qweight"] << 4 | (packed["qweight"] >> 28 & 0xF)
    assert not torch.equal(LAYOUTS["GEMM"].unpack(packed, 128, {}).weight.codes, weight.codes)
