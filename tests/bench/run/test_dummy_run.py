"""A worker that draws its weights, and what of a checkpoint it does without."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.records.environment import Environment
from bench.records.record import Record
from bench.records.scenario import Scenario
from bench.records.stopping import PassRule
from bench.run.executor import WorkerExecutor
from bench.run.plan import plan
from bench.suite.suite import dummy_targets, suite_named
from bench.worker.options import BenchOptions
from bench.worker.request import PlannedRun, Request, Settings, Target
from bench.worker.worker import work

SHORT = Scenario("short", prompt_tokens=8, new_tokens=4)


@pytest.fixture
def targets(shrunken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Target]:
    """The rows of the published table in two layers."""
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    return dummy_targets(suite_named("biomistral"), str(shrunken))


def measured(target: Target, **changed: Any) -> list[Record]:
    rule = PassRule(max_time_s=0.0)
    settings = Settings("cpu", {"BioMistral-7B": "float32"}, Environment(), BenchOptions(timeout_s=60.0, rule=rule))
    records: list[Record] = []
    work(Request(settings, PlannedRun(replace(target, **changed), 0, (SHORT,))), records.append)
    return records


def test_random_weights_are_measured_as_a_checkpoint_is(targets: list[Target]) -> None:
    [reference] = measured(targets[0])
    [awq] = measured(targets[1])
    for record in (reference, awq):
        assert (record.status, record.reason) == ("ok", None)
        assert record.latency is not None
        assert len(record.latency.decode_s[0]) == 3
        assert record.kernels is not None
    assert reference.prompt_sha256 == awq.prompt_sha256
    assert reference.memory is not None
    assert awq.memory is not None
    assert reference.memory.weights_bytes > 1.5 * awq.memory.weights_bytes


def test_weights_that_cannot_be_drawn_are_a_record(targets: list[Target]) -> None:
    [record] = measured(targets[0], dummy="no-such-shape")
    assert record.status == "unsupported"
    assert str(record.reason).startswith("dummy:no-such-shape is no config.json")


def test_an_unknown_kernel_is_a_record(targets: list[Target]) -> None:
    subject = replace(targets[1].subject, kernel="steam")
    [record] = measured(targets[1], subject=subject)
    assert record.status == "unsupported"
    assert str(record.reason).startswith("unknown kernel 'steam'")


def test_a_worker_is_asked_for_weights_and_no_checkpoint(targets: list[Target], tmp_path: Path) -> None:
    """The worker is replaced by a copy of its request."""
    settings = Settings("cpu", {"BioMistral-7B": "float32"}, Environment(), BenchOptions(timeout_s=60.0))
    kept = tmp_path / "kept.json"
    copying = f"import shutil, sys; shutil.copy(sys.argv[1], {str(kept)!r})"
    command = (sys.executable, "-c", copying)
    run = next(run for run in plan(targets, [SHORT], range(1)) if run.subject.kernel == "native")
    [record] = WorkerExecutor(settings, command=command)(run)
    assert (record.status, record.subject) == ("error", run.subject)
    request = Request.read(kept)
    assert (request.run, request.settings) == (run, settings)
    assert (run.target.checkpoint, run.subject.kernel, run.quality, run.tasks) == (None, "native", False, ())
