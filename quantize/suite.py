"""A suite: the rows of a whole table as a TOML file; bench/suite/suite.py reads the rest of it. Imports no torch."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from quantize.errors import UserError
from quantize.schema import from_data
from quantize.variant import GROUP_SIZES, REFERENCE, VARIANTS, Variant, check_kernel

T = TypeVar("T")
SUITES = Path(__file__).resolve().parent / "suites"  # where the named ones lie, and the recipes of merges
MERGE_PREFIX = "merge:"  # of a source that a recipe says how to merge


@dataclass(frozen=True)
class SuiteRow:
    """One row of the table.

    base_model: as the table names it; source: as `quantize` takes it; revision: of a hub source.
    variant:    a name in VARIANTS; group_size: of an AWQ one, None for the others.
    kernel:     what an AWQ row is measured on, None for the default.
    published:  whether the published table has this row.
    recipe:     of a merge, which `--merge` makes in place of the source."""

    base_model: str
    source: str
    variant: str
    group_size: int | None = None
    revision: str | None = None
    kernel: str | None = None
    published: bool = True
    recipe: str | None = None

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UserError(f"unknown variant {self.variant!r}; there are: {', '.join(VARIANTS)}")
        is_awq = self.quantization.is_awq
        if is_awq and self.group_size not in GROUP_SIZES:
            raise UserError(f"{self.variant} needs a group_size: one of {', '.join(map(str, GROUP_SIZES))}")
        if not is_awq and (self.group_size is not None or self.kernel is not None):
            raise UserError(f"{self.variant} has no group_size and no choice of a kernel: leave them out")
        check_kernel(self.kernel)

    @property
    def quantization(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def checkpoint_name(self) -> str:
        return f"{self.base_model}-{self.quantization.folder_suffix(self.group_size)}"


@dataclass(frozen=True)
class QuantizeCall:
    """One call of `quantize`. base_model: its name, None for any; source, revision, group_size, variants: as there."""

    base_model: str | None
    source: str
    revision: str | None
    group_size: int | None
    variants: tuple[str, ...]


def rows_of(rows: Sequence[SuiteRow], base_model: str) -> tuple[SuiteRow, ...]:
    """The rows of one base model, and its reference, which a table may have of another model alone."""
    own = tuple(row for row in rows if row.base_model == base_model)
    if any(row.variant == REFERENCE.name for row in own):
        return own
    return (replace(own[0], variant=REFERENCE.name, group_size=None, kernel=None, published=False), *own)


def calls_of(rows: Sequence[SuiteRow]) -> list[QuantizeCall]:
    """What makes the checkpoints of these rows: a call a source, more where its rows differ in group size."""
    calls: dict[tuple[str, str, str | None, int | None], dict[str, None]] = {}
    for row in rows:
        groups = (other.group_size for other in rows if other.source == row.source)
        group_size = row.group_size or next(filter(None, groups), None)
        calls.setdefault((row.base_model, row.source, row.revision, group_size), {})[row.variant] = None
    return [QuantizeCall(*key, variants=tuple(variants)) for key, variants in calls.items()]


def suite_file(name_or_path: str) -> Path:
    """The file of a named suite, or the file named. Raises UserError for neither."""
    return named_file(name_or_path, "suite", ".toml")


def named_file(name_or_path: str, what: str, ending: str) -> Path:
    for path in (Path(name_or_path), SUITES / f"{name_or_path}{ending}"):
        if path.suffix == ending and path.is_file():
            return path
    known = ", ".join(sorted(file.stem for file in SUITES.glob(f"*{ending}")))
    raise UserError(f"no {what} {name_or_path!r}; there are: {known}, or name a {ending} file")


def suite_table(name_or_path: str) -> dict[str, Any]:
    """What a suite's file holds. Raises UserError for no such suite, or one that is no TOML."""
    path = suite_file(name_or_path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no suite ({error}): fix it, or name another") from None


def suite_rows(name_or_path: str, *, merge: bool = False) -> tuple[SuiteRow, ...]:
    """The rows of a suite, in the table's order. Raises UserError for what is no suite, naming the row.

    merge: with recipes in place of finished merges. Raises UserError where none has one."""
    rows = entries_in(suite_table(name_or_path), "row", SuiteRow, suite_file(name_or_path).name)
    if not merge:
        return rows
    if not any(row.recipe for row in rows):
        raise UserError(f"{name_or_path} has no row with a recipe: leave --merge out")
    return tuple(replace(row, source=MERGE_PREFIX + row.recipe, revision=None) if row.recipe else row for row in rows)


def entries_in(table: Mapping[str, Any], key: str, cls: type[T], where: str) -> tuple[T, ...]:
    """Every [[key]] of a suite's file as one of these; `where` begins the message of what is wrong."""
    entries = table.get(key)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where} has no [[{key}]]: write one or more")
    return tuple(from_data(cls, entry, f"{where}, {key} {number}") for number, entry in enumerate(entries, start=1))
