"""What of a source's folder becomes of a checkpoint's, and which sources are refused before anything is made."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantize
from quantize.building import assemble
from quantize.building.job import BuildOptions
from quantize.checkpoint import Manifest
from quantize.cli import main
from quantize.errors import UserError
from quantize.quiet import quiet_libraries

QUICK = BuildOptions(blocks=2, block_tokens=32)


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "tiny"))


def made(folder: Path, variant: str, out: str = "out") -> tuple[Path, Manifest]:
    [built] = quantize.quantize(str(folder), [variant], folder.parent / out, options=QUICK)
    return built.checkpoint.path, built.checkpoint.manifest


def edited(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_licence_and_card_come_along_and_what_names_code_does_not(folder: Path) -> None:
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("a card")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        edited(folder / name, auto_map={"AutoConfig": "own.C"})
    path, manifest = made(folder, "fp16")
    assert (path / "LICENSE").read_text() == "free"
    assert {"LICENSE", "README.md"} <= manifest.files.keys()
    assert not [one.name for one in path.glob("*.json") if "auto_map" in one.read_text()]


@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE", "generation_config.json"])
def test_a_link_out_of_the_folder_is_refused_before_anything(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"{name} is a link out of its folder"):
        made(folder, "fp16")
    assert not (tmp_path / "out").exists()


def test_a_setting_that_would_be_written_anew_is_read_before_anything(folder: Path) -> None:
    (folder / "special.json").write_text('{"auto_map": ' + "[" * 100000)
    with pytest.raises(UserError, match=r"special\.json is damaged"):
        made(folder, "fp16")
    assert not (folder.parent / "out").exists()


def test_weights_that_change_while_they_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join_parts = assemble.join_parts

    def joined(parts: Path) -> int:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes())
        return join_parts(parts)

    monkeypatch.setattr(assemble, "join_parts", joined)
    with pytest.raises(UserError, match=r"model\.safetensors changed while it was read"):
        made(folder, "fp16")
    assert not list((folder.parent / "out").iterdir())


@pytest.mark.parametrize("variant", ["fp16", "awq-gemm", "bnb-4bit", "bnb-8bit"])
def test_tied_weights_that_differ_are_kept_apart_in_every_variant(variant: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    path, _ = made(folder, variant)
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = quantize.load(path)
    assert torch.equal(loaded.model.lm_head.weight.half(), head)
    assert not torch.equal(loaded.model.model.embed_tokens.weight.half(), head)


@pytest.mark.parametrize(("variant", "share"), [("fp16", None), ("bnb-8bit", 1.0), ("awq-gemm", 1.0)])
def test_the_share_that_is_quantized_is_in_the_manifest(variant: str, share: float | None, folder: Path) -> None:
    assert made(folder, variant)[1].quantized_share == share


def test_bitsandbytes_cannot_store_the_experts_of_a_mixture_and_rounding_can(folder: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with quiet_libraries():
        MixtralForCausalLM(config).half().save_pretrained(folder)
    with pytest.raises(UserError, match=r"only 11% of this model's matrices.*: use awq-gemm"):
        made(folder, "bnb-8bit")
    assert made(folder, "fp16")[1].quantized_share is None
    share = made(folder, "rtn")[1].quantized_share
    assert share is not None
    assert share > 0.99


def test_a_value_that_float16_cannot_hold_is_said_as_such(folder: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.norm.weight"][0] = 1e30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds 1e\+30, more than float16 can"):
        made(folder, "rtn")
    made(folder, "fp16")


@pytest.mark.parametrize("variant", ["fp16", "rtn", "awq-gemm", "bnb-4bit", "bnb-8bit"])
def test_so_is_one_in_a_matrix_that_is_quantized(variant: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    tensors[name][3, 5] = 1e8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj\.weight holds 1e\+08, more than float16 can"):
        made(folder, variant)


def test_the_user_names_the_base_model(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder), "--variant", "fp16", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--name", "Mine"]) == 0
    assert (tmp_path / "out" / "Mine-FP16" / "quantable.json").is_file()
    assert main([*arguments, "--name", "../mine"]) == 2


def test_a_tokenizer_of_another_model_is_refused_before_the_search(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:64].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    special = {"eos_token_id": None, "pad_token_id": None, "bos_token_id": None}
    edited(folder / "config.json", vocab_size=64, **special)
    with pytest.raises(UserError, match="the model has 64 rows: it is another model's tokenizer"):
        made(folder, "awq-gemm")
