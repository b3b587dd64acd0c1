"""A suite: the rows of a whole table as a TOML file. What `quantize` makes of it; bench/suite/suite.py reads the rest.

Imports no torch.
"""

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.variant import GROUP_SIZES, VARIANTS, Variant, check_kernel

SUITES = Path(__file__).resolve().parent / "suites"
"""Where the named suites lie."""


@dataclass(frozen=True)
class SuiteRow:
    """One row of the table.

    base_model: as the table names it. source: where its weights come from, as `quantize` takes it; revision: of a
    hub source. group_size: of an AWQ variant, None for the others. kernel: what an AWQ row is measured on, None for the
    default. published: whether the published table has this row.
    """

    base_model: str
    source: str
    variant: str
    group_size: int | None = None
    revision: str | None = None
    kernel: str | None = None
    published: bool = True

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UserError(f"unknown variant {self.variant!r}; there are: {', '.join(VARIANTS)}")
        is_awq = VARIANTS[self.variant].is_awq
        if is_awq and self.group_size not in GROUP_SIZES:
            raise UserError(f"{self.variant} needs a group_size: one of {', '.join(map(str, GROUP_SIZES))}")
        if not is_awq and (self.group_size is not None or self.kernel is not None):
            raise UserError(f"{self.variant} has no group_size and no choice of a kernel: leave them out")
        check_kernel(self.kernel)

    @property
    def quantization(self) -> Variant:
        """The variant that `variant` names."""
        return VARIANTS[self.variant]

    @property
    def checkpoint_name(self) -> str:
        """The checkpoint's folder, as `quantize` names it."""
        return f"{self.base_model}-{self.quantization.folder_suffix(self.group_size)}"


@dataclass(frozen=True)
class Job:
    """One call of `quantize`: what to make of one source. base_model: as it will be called, None for whatever."""

    base_model: str | None
    source: str
    revision: str | None
    group_size: int | None
    variants: tuple[str, ...]


def jobs_of(rows: Sequence[SuiteRow]) -> list[Job]:
    """What makes the checkpoints of these rows: a job a source, more where its rows differ in group size."""
    jobs: dict[tuple[str, str, str | None, int | None], dict[str, None]] = {}
    for row in rows:
        groups = [other.group_size for other in rows if other.source == row.source and other.group_size is not None]
        group_size = row.group_size or next(iter(groups), None)
        jobs.setdefault((row.base_model, row.source, row.revision, group_size), {})[row.variant] = None
    return [Job(*key, variants=tuple(variants)) for key, variants in jobs.items()]


def suite_file(name_or_path: str) -> Path:
    """The file of a named suite, or the file named. Raises UserError for neither."""
    path = Path(name_or_path)
    named = SUITES / f"{name_or_path}.toml"
    if path.suffix == ".toml" and path.is_file():
        return path
    if named.is_file():
        return named
    known = ", ".join(sorted(file.stem for file in SUITES.glob("*.toml")))
    raise UserError(f"no suite {name_or_path!r}; there are: {known}, or name a .toml file")


def suite_table(name_or_path: str) -> dict[str, Any]:
    """What a suite's file holds. Raises UserError for no such suite, or one that is no TOML."""
    path = suite_file(name_or_path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no suite ({error}): mend it, or name another") from None


def suite_rows(name_or_path: str) -> tuple[SuiteRow, ...]:
    """The rows of a suite, in the table's order. Raises UserError for what is no suite, naming the row."""
    rows = suite_table(name_or_path).get("row")
    where = suite_file(name_or_path).name
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{where} has no [[row]]: give each row of the table one")
    return tuple(from_table(SuiteRow, row, f"{where}, row {number}") for number, row in enumerate(rows, start=1))


def from_table(cls: Any, table: Any, where: str) -> Any:
    """An instance of the dataclass `cls` from a TOML table; `where` begins the message of what is wrong with it.

    Raises UserError for a key that the class does not have, a value of another type, one that is missing or rejected.
    """
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: {table!r} is no table")
    known = {field.name: field for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; there are: {', '.join(known)}")
        wanted: Any = known[key].type
        values[key] = float(value) if wanted is float and type(value) is int else value
        if not isinstance(values[key], wanted) or (isinstance(value, bool) and wanted is not bool):
            raise UserError(f"{where}: {key} = {value!r} has the wrong type")
    missing = [name for name in _required(known.values()) if name not in values]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing")
    try:
        return cls(**values)
    except (UserError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def _required(fields: Iterable["dataclasses.Field[Any]"]) -> list[str]:
    none = dataclasses.MISSING
    return [field.name for field in fields if field.default is none and field.default_factory is none]
