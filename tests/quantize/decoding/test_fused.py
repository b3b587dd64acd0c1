"""A decode step in fewer kernels computes what the model's own does, and leaves the model as it was."""

import contextlib
from collections import Counter
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantize.decoding.fused import FusedRotary, fused_steps, llama_like, plain_norms

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
SLOTS = 24


def model_of(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES), dtype=torch.float32).eval()


def fused(model: Any) -> contextlib.AbstractContextManager[None]:
    return fused_steps(plain_norms(model), llama_like(model))


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that reach a device as kernels of their own, views left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def step(model: Any) -> torch.Tensor:
    """The logits of a token behind a prompt, with a mask as quantize.decoding.static gives it."""
    prompt = torch.arange(10, 10 + SLOTS - 1).view(1, -1)
    cache = model(prompt, use_cache=True).past_key_values
    mask = torch.zeros((1, 1, 1, SLOTS))
    mask[..., 3] = torch.finfo(torch.float32).min
    out: torch.Tensor = model(torch.tensor([[7]]), attention_mask=mask, past_key_values=cache).logits
    return out


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"])
def test_it_computes_the_same_and_is_gone_afterwards(kind: str) -> None:
    model = model_of(kind)
    expected = step(model)
    with fused(model):
        found = step(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(step(model), expected)


@pytest.mark.parametrize(("kind", "norms", "rotary"), [("mistral", 7, 1), ("qwen3", 13, 1), ("gemma2", 0, 1)])
def test_the_plain_forms_are_known_and_no_others(kind: str, norms: int, rotary: int) -> None:
    model = model_of(kind)
    assert len(plain_norms(model)) == norms
    assert len(llama_like(model)) == rotary


def test_other_rotary_embeddings_are_left_alone() -> None:
    assert llama_like(model_of("phi3")) == []


def test_a_step_needs_fewer_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("mistral")
    norm = Mock(wraps=torch.nn.functional.rms_norm)  # on a CPU several operations, on a GPU one
    monkeypatch.setattr("torch.nn.functional.rms_norm", norm)
    with Counted() as own:
        step(model)
    with fused(model), Counted() as fewer:
        step(model)
    layers = 3
    assert norm.call_count == 2 * (2 * layers + 1)  # of the prompt and of the step
    assert own.calls["neg"] == 2 * 2 * layers
    assert fewer.calls["neg"] == 2  # the sign of the sine, once a pass
    assert fewer.calls["addcmul"] == 2 * layers
    assert fewer.calls["roll"] == 2 * layers


def test_a_rotary_embedding_of_part_of_a_head_runs_as_it_was() -> None:
    q, cos = torch.randn(1, 4, 1, 8), torch.randn(1, 1, 4)
    own = Mock()
    assert FusedRotary(own)(q, q, cos, cos) is own.return_value
    assert own.call_args.kwargs == {"unsqueeze_dim": 1}


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    from transformers.models.mistral import modeling_mistral

    model = model_of("mistral")
    before = modeling_mistral.apply_rotary_pos_emb

    def fail() -> None:
        assert modeling_mistral.apply_rotary_pos_emb is not before
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), fused(model):
        fail()
    assert modeling_mistral.apply_rotary_pos_emb is before
    assert not any("forward" in vars(module) for module in model.modules())
