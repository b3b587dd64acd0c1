"""A layer as a CUDA graph, with a stand-in for CUDA: what a replay does not do anew is no measurement."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.lab.crossover.measure import captured


class FakeGraph:
    """A replay does the work again into the same outputs, or nothing."""

    holds_all = True
    outputs_of: Any

    def replay(self) -> None:
        if FakeGraph.holds_all:
            work, out = FakeGraph.outputs_of
            out.copy_(work())


@pytest.fixture
def recording(recording: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    recording.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    return recording


@pytest.mark.parametrize("holds_all", [True, False])
@torch.no_grad()
def test_a_graph_that_leaves_a_kernel_out_is_refused(recording: pytest.MonkeyPatch, holds_all: bool) -> None:
    x, linear = torch.randn(1, 3, 16), nn.Linear(16, 8, bias=False)
    before = x.clone()

    def work() -> Tensor:
        out: Tensor = linear(x)
        FakeGraph.outputs_of = ((lambda: linear(x)), out)
        return out

    recording.setattr(FakeGraph, "holds_all", holds_all)
    refused = contextlib.nullcontext() if holds_all else pytest.raises(RuntimeError, match="does not hold all")
    with refused:
        captured(work, [x, x])
    assert torch.equal(x, before)
