"""A merge as a source: mergekit carries out a recipe in its own format, in a process of its own, into the cache."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from quantize.checkpoint import SourceFacts
from quantize.errors import UserError
from quantize.files import hash_of_hashes, replace_file, sha256_of
from quantize.source import CONFIGS, Say, Source, cache_folder, open_source
from quantize.suite import MERGE_PREFIX, named_file
from quantize.weights import open_weights, read_json, regular_files

MERGE_SEED = 0  # of what a method draws, as DARE its masks
KEYS = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)  # of a recipe
NAMING = ("model", "base_model", "tokenizer_source", "source")  # keys whose value names a model, or one of these:
NO_MODELS = ("union", "base")
TIMEOUT_S = 6 * 3600.0
SHARD_BYTES = 10**9  # of a file, which mergekit holds in memory until it is whole
BARE_BYTES, FLOAT_COPIES = 500 * 10**6, 6  # of a process; of the largest tensor, beside one of each model
Recipe = dict[str, Any]
Models = dict[str, Source]


def open_merge(source: str, name: str | None, bars: bool, say: Say) -> Source:
    """The merge that `merge:RECIPE.yaml` names, made where the cache lacks it: see `open_source`."""
    path = named_file(source.removeprefix(MERGE_PREFIX), "recipe", ".yaml")
    recipe, names = read_recipe(path)
    parts = {one: one.partition("@")[::2] for one in names}
    models = {one: open_source(part[0], revision=part[1] or None, bars=bars, say=say) for one, part in parts.items()}
    folder, mergekit = _carried_out(recipe, models, path.name, say)
    opened = open_source(str(folder), name=path.stem if name is None else name)
    public = {one: one if model.facts.kind == "hub" else model.base_model for one, model in models.items()}
    sources = {public[one]: model.facts.weights_sha256 for one, model in models.items()}
    renewed = renamed(recipe, public.__getitem__)
    merge = {"recipe": renewed, "seed": MERGE_SEED, "mergekit": mergekit, "sources": sources}
    return replace(opened, facts=SourceFacts("merge", source, None, opened.facts.weights_sha256, merge))


def read_recipe(path: Path) -> tuple[Recipe, list[str]]:
    """A recipe and the models that it names. Raises UserError for what is none, or asks for what is not done here."""
    import yaml

    names: dict[str, str] = {}
    try:
        recipe = renamed(yaml.safe_load(path.read_text(encoding="utf-8")), lambda one: names.setdefault(one, one))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no recipe ({error}): write it in mergekit's format") from None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("merge_method"), str):
        raise UserError(f"{path} does not say its merge_method: write it in mergekit's format")
    if unknown := next((key for key in recipe if key not in KEYS), None):
        raise UserError(f"{path}: unknown key {unknown!r}; there are: {', '.join(KEYS)}")
    if adapter := next((name for name in names if "+" in name), None):
        raise UserError(f"{path}: {adapter} asks for an adapter: merge it into its model first, and name that")
    if len(names) < 2:
        raise UserError(f"{path} names {len(names)} models: a merge needs two or more, each a folder or org/name")
    return recipe, list(names)


def renamed(part: Any, name: Callable[[str], str]) -> Any:
    """A recipe, or a part of one, with every model under another name."""
    if isinstance(part, list):
        return [renamed(one, name) for one in part]
    if not isinstance(part, dict):
        return part
    models = {key for key in NAMING if isinstance(part.get(key), str) and part[key] not in NO_MODELS}
    return {key: name(value) if key in models else renamed(value, name) for key, value in part.items()}


def _carried_out(recipe: Recipe, models: Models, name: str, say: Say) -> tuple[Path, str]:
    """The merge's folder in the cache, named by recipe, models and seed, and mergekit's version; made where none is."""
    from filelock import FileLock

    contents = {one: f"{model.facts.weights_sha256} {_hash(_beside(model))}" for one, model in models.items()}
    key = json.dumps([renamed(recipe, contents.__getitem__), MERGE_SEED], sort_keys=True)
    home = cache_folder() / "merges" / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder, result = home / "model", home / "merge.json"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home.with_suffix(".lock"), timeout=TIMEOUT_S):
            if not result.is_file() or (made := read_json(result))["sha256"] != _hash(folder.glob("*")):
                for old in home.iterdir():  # what a killed merge left
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
                _check_room(recipe, models, home, name, say)
                with tempfile.TemporaryDirectory(dir=home) as work:
                    version = _run(recipe, models, Path(work), name)
                    (Path(work) / folder.name).rename(folder)
                made = {"mergekit": version, "sha256": _hash(folder.glob("*"))}
                replace_file(result, json.dumps(made).encode())
            return folder, str(made["mergekit"])
    except OSError as error:  # a wait that is over, too
        raise UserError(f"cannot merge in {home} ({error.strerror or error}): set QUANTABLE_CACHE") from None


def _hash(files: Iterable[Path]) -> str:
    return hash_of_hashes({path.name: sha256_of(path) for path in files})


def _beside(model: Source) -> list[Path]:
    """A model's config and tokenizer."""
    return [file for file in regular_files(model.folder, CONFIGS) if not file.name.endswith(".index.json")]


def _check_room(recipe: Recipe, models: Models, home: Path, name: str, say: Say) -> None:
    """Say what it takes: mergekit reads a tensor at a time, and holds a file. Raises UserError for want of it."""
    weights = open_weights(models[recipe.get("base_model") or next(iter(models))].folder)
    sizes = [math.prod(weights.shape(one)) for one in weights.names()]
    disk = sum(sizes) * (4 if "float32" in (recipe.get("dtype"), recipe.get("out_dtype")) else 2)
    memory = BARE_BYTES + min(disk, SHARD_BYTES) + 4 * max(sizes) * (len(models) + FLOAT_COPIES)
    needs = f"about {memory / 1e9:.1f} GB of memory and {disk / 1e9:.1f} GB of disk in {home}"
    say(f"{name}: merging {len(models)} models takes {needs}")
    if memory > psutil.virtual_memory().available or disk > shutil.disk_usage(home).free:
        raise UserError(f"{name} needs {needs}, and so much is not free: set QUANTABLE_CACHE, or use another machine")


def _run(recipe: Recipe, models: Models, work: Path, name: str) -> str:
    """Have mergekit write work/model; its version. It sees links to safetensors, config and tokenizer, and no more."""
    names = {one: f"source-{number}" for number, one in enumerate(sorted(models))}
    for one, place in names.items():
        (work / place).mkdir()
        for file in (*regular_files(models[one].folder, ("*.safetensors", "*.index.json")), *_beside(models[one])):
            (work / place / file.name).symlink_to(file.resolve())
    options = {"random_seed": MERGE_SEED, "out_shard_size": SHARD_BYTES}
    request = json.dumps([renamed(recipe, names.__getitem__), options])
    python, worker = os.environ.get("QUANTABLE_MERGEKIT", sys.executable), Path(__file__).with_name("merge_worker.py")
    how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "check": False, "cwd": work}
    how["env"] = os.environ | {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}  # mergekit orders work by hashes
    try:
        ran = subprocess.run([python, "-P", str(worker), request], timeout=TIMEOUT_S, **how)
    except subprocess.TimeoutExpired:
        raise UserError(f"{name} was not merged within {TIMEOUT_S / 3600:.0f} hours: use a faster machine") from None
    said = json.loads(ran.stdout or '{"error": "it died, probably for want of memory"}')
    if "lacks" in said:
        raise UserError(f"a merge needs {said['lacks']}: pip install 'quantable[merge]'")
    if "error" in said:
        raise UserError(f"mergekit does not carry out {name} ({said['error'][:300]}): change the recipe")
    return str(said["mergekit"])
