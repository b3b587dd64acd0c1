from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.records.environment import Environment
from bench.records.scenario import SCENARIOS, Scenario
from bench.records.stopping import PassRule, RoundsRule, Rules
from bench.run.plan import target_of
from bench.worker.options import BenchOptions
from bench.worker.request import PlannedRun, QualityRequest, Request, Settings, Target
from quantize.checkpoint import Checkpoint

Make = Callable[..., Checkpoint]
CHAT = SCENARIOS["chat"]


@pytest.fixture
def target(make_checkpoint: Make) -> Target:
    return target_of(make_checkpoint("awq-gemm"))


@pytest.fixture
def settings() -> Settings:
    return Settings(
        "cpu",
        {"Tiny": "float32"},
        Environment(cpu="Model 1", libraries={"torch": "1", "triton": None}),
        BenchOptions(
            timeout_s=9.0,
            threads=2,
            rounds=RoundsRule(least=2),
            rule=PassRule(noise=0.5),
            task_folder="x",
            task_limit=3,
        ),
        quality=QualityRequest(label="mine"),
        reference_logprobs={"Tiny": "x.npy"},
    )


def test_a_request_comes_back_as_it_was_written(tmp_path: Path, settings: Settings, target: Target) -> None:
    run = PlannedRun(target, 7, tuple(SCENARIOS.values()), 1, quality=True, tasks=("anatomy",), is_reference=True)
    request = Request(settings, run, parent_pid=3)
    request.write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json") == request


def test_a_request_for_random_weights_comes_back_too(tmp_path: Path, settings: Settings, target: Target) -> None:
    drawn = replace(target, checkpoint=None, dummy="mistral-7b")
    request = Request(settings, PlannedRun(drawn, 0, (Scenario.over("many", (4, 8), 2),)))
    request.write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json") == request


def test_a_target_is_a_checkpoint_or_random_weights(target: Target) -> None:
    with pytest.raises(ValueError, match="one of the two"):
        replace(target, dummy="mistral-7b")
    with pytest.raises(ValueError, match="one of the two"):
        replace(target, checkpoint=None)


def test_a_record_says_whose_run_it_was_and_under_which_rules(settings: Settings, target: Target) -> None:
    request = Request(settings, PlannedRun(target, 7, (CHAT,), 1))
    record = request.record("oom", ("latency", CHAT), started_at="2026-01-01", wall_s=2.0, reason="no memory")
    assert (record.subject, record.environment) == (target.subject, settings.environment)
    assert (record.device, record.compute_dtype, record.round, record.position) == ("cpu", "float32", 1, 7)
    assert record.plan == Rules(RoundsRule(least=2), PassRule(noise=0.5))


def test_what_the_reference_expects_is_kept_by_base_model(settings: Settings, target: Target) -> None:
    assert Request(settings, PlannedRun(target, 0, quality=True)).reference_logprobs == "x.npy"
    other = replace(target, subject=replace(target.subject, base_model="Other", family="Tiny"))
    assert Request(settings, PlannedRun(other, 0, quality=True)).reference_logprobs is None


def test_a_request_without_work_is_rejected(settings: Settings, target: Target) -> None:
    with pytest.raises(ValueError, match="without work"):
        Request(settings, PlannedRun(target, 0))
