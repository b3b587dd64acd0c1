"""No library reads a model's folder here without being told not to run its code and not to read pickles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEVER = ("torch.load", "pickle.load", "pickle.loads", "eval", "exec", "input", "getpass.getpass")
SOURCES = sorted(path for package in ("quantize", "bench", "reports") for path in (ROOT / package).rglob("*.py"))


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
