from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.records.scenario import SCENARIOS, Scenario
from bench.records.steady import Rule
from bench.run.target import subject_of
from bench.worker.request import Dummy, QualityRequest, Request, TaskRequest
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
    request = Request(
        scenarios=tuple(SCENARIOS.values()),
        round=1,
        position=7,
        threads=2,
        quality=QualityRequest(expectations="x.npy", label="mine"),
        tasks=TaskRequest(("anatomy",), limit=3),
        rule=Rule(noise=0.5),
        **fields,
    )
    request.write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json") == request


def test_a_request_for_random_weights_comes_back_too(tmp_path: Path, fields: dict[str, Any]) -> None:
    scenario = Scenario.over("many", (4, 8), 2)
    asked: dict[str, Any] = fields | {"checkpoint": None, "scenarios": (scenario,)}
    request = Request(**asked, dummy=Dummy("mistral-7b", "awq-gemm", 128))
    request.write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json") == request


def test_the_kernel_is_the_subjects(fields: dict[str, Any]) -> None:
    chosen = replace(fields["subject"], kernel="native")
    assert Request(**fields | {"subject": chosen, "scenarios": (SCENARIOS["chat"],)}).kernel == "native"


def test_a_request_is_for_a_checkpoint_or_for_random_weights(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one of the two"):
        Request(scenarios=(SCENARIOS["chat"],), dummy=Dummy("mistral-7b", "fp16"), **fields)
    with pytest.raises(ValueError, match="one of the two"):
        Request(scenarios=(SCENARIOS["chat"],), **fields | {"checkpoint": None})


def test_a_record_says_whose_run_it_was(fields: dict[str, Any]) -> None:
    request = Request(scenarios=(SCENARIOS["chat"],), round=1, position=7, **fields)
    record = request.record("oom", request.works[0], started_at="2026-01-01", wall_s=2.0, reason="no memory")
    assert (record.subject, record.environment) == (request.subject, request.environment)
    assert (record.device, record.compute_dtype, record.round, record.position) == ("cpu", "float32", 1, 7)


def test_a_request_without_work_is_rejected(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="without work"):
        Request(**fields)
