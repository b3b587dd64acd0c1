"""Nothing foreign gets in: no code of a model, no pickle, no question; and no name is believed before it is checked."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import quantize
from bench.run.run import BenchOptions
from quantize.errors import UserError
from quantize.kernels import KERNELS
from quantize.variant import KERNEL_NAMES

ROOT = Path(__file__).resolve().parents[1]
READERS = ("from_pretrained", "from_config")


def calls(root: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call that lets a library read a model's folder."""
    for package in ("quantize", "bench", "reports"):
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READERS:
                    yield f"{path.relative_to(root)}:{node.lineno}", node


def unsafe(call: ast.Call) -> bool:
    """Whether it leaves open what transformers may do: run code of the model's, or load a pickle."""
    assert isinstance(call.func, ast.Attribute)
    said = {one.arg: one.value.value for one in call.keywords if isinstance(one.value, ast.Constant)}
    is_model = "Model" in ast.unparse(call.func.value) and call.func.attr == "from_pretrained"
    reads_gguf = any(one.arg == "gguf_file" for one in call.keywords)
    weights_safe = any(said.get(name) is True for name in ("use_safetensors", "safetensors")) or reads_gguf
    return said.get("trust_remote_code") is not False or (is_model and not weights_safe)


def test_every_call_that_reads_a_folder_is_safe() -> None:
    found = list(calls(ROOT))
    assert len(found) >= 8
    assert [place for place, call in found if unsafe(call)] == []


@pytest.mark.parametrize(
    "line",
    [
        "AutoConfig.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)",
        "AutoModelForCausalLM.from_config(config)",
    ],
)
def test_an_unsafe_call_is_found(line: str) -> None:
    (call,) = (node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call))
    assert unsafe(call)


@pytest.fixture
def own_code(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model whose config and tokenizer name code of their own; the code leaves a file behind when it runs."""
    folder = tmp_path / "own-code"
    shutil.copytree(tiny_llama, folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass C: pass\nclass M: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.C", "own.C"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("variant", ["fp16", "awq-gemm", "bnb-8bit"])
def test_a_models_own_code_never_runs_and_nothing_is_asked(own_code: Path, tmp_path: Path, variant: str) -> None:
    command = [sys.executable, "-m", "quantize", str(own_code), "--variant", variant, "--out", str(tmp_path / "out")]
    ran = subprocess.run(command, input="y\n" * 100, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 2, ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert "own-code" in ran.stderr
    assert not (tmp_path / "ran").exists()


def without(folder: Path, target: Path, *names: str) -> Path:
    """A copy of a model's folder whose weights lack these tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name not in names}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("variant", ["fp16", "bnb-8bit", "rtn"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_source_without_one_of_its_models_tensors_is_refused(
    tiny_llama: Path, tmp_path: Path, variant: str, name: str
) -> None:
    source = without(tiny_llama, tmp_path / "source", name)
    with pytest.raises(UserError, match=f"lack {name}"):
        quantize.quantize(str(source), [variant], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize("variant", ["fp16", "awq-gemm"])
def test_a_checkpoint_of_another_model_of_the_same_name_is_not_kept(
    tiny_llama: Path, tmp_path: Path, variant: str
) -> None:
    for number in (1, 2):
        shutil.copytree(tiny_llama, tmp_path / str(number) / "final")
    weights = tmp_path / "2" / "final" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    options = quantize.BuildOptions(blocks=2, block_tokens=32)
    out = tmp_path / "out"
    (first,) = quantize.quantize(str(tmp_path / "1" / "final"), [variant], out, options=options)
    assert quantize.quantize(str(tmp_path / "1" / "final"), [variant], out, options=options)[0].kept
    with pytest.raises(UserError, match=r"other weights.*--force"):
        quantize.quantize(str(tmp_path / "2" / "final"), [variant], out, options=options)
    assert first.checkpoint.path.is_dir()


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"rounding": "nearest"}, "rounding = gptq, now nearest"), ({"blocks": 3}, "another calibration text")],
)
def test_a_checkpoint_made_with_other_options_is_not_kept(
    tiny_llama: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    options: dict[str, Any] = {"blocks": 2, "block_tokens": 32}
    quantize.quantize(str(tiny_llama), ["awq-gemm"], tmp_path, options=quantize.BuildOptions(**options))
    with pytest.raises(UserError, match=said):
        quantize.quantize(str(tiny_llama), ["awq-gemm"], tmp_path, options=quantize.BuildOptions(**options | changed))


def test_a_kernels_name_is_checked_before_anything_starts() -> None:
    assert set(KERNEL_NAMES) == set(KERNELS)
    for known in (None, "auto", "native", *KERNEL_NAMES):
        BenchOptions(kernel=known)
    with pytest.raises(UserError, match=r"unknown kernel 'foo'; there are: auto, native, torch-cpu"):
        BenchOptions(kernel="foo")


def test_a_tasks_name_is_checked_before_anything_starts(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from bench.run.checks import expand_tasks

    with pytest.raises(UserError, match="unknown task 'nosuchtask'"):
        expand_tasks(("nosuchtask",), None)
