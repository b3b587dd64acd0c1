"""A worker that draws its weights, and what of a checkpoint it does without."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.records.record import Record
from bench.records.scenario import Scenario
from bench.records.steady import Rule
from bench.run.executor import Settings, WorkerExecutor
from bench.run.plan import plan
from bench.run.target import Candidate
from bench.suite.suite import dummy_candidates, suite_named
from bench.worker.request import Dummy, Request
from bench.worker.worker import work

SHORT = Scenario("short", prompt_tokens=8, new_tokens=4)


@pytest.fixture
def candidates(shrunken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    """The rows of the published table in two layers."""
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    return dummy_candidates(suite_named("biomistral"), str(shrunken))


def measured(candidate: Candidate, **changed: Any) -> list[Record]:
    fields: dict[str, Any] = {
        "checkpoint": None,
        "dummy": candidate.dummy,
        "subject": candidate.subject,
        "device": "cpu",
        "compute_dtype": "float32",
        "environment": {},
        "scenarios": (SHORT,),
        "rule": Rule(max_time_s=0.0),
    }
    records: list[Record] = []
    work(Request(**(fields | changed)), records.append)
    return records


def test_random_weights_are_measured_as_a_checkpoint_is(candidates: list[Candidate]) -> None:
    [reference] = measured(candidates[0])
    [awq] = measured(candidates[1])
    for record in (reference, awq):
        assert (record.status, record.reason) == ("ok", None)
        assert record.latency is not None
        assert len(record.latency.decode_s[0]) == 3
        assert record.kernels is not None
    assert reference.prompt_sha256 == awq.prompt_sha256
    assert reference.memory is not None
    assert awq.memory is not None
    assert reference.memory.weights_bytes > 1.5 * awq.memory.weights_bytes


def test_weights_that_cannot_be_drawn_are_a_record(candidates: list[Candidate]) -> None:
    [record] = measured(candidates[0], dummy=Dummy("no-such-shape", "fp16"))
    assert record.status == "unsupported"
    assert str(record.reason).startswith("dummy:no-such-shape is no config.json")


def test_an_unknown_kernel_is_a_record(candidates: list[Candidate]) -> None:
    subject = replace(candidates[1].subject, kernel="steam")
    [record] = measured(candidates[1], subject=subject)
    assert record.status == "unsupported"
    assert str(record.reason).startswith("unknown kernel 'steam'")


def test_a_worker_is_asked_for_weights_and_no_checkpoint(candidates: list[Candidate], tmp_path: Path) -> None:
    """The worker is replaced by a copy of its request."""
    settings = Settings("cpu", {"BioMistral-7B": "float32"}, {}, timeout_s=60.0)
    kept = tmp_path / "kept.json"
    copying = f"import shutil, sys; shutil.copy(sys.argv[1], {str(kept)!r})"
    command = (sys.executable, "-c", copying)
    run = next(run for run in plan(candidates, [SHORT], range(1)) if run.subject.kernel == "native")
    [record] = WorkerExecutor(settings, command=command)(run)
    assert (record.status, record.subject) == ("error", run.subject)
    request = Request.read(kept)
    assert (request.checkpoint, request.dummy, request.kernel) == (None, run.candidate.dummy, "native")
    assert (request.quality, request.tasks) == (None, None)
