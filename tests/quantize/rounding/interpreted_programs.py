"""The Triton programs choose the codes that torch's calls choose, but where two are equally near.

Run by tests/quantize/kernels/test_kernels.py with TRITON_INTERPRET=1.
"""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from quantize.int4.weight import round_to_nearest
from quantize.kernels.triton import no_programs_reason
from quantize.rounding import gptq
from quantize.rounding.gptq import Grid, Target, gptq_round, round_with_feedback, sweep

ROWS, FEATURES, GROUP = 45, 192, 32
LEVELS = torch.tensor([-1.0, -0.7, -0.53, -0.4, -0.29, -0.19, -0.1, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.57, 0.73, 1.0])


@pytest.fixture(params=["no pull", "pull"])
def given(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight, a Gram matrix of correlated inputs, and what pulls."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((ROWS, FEATURES), generator=generator)
    inputs = torch.randn((400, FEATURES), generator=generator) @ torch.randn((FEATURES, FEATURES), generator=generator)
    gram = inputs.t() @ inputs / len(inputs)
    return weight, gram, 0.05 * weight @ gram if request.param == "pull" else None


Made = TypeVar("Made")


def both(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Made]) -> tuple[Made, Made]:
    """What it gives with the programs, and without."""
    assert no_programs_reason(torch.device("cpu")) is None
    found = work()
    monkeypatch.setattr(gptq, "no_programs_reason", lambda device: "not now")
    return found, work()


def test_feedback(given: tuple[Tensor, Tensor, Tensor | None], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, pull = given
    target = Target.of(gram)
    found, expected = both(monkeypatch, lambda: round_with_feedback(weight, target, GROUP, None, pull).codes)
    assert (found == expected).float().mean() > 0.99
    assert not torch.equal(found, round_to_nearest(weight, GROUP).codes)


def test_feedback_to_levels(given: tuple[Tensor, Tensor, Tensor | None], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, pull = given
    above = torch.cat([(LEVELS[1:] + LEVELS[:-1]) / 2, torch.tensor([torch.inf])])
    table = torch.stack([LEVELS, torch.arange(16).float().flip(0), above])
    scales = weight.view(ROWS, -1, GROUP).abs().amax(dim=-1).t().contiguous()
    grid = Grid(GROUP, scales, table, has_levels=True)
    found, expected = both(monkeypatch, lambda: gptq_round(weight, Target.of(gram), grid, pull))
    assert (found == expected).float().mean() > 0.99
    assert {*expected.flatten().tolist()} == {*range(16)}


def test_descent(given: tuple[Tensor, Tensor, Tensor | None], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, pull = given
    start = round_to_nearest(weight, GROUP)
    found, expected = both(monkeypatch, lambda: sweep(start, weight, gram, pull))
    assert (found.codes == expected.codes).float().mean() > 0.99
    assert torch.allclose(found.scales, expected.scales, rtol=1e-2)
    assert not torch.equal(found.codes, start.codes)
