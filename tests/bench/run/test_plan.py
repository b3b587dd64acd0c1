from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bench.records.record import Record, TaskScore
from bench.records.scenario import SCENARIOS, Scenario
from bench.run.plan import in_engine, key_of, missing, plan, planned_keys, target_of, with_references
from bench.worker.request import QUALITY, TASKS, PlannedRun, Target
from quantize.checkpoint import Checkpoint

Make = Callable[..., Checkpoint]
MakeRecords = Callable[..., list[Record]]
BOTH = tuple(SCENARIOS.values())
FLOAT32 = {"Tiny": "float32"}


@pytest.fixture
def five(make_checkpoint: Make) -> list[Target]:
    variants = ("fp16", "awq-gemm", "awq-gemv", "bnb-4bit", "bnb-8bit")
    return [target_of(make_checkpoint(variant, name=letter)) for letter, variant in zip("ABCDE", variants, strict=True)]


def order(runs: list[PlannedRun]) -> str:
    return "".join(run.subject.name for run in runs)


def test_rounds_are_interleaved_and_every_other_one_is_reversed(five: list[Target]) -> None:
    runs = plan(five, BOTH, range(3))
    assert order(runs) == "ABCDEEDCBAABCDE"
    assert [run.round for run in runs] == [0] * 5 + [1] * 5 + [2] * 5
    assert [run.position for run in runs] == list(range(15))


def test_every_process_measures_all_scenarios(five: list[Target]) -> None:
    assert {run.scenarios for run in plan(five, BOTH, range(2))} == {BOTH}


def test_the_first_rounds_processes_measure_quality_and_tasks_too(five: list[Target]) -> None:
    runs = plan(five, BOTH, range(2), tasks=["anatomy"])
    assert [run.quality for run in runs] == [True] * 5 + [False] * 5
    assert [run.tasks for run in runs] == [("anatomy",)] * 5 + [()] * 5
    assert runs[0].works == (("latency", BOTH[0]), ("latency", BOTH[1]), QUALITY, TASKS)
    assert not any(run.quality for run in plan(five, BOTH, range(2), quality=False))


def test_the_reference_comes_first_in_the_first_round(make_checkpoint: Make) -> None:
    targets = [target_of(make_checkpoint("bnb-4bit", name="B")), target_of(make_checkpoint("fp16", name="A"))]
    assert order(plan(targets, BOTH, range(2))) == "ABBA"


def test_engines_take_turns_in_every_round_each_beside_its_reference(make_checkpoint: Make) -> None:
    own = [target_of(make_checkpoint("bnb-4bit", name="B")), target_of(make_checkpoint("fp16", name="A"))]
    runs = plan([in_engine(one, name) for name in ("quantable", "vllm") for one in own], BOTH, range(2))
    assert [run.subject.name for run in runs[:4]] == ["A", "B", "A, vllm", "B, vllm"]
    assert [run.subject.name for run in runs[4:]] == ["B, vllm", "A, vllm", "B", "A"]
    assert [run.is_reference for run in runs[:4]] == [True, False, True, False]
    assert {run.subject.quality_baseline for run in runs} == {"Tiny", "Tiny in vllm"}
    judges = with_references([runs[3]], runs, {"Tiny"})
    assert [run.subject.name for run in judges] == ["A, vllm", "B, vllm"]


def test_a_reference_is_judged_again_when_what_it_expects_is_gone(five: list[Target], records_of: MakeRecords) -> None:
    runs = plan(five, BOTH, range(1))
    records = all_records(runs[:3], records_of)
    left = missing(runs, records, device="cpu", compute_dtypes=FLOAT32)
    assert with_references(left, runs, {"Tiny"}) == left
    [again, *rest] = with_references(left, runs, set())
    assert (again.target, again.works, rest) == (five[0], (QUALITY,), left)
    assert with_references(runs, runs, set()) == runs
    assert with_references([], runs, set()) == []


def test_tasks_are_done_when_every_one_has_a_score(five: list[Target], records_of: MakeRecords) -> None:
    [run] = plan(five[:1], BOTH, range(1), quality=False, tasks=["anatomy", "medqa"])
    [*latency, tasks] = records_of(run)
    scored = replace(tasks, tasks=(TaskScore("anatomy", "acc", 0.5),))
    left = missing([run], [*latency, scored], device="cpu", compute_dtypes=FLOAT32)
    assert [one.works for one in left] == [(TASKS,)]
    both = replace(tasks, tasks=(TaskScore("anatomy", "acc", 0.5), TaskScore("medqa", "acc", 0.5)))
    assert missing([run], [*latency, both], device="cpu", compute_dtypes=FLOAT32) == []


def test_no_two_rounds_of_one_checkpoint_follow_one_another_within_a_round(five: list[Target]) -> None:
    for start in (0, 5, 10):
        assert sorted(order(plan(five, BOTH, range(3)))[start : start + 5]) == list("ABCDE")


def test_each_base_model_is_finished_before_the_next(make_checkpoint: Make) -> None:
    targets = [
        target_of(make_checkpoint("fp16", name="A", base_model="One")),
        target_of(make_checkpoint("bnb-4bit", name="B", base_model="One")),
        target_of(make_checkpoint("fp16", name="C", base_model="Two")),
    ]
    assert order(plan(targets, BOTH, range(2))) == "ABBACC"


def test_the_subject_is_what_the_manifest_says(make_checkpoint: Make) -> None:
    checkpoint = make_checkpoint("awq-gemv", name="Tiny-AWQ", weights=b"12345")
    subject = target_of(checkpoint).subject
    assert (subject.name, subject.base_model, subject.variant) == ("Tiny-AWQ", "Tiny", "awq-gemv")
    assert (subject.method, subject.q_group_size, subject.w_bit, subject.version) == ("AWQ", 64, 4, "GEMV")
    assert subject.content_sha256 == checkpoint.content_sha256
    assert subject.file_weights_bytes == 5


def all_records(runs: list[PlannedRun], records_of: MakeRecords) -> list[Record]:
    return [record for run in runs for record in records_of(run)]


def test_what_is_recorded_is_not_planned_again(five: list[Target], records_of: MakeRecords) -> None:
    runs = plan(five, BOTH, range(3))
    records = all_records(runs[:7], records_of)
    assert missing(runs, records, device="cpu", compute_dtypes=FLOAT32) == runs[7:]
    assert missing(runs, all_records(runs, records_of), device="cpu", compute_dtypes=FLOAT32) == []


def test_a_scenario_that_is_missing_is_planned_alone_in_its_place(five: list[Target], records_of: MakeRecords) -> None:
    runs = plan(five, BOTH, range(1))
    records = [r for r in all_records(runs, records_of) if not (r.position == 3 and r.scenario == BOTH[1])]
    assert missing(runs, records, device="cpu", compute_dtypes=FLOAT32) == [
        replace(runs[3], scenarios=(BOTH[1],), quality=False)
    ]


def test_a_round_more_plans_that_round_alone(five: list[Target], records_of: MakeRecords) -> None:
    records = all_records(plan(five, BOTH, range(2)), records_of)
    left = missing(plan(five, BOTH, range(3)), records, device="cpu", compute_dtypes=FLOAT32)
    assert [(run.works, run.round) for run in left] == [((("latency", BOTH[0]), ("latency", BOTH[1])), 2)] * 5
    assert order(left) == "ABCDE"


def test_a_failed_run_is_tried_again(five: list[Target], records_of: MakeRecords) -> None:
    runs = plan(five, BOTH, range(1))
    records = all_records(runs[1:], records_of) + records_of(runs[0], status="oom", reason="no memory")
    assert missing(runs, records, device="cpu", compute_dtypes=FLOAT32) == [runs[0]]


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "cuda"},
        {"compute_dtype": "bfloat16"},
        {"round": 7},
        {"scenario": Scenario("published", prompt_tokens=1024, new_tokens=1, seed=1)},
    ],
)
def test_records_of_something_else_cover_nothing(
    five: list[Target], records_of: MakeRecords, changed: dict[str, Any]
) -> None:
    runs = plan(five[:1], BOTH[:1], range(1), quality=False)
    records = [replace(record, **changed) for record in records_of(runs[0])]
    assert missing(runs, records, device="cpu", compute_dtypes=FLOAT32) == runs


def test_other_contents_under_the_same_name_are_another_subject(make_checkpoint: Make, records_of: MakeRecords) -> None:
    before = target_of(make_checkpoint("fp16", name="A", weights=b"before"))
    after = target_of(make_checkpoint("fp16", name="B", weights=b"after"))
    [record] = records_of(plan([before], BOTH[:1], range(1), quality=False)[0])
    renamed = replace(record, subject=replace(record.subject, name="B"))
    runs = plan([after], BOTH[:1], range(1), quality=False)
    assert missing(runs, [renamed], device="cpu", compute_dtypes=FLOAT32) == runs


def test_the_same_contents_under_two_names_are_two_subjects(make_checkpoint: Make, records_of: MakeRecords) -> None:
    twins = [target_of(make_checkpoint("fp16", name=name, weights=b"same")) for name in ("A", "B")]
    runs = plan(twins, BOTH[:1], range(1), quality=False)
    assert twins[0].subject.content_sha256 == twins[1].subject.content_sha256
    assert missing(runs, records_of(runs[0]), device="cpu", compute_dtypes=FLOAT32) == [runs[1]]


def test_the_plans_keys_are_those_of_its_records(five: list[Target], records_of: MakeRecords) -> None:
    runs = plan(five, BOTH, range(2))
    keys = planned_keys(runs, device="cpu", compute_dtypes=FLOAT32)
    assert keys == {key_of(record) for record in all_records(runs, records_of)}
    assert len(keys) == 5 * 2 * 2 + 5
