from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.plan import subject_of
from bench.request import Request
from bench.scenario import SCENARIOS
from quantize.checkpoint import Checkpoint

Make = Callable[..., Checkpoint]


@pytest.fixture
def fields(make_checkpoint: Make) -> dict[str, Any]:
    checkpoint = make_checkpoint("awq-gemm")
    return {
        "checkpoint": str(checkpoint.path),
        "subject": subject_of(checkpoint),
        "device": "cpu",
        "compute_dtype": "float32",
        "environment": {"cpu": "Model 1"},
    }


def test_a_request_comes_back_as_it_was_written(tmp_path: Path, fields: dict[str, Any]) -> None:
    request = Request(kind="latency", scenarios=tuple(SCENARIOS.values()), round=1, position=7, threads=2, **fields)
    request.write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json") == request


def test_a_bare_prefill_is_repeated_and_many_decode_steps_are_not(fields: dict[str, Any]) -> None:
    request = Request(kind="latency", scenarios=tuple(SCENARIOS.values()), **fields)
    assert [request.repetitions_for(scenario) for scenario in request.scenarios] == [2, 1]
    request = Request(kind="latency", scenarios=tuple(SCENARIOS.values()), repetitions=5, **fields)
    assert [request.repetitions_for(scenario) for scenario in request.scenarios] == [5, 5]


def test_a_record_says_whose_run_it_was(fields: dict[str, Any]) -> None:
    request = Request(kind="latency", scenarios=(SCENARIOS["chat"],), round=1, position=7, **fields)
    record = request.record("oom", started_at="2026-01-01", wall_s=2.0, scenario=SCENARIOS["chat"], reason="no memory")
    assert (record.subject, record.environment) == (request.subject, request.environment)
    assert (record.device, record.compute_dtype, record.round, record.position) == ("cpu", "float32", 1, 7)


def test_contradictions_are_rejected(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="kind 'speed'"):
        Request(**(fields | {"kind": "speed"}))
    with pytest.raises(ValueError, match="a latency request has scenarios"):
        Request(kind="latency", **fields)
    with pytest.raises(ValueError, match="a quality request has none"):
        Request(kind="quality", scenarios=(SCENARIOS["chat"],), **fields)
