"""Whatever stands in a file that is read here, it is read or refused in one line: no traceback, no file elsewhere.

A reader gets a good file with values, fields, bytes or lines exchanged. QUANTABLE_EXAMPLES sets how many for each.
"""

import copy
import hashlib
import json
import os
import shutil
import struct
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quantize
from bench.records.store import line_of, read_file, record_from
from bench.suite.suite import suite_named
from quantize.building.journal import Journal
from quantize.checkpoint import MANIFEST_NAME, find_checkpoints, open_checkpoint, verify
from quantize.errors import UserError
from quantize.model.fit import fitting_model
from quantize.schema import parse_json
from quantize.source import open_source
from quantize.suite import suite_rows
from quantize.weights import open_weights
from tests.builder import Builder


def examples(count: int) -> settings:
    """So many examples, the same in every run, unless QUANTABLE_EXAMPLES asks for more."""
    return settings(
        max_examples=int(os.environ.get("QUANTABLE_EXAMPLES", count)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize="QUANTABLE_EXAMPLES" not in os.environ,
        database=None,
    )


MANY = examples(2000)

ODD: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        1,
        2**31,
        2**63,
        10**40,
        -5.0,
        1e308,
        0.5,
        "",
        "x",
        "../x",
        "/etc/passwd",
        "a/b",
        "\x00",
        "\x1b[2J",
    ),
    *(
        "\u202e",
        "\ud800",
        "9" * 5000,
        [],
        {},
        [[]],
        [None],
        {"": {}},
        {"a": 1},
        "NaN",
        "cpu",
        "cuda",
        "latency",
        "quality",
    ),
]
values = st.one_of(
    st.sampled_from(ODD).map(copy.deepcopy),  # a value is changed where it was put
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)
"""What may stand in place of a good value; NaN and infinity are among the floats."""


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def damaged(draw: st.DrawFn, good: Any) -> Any:
    """A good document with one to three places exchanged, taken out, added to or renamed."""
    data = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(data))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(values)
            continue
        owner = data
        for key in path[:-1]:
            owner = owner[key]
        change = draw(st.sampled_from(["exchange", "exchange", "remove", "add", "rename"]))
        if change == "exchange":
            owner[path[-1]] = draw(values)
        elif change == "remove":
            del owner[path[-1]]
        elif isinstance(owner, dict):
            value = draw(values) if change == "add" else owner.pop(path[-1])
            owner[draw(st.text(max_size=6))] = value
    return data


@st.composite
def damaged_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """Good bytes cut, or with some exchanged, put in, or doubled."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(st.sampled_from(["cut", "exchange", "insert", "double"]))
        if change == "cut":
            del data[at:]
        elif change == "exchange":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif change == "insert":
            data[at:at] = draw(st.sampled_from([b"\xef\xbb\xbf", b"[" * 20000, b"\x00", b"\n", b"}", b"\xff", b'"']))
        else:
            data += data[at:]
    return bytes(data)


def refused_or(work: Callable[[], object]) -> None:
    """The work is done, or its UserError is one printable line."""
    said = "done"
    try:
        work()
    except UserError as error:
        said = str(error)
    assert said
    assert said.isprintable()


def text_of(data: Any) -> bytes:
    return json.dumps(data).encode()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in a folder; nothing appears beside it."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "inside").mkdir()
    yield outside / "inside"
    assert [path.name for path in outside.iterdir()] == ["inside"]


GOOD_RECORDS = [
    json.loads(line_of(record))
    for record in (Builder().latency("awq-gemm"), Builder().quality("fp16", 9.0), Builder().failure("fp16", "oom", "x"))
]


@MANY
@given(data=st.sampled_from(GOOD_RECORDS).flatmap(damaged))
def test_a_record(data: Any) -> None:
    refused_or(lambda: record_from(parse_json(text_of(data), "line 1"), "line 1"))


@MANY
@given(data=damaged_bytes("".join(json.dumps(one) + "\n" for one in GOOD_RECORDS).encode()))
def test_a_records_file(data: bytes, alone: Path) -> None:
    path = alone / "records.jsonl"
    path.write_bytes(data)
    refused_or(lambda: read_file(path))


FILES = {"config.json": b"{}", "model.safetensors": b"weights"}
GOOD_MANIFEST = {
    "name": "M-AWQ", "base_model": "M", "variant": "awq-gemm", "q_group_size": 128,
    "source": {"kind": "folder", "id": "M", "revision": None, "weights_sha256": "0" * 64},
    "calibration": {"text": "builtin", "blocks": 48, "block_tokens": 256, "sha256": "0" * 64},
    "options": {"w_bit": 4, "version": "GEMM"}, "libraries": {"torch": "2"}, "seconds": {"total": 1.0},
    "created": "2026-11-25T00:00:00+00:00", "weights_bytes": 10,
    "files": {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in FILES.items()},
    "layers": [{"name": "q"}], "estimate": {"seconds": 1}, "measured": None, "schema_version": 1,
}  # fmt: skip


def opened(folder: Path) -> None:
    found = open_checkpoint(folder)
    assert found.path == folder
    verify(found)
    assert [one.path for one in find_checkpoints(folder.parent)] == [folder]


@MANY
@given(data=damaged(GOOD_MANIFEST) | damaged_bytes(text_of(GOOD_MANIFEST)))
def test_a_manifest(data: Any, alone: Path) -> None:
    folder = alone / "out" / "M-AWQ"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / MANIFEST_NAME).write_bytes(data if isinstance(data, bytes) else text_of(data))
    refused_or(lambda: opened(folder))


GOOD_JOURNAL = {
    "key": "0" * 64, "seconds": {"search": 1.5},
    "layers": [[{"name": "q", "loss": 0.5}]],
}  # fmt: skip


@MANY
@given(data=damaged(GOOD_JOURNAL) | damaged_bytes(text_of(GOOD_JOURNAL)))
def test_a_journal(data: Any, alone: Path) -> None:
    folder = alone / ".M.unfinished"
    folder.mkdir(exist_ok=True)
    (folder / "journal.json").write_bytes(data if isinstance(data, bytes) else text_of(data))

    def go_on() -> None:
        journal = Journal(folder, {"a": 1})
        journal.hidden()
        assert journal.finished_layers >= 0

    refused_or(go_on)


@pytest.fixture(scope="module")
def model(tiny_llama: Path, alone: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, alone / "model"))


@pytest.fixture(scope="module")
def good_config(tiny_llama: Path) -> Any:
    return json.loads((tiny_llama / "config.json").read_text())


@MANY
@given(data=st.data())
def test_a_config(data: st.DataObject, model: Path, good_config: Any) -> None:
    given_config = data.draw(damaged(good_config) | damaged_bytes(text_of(good_config)))
    (model / "config.json").write_bytes(given_config if isinstance(given_config, bytes) else text_of(given_config))

    def whole() -> None:
        source = open_source(str(model))
        fitting_model(source.folder, open_weights(source.folder), print)

    refused_or(whole)


def safetensors(header: Any, data: bytes) -> bytes:
    encoded = header if isinstance(header, bytes) else text_of(header)
    return struct.pack("<Q", len(encoded)) + encoded + data


GOOD_HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
}


@MANY
@given(
    data=damaged(GOOD_HEADER) | damaged_bytes(text_of(GOOD_HEADER)) | damaged_bytes(safetensors(GOOD_HEADER, b"x" * 16))
)
def test_a_safetensors_header(data: Any, alone: Path) -> None:
    raw = isinstance(data, bytes) and not data.startswith(b"{")
    (alone / "model.safetensors").write_bytes(data if raw else safetensors(data, b"x" * 16))

    def whole() -> None:
        weights = open_weights(alone)
        for name in weights.names():
            assert weights.dtype(name).is_floating_point is not None
            assert list(weights.get(name).shape) == list(weights.shape(name))

    refused_or(whole)


GOOD_SUITE = tomllib.loads((Path(quantize.__file__).parent / "suites" / "biomistral.toml").read_text())


def toml(data: Any) -> str:
    """A document as TOML, tables inline."""
    if isinstance(data, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(value)}" for key, value in data.items()) + "}"
    if isinstance(data, list):
        return "[" + ", ".join(map(toml, data)) + "]"
    return "nan" if data is None else json.dumps(data).replace("NaN", "nan").replace("Infinity", "inf")


@MANY
@given(data=damaged(GOOD_SUITE) | damaged_bytes(toml(GOOD_SUITE).encode()))
def test_a_suite(data: Any, alone: Path) -> None:
    path = alone / "suite.toml"
    if isinstance(data, dict):
        text = "\n".join(f"{json.dumps(str(key))} = {toml(value)}" for key, value in data.items()).encode()
    else:
        text = data if isinstance(data, bytes) else b"x"
    path.write_bytes(text)
    refused_or(lambda: suite_rows(str(path)))
    refused_or(lambda: suite_named(str(path)))
