"""Imports go one way, reports -> bench -> quantize, and what must work without torch reaches no torch.

The rules are read off the source with `ast`, so that nothing has to be importable here. The second half of
the file shows that each rule catches a planted violation.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("quantize", "bench", "reports")
"""From the bottom to the top: a package may import itself and those before it."""

LIGHT = (
    "bench.records.record",
    "bench.records.scenario",
    "quantize.errors",
    "quantize.variant",
    "quantize.checkpoint",
    "quantize.suite",
    "bench.suite.suite",
    "bench.suite.suite_run",
    "reports",
)
"""Modules and packages that must import with nothing installed but what `report` needs."""

LIGHT_MAY_IMPORT = {*sys.stdlib_module_names, *PACKAGES, "rich", "msgspec", "filelock"}

MODEL_LOADERS = ("quantize.loader", "quantize.load", "quantize.loading.dummy_model")
"""The modules that load or draw models, and the loader as the package hands it out."""

MAY_LOAD_MODELS = (
    "bench.worker.worker",
    "bench.lab.quantizers",
    "bench.lab.evaluate",
    "bench.lab.overhead",
    "bench.worker.profile",
    "bench.lab.optimum_benchmark",
)
"""The worker measures; the others are the race's contenders, their judge, and the races against others."""
MODEL_CLASS = re.compile(r"AutoModel\w*|PreTrainedModel|\w+For(CausalLM|\w+Generation)|\w+LMHeadModel")

Sources = Mapping[str, str]
"""Source text by dotted module name; a package stands under its own name."""


@dataclass(frozen=True)
class Import:
    """One name that a module imports: `module` dotted, `name` what is taken from it (None for all of it).

    when_loaded: whether it runs when the module is imported; for_types: only type checkers see it.
    """

    module: str
    name: str | None
    line: int
    when_loaded: bool
    for_types: bool

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


class _Collector(ast.NodeVisitor):
    def __init__(self, module: str, is_package: bool) -> None:
        self.package = module if is_package else module.rpartition(".")[0]
        self.found: list[Import] = []
        self.names: list[tuple[str, int]] = []
        self.in_function = False
        self.for_types = False

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        before, self.in_function = self.in_function, True
        self.generic_visit(node)
        self.in_function = before

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit_FunctionDef(node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)
            return
        self.for_types = True
        for child in node.body:
            self.visit(child)
        self.for_types = False
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, None, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:
            above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            module = ".".join([*above, module]).rstrip(".")
        for alias in node.names:
            self._add(module, alias.name, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        if name in ("importlib.import_module", "import_module", "__import__") and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                self._add(first.value, None, node.lineno)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if not self.for_types:
            self.names.append((node.attr, node.lineno))
        self.generic_visit(node)

    def _add(self, module: str, name: str | None, line: int) -> None:
        when_loaded = not (self.in_function or self.for_types)
        self.found.append(Import(module, name, line, when_loaded, self.for_types))


def collect(sources: Sources, module: str) -> _Collector:
    return _collect(module, sources[module], any(name.startswith(module + ".") for name in sources))


@functools.cache
def _collect(module: str, text: str, is_package: bool) -> _Collector:
    collector = _Collector(module, is_package)
    collector.visit(ast.parse(text))
    return collector


def against_the_arrows(sources: Sources) -> list[str]:
    """Imports of a package further up, wherever in the file they stand."""
    found = []
    for module in sources:
        rank = PACKAGES.index(module.split(".")[0])
        for one in collect(sources, module).found:
            target = one.module.split(".")[0]
            if target in PACKAGES and PACKAGES.index(target) > rank:
                found.append(f"{module}:{one.line} imports {one.full}")
    return found


def heavy_for_light(sources: Sources) -> list[str]:
    """What the light modules import, directly or through our own modules, that need not be installed."""
    found = []
    for light in sources:
        if not _within(light, LIGHT):
            continue
        for path, one in _reached(sources, light):
            if one.module.split(".")[0] not in LIGHT_MAY_IMPORT:
                found.append(f"{' -> '.join(path)}:{one.line} imports {one.full}")
    return found


def loads_models(sources: Sources) -> list[str]:
    """Where bench reaches for a model's loader or a transformers model class outside its worker."""
    found = []
    for module in sources:
        if not _within(module, ("bench",)) or module in MAY_LOAD_MODELS:
            continue
        collector = collect(sources, module)
        for one in collector.found:
            is_class = one.module.split(".")[0] == "transformers" and MODEL_CLASS.fullmatch(one.name or "")
            if not one.for_types and (_within(one.full, MODEL_LOADERS) or is_class):
                found.append(f"{module}:{one.line} imports {one.full}")
        found += [f"{module}:{line} uses {name}" for name, line in collector.names if MODEL_CLASS.fullmatch(name)]
    return found


def _within(module: str, roots: Iterable[str]) -> bool:
    return any(module == root or module.startswith(root + ".") for root in roots)


def _reached(sources: Sources, start: str) -> Iterator[tuple[list[str], Import]]:
    """Every import that happens when `start` is imported, with the chain of our modules that leads to it."""
    waiting = [[name] for name in _loaded_with(sources, start)]
    seen = {path[0] for path in waiting}
    while waiting:
        path = waiting.pop()
        for one in collect(sources, path[-1]).found:
            if not one.when_loaded:
                continue
            yield path, one
            for name in _loaded_with(sources, one.full):
                if name not in seen:
                    seen.add(name)
                    waiting.append([*path, name])


def _loaded_with(sources: Sources, dotted: str) -> list[str]:
    """Our modules that run when this name is imported: it and the packages around it."""
    parts = dotted.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return [name for name in around if name in sources]


def repository() -> Sources:
    sources = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            sources[name] = path.read_text(encoding="utf-8")
    return sources


RULES = {rule.__name__: rule for rule in (against_the_arrows, heavy_for_light, loads_models)}


@pytest.mark.parametrize("rule", RULES)
def test_the_source_keeps_the_rule(rule: str) -> None:
    sources = repository()
    assert {*PACKAGES, "bench.records.record", "quantize.checkpoint", "reports.cli"} <= set(sources)
    assert RULES[rule](sources) == []


@pytest.mark.parametrize(
    ("rule", "module", "line"),
    [
        ("against_the_arrows", "quantize.variant", "import bench"),
        ("against_the_arrows", "bench.records.scenario", "import reports"),
        ("heavy_for_light", "quantize.checkpoint", "import torch"),
        ("heavy_for_light", "bench.records.record", "from torch import nn"),
        ("heavy_for_light", "reports.table", "import numpy as np"),
        ("loads_models", "bench.records.scenario", "from quantize.loader import load"),
    ],
)
def test_one_line_more_in_the_source_breaks_the_rule(rule: str, module: str, line: str) -> None:
    """Guards against a rule that passes because it looks at nothing."""
    sources = dict(repository())
    sources[module] += f"\n{line}\n"
    assert any(module in violation for violation in RULES[rule](sources))


def skeleton(**planted: str) -> Sources:
    """Empty packages with these modules ("bench__plan" stands for bench.run.plan)."""
    empty = dict.fromkeys([*PACKAGES, "quantize.loader", "bench.run.plan", "reports.table"], "")
    return {**empty, **{name.replace("__", "."): text for name, text in planted.items()}}


def test_an_empty_house_breaks_no_rule() -> None:
    assert all(rule(skeleton()) == [] for rule in RULES.values())


@pytest.mark.parametrize(
    "planted",
    [
        skeleton(bench__plan="import reports.table"),
        skeleton(bench__plan="from reports import table"),
        skeleton(bench__plan="def f():\n    from reports.table import Table\n"),
        skeleton(quantize__load="from bench.run.plan import plan"),
        skeleton(quantize__load="import importlib\nimportlib.import_module('reports.table')"),
        skeleton(quantize__load="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bench"),
        skeleton(quantize__load="try:\n    import reports\nexcept ImportError:\n    reports = None"),
    ],
)
def test_an_import_against_the_arrows_is_caught(planted: Sources) -> None:
    assert len(against_the_arrows(planted)) == 1


@pytest.mark.parametrize(
    "planted",
    [
        skeleton(reports__table="import torch"),
        skeleton(reports__table="from transformers import AutoConfig"),
        skeleton(reports__table="class A:\n    import numpy"),
        skeleton(reports__table="from .heavy import x", reports__heavy="import torch.nn"),
        skeleton(reports__table="from bench import plan", bench__plan="import psutil"),
        skeleton(
            reports__table="import bench.run.plan",
            bench="from quantize import load",
            quantize__load="import torch",
        ),
    ],
)
def test_a_heavy_library_reached_by_a_light_module_is_caught(planted: Sources) -> None:
    assert heavy_for_light(planted)


@pytest.mark.parametrize(
    "allowed",
    [
        skeleton(reports__table="def f():\n    import torch"),
        skeleton(reports__table="f = lambda: __import__('torch')"),
        skeleton(reports__table="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        skeleton(reports__table="import json, rich.table\nfrom bench import plan"),
        skeleton(quantize__load="import torch", bench__plan="def f():\n    from quantize import load"),
    ],
)
def test_a_late_import_is_no_violation(allowed: Sources) -> None:
    assert heavy_for_light(allowed) == []
    assert against_the_arrows(allowed) == []


@pytest.mark.parametrize(
    "line",
    [
        "from quantize.loader import load",
        "from quantize import load",
        "import quantize.loader",
        "from quantize import VARIANTS, loading",
        "def f():\n    from quantize.loader import load",
        "from transformers import AutoModelForCausalLM",
        "from transformers.models.llama import LlamaForCausalLM",
        "import transformers\ntransformers.AutoModel.from_pretrained('x')",
    ],
)
def test_loading_a_model_outside_the_worker_is_caught(line: str) -> None:
    assert len(loads_models(skeleton(bench__plan=line))) == 1
    assert loads_models(skeleton(bench__worker=line)) == []
    assert loads_models(skeleton(reports__table=line)) == []


def test_a_type_or_a_tokenizer_is_not_a_model() -> None:
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from quantize.loader import Loaded\n"
    tokenizer = "from transformers import AutoTokenizer, AutoConfig\n"
    assert loads_models(skeleton(bench__plan=typed + tokenizer)) == []
