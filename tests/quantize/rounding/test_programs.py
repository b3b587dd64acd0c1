"""The Triton programs that choose codes, on a GPU: as torch's calls choose, but where two codes are equally near.

On a CPU interpreted_programs.py has them in Triton's interpreter.
"""

import pytest
import torch

from quantize.int4.weight import round_to_nearest
from quantize.rounding import gptq
from quantize.rounding.gptq import Target, round_with_feedback, sweep


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("rows", "features", "group_size"), [(100, 192, 64), (256, 1024, 128), (45, 96, 32)])
def test_the_same_codes(rows: int, features: int, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    weight, inputs = (torch.randn(n, features, device="cuda", generator=generator) for n in (rows, 2 * features))
    inputs += inputs.roll(1, 1)
    gram = inputs.t() @ inputs / len(inputs)
    nearest, target = round_to_nearest(weight, group_size), Target.of(gram)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return round_with_feedback(weight, target, group_size).codes, sweep(nearest, weight, gram).codes

    found = both()
    monkeypatch.setattr(gptq, "no_programs_reason", lambda device: "not now")
    for ours, theirs in zip(found, both(), strict=True):
        assert float((ours == theirs).float().mean()) > 0.99
