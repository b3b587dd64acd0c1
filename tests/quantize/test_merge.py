"""A merge as a source: recipes, refusals and names without mergekit; the merges themselves where it is installed."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bench.cli import main as bench
from bench.records.store import read_records
from quantize.checkpoint import find_checkpoints, open_checkpoint
from quantize.cli import main
from quantize.errors import UserError
from quantize.merge import MERGE_SEED, read_recipe, renamed
from quantize.source import open_source
from quantize.suite import SUITES, calls_of, named_file, suite_rows
from reports.card import card

real = pytest.mark.skipif(find_spec("mergekit") is None, reason="mergekit is not installed (the extra `merge`)")
METHODS: dict[str, dict[str, Any]] = {
    "dare_ties": {"parameters": {"int8_mask": True}},
    "ties": {"parameters": {"normalize": True}},
    "slerp": {"parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]}},
    "linear": {"parameters": {"weight": 0.5}},
}


@pytest.fixture
def models(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two tiny models that differ in their weights, a README among the files of each."""
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    folders = []
    for number in range(2):
        folder = Path(shutil.copytree(tiny_llama, tmp_path / f"model-{number}"))
        (folder / "README.md").write_text("What people read.")
        generator = torch.Generator().manual_seed(number)
        weights = load_file(folder / "model.safetensors")
        noise = {name: torch.randn(one.shape, generator=generator) / 50 for name, one in weights.items()}
        save_file({name: (one + noise[name]).half() for name, one in weights.items()}, folder / "model.safetensors")
        folders.append(folder)
    return folders


@pytest.fixture
def write(models: list[Path], tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe for the two in the manner of the published ones; returns the source that it is."""

    def recipe(method: str, **changed: Any) -> str:
        base, other = map(str, models)
        own: dict[str, Any] = {"density": 0.5, "weight": 0.5} if "ties" in method else {}
        two = [{"model": base}, {"model": other, "parameters": own} if own else {"model": other}]
        data = {"models": two, "merge_method": method, "dtype": "float16", **METHODS[method], **changed}
        data |= {} if method == "linear" else {"base_model": base}
        path = tmp_path / f"{method}.yaml"
        path.write_text(yaml.safe_dump(data))
        return f"merge:{path}"

    return recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "is no recipe"),
        ("[]", "does not say its merge_method"),
        ("models: []", "does not say its merge_method"),
        ("merge_method: ties\nspeed: 1", "unknown key 'speed'; there are: merge_method, base_model"),
        ("merge_method: ties\nmodels: [{model: a/b}]", "names 1 models: a merge needs two or more"),
        ("merge_method: ties\nbase_model: a/b\nmodels: [{model: a/c+a/lora}]", r"a/c\+a/lora asks for an adapter"),
    ],
)
def test_what_is_no_recipe_is_refused_before_anything_is_looked_up(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_recipe(path)


def test_a_recipe_is_a_name_or_a_file(tmp_path: Path) -> None:
    assert named_file("BioMistral-7B-TIES", "recipe", ".yaml") == SUITES / "BioMistral-7B-TIES.yaml"
    for wrong in ("BioMistral", str(tmp_path), str(tmp_path / "none.yaml")):
        with pytest.raises(
            UserError, match=r"no recipe '.*'; there are: BioMistral-7B-DARE, .*, or name a \.yaml file"
        ):
            open_source(f"merge:{wrong}")


def test_every_name_of_a_model_is_found_and_can_be_another() -> None:
    recipe = {
        "base_model": "a/base@v1",
        "slices": [{"sources": [{"model": "a/base@v1", "layer_range": [0, 2]}, {"model": "b/other"}]}],
        "tokenizer_source": "union",
        "tokenizer": {"source": "base", "tokens": {"<s>": {"source": "c/third"}}},
        "parameters": {"t": [{"filter": "model", "value": 1}]},
    }
    names: list[str] = []
    assert renamed(recipe, lambda one: names.append(one) or one) == recipe  # type: ignore[func-returns-value]
    assert names == ["a/base@v1", "a/base@v1", "b/other", "c/third"]
    changed = renamed(recipe, {"a/base@v1": "x", "b/other": "y", "c/third": "z"}.__getitem__)
    assert (changed["base_model"], changed["tokenizer"]["tokens"]["<s>"], changed["tokenizer_source"]) == (
        "x", {"source": "z"}, "union",
    )  # fmt: skip


def test_the_published_recipes_are_those_of_the_cards_and_the_suite_can_make_them() -> None:
    both = ["mistralai/Mistral-7B-Instruct-v0.1", "BioMistral/BioMistral-7B"]
    for method, name in {"dare_ties": "DARE", "ties": "TIES", "slerp": "SLERP"}.items():
        recipe, names = read_recipe(SUITES / f"BioMistral-7B-{name}.yaml")
        assert (recipe["merge_method"], names, recipe["base_model"]) == (method, both, both[0])
        if name != "SLERP":
            assert recipe["models"][1]["parameters"] == {"density": 0.5, "weight": 0.5}
    made = calls_of(suite_rows("biomistral", merge=True))
    assert [call.source for call in made[1:]] == [f"merge:BioMistral-7B-{name}" for name in ("DARE", "TIES", "SLERP")]
    assert made[0] == calls_of(suite_rows("biomistral"))[0]
    with pytest.raises(UserError, match="qwen2-7b has no row with a recipe: leave --merge out"):
        suite_rows("qwen2-7b", merge=True)


def test_without_mergekit_one_line_says_how_to_install_it(
    write: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setenv("QUANTABLE_MERGEKIT", str(bare))
    assert main([write("ties"), "--variant", "fp16", "--quiet", "--out", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", "error: a merge needs mergekit: pip install 'quantable[merge]'\n")
    assert not list((tmp_path / "cache" / "merges").glob("*/*"))


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_what_a_merge_takes_is_told_and_its_want_refused(
    what: str, write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    none = {"memory": ("psutil.virtual_memory", "available"), "disk": ("shutil.disk_usage", "free")}[what]
    monkeypatch.setattr(none[0], lambda *_: SimpleNamespace(**{none[1]: 10}))
    told: list[str] = []
    with pytest.raises(UserError, match=r"GB of memory and .* GB of disk in .*, and so much is not free"):
        open_source(write("ties"), say=told.append)
    assert told[0].startswith("ties.yaml: merging 2 models takes about 0.5 GB of memory and 0.0 GB of disk")


def test_a_source_without_safetensors_is_refused(write: Callable[..., str], models: list[Path]) -> None:
    source = write("ties")
    (models[1] / "model.safetensors").rename(models[1] / "pytorch_model.bin")
    with pytest.raises(UserError, match="has its weights only as pickles"):
        open_source(source)


# With mergekit


@real
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_a_source_and_the_same_bytes_on_a_second_run(
    method: str, write: Callable[..., str], models: list[Path], tmp_path: Path
) -> None:
    source, told = write(method), list[str]()
    first = open_source(source, say=told.append)
    assert (first.base_model, first.facts.kind, len(told)) == (method, "merge", 1)
    assert open_source(source, say=told.append) == first
    assert len(told) == 1  # the cache has it
    shutil.rmtree(tmp_path / "cache")
    second = open_source(source)
    assert (second.folder, second.facts) == (first.folder, first.facts)
    merge = second.facts.merge
    assert merge is not None
    assert (merge["seed"], list(merge["sources"])) == (MERGE_SEED, ["model-0", "model-1"])
    assert merge["recipe"]["merge_method"] == method
    assert str(tmp_path) not in json.dumps(merge)
    for file in second.folder.iterdir():
        assert file.suffix in (".json", ".safetensors", ".jinja"), file
        assert str(tmp_path).encode() not in file.read_bytes(), file


@real
def test_linear_is_the_average(write: Callable[..., str], models: list[Path]) -> None:
    made = load_file(open_source(write("linear")).folder / "model.safetensors")
    one, two = (load_file(folder / "model.safetensors") for folder in models)
    assert made.keys() == one.keys()
    for name, tensor in made.items():
        assert torch.equal(tensor, ((one[name].float() + two[name].float()) / 2).half()), name


@real
def test_other_weights_or_another_recipe_are_another_merge_and_a_damaged_one_is_made_again(
    write: Callable[..., str], models: list[Path]
) -> None:
    first = open_source(write("ties"))
    assert open_source(write("ties", parameters={"normalize": False})).folder != first.folder
    file = first.folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert open_source(write("ties")).facts == first.facts
    assert file.read_bytes() == whole
    weights = load_file(models[1] / "model.safetensors")
    save_file({name: one * 2 for name, one in weights.items()}, models[1] / "model.safetensors")
    assert open_source(write("ties")).folder != first.folder


@real
def test_a_recipe_that_mergekit_refuses_is_one_line(write: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"mergekit does not carry out ties.yaml \(.*\): change the recipe"):
        open_source(write("ties", dtype="float17"))


TABLE = """
shape = "mistral-7b"
[reference]
base_model = "model-0"
[rounds]
least = 1
most = 1
[rule]
max_warmups = 2
min_passes = 2
min_time_s = 0.01
max_time_s = 0.1
[[scenario]]
name = "short"
prompt_tokens = 8
new_tokens = 1
"""


@real
def test_three_merges_in_one_suite_are_quantized_and_benched(
    write: Callable[..., str], models: list[Path], tmp_path: Path
) -> None:
    rows = [f'base_model = "model-0"\nsource = "{models[0]}"\nvariant = "fp16"\n']
    for method in ("dare_ties", "ties", "slerp"):
        recipe = write(method).removeprefix("merge:")
        fields = f'base_model = "{method}"\nsource = "org/{method}"\nrecipe = "{recipe}"\n'
        rows += [fields + 'variant = "fp16"\n', fields + 'variant = "awq-gemm"\ngroup_size = 64\n']
    suite, out = tmp_path / "merges.toml", tmp_path / "out"
    suite.write_text(TABLE + "".join(f"[[row]]\n{row}\n" for row in rows))
    words = ["--suite", str(suite), "--out", str(out), "--quiet"]
    assert main([*words, "--merge", "--rounding", "nearest", "--blocks", "2"]) == 0
    made = {one.path.name: one.manifest.source for one in find_checkpoints(out)}
    assert len(made) == 7
    assert made["ties-AWQ-QGS64-W4-GEMM"] == made["ties-FP16"]
    assert len({one.weights_sha256 for one in made.values()}) == 4
    assert open_checkpoint(out / "slerp-FP16").manifest.source.kind == "merge"
    assert bench([*words, "--no-quality", "--device", "cpu"]) == 0
    assert sorted(one.subject.name for one in read_records(out / "records.jsonl")) == sorted(made)
    assert "a dare_ties merge of model-0 and model-1 (mergekit" in str(card(out / "dare_ties-FP16").text)
