"""`quantize` from end to end on a tiny model: what it writes, keeps, resumes and refuses."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quantize
from quantize.building.job import BuildOptions
from quantize.checkpoint import find_checkpoints, open_checkpoint, verify
from quantize.cli import main
from quantize.errors import UserError
from quantize.files import only_writer
from quantize.int4.layouts import LAYOUTS
from quantize.progress import Progress
from quantize.rounding.options import BnbOptions
from tests.dying import Died

ALL = ("fp16", "awq-gemm", "awq-gemv", "bnb-4bit", "bnb-8bit")
FAST = BuildOptions(blocks=4, block_tokens=64, device="cpu")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def built(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every variant of the tiny model."""
    out = tmp_path_factory.mktemp("built")
    quantize.quantize(str(tiny_llama), ["all"], out, options=FAST)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def hashes(out: Path) -> dict[str, str]:
    return {c.manifest.name: c.content_sha256 for c in find_checkpoints(out)}


def test_every_variant_is_there_named_as_published(built: Path) -> None:
    found = find_checkpoints(built)
    assert [c.manifest.variant for c in found] == list(ALL)
    assert [c.path.name for c in found] == [
        "tiny-llama-FP16",
        "tiny-llama-AWQ-QGS128-W4-GEMM",
        "tiny-llama-AWQ-QGS128-W4-GEMV",
        "tiny-llama-BnB.4",
        "tiny-llama-BnB.8",
    ]
    assert not [path for path in built.iterdir() if path.name.startswith(".") or "partial" in path.name]
    for checkpoint in found:
        verify(checkpoint)


def test_the_manifest_says_how_it_came_to_be(built: Path) -> None:
    manifest = open_checkpoint(built / "tiny-llama-AWQ-QGS128-W4-GEMM").manifest
    assert manifest.source.kind == "folder"
    assert manifest.calibration is not None
    assert (manifest.calibration.blocks, manifest.calibration.block_tokens) == (4, 64)
    assert manifest.libraries["torch"]
    assert manifest.seconds["scale"] > 0
    assert len(manifest.layers) == 2 * 7
    assert sum(layer["error"] for layer in manifest.layers) < sum(layer["error_rtn"] for layer in manifest.layers)
    with safe_open(built / manifest.name / "model.safetensors", framework="pt") as file:
        assert manifest.weights_bytes == sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def test_both_layouts_hold_the_same_integers(built: Path) -> None:
    gemm = load_file(built / "tiny-llama-AWQ-QGS128-W4-GEMM" / "model.safetensors")
    gemv = load_file(built / "tiny-llama-AWQ-QGS128-W4-GEMV" / "model.safetensors")
    assert gemm.keys() == gemv.keys()
    names = [name.removesuffix(".qweight") for name in gemm if name.endswith(".qweight")]
    assert len(names) == 2 * 7
    for name in names:
        in_features = gemm[f"{name}.qweight"].shape[0]
        one, two = (
            LAYOUTS[layout]
            .unpack(
                {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")},
                in_features,
                {"group_size": 128},
            )
            .weight
            for layout, tensors in (("GEMM", gemm), ("GEMV", gemv))
        )
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.dequantize(), two.dequantize())
    for name in gemm:
        if not name.endswith(("qweight", "qzeros", "scales")):
            assert torch.equal(gemm[name], gemv[name])


def test_config_says_what_engines_read(built: Path) -> None:
    config = json.loads((built / "tiny-llama-AWQ-QGS128-W4-GEMV" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemv",
        "modules_to_not_convert": None,
    }
    assert config["dtype"] == "float16"
    reference = json.loads((built / "tiny-llama-FP16" / "config.json").read_text())
    assert "quantization_config" not in reference


def test_the_reference_is_the_source_unchanged(built: Path, tiny_llama: Path) -> None:
    source = load_file(tiny_llama / "model.safetensors")
    reference = load_file(built / "tiny-llama-FP16" / "model.safetensors")
    assert source.keys() == reference.keys()
    assert all(torch.equal(source[name], reference[name]) for name in source)


@pytest.mark.parametrize("variant", ALL)
def test_every_checkpoint_loads_and_follows_the_reference(built: Path, variant: str) -> None:
    paths = {c.manifest.variant: c.path for c in find_checkpoints(built)}
    reference, loaded = quantize.load(paths["fp16"]), quantize.load(paths[variant], kernel="torch-cpu")
    ids = torch.arange(96).view(1, 96) * 5 % 500
    with torch.inference_mode():
        exact, out = reference.model(ids).logits, loaded.model(ids).logits
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert float((out - exact).norm() / exact.norm()) < {"fp16": 1e-6, "bnb-8bit": 0.05}.get(variant, 0.35)
    expected = {"fp16": "torch (float32)", "bnb-4bit": "bitsandbytes nf4", "bnb-8bit": "bitsandbytes int8"}
    assert expected.get(variant, "torch int4 (bfloat16)") in loaded.kernel(1)


def test_awq_holds_its_embeddings_once_and_in_half_precision(built: Path) -> None:
    path = built / "tiny-llama-AWQ-QGS128-W4-GEMM"
    loaded = quantize.load(path)
    embeddings = loaded.model.get_input_embeddings().weight
    head = loaded.model.get_output_embeddings().weight
    assert embeddings.dtype == torch.float16
    assert embeddings.data_ptr() == head.data_ptr()
    assert loaded.weights_bytes < 1.15 * open_checkpoint(path).manifest.weights_bytes


def test_one_token_and_many_give_the_same_logits(built: Path) -> None:
    model = quantize.load(built / "tiny-llama-AWQ-QGS128-W4-GEMM").model
    ids = torch.arange(80).view(1, 80)
    with torch.inference_mode():
        whole = model(ids).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert float((whole - last).norm() / whole.norm()) < 0.01


def test_an_unknown_kernel_and_a_missing_gpu_are_refused(built: Path) -> None:
    path = built / "tiny-llama-AWQ-QGS128-W4-GEMM"
    with pytest.raises(UserError, match="there are: auto, native, torch-cpu"):
        quantize.load(path, kernel="fast")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            quantize.load(path, device="cuda")
        with pytest.raises(UserError, match="autoawq-gemm: runs on CUDA"):
            quantize.load(path, kernel="autoawq-gemm")


def test_finished_checkpoints_are_kept_unless_forced(tiny_llama: Path, tmp_path: Path) -> None:
    first = quantize.quantize(str(tiny_llama), ["fp16", "awq-gemm"], tmp_path, options=FAST)
    assert [item.kept for item in first] == [False, False]
    stamps = {item.checkpoint.path: item.checkpoint.path.stat().st_mtime_ns for item in first}
    said: list[str] = []
    again = quantize.quantize(str(tiny_llama), ["fp16", "awq-gemm"], tmp_path, options=FAST, say=said.append)
    assert [item.kept for item in again] == [True, True]
    assert stamps == {item.checkpoint.path: item.checkpoint.path.stat().st_mtime_ns for item in again}
    assert all("kept" in line for line in said)
    forced = quantize.quantize(
        str(tiny_llama), ["fp16"], tmp_path, options=BuildOptions(**{**FAST.__dict__, "force": True})
    )
    assert not forced[0].kept
    assert forced[0].checkpoint.content_sha256 == first[0].checkpoint.content_sha256


@pytest.mark.parametrize("damage", ["flipped", "empty", "other makers"])
def test_a_finished_checkpoint_is_kept_only_where_it_is_whole_and_of_the_same_makers(
    damage: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [made] = quantize.quantize(str(tiny_llama), ["fp16"], tmp_path)
    weights = made.checkpoint.path / "model.safetensors"
    content = weights.read_bytes()
    message = rf"{weights} .*: make the checkpoint again with `quantize --force`"
    if damage == "other makers":
        monkeypatch.setattr("quantize.building.job.maker_versions", lambda: {"torch": "99.0"})
        message = r"is there already, made with torch .*, now 99.0: --force makes it again, another --out keeps both"
    elif damage == "flipped":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        weights.write_bytes(b"")
    with pytest.raises(UserError, match=message):
        quantize.quantize(str(tiny_llama), ["fp16"], tmp_path)


@pytest.mark.parametrize("name", [".tiny-llama.unfinished", ".tiny-llama-FP16.partial"])
def test_a_folder_of_the_users_with_the_name_of_a_working_folder_is_left_alone(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=rf"{name} is in the way, and is not of an earlier run: move it away"):
        quantize.quantize(str(tiny_llama), ["fp16", "awq-gemm"], tmp_path, options=FAST)
    assert (tmp_path / name / "notes.txt").read_text() == "mine"


def test_feedback_lowers_the_errors_of_plain_rounding(tiny_llama: Path, built: Path, tmp_path: Path) -> None:
    options = BuildOptions(**{**FAST.__dict__, "rounding": "nearest"})
    (item,) = quantize.quantize(str(tiny_llama), ["awq-gemm"], tmp_path, options=options)
    nearest = item.checkpoint.manifest.layers
    fed_back = open_checkpoint(built / "tiny-llama-AWQ-QGS128-W4-GEMM").manifest.layers
    assert sum(layer["error"] for layer in fed_back) < 0.9 * sum(layer["error"] for layer in nearest)


@pytest.mark.parametrize("double_quant", [False, True])
def test_feedback_keeps_bitsandbytes_scales(tiny_llama: Path, tmp_path: Path, double_quant: bool) -> None:
    files = {}
    for rounding in ("gptq", "nearest"):
        options = BuildOptions(**{**FAST.__dict__, "rounding": rounding, "bnb": BnbOptions(double_quant=double_quant)})
        (item,) = quantize.quantize(str(tiny_llama), ["bnb-4bit"], tmp_path / rounding, options=options)
        files[rounding] = load_file(item.checkpoint.path / "model.safetensors")
    assert files["gptq"].keys() == files["nearest"].keys()
    changed = [name for name, tensor in files["gptq"].items() if not torch.equal(tensor, files["nearest"][name])]
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)


def test_a_stopped_run_with_other_options_starts_anew(tiny_llama: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.doing.startswith("layer 2 of"):
            raise Died

    with pytest.raises(Died):
        quantize.quantize(str(tiny_llama), ["awq-gemm"], tmp_path, options=FAST, progress=Progress(changed=stop))
    said: list[str] = []
    options = BuildOptions(blocks=5, block_tokens=64, device="cpu")
    quantize.quantize(str(tiny_llama), ["awq-gemm"], tmp_path, options=options, say=said.append)
    assert any("starting anew" in line for line in said)


def test_two_runs_give_the_same_bytes(tiny_llama: Path, built: Path, tmp_path: Path) -> None:
    quantize.quantize(str(tiny_llama), ["all"], tmp_path, options=FAST)
    assert hashes(tmp_path) == hashes(built)


# What a user gets to see


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command; it must end with code 2 and one line after the first of its progress, which is returned."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("quantize: reading ")]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured.err
    return lines[0]


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_bad_sources(capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    assert "no/such/folder" in refused(capsys, "./no/such/folder", *out)
    no_config = copy(tiny_llama, tmp_path / "no-config")
    (no_config / "config.json").unlink()
    assert "config.json" in refused(capsys, str(no_config), *out)
    pickled = copy(tiny_llama, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pickles" in refused(capsys, str(pickled), *out)
    truncated = copy(tiny_llama, tmp_path / "truncated")
    os.truncate(truncated / "model.safetensors", 1000)
    assert "model.safetensors is damaged or cut short" in refused(capsys, str(truncated), *out)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("variant", ALL)
def test_weights_that_are_no_numbers(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path, bad: float, variant: str
) -> None:
    source = copy(tiny_llama, tmp_path / "nan")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, str(source), "--variant", variant, "--out", str(tmp_path / "out"), "--blocks", "2")
    assert "model.layers.1.mlp.up_proj.weight holds" in line
    assert list((tmp_path / "out").iterdir()) == []


def edited_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_can_be_made_is_made_and_the_rest_is_said(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    source = copy(tiny_llama, tmp_path / "gpt2")
    (source / "model.safetensors").unlink()
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=512)).half().save_pretrained(source)
    capsys.readouterr()
    assert (
        main([str(source), "--blocks", "4", "--block-tokens", "32", "--variant", "all", "--out", str(tmp_path / "out")])
        == 2
    )
    said = capsys.readouterr()
    _, line = said.err.splitlines()
    assert "no bnb-8bit, bnb-4bit: bitsandbytes variants need nn.Linear layers, which GPT2LMHeadModel" in line
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name.removeprefix("gpt2-") for name in made] == ["AWQ-QGS64-W4-GEMM", "AWQ-QGS64-W4-GEMV", "FP16"]
    assert all(name in said.out for name in made)
    assert (
        main([str(source), "--blocks", "4", "--block-tokens", "32", "--dry-run", "--out", str(tmp_path / "none")]) == 2
    )
    assert "no bnb-8bit, bnb-4bit: bitsandbytes variants need nn.Linear layers" in capsys.readouterr().err


def test_group_sizes_that_do_not_divide(capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
    out = ("--variant", "awq-gemm", "--out", str(tmp_path / "out"))
    assert "choose one of 128, 64, 32" in refused(capsys, str(tiny_llama), "--group-size", "48", *out)
    from transformers import LlamaConfig, LlamaForCausalLM

    odd = copy(tiny_llama, tmp_path / "odd")
    config = LlamaConfig(
        vocab_size=512, hidden_size=96, intermediate_size=160, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).half().save_pretrained(odd)
    capsys.readouterr()
    line = refused(capsys, str(odd), "--group-size", "64", *out)
    assert "group size 64 does not divide the 96 input features of model.layers.0.self_attn.q_proj" in line
    assert "choose 32" in line


def test_unknown_variant_and_empty_calibration(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    out = ("--out", str(tmp_path / "out"))
    line = refused(capsys, str(tiny_llama), "--variant", "gguf", *out)
    assert "there are: fp16, awq-gemm, awq-gemv, awq-ct, awq-gguf, rtn, bnb-4bit, bnb-8bit" in line
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert "holds no text" in refused(
        capsys, str(tiny_llama), "--variant", "awq-gemm", "--calibration", str(empty), *out
    )


def test_a_folder_in_the_way_is_left_alone(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "tiny-llama-FP16"
    mine.mkdir()
    (mine / "thesis.txt").write_text("the only copy")
    line = refused(capsys, str(tiny_llama), "--variant", "fp16", "--out", str(tmp_path), "--force")
    assert "is no quantable checkpoint" in line
    assert (mine / "thesis.txt").read_text() == "the only copy"
    a_file = tmp_path / "file"
    a_file.write_text("")
    assert "is a file" in refused(capsys, str(tiny_llama), "--out", str(a_file))


@pytest.mark.parametrize("variant", ["fp16", "awq-gemm", "bnb-4bit"])
def test_a_disk_that_fills_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path, variant: str
) -> None:
    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("quantize.building.assemble.save_file", full)
    line = refused(capsys, str(tiny_llama), "--variant", variant, "--out", str(tmp_path), "--blocks", "2")
    assert "disk is full" in line
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("variant", ["fp16", "awq-gemm", "bnb-8bit"])
def test_an_interrupt_in_the_middle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path, variant: str
) -> None:
    def interrupted(folder: Path) -> int:
        raise KeyboardInterrupt

    arguments = (str(tiny_llama), "--variant", variant, "--out", str(tmp_path), "--blocks", "2")
    with monkeypatch.context() as patch:
        patch.setattr("quantize.building.assemble.join_parts", interrupted)
        assert main(list(arguments)) == 130
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("interrupted: what is finished is kept, the same quantize again")
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert main(list(arguments)) == 0
    verify(find_checkpoints(tmp_path)[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
    assert "no CUDA device" in refused(capsys, str(tiny_llama), "--device", "cuda", "--out", str(tmp_path))


def test_nothing_of_the_libraries_reaches_the_screen(tiny_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quantize", str(tiny_llama), "--out", str(tmp_path), "--blocks", "1"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    first, *_, last = ran.stderr.splitlines()
    assert first == f"quantize: reading {tiny_llama}"
    assert last.startswith("done after ")
    assert all(line.startswith("after ") or "% after " in line for line in ran.stderr.splitlines()[1:-1])
    assert len(ran.stdout.splitlines()) == 5
    assert all("GB of weights" in line for line in ran.stdout.splitlines())


def test_a_second_writer_is_told_who_is_at_work(tiny_llama: Path, tmp_path: Path) -> None:
    with only_writer(tmp_path / f".{tiny_llama.name}.lock", "busy"):
        with pytest.raises(UserError, match="another `quantize` is making tiny-llama in"):
            quantize.quantize(str(tiny_llama), ["fp16"], tmp_path)
        assert quantize.quantize(str(tiny_llama), ["fp16"], tmp_path / "other")
    assert quantize.quantize(str(tiny_llama), ["fp16"], tmp_path)
