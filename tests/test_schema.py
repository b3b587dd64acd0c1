"""The schemas are those of what is written, and the page explains each field."""

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.records.store import line_of
from docs.fill import data_page
from docs.schema import main, schema
from quantize.checkpoint import Manifest, SourceFacts
from quantize.schema import to_data
from reports.export import csv_text
from reports.results import measurements

if TYPE_CHECKING:
    from tests.builder import Builder

ROOT = Path(__file__).resolve().parents[1]


def fits(data: Any, node: dict[str, Any], parts: dict[str, Any]) -> bool:
    """Whether JSON is of a schema, as far as ours go."""
    if "$ref" in node:
        return fits(data, parts[node["$ref"].rpartition("/")[2]], parts)
    if "anyOf" in node:
        return any(fits(data, one, parts) for one in node["anyOf"])
    if "enum" in node or "const" in node:
        return data in node.get("enum", [node.get("const")])
    known = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float, "null": type(None)}
    if "type" not in node:
        return True
    if node["type"] == "boolean" or isinstance(data, bool):
        return node["type"] == "boolean" and isinstance(data, bool)
    if not isinstance(data, known[node["type"]]) or ("minimum" in node and data < node["minimum"]):
        return False
    if isinstance(data, list) and isinstance(node.get("items"), dict):
        return all(fits(one, node["items"], parts) for one in data)
    if isinstance(data, dict):
        fields, more = node.get("properties", {}), node.get("additionalProperties", True)
        return set(node.get("required", ())) <= data.keys() and all(
            fits(value, fields[name], parts) if name in fields else more is not False for name, value in data.items()
        )
    return True


def test_records_fit_and_one_wrong_field_does_not(builder: "Builder") -> None:
    found = schema("records")
    for record in (builder.latency("awq-gemm"), builder.quality("fp16", 9.0), builder.failure("fp16", "oom", "x")):
        data = json.loads(line_of(record))
        assert fits(data, found, found["$defs"])
        assert not fits(data | {"speed": 1}, found, found["$defs"])
        assert not fits(data | {"wall_s": "1"}, found, found["$defs"])
        assert not fits({name: value for name, value in data.items() if name != "subject"}, found, found["$defs"])


LABORATORY = ("architectures", "race", "overhead", "side_by_side", "profile", "crossover")
GALLERY = [path for path in sorted((ROOT / "reports/gallery").rglob("*.jsonl")) if path.stem not in LABORATORY]


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_the_last_record_of_each_file_in_the_gallery_fits(path: Path) -> None:
    found = schema("records")
    data = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    assert data.keys() <= {name for part in found["$defs"].values() for name in part["properties"]}


def test_a_manifest_fits() -> None:
    found = schema("manifest")
    source = SourceFacts("folder", "M", None, "0" * 64)
    made = to_data(Manifest("M-FP16", "M", "fp16", None, source, None, {}, {}, {}, "2026", 1))
    assert fits(made, found, found["$defs"])
    assert not fits(made | {"weights_bytes": -1}, found, found["$defs"])


def test_the_columns_are_those_of_the_csv_and_of_their_types(builder: "Builder") -> None:
    columns = schema("csv")["fields"]
    rows = list(csv.DictReader(io.StringIO(csv_text(measurements(builder.five_rows())))))
    assert [one["name"] for one in columns] == list(rows[0])
    for one in columns:
        values = [row[one["name"]] for row in rows if row[one["name"]]]
        if one["type"] != "string":
            assert all(float(value) is not None for value in values), one
        if one["type"] == "integer":
            assert all(value.isdigit() for value in values), one
        numbers = [value for value in values if value.replace(".", "").isdigit()]
        assert one["type"] != "string" or not numbers or one["name"] in ("prompt_lengths", "content_sha256"), one


def test_the_page_has_every_field_in_one_line() -> None:
    text = data_page()
    assert (ROOT / "docs/data.md").read_text(encoding="utf-8") == text, "python -m docs.fill"
    for what in ("records", "manifest", "sweep"):
        for name, part in schema(what)["$defs"].items():
            section = text.partition(f"### {name}\n")[2].partition("\n#")[0]
            for field, node in part["properties"].items():
                assert node["description"], f"{name}.{field}"
                assert f"\n- `{field}` (" in section
    for one in schema("csv")["fields"]:
        assert one["description"]
        assert f"\n- `{one['name']}` (" in text


@pytest.mark.parametrize("what", ["records", "manifest", "sweep", "csv"])
def test_the_command_prints_json(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([what]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(schema(what)))
