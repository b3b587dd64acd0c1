"""Groupwise 4-bit rounding, from first principles."""

import pytest
import torch

from quantize.int4.weight import Int4Weight, minmax_range, round_to_nearest, rounded


def test_every_weight_is_within_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 256)
    quantized = round_to_nearest(weight, 64)
    step = quantized.scales.float().repeat_interleave(64, dim=1)
    # The zero point is rounded too, so the ends of a range may be off by half a step more.
    assert float(((quantized.dequantize() - weight).abs() / step).max()) <= 1.001
    assert float(((quantized.dequantize() - weight).abs() / step).median()) <= 0.3


def test_values_on_the_grid_come_back_exactly() -> None:
    codes = torch.arange(16).repeat(4, 2).float()
    weight = (codes - 5) * 0.25
    quantized = round_to_nearest(weight, 16)
    assert torch.equal(quantized.dequantize(), weight)
    assert quantized.group_size == 16


def test_zero_is_always_on_the_grid() -> None:
    positive = torch.rand(8, 64) + 3
    scales, zeros = minmax_range(positive.view(8, 1, 64))
    assert torch.equal(zeros, torch.zeros_like(zeros))
    torch.testing.assert_close(scales.view(8) * 15, positive.amax(dim=1), rtol=1e-3, atol=0)


def test_equal_weights_and_zeros_do_not_divide_by_zero() -> None:
    for value in (0.0, 1e-9, -2.5):
        groups = torch.full((2, 3, 32), value)
        back = rounded(groups, *minmax_range(groups))
        assert torch.isfinite(back).all()
        assert torch.allclose(back, torch.full_like(back, value), rtol=1e-3, atol=1e-6)


def test_clip_bounds_the_range() -> None:
    weight = torch.cat([torch.full((1, 31), 0.1), torch.full((1, 1), 8.0)], dim=1)
    clipped = round_to_nearest(weight, 32, clip=torch.full((1, 1), 0.5)).dequantize()
    assert float(clipped.max()) == pytest.approx(0.5, rel=1e-3)
    assert float((clipped[0, :31] - 0.1).abs().max()) < 0.02


def test_scales_are_what_float16_holds() -> None:
    torch.manual_seed(1)
    scales, _ = minmax_range(torch.randn(64, 4, 64))
    assert torch.equal(scales, scales.half().float())


def test_shapes_that_cannot_be_are_rejected() -> None:
    codes = torch.zeros((4, 64), dtype=torch.uint8)
    with pytest.raises(ValueError, match="groups"):
        Int4Weight(codes, torch.ones(4, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match="scales and zeros"):
        Int4Weight(codes, torch.ones(4, 2), torch.ones(4, 1))
