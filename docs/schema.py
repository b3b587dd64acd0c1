"""What the files hold, field by field, from the types that check them and their docstrings.

`python -m docs.schema records`, `manifest` or `csv` prints it as a JSON schema.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

import msgspec

from bench.records.environment import Environment
from bench.records.record import PHASES, Divergence, Latency, Memory, Quality, Record, Subject
from bench.records.scenario import Scenario
from bench.sweep.cell import Attempt, Cell
from quantize.checkpoint import Manifest
from quantize.shell import Parser, command
from reports.export import OF_A_PHASE, csv_text
from reports.results import PARTS, Measurement, Result, Timing

FILES: dict[str, tuple[type, ...]] = {"records": (Record,), "manifest": (Manifest,), "sweep": (Cell, Attempt)}
"""Whose fields a line of records.jsonl, a quantable.json, and a sweep's files have: those of one of these types."""

SHARED = {  # fields that mean the same in every class whose docstring does not name them
    **dict.fromkeys(("when", "measured_at"), "ISO 8601, UTC"),
    **{"kind": "of the record", "schema_version": "of this kind of record; a later one has more fields"},
    **{"device": '"cpu" or "cuda"', "compute_dtype": "of the activations"},
    **{"contender": "who took part", "style": "the form of its weights"},
    "error_bound": "the largest relative_error that is no mistake",
}
COLUMNS = {  # by type, what a column of the CSV means that is no field or property of one of COLUMN_CLASSES
    "number": {f"{phase}_{name}": f"{phase}: {text}" for phase in PHASES for name, text in OF_A_PHASE.items()}
    | {f"{phase}_tokens_per_s": f"{phase}: tokens a second, over the whole batch" for phase in PARTS}
    | {"decode_copy_share": "decode_bytes_per_s as a share of what a plain copy on the device moves"},
    "string": {f"{phase}_verdict": f"{phase}: faster, slower, same within noise or unsure" for phase in PHASES}
    | {f"{phase}_kernel": f"{phase}: what ran the linear layers" for phase in PARTS}
    | {"scenario": "its name", "prompt_lengths": "tokens of each prompt of a pass, spaces between"}
    | {"status": "ok, or how the runs in this scenario failed", "reason": "why they failed"}
    | {"memory_source": "what the peaks mean: RSS or CUDA allocator"}
    | {"machine": "the GPU, or else the processor", "date": "of the first run, ISO 8601"}
    | {"commit": "of the quantable that measured", "versions": "of Python and of the libraries, spaces between"},
}
COLUMN_CLASSES = (Subject, Scenario, Timing, Result, Quality, Divergence, Memory, Latency, Measurement, Record)
TYPES_OF_COLUMNS = {bool: "integer", int: "integer", float: "number"}
UNITS = {"_bytes_per_s": "bytes/s", "_tokens_per_s": "tokens/s", "_bytes": "bytes", "_s": "s", "_j": "J"}


def schema(what: str) -> dict[str, Any]:
    """The JSON schema of one of FILES; of "csv" the table schema (Frictionless Data): names, types, units."""
    if what == "csv":
        subject = Subject("", "", "", "", None, None, None, None, "", None)
        result = Result(subject, False, None, None, None, None, None, {}, (), ())
        header = csv_text([Measurement("cpu", Environment(), None, (), (result,))]).partition("\n")[0]
        return {"fields": [column(name) for name in header.split(",")]}
    roots, parts = msgspec.json.schema_components(FILES[what], ref_template="#/$defs/{name}")
    for cls in classes_in(FILES[what]):
        about, fields = docs_of(cls)
        parts[cls.__name__] |= {"description": about, "additionalProperties": False}
        for name, text in fields.items():
            parts[cls.__name__]["properties"][name]["description"] = text
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "anyOf": list(roots), "$defs": parts}


def classes_in(kinds: Iterable[Any]) -> list[type]:
    """The dataclasses among these types and in their fields, each once, in the order in which a reader meets them."""
    found: list[Any] = []
    for kind in kinds:
        own = [kind] if dataclasses.is_dataclass(kind) else []
        found += [*own, *classes_in(get_type_hints(kind).values() if own else get_args(kind))]
    return list(dict.fromkeys(found))


def docs_of(cls: type) -> tuple[str, dict[str, str]]:
    """What a class is, and each of its fields: from its docstring, where `name: what` or `one, other: what` stand.

    A field that it does not name is one of SHARED, or what its own class's docstring begins with.
    """
    hints, text = get_type_hints(cls), " ".join((cls.__doc__ or "").split())
    name = "|".join(hints)
    about, *found = re.split(rf"\b((?:{name})(?:, (?:{name}))*): +", text)
    docs: dict[str, str] = {}
    for names, words in zip(found[::2], found[1::2], strict=True):
        docs |= dict.fromkeys(names.split(", "), words.strip(" ;."))
    for field, hint in hints.items():
        first = [docs_of(inner)[0].partition(". ")[0].strip(" .") for inner in classes_in([hint])[:1]]
        docs.setdefault(field, SHARED.get(field) or "".join(first))
    return about.strip(), {field: docs[field] for field in hints}


def column(name: str) -> dict[str, str]:
    """A column of the CSV: its name, type, unit where it has one, and meaning."""
    unit = next(({"unit": unit} for suffix, unit in UNITS.items() if name.endswith(suffix)), {})
    for kind, texts in COLUMNS.items():
        if name in texts:
            return {"name": name, "type": kind, **unit, "description": texts[name]}
    member = name.removeprefix("kl_")
    cls = next(cls for cls in COLUMN_CLASSES if member in get_type_hints(cls) or hasattr(cls, member))
    made = getattr(cls, member, None)
    if isinstance(made, property):
        hint, text = get_type_hints(made.fget)["return"], (made.__doc__ or "").partition(".\n")[0].strip(".")
    else:
        hint, text = get_type_hints(cls)[member], docs_of(cls)[1][member]
    kind = next((kind for one, kind in TYPES_OF_COLUMNS.items() if one in (hint, *get_args(hint))), "string")
    return {"name": name, "type": kind, **unit, "description": text}


def parser() -> Parser:
    cli = Parser(prog="schema", description="Print the JSON schema of what a file holds (docs/data.md).")
    text = "a records.jsonl, a quantable.json, a sweep.json and its attempts, `report --format csv`"
    cli.add_argument("what", choices=[*FILES, "csv"], help=text)
    return cli


main = command(parser, lambda options: print(json.dumps(schema(options.what), indent=1)))

if __name__ == "__main__":
    raise SystemExit(main())
