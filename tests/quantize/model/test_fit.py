"""A folder's weights fit the model of its config, or one line names a tensor and what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.errors import UserError
from quantize.model.fit import fitting_model
from quantize.quiet import quiet_libraries
from quantize.weights import open_weights
from tests.architectures.tiny_models import architectures, tiny_model

Tensors = dict[str, Tensor]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt_neox": {},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "falcon": {"new_decoder_architecture": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """A small random model of a type, as transformers saves it."""

    def save(kind: str) -> Path:
        config = transformers.AutoConfig.for_model(kind, **(SMALL | KINDS[kind]))
        torch.manual_seed(0)
        with quiet_libraries():
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            model.half().save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


def write(folder: Path, tensors: Tensors, **config: Any) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def read(folder: Path) -> Tensors:
    tensors: Tensors = load_file(folder / "model.safetensors")
    return tensors


def said_of(folder: Path) -> list[str]:
    said: list[str] = []
    fitting_model(folder, open_weights(folder), said.append)
    return said


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        said_of(folder)
    return str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_fits_and_every_tensor_and_shape_is_asked_for(
    kind: str, saved: Callable[[str], Path]
) -> None:
    folder = saved(kind)
    whole = read(folder)
    assert said_of(folder) == []
    for name, tensor in whole.items():
        write(folder, {other: kept for other, kept in whole.items() if other != name})
        assert refusal(folder), name
        write(folder, whole | {name: torch.cat([tensor, tensor[:1]])})
        assert refusal(folder), name


LORA = "base_model.model.layers.0.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("without", "more", "config", "said"),
    [
        ("lm_head", {}, {}, "the weights lack lm_head.weight, which config.json asks for"),
        ("nothing", {}, {"num_hidden_layers": 3}, "lack model.layers.2.input_layernorm.weight and 8 more"),
        ("nothing", {}, {"num_hidden_layers": 1}, "has no place for model.layers.1.input_layernorm.weight and 8 more"),
        ("nothing", {}, {"hidden_size": 64}, "of shape [64, 32] where config.json asks for [64, 64]"),
        ("nothing", {LORA: torch.zeros(4, 32)}, {}, f"has no place for {LORA}: the folder holds another model, or an"),
        ("nothing", {}, {"pad_token_id": 64}, "transformers cannot read config.json"),
        ("nothing", {}, {"num_hidden_layers": 10**9}, "num_hidden_layers is not between 1 and 10000"),
        ("nothing", {}, {"num_hidden_layers": 0}, "num_hidden_layers is not between 1 and 10000"),
        ("nothing", {}, {"hidden_size": "wide"}, "transformers cannot read config.json"),
        ("nothing", {}, {"eos_token_id": {"a": 1}}, "transformers cannot read config.json"),
        ("nothing", {}, {"model_type": "t5"}, "transformers cannot read config.json"),
        ("nothing", {}, {"model_type": "nosuch"}, "transformers cannot read config.json"),
    ],
)
def test_what_does_not_fit_is_named(
    without: str, more: Tensors, config: dict[str, Any], said: str, saved: Callable[[str], Path]
) -> None:
    folder = saved("llama")
    write(folder, {name: tensor for name, tensor in read(folder).items() if without not in name} | more, **config)
    assert said in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int8, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_weights_are_floating_point(dtype: torch.dtype, saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    tensors = read(folder)
    write(folder, tensors | {"model.norm.weight": tensors["model.norm.weight"].to(dtype)})
    assert "weight model.norm.weight is of type" in refusal(folder)


def test_a_model_without_its_prefix_fits_and_one_without_its_head_does_not(saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    bare = {name.removeprefix("model."): tensor for name, tensor in read(folder).items()}
    write(folder, bare)
    assert said_of(folder) == []
    del bare["lm_head.weight"]
    write(folder, bare)
    assert "lack lm_head.weight" in refusal(folder)


def test_tied_weights_that_differ_are_not_tied(saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    tensors = read(folder)
    write(folder, tensors, tie_word_embeddings=True)
    [line] = said_of(folder)
    assert line.startswith("lm_head.weight differs from model.embed_tokens.weight, to which config.json ties it")
    model = fitting_model(folder, open_weights(folder), lambda line: None)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("absent", ["lm_head.weight", "model.embed_tokens.weight", None])
def test_tied_weights_may_stand_in_the_files_once_or_twice(absent: str | None, saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    tensors = read(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors.pop(absent or "", None)
    write(folder, tensors, tie_word_embeddings=True)
    assert said_of(folder) == []


def test_conversions_that_run_on_the_cpu_alone_and_integers_are_checked_too(tmp_path: Path) -> None:
    if "qwen4_exp_text" not in architectures():
        pytest.skip("this transformers has no qwen4_exp_text")
    with quiet_libraries():
        tiny_model("qwen4_exp_text").half().save_pretrained(tmp_path)
    assert said_of(tmp_path) == []
