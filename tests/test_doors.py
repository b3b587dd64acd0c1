"""No library reads a model's folder here without being told not to run its code and not to read pickles."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantize
from quantize.checkpoint import seal

ROOT = Path(__file__).parents[1]
NEVER = ("torch.load", "pickle.load", "pickle.loads", "eval", "exec", "input", "getpass.getpass")
SOURCES = sorted(
    path for package in ("quantable", "quantize", "bench", "reports") for path in (ROOT / package).rglob("*.py")
)


def faults(tree: ast.AST) -> Iterator[str]:
    """Each call that may run what a folder holds, or ask the user."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        last = name.rpartition(".")[2]
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in NEVER:
            yield f"line {call.lineno}: {name}"
        if last not in ("from_pretrained", "from_config"):
            continue
        no_folder = bool(call.args) and ast.unparse(call.args[0]) == "None"  # a state dict of ours
        if given.get("trust_remote_code") != "False" and not no_folder:
            yield f"line {call.lineno}: {name} without trust_remote_code=False"
        model = last == "from_pretrained" and not name.startswith(("AutoTokenizer.", "transformers.AutoTokenizer."))
        config = name.startswith(("AutoConfig.", "transformers.AutoConfig."))
        if (
            model
            and not config
            and "True" not in (given.get("use_safetensors"), given.get("safetensors"))
            and "gguf_file" not in given
        ):
            yield f"line {call.lineno}: {name} without use_safetensors=True"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_opens_a_door(path: Path) -> None:
    assert list(faults(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("AutoModelForCausalLM.from_pretrained(folder)", 2),
        ("AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)", 1),
        ("AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, use_safetensors=True)", 1),
        ("AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)", 0),
        ("AutoConfig.from_pretrained(folder)", 1),
        ("AutoTokenizer.from_pretrained(folder, trust_remote_code=False)", 0),
        ("AutoModelForCausalLM.from_config(config)", 1),
        ("torch.load(path)", 1),
        ("input('really?')", 1),
    ],
)
def test_the_walk_finds_them(code: str, count: int) -> None:
    assert len(list(faults(ast.parse(code)))) == count


OWN = "open({ran!r}, 'w').close()\nfrom transformers import LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"


def with_own_code(folder: Path, ran: Path, where: str) -> None:
    """Have a model's folder name code of its own, which leaves a file behind when it runs."""
    (folder / "own.py").write_text(OWN.format(ran=str(ran)))
    name = "tokenizer_config.json" if where == "tokenizer" else "config.json"
    data = json.loads((folder / name).read_text())
    if where == "tokenizer":
        data |= {"auto_map": {"AutoTokenizer": ["own.T", "own.T"]}, "tokenizer_class": "T"}
    else:
        data["auto_map"] = {"AutoConfig": "own.M", "AutoModelForCausalLM": "own.M"}
        data["model_type"] = "own" if where == "unknown type" else data["model_type"]
    (folder / name).write_text(json.dumps(data))


def answered_yes(*command: str) -> "subprocess.CompletedProcess[str]":
    """A command to whose every question the answer is yes."""
    whole = [sys.executable, *command]
    return subprocess.run(whole, cwd=ROOT, input="y\n" * 100, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("where", "code"), [("known type", 0), ("unknown type", 2), ("tokenizer", 2)])
def test_quantize_never_runs_a_models_code(where: str, code: int, tiny_llama: Path, tmp_path: Path) -> None:
    folder, ran = Path(shutil.copytree(tiny_llama, tmp_path / "foreign")), tmp_path / "ran"
    with_own_code(folder, ran, where)
    done = answered_yes("-m", "quantize", str(folder), "--variant", "fp16", "--out", str(tmp_path / "out"))
    assert (done.returncode, ran.exists()) == (code, False), done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    if code:
        assert done.stderr.count("\n") == 2  # the first of the progress, and the error
        assert "never run" in done.stderr or "does not recognize this architecture" in done.stderr
    else:
        assert "auto_map" not in (tmp_path / "out" / "foreign-FP16" / "config.json").read_text()


@pytest.mark.parametrize("where", ["known type", "unknown type", "tokenizer"])
def test_load_and_bench_never_run_a_models_code(where: str, tiny_llama: Path, tmp_path: Path) -> None:
    made = quantize.quantize(str(tiny_llama), ["fp16"], tmp_path / "out")[0].checkpoint
    ran = tmp_path / "ran"
    with_own_code(made.path, ran, where)
    seal(made.path, made.manifest)
    answered_yes("-c", f"import quantize; quantize.load({str(made.path)!r})")
    done = answered_yes("-m", "bench", str(made.path.parent), "--rounds", "1", "--prompt", "8", "--no-quality")
    assert not ran.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert done.returncode == (0 if where == "known type" else 2)
