"""A model taken apart computes what it computed, and every tensor finds its way from the files and back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from quantize.model.architecture import architecture_of
from quantize.model.layer_calls import runnable
from quantize.model.names import left_in_half, linear_layers
from quantize.model.pretrained import empty_model, model_of
from quantize.model.skeleton import Skeleton, kept_names
from quantize.quiet import quiet_libraries
from quantize.weights import open_weights

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48, "moe_layers": [0, 1]},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"new_decoder_architecture": True, "head_dim": None},
    "gpt_neox": {},
    "gemma2": {"tie_word_embeddings": True},
}
WRAPPED = "llava"


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """A small random model of a type in float32, as transformers saves it."""

    def save(kind: str) -> Path:
        torch.manual_seed(0)
        with quiet_libraries():
            if kind == WRAPPED:
                sees = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32}
                sees |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
                text = {**SMALL, "model_type": "llama"}
                config = transformers.LlavaConfig(text_config=text, vision_config=sees, image_token_index=5)
                model = transformers.LlavaForConditionalGeneration(config)
            else:
                stated = {key: value for key, value in (SMALL | KINDS[kind]).items() if value is not None}
                config = transformers.AutoConfig.for_model(kind, **stated)
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            model.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.arange(40).view(2, 20) + 8, use_cache=False).logits
    return found


def skeleton_of(folder: Path) -> Skeleton:
    with quiet_libraries():
        return Skeleton.of(empty_model(folder), open_weights(folder))


@pytest.mark.parametrize("kind", [*KINDS, WRAPPED])
def test_taken_apart_and_filled_it_gives_the_same(kind: str, saved: Callable[[str], Path]) -> None:
    folder = saved(kind)
    with quiet_libraries():
        before = logits(model_of(folder, dtype=torch.float32).eval())
        skeleton = skeleton_of(folder)
        skeleton.fill(skeleton.model, "", torch.device("cpu"))
        skeleton.model.tie_weights()
        after = logits(skeleton.model)
    assert float((after - before).norm() / before.norm()) < 1e-6


@pytest.mark.parametrize(
    ("kind", "linear", "stored"),
    [
        ("mixtral", "model.layers.1.mlp.experts.3.up_proj", "model.layers.1.block_sparse_moe.experts.3.w3"),
        ("qwen3_moe", "model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.experts.3.up_proj"),
        ("gpt_oss", "model.layers.0.mlp.experts.2.gate_proj", "model.layers.0.mlp.experts.2.gate_proj"),
        ("gpt_neox", "lm_head", "embed_out"),
        ("gpt2", "transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_attn"),
    ],
)
def test_a_checkpoint_names_a_layer_as_the_source_does(
    kind: str, linear: str, stored: str, saved: Callable[[str], Path]
) -> None:
    assert skeleton_of(saved(kind)).stored[f"{linear}.weight"] == f"{stored}.weight"


@pytest.mark.parametrize("kind", [*KINDS, WRAPPED])
def test_names_in_files_lead_back_to_where_they_came_from(kind: str, saved: Callable[[str], Path]) -> None:
    folder = saved(kind)
    skeleton = skeleton_of(folder)
    held = [name for name in skeleton.stored if name in skeleton]
    with quiet_libraries():
        again = Skeleton.of(empty_model(folder), skeleton.weights, [skeleton.stored[name] for name in held])
    assert {name: again.stored[name] for name in held} == {name: skeleton.stored[name] for name in held}


def test_what_stays_in_half_precision_is_named_in_full(saved: Callable[[str], Path]) -> None:
    skeleton = skeleton_of(saved("mixtral"))
    names = {name for name, _, _ in architecture_of(skeleton.model).shapes()}
    assert left_in_half(skeleton.model, names) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert kept_names(skeleton, names)[:2] == ("model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate")


def test_of_a_wrapper_only_the_language_model_is_quantized(saved: Callable[[str], Path], tmp_path: Path) -> None:
    with quiet_libraries():
        model = empty_model(saved(WRAPPED))
    names = {name for name, _, _ in architecture_of(model).shapes()}
    assert len(names) == 14
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert left_in_half(model, names) == ["model.vision_tower", "model.multi_modal_projector"]
    kept = kept_names(skeleton_of(tmp_path / WRAPPED), names)
    assert kept == ("vision_tower", "model.vision_tower", "multi_modal_projector", "model.multi_modal_projector")
    assert set(linear_layers(model)) == names


def test_a_linear_layer_that_is_read_and_never_called_is_kept(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=8, pad_token_id=0
    )
    with quiet_libraries():
        transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
        found = runnable(skeleton_of(tmp_path), torch.device("cpu"))
    assert "mixer.dt_proj" not in found.linears(1)
    assert {"mixer.in_proj", "mixer.x_proj", "mixer.out_proj"} == found.linears(1).keys()
    assert found.kept == {"backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"}


def test_a_router_is_kept_whatever_stands_beside_its_experts(tmp_path: Path) -> None:
    config = transformers.HunYuanMoEV1Config(
        **{**SMALL, "hidden_size": 64, "head_dim": 16}, num_experts=8, moe_topk=2, moe_intermediate_size=32
    )
    with quiet_libraries():
        transformers.HunYuanMoEV1ForCausalLM(config).save_pretrained(tmp_path)
    kept = architecture_of(skeleton_of(tmp_path).model).kept
    assert kept == {f"model.layers.{index}.mlp.gate.wg" for index in range(2)}


def test_a_linear_layer_whose_weight_files_name_otherwise_is_kept(saved: Callable[[str], Path]) -> None:
    """A checkpoint would name its packed parts beside a weight that is no `.weight`, and not find them again."""
    skeleton = skeleton_of(saved("gpt_neox"))
    odd = "gpt_neox.layers.1.attention.dense"
    renamed = replace(skeleton, stored=skeleton.stored | {f"{odd}.weight": "layers.1.weight_proj"})
    with quiet_libraries():
        assert runnable(renamed, torch.device("cpu")).kept == {odd}
