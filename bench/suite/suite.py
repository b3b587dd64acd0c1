"""A suite: a whole table as a TOML file, its rows in order, its scenarios, its reference. Imports no torch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.records.record import name_on
from bench.records.scenario import Scenario
from bench.records.stopping import PassRule, RoundsRule
from bench.run.plan import half_dtype, subject_of, target_of
from bench.suite.prompts import TokensOf, published_lengths
from bench.worker.request import Target
from quantize.checkpoint import MANIFEST_NAME, find_checkpoints
from quantize.errors import UserError
from quantize.schema import from_data
from quantize.suite import SuiteRow, entries_in, rows_of, suite_file, suite_table
from quantize.variant import REFERENCE

THREE_SHOT = "3-shot"  # stands for the prompt lengths of the published table's questions (bench.suite.prompts)


@dataclass(frozen=True)
class SuiteScenario:
    """A scenario as the file writes it: `prompt_tokens`, or `lengths`, a list of them or "3-shot"."""

    name: str
    new_tokens: int
    prompt_tokens: int | None = None
    lengths: tuple[int, ...] | str | None = None
    batch: int = 1
    mode: str = "eager"

    def __post_init__(self) -> None:
        if (self.prompt_tokens is None) == (self.lengths is None):
            raise UserError("give prompt_tokens or lengths, one of the two")
        if isinstance(self.lengths, str) and self.lengths != THREE_SHOT:
            raise UserError(f"lengths are numbers of tokens in a list, or {THREE_SHOT!r}")
        self.scenario()  # which rejects what no scenario may be

    def scenario(self, tokens_of: TokensOf | None = None) -> Scenario:
        """The scenario to run. tokens_of: as `published_lengths` takes it."""
        more: dict[str, Any] = {"new_tokens": self.new_tokens, "batch": self.batch, "mode": self.mode}
        if self.prompt_tokens is not None:
            return Scenario(self.name, self.prompt_tokens, **more)
        lengths = self.lengths if isinstance(self.lengths, tuple) else published_lengths(tokens_of)
        return Scenario.over(self.name, lengths, **more)


@dataclass(frozen=True)
class SuiteReference:
    """The base model whose half-precision row all ratios are to."""

    base_model: str


@dataclass(frozen=True)
class SuiteTables:
    """What stands once in a suite's file.

    shape: of random weights, as `quantize.dummy.dummy_config` reads it; rounds, rule: as in BenchOptions."""

    shape: str
    reference: SuiteReference
    rounds: RoundsRule = field(default_factory=RoundsRule)
    rule: PassRule = field(default_factory=PassRule)


@dataclass(frozen=True, kw_only=True)
class Suite(SuiteTables):
    """A table to be: its rows in order, what is measured of each, and the name that the user typed."""

    name: str
    rows: tuple[SuiteRow, ...]
    scenarios: tuple[SuiteScenario, ...]

    def __post_init__(self) -> None:
        reference = self.reference.base_model
        if not any(row.variant == REFERENCE.name and row.base_model == reference for row in self.rows):
            raise UserError(f"no row is the reference, {reference} as {REFERENCE.name}: add it")
        names = [f"scenario {scenario.name!r}" for scenario in self.scenarios]
        names += [f"row {name_on(row.checkpoint_name, row.kernel)!r}" for row in self.rows]
        if len(set(names)) < len(names):
            raise UserError(f"the {max(names, key=names.count)} stands there more than once: leave one")

    def scenarios_named(self, names: Sequence[str], tokens_of: TokensOf | None = None) -> tuple[Scenario, ...]:
        """The scenarios of these names in the suite's order, all of them for no name. Raises UserError for others."""
        known = [scenario.name for scenario in self.scenarios]
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"suite {self.name} has no scenario {unknown[0]!r}; there are: {', '.join(known)}")
        return tuple(one.scenario(tokens_of) for one in self.scenarios if not names or one.name in names)


def suite_named(name_or_path: str, base_model: str | None = None) -> Suite:
    """The suite of this name (a file in quantize/suites), or in this .toml file. Raises UserError for what is none.

    base_model: its rows alone, beside a reference of its own."""
    where, data = suite_file(name_or_path).name, suite_table(name_or_path)
    rows, scenarios = entries_in(data, "row", SuiteRow, where), entries_in(data, "scenario", SuiteScenario, where)
    once = from_data(SuiteTables, {key: x for key, x in data.items() if key not in ("row", "scenario")}, where)
    if base_model:
        rows, once = rows_of(rows, base_model), replace(once, reference=SuiteReference(base_model))
    try:
        return Suite(**vars(once), name=name_or_path, rows=rows, scenarios=scenarios)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def dummy_targets(suite: Suite, shape: str | None = None) -> list[Target]:
    """The suite's rows as random weights in its shape, or in this one. Raises UserError for what is no shape."""
    from quantize.dummy import SHAPES, dummy_config

    spec = shape or suite.shape
    name, config = dummy_config(spec)
    layers, hidden_size = config.get("num_hidden_layers"), config.get("hidden_size")
    common: dict[str, Any] = {"dummy_layers": layers, "dummy_hidden_size": hidden_size, "file_weights_bytes": None}
    common |= {"dummy": shape_name(name.removeprefix("dummy-"), layers, hidden_size)}
    place = spec if spec in SHAPES else str(Path(spec).resolve())
    targets = []
    for row in suite.rows:
        contents = json.dumps([config, row.variant, row.group_size], sort_keys=True)
        own: dict[str, Any] = {"name": f"{row.checkpoint_name}, random weights", "kernel": row.kernel}
        own |= {"base_model": row.base_model, "q_group_size": row.group_size, "family": suite.reference.base_model}
        content_sha256 = hashlib.sha256(contents.encode()).hexdigest()
        subject = subject_of(row.quantization, content_sha256=content_sha256, **own, **common)
        targets.append(Target(subject, dummy=place, half_dtype=half_dtype(config)))
    return targets


def shape_name(name: str, layers: int | None, hidden_size: int | None) -> str:
    """How the reader is told a shape: "mistral-7b, 32 layers, hidden size 4096"."""
    parts = [name, f"{layers} layers" if layers else "", f"hidden size {hidden_size}" if hidden_size else ""]
    return ", ".join(filter(None, parts))


def checkpoint_targets(suite: Suite, folder: Path) -> list[Target]:
    """The suite's rows as the checkpoints in this folder. Raises UserError, saying how to make those that lack."""
    made = find_checkpoints(folder) if any(folder.glob(f"*/{MANIFEST_NAME}")) else []
    there = {(one.manifest.base_model, one.manifest.variant, one.manifest.q_group_size): one for one in made}
    found = [(row, there.get((row.base_model, row.variant, row.group_size))) for row in suite.rows]
    if missing := list(dict.fromkeys(row.checkpoint_name for row, checkpoint in found if checkpoint is None)):
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        command = f"quantize --suite {suite.name} --out {folder}"
        ways = f"make what is missing with `{command}`, or measure random weights with --dummy"
        raise UserError(f"{folder} lacks {missing[0]}{rest}: {ways}")
    family = suite.reference.base_model
    return [target_of(one, kernel=row.kernel, family=family) for row, one in found if one is not None]
