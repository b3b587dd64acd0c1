"""What a run refuses for what the model or its text is, and what it does where the system lacks something."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantize
from quantize.building.assemble import join_parts, write_part
from quantize.building.job import BuildOptions
from quantize.building.journal import JOURNAL_NAME, Journal, discard_finished
from quantize.building.layer import LayerResult, LinearFacts
from quantize.building.stream import HeldOutResult, observe_layer, tensor_core_products
from quantize.calibration import LISTED, listed_texts
from quantize.checkpoint import open_checkpoint, verify
from quantize.errors import UserError
from quantize.model.architecture import architecture_of
from quantize.model.layer_calls import layer_calls
from quantize.model.pretrained import model_of
from quantize.weights import open_weights

OPTIONS = BuildOptions(blocks=2, block_tokens=32, device="cpu")
UP = "model.layers.1.mlp.up_proj.weight"


def make(source: Path, out: Path, variant: str = "awq-gemm", options: BuildOptions = OPTIONS, **how: Any) -> Path:
    (item,) = quantize.quantize(str(source), [variant], out, options=options, **how)
    return item.checkpoint.path


def changed(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(source, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_weights_that_lack_a_tensor_or_hold_another_models(tiny_llama: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    lacking = changed(tiny_llama, tmp_path / "lacking", {name: one for name, one in tensors.items() if name != UP})
    with pytest.raises(UserError, match=f"lack {UP}, which config.json asks for"):
        make(lacking, tmp_path / "out")
    mixed = changed(tiny_llama, tmp_path / "mixed", tensors | {UP: torch.zeros(128, 128, dtype=torch.float16)})
    with pytest.raises(UserError, match=r"of shape \[128, 128\] where config.json asks for \[256, 128\]"):
        make(mixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_feedback_where_bitsandbytes_has_no_layers(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    source = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=512)).half().save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, source)
    with pytest.raises(UserError, match=r"bitsandbytes variants need nn\.Linear layers, which GPT2LMHeadModel"):
        make(source, tmp_path / "out", "bnb-4bit")


def test_a_layer_that_comes_out_worse_than_plain_rounding(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.building.layer.WORSE_THAN_PLAIN", 0.0)
    with pytest.raises(UserError, match=r"model\.layers\.0 comes out worse than plain rounding .* the variant rtn"):
        make(tiny_llama, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_lost_what_it_knew_is_broken() -> None:
    HeldOutResult(10.0, 19.9, 0.5, 100).check()
    for perplexity in (20.1, float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"the quantized model is broken: perplexity .* the source has 10;"):
            HeldOutResult(10.0, perplexity, 0.5, 100).check()


def test_a_short_text_gives_fewer_blocks_and_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A short text, which is no longer than this. " * 10)
    said: list[str] = []
    options = replace(OPTIONS, blocks=1000, calibration=str(text))
    path = make(tiny_llama, tmp_path / "out", options=options, say=said.append)
    calibration = open_checkpoint(path).manifest.calibration
    assert calibration is not None
    assert said == [f"the calibration text fills {calibration.blocks} of 1000 blocks"]


def test_a_built_in_text_that_is_not_everywhere_the_same_is_told_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = listed_texts(LISTED)[0]
    monkeypatch.setattr("quantize.calibration.listed_texts", lambda _: (here, "h11 differs"))
    said: list[str] = []
    make(tiny_llama, tmp_path / "out", options=replace(OPTIONS, calibration="builtin"), say=said.append)
    assert [line for line in said if "h11 differs" in line] == said


def test_without_hard_links_the_parts_are_copied(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = open_checkpoint(make(tiny_llama, tmp_path / "linked"))

    def refused(source: Path, target: Path) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr("os.link", refused)
    copied = open_checkpoint(make(tiny_llama, tmp_path / "copied"))
    verify(copied)
    assert copied.content_sha256 == linked.content_sha256


def test_parts_become_several_files_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.building.assemble.MAX_SHARD_BYTES", 9000)
    tensors = {f"t{number}": torch.full((1000,), number, dtype=torch.int32) for number in range(5)}
    for number, (name, tensor) in enumerate(tensors.items()):
        write_part(tmp_path, number, {name: tensor})
    assert join_parts(tmp_path) == 5 * 4000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 20000}
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"
    weights = open_weights(tmp_path)
    assert all(torch.equal(weights.get(name), tensor) for name, tensor in tensors.items())


def test_a_damaged_journal_starts_anew(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    journal = Journal(folder, {"key": 1})
    journal.layer_done(LayerResult(0, {}, {}, (LinearFacts("q", 0.1, 0.2, None),), {"scale": 1.5}), [torch.ones(2)], [])
    journal.layer_done(LayerResult(1, {}, {}, (), {"scale": 1.0, "round": 2.0}), [torch.zeros(2)], [])
    again = Journal(folder, {"key": 1})
    assert (again.restarted, again.finished_layers, again.state) == (False, 2, journal.state)
    assert again.state.seconds == {"scale": 2.5, "round": 2.0}
    assert torch.equal(again.hidden()[0], torch.zeros(2))
    (folder / JOURNAL_NAME).write_text("{")
    anew = Journal(folder, {"key": 1})
    assert (anew.restarted, anew.finished_layers, anew.hidden()) == (True, 0, [])


@pytest.mark.parametrize(
    ("lost", "added", "message"),
    [
        ("model.norm.weight", "", "the checkpoint lacks model.norm.weight: make it again"),
        ("", "model.norm.qweight", "model.norm is no linear layer of this architecture"),
    ],
)
def test_a_checkpoint_with_other_tensors(tiny_llama: Path, tmp_path: Path, lost: str, added: str, message: str) -> None:
    path = make(tiny_llama, tmp_path, "rtn")
    tensors = load_file(path / "model.safetensors")
    kept = {name: one for name, one in tensors.items() if name != lost}
    save_file(kept | ({added: torch.zeros(1)} if added else {}), path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        quantize.load(path, kernel="dequantize")


def test_weights_so_large_that_sums_of_squares_overflow_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "large"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.full_like(
        tensors["model.layers.0.mlp.up_proj.weight"], 1e30, dtype=torch.bfloat16
    )
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.0 gives NaN or Inf on the calibration text"):
        make(source, tmp_path / "out", "awq-gemm")


def test_an_unknown_device_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown device 'tpu': use cpu or cuda"):
        make(tiny_llama, tmp_path, options=replace(OPTIONS, device="tpu"))


def test_layers_that_give_no_numbers_are_named_and_the_model_is_whole_again(tiny_llama: Path) -> None:
    model = model_of(tiny_llama, dtype=torch.float32).eval()
    architecture, ids = architecture_of(model), torch.arange(32).view(1, 32)
    with torch.no_grad():
        logits = model(ids).logits
    (hidden, kwargs), _ = layer_calls(model, architecture, ids)
    assert torch.equal(hidden, model.get_input_embeddings()(ids))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    with pytest.raises(UserError, match=r"model\.layers\.0 gives NaN or Inf on the calibration text"):
        observe_layer(architecture, 0, [hidden * float("nan")], [kwargs], {})


def test_batches_through_a_layer_do_not_change_what_is_found(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, blocks=6)
    whole = open_checkpoint(make(tiny_llama, tmp_path / "whole", options=options)).manifest.layers
    monkeypatch.setattr("quantize.building.stream.BATCH_TOKENS", 64)
    batched = open_checkpoint(make(tiny_llama, tmp_path / "batched", options=options)).manifest.layers
    for one, other in zip(whole, batched, strict=True):
        assert other["error_rtn"] == pytest.approx(one["error_rtn"], rel=1e-3)


def test_a_group_size_below_the_usual_one_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2}
    source = tmp_path / "narrow"
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).half().save_pretrained(source)
    shutil.copy(tiny_llama / "tokenizer.json", source)
    said: list[str] = []
    path = make(source, tmp_path / "out", "rtn", say=said.append)
    assert said == ["group size 32: 128 does not divide every layer of this model"]
    assert path.name == "narrow-RTN-QGS32-W4-GEMM"


def test_a_journal_with_work_left_in_it_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", {})
    for name in ("awq-gemm", "bnb-4bit"):
        journal.parts(name)
    discard_finished(journal.folder, ["awq-gemm"])
    assert journal.folder.is_dir()
    discard_finished(journal.folder, ["awq-gemm", "bnb-4bit", "fp16"])
    assert not journal.folder.exists()


@pytest.mark.parametrize(("device", "inside"), [("cuda", "high"), ("cpu", "highest")])
def test_products_are_in_tf32_on_cuda_alone_and_only_inside(device: str, inside: str) -> None:
    with tensor_core_products(torch.device(device)):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("file", ["awq-gemm/part-00001.safetensors", "hidden-00002.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_an_unfinished_run_whose_files_are_not_its_own_starts_anew(file: str, damage: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "work", {"a": 1})
    parts = [write_part(journal.parts("awq-gemm"), number, {"x": torch.ones(8)}) for number in (1, 2)]
    for number, part in enumerate(parts):
        journal.layer_done(LayerResult(number, {}, {}, (), {}), [torch.ones(2)], [part])
    assert Journal(tmp_path / "work", {"a": 1}).finished_layers == 2
    path = tmp_path / "work" / file
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    again = Journal(tmp_path / "work", {"a": 1})
    assert (again.restarted, again.finished_layers, again.hidden()) == (True, 0, [])
