"""A decode step in fewer kernels computes what the model's own does, and leaves the model as it was.

Run by tests/quantize/kernels/test_kernels.py with TRITON_INTERPRET=1.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quantize.decoding.fused import fused_rotary, fused_steps, fused_write, llama_like, plain_norms
from quantize.decoding.static import StaticDecoder, check_against_eager
from quantize.kernels.triton import launch

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


@contextlib.contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Counts the launches of each program inside."""
    launched: Counter[str] = Counter()

    def counted(program: Any, *rest: Any, **options: Any) -> None:
        launched[program.fn.__name__] += 1
        launch(program, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.decoding.fused.launch", counted)
        yield launched


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


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("kind", "dtype"), [("mistral", torch.float32), ("qwen3", torch.bfloat16)])
def test_decoding_on_a_static_cache_is_what_it_is_eagerly(kind: str, dtype: torch.dtype, batch: int) -> None:
    model = model_of(kind).to(dtype)
    prompt = torch.randint(0, 300, (batch, 9), generator=torch.Generator().manual_seed(0))
    with counted_launches() as launched:
        decoder = StaticDecoder(model, batch=batch, positions=16)
        assert not launched  # a prompt runs as it always does
        check_against_eager(decoder, model, prompt, 4, dtype)
    layers, steps = 3, 4
    norms = 13 if kind == "qwen3" else 7
    assert launched == {"norm_program": norms * steps, "rotary_program": layers * steps, "slot_program": layers * steps}


def test_the_parts_of_a_fused_projection_are_read_where_they_lie() -> None:
    whole = torch.randn((2, 1, (4 + 2 + 2) * 24))
    q, k, v = (part.view(2, 1, -1, 24).transpose(1, 2) for part in torch.split(whole, [96, 48, 48], dim=-1))
    angles = torch.randn((2, 1, 24))
    found = fused_rotary(Mock(), q, k, angles.cos(), angles.sin())
    for one, expected in zip(found, apply_rotary_pos_emb(q, k, angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(one, expected)
    kept_keys, kept_values = torch.zeros((2, 2, 5, 24)), torch.zeros((2, 2, 5, 24))
    fused_write(k, v, torch.tensor([3]), kept_keys, kept_values)
    assert torch.equal(kept_keys[:, :, 3:4], k)
    assert torch.equal(kept_values[:, :, 3:4], v)
    assert not kept_keys[:, :, [0, 1, 2, 4]].any()


def test_a_rotary_embedding_of_part_of_a_head_or_of_a_prompt_runs_as_it_was() -> None:
    for tokens, part in ((1, 4), (2, 8)):
        q, cos, own = torch.randn(1, 4, tokens, 8), torch.randn(1, tokens, part), Mock()
        assert fused_rotary(own, q, q, cos, cos) is own.return_value
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
