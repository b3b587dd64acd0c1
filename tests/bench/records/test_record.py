import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.records.gpu_state import GpuState, GpuStates
from bench.records.record import Divergence, Kernels, Latency, Memory, Quality, Record, TaskScore, latency_records
from bench.records.scenario import SCENARIOS, Scenario
from bench.records.store import append, line_of, read_records, record_from
from bench.run.plan import plan, target_of
from quantize.checkpoint import Checkpoint
from quantize.errors import UserError

Make = Callable[..., Checkpoint]
MakeRecords = Callable[..., list[Record]]


@pytest.fixture
def three(make_checkpoint: Make, records_of: MakeRecords) -> list[Record]:
    """An ok latency record with everything in it, one that failed, and a quality record."""
    runs = plan([target_of(make_checkpoint("awq-gemm"))], [SCENARIOS["chat"]], range(2))
    full, quality, failed = (record for run in runs for record in records_of(run))
    return [
        replace(
            full,
            kernels=Kernels("dense", "int4"),
            memory=Memory(10, "RSS", 20, 30, None),
            device_state=GpuStates(before=GpuState(energy_j=1.5)),
        ),
        replace(failed, status="oom", reason="no memory", latency=None),
        replace(
            quality,
            quality=Quality(15.0, 9, "text", "0", Divergence(0.1, 0.05, 0.9, 0.12), Divergence(1e-6, 0.0, 1e-5, 0.0)),
            tasks=(TaskScore("anatomy", "acc", 0.5, 0.01, 10, 3),),
        ),
    ]


def test_records_come_back_as_they_were_written(tmp_path: Path, three: list[Record]) -> None:
    path = tmp_path / "new folder" / "records.jsonl"
    for record in three:
        append(path, record)
    assert read_records(path) == three
    assert latency_records(three) == three[:1]


def test_prompt_lengths_and_modes_come_back_as_they_were_written(tmp_path: Path, three: list[Record]) -> None:
    lengths = replace(
        three[0],
        scenario=Scenario.over("published", (3, 5), 1),
        latency=Latency((3.0, 4.0), ((), ()), (5.0,), True, "time", ((1.0, 2.0), (1.5, 2.5))),
    )
    graph = replace(
        three[0],
        scenario=Scenario("chat-graph", 8, 3, mode="graph"),
        latency=Latency((1.0,), ((0.1, 0.2),), (), decode_mode="CUDA graph"),
        memory=Memory(10, "RSS", 20, 30, None, decode_bytes=7),
    )
    for record in (lengths, graph):
        append(tmp_path / "records.jsonl", record)
    found = read_records(tmp_path / "records.jsonl")
    assert found == [lengths, graph]
    assert [hash(record.scenario) for record in found] == [hash(record.scenario) for record in (lengths, graph)]


def test_records_of_version_2_lack_what_version_3_added(three: list[Record]) -> None:
    data = json.loads(line_of(three[0])) | {"schema_version": 2}
    added = {
        "subject": ("family", "kernel", "dummy", "dummy_layers", "dummy_hidden_size"),
        "scenario": ("lengths", "mode"),
        "latency": ("prefill_by_length_s", "decode_mode"),
        "memory": ("decode_bytes",),
    }
    for part, names in added.items():
        for name in names:
            del data[part][name]
    assert record_from(data, "line 1") == three[0]


def test_a_torn_last_line_is_passed_over_and_swallows_nothing(tmp_path: Path, three: list[Record]) -> None:
    path = tmp_path / "records.jsonl"
    append(path, three[0])
    whole = path.read_bytes()
    append(path, three[1])
    last = path.read_bytes()[len(whole) :]
    for cut in range(len(last) - 1):
        path.write_bytes(whole + last[:cut])
        assert read_records(path) == three[:1]
    for cut in (0, 1, len(last) // 2, len(last) - 2):
        path.write_bytes(whole + last[:cut])
        append(path, three[2])
        assert read_records(path) == [three[0], three[2]]


def test_a_last_line_that_lacks_only_its_end_is_whole(tmp_path: Path, three: list[Record]) -> None:
    path = tmp_path / "records.jsonl"
    append(path, three[0])
    path.write_bytes(path.read_bytes()[:-1])
    append(path, three[1])
    assert read_records(path) == three[:2]


@pytest.mark.parametrize("version", [0, 9, None, "1"])
def test_unknown_schema_versions_are_refused(tmp_path: Path, three: list[Record], version: object) -> None:
    data = json.loads(line_of(three[0])) | {"schema_version": version}
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    with pytest.raises(UserError, match=r"schema version .* this quantable reads versions up to 8"):
        read_records(path)


@pytest.mark.parametrize(
    "line",
    [
        *("hello", '{"a": 1}', "[1]", '{"kind":"latency","schema_version":1}', '{"kind":["latency"]}'),
        *('{"kind":{}}', '{"kind":"latency","wall_s":NaN}', '{"kind":"latency","device":"\\ud800"}', '{"kind":7}'),
    ],
)
def test_what_is_no_record_is_refused_with_its_line(tmp_path: Path, three: list[Record], line: str) -> None:
    path = tmp_path / "records.jsonl"
    append(path, three[0])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"line 2( is no record|: )"):
        read_records(path)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `bench` first"):
        read_records(tmp_path / "none.jsonl")


def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, three: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *how: Any) -> str:
        raise PermissionError(13, "Permission denied")

    append(tmp_path / "records.jsonl", three[0])
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"^cannot read .*records\.jsonl \(Permission denied\)$"):
        read_records(tmp_path / "records.jsonl")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"status": "error"}, "a reason exactly when"),
        ({"reason": "why"}, "a reason exactly when"),
        ({"latency": None}, "has latency figures"),
        ({"scenario": None}, "has a scenario"),
    ],
)
def test_contradictions_are_rejected(three: list[Record], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(three[0], **changed)


@pytest.mark.parametrize(("field", "value"), [("status", "fine"), ("kind", "speed")])
def test_a_kind_or_a_status_that_there_is_not_is_refused(three: list[Record], field: str, value: str) -> None:
    with pytest.raises(UserError, match=f"line 1.*{value}|line 1: {field}: invalid enum value '{value}'"):
        record_from(json.loads(line_of(three[0])) | {field: value}, "line 1")


def test_not_a_number_is_never_written(three: list[Record]) -> None:
    with pytest.raises(ValueError, match="JSON"):
        line_of(replace(three[0], wall_s=float("nan")))


def test_records_of_version_1_are_read_with_what_they_lack_unknown() -> None:
    path = Path(__file__).parent / "records-version-1.jsonl"
    assert '"schema_version":1' in path.read_text()
    records = read_records(path)
    assert [record.kind for record in records] == ["latency", "quality"]
    assert {record.schema_version for record in records} == {8}
    latency, quality = records
    assert latency.latency is not None
    assert (latency.latency.steady, latency.prompt_sha256) == (None, None)
    assert latency.memory is not None
    assert (latency.memory.kv_cache_bytes, latency.memory.activations_bytes) == (None, None)
    assert latency.memory.rest_bytes == latency.memory.baseline_bytes - latency.memory.weights_bytes  # type: ignore[operator]
    assert quality.quality is not None
    assert quality.quality.divergence is None


def test_the_same_record_twice_counts_once(three: list[Record], tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append(path, *three)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() * 2)
    assert read_records(path) == three


def test_a_kernel_is_named_for_the_tokens_that_it_gets_at_once() -> None:
    lengths = Scenario.over("x", [3, 4, 90], 8, batch=2)
    assert Kernels.of(lambda tokens: "few" if tokens < 100 else "many", lengths) == Kernels("few / many", "few")
    assert Kernels.of(str, lengths) == Kernels("6 / 8 / 180", "2")
    assert Kernels.of(str, None).decode == "1"  # a long text: of quality, or tasks
