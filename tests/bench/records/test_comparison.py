"""Pairing by round, and the estimate on a machine that slows down while it measures."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from bench.records.comparison import Comparison, compare
from bench.records.phase import phase_s
from bench.records.record import Latency, Record
from bench.records.scenario import SCENARIOS
from quantize.errors import UserError

if TYPE_CHECKING:
    from tests.reports.conftest import Builder

PUBLISHED, CHAT = SCENARIOS["published"], SCENARIOS["chat"]

NOISE = 0.1
ROUNDS = 20
REPETITIONS = 40


def slowing_machine(order: Sequence[str], work_s: dict[str, float], rng: random.Random) -> list[list[float]]:
    """Seconds of every repetition of every run in this order, on a machine that ends at half its speed.

    Speed falls linearly in time, from 1 to 0.5 when the last run ends. `work_s` is what a repetition takes at
    full speed; each has noise of its own.
    """
    total = math.fsum(work_s[name] * REPETITIONS for name in order)
    end = total / 0.75  # the mean speed is 0.75
    now = 0.0
    runs = []
    for name in order:
        samples = []
        for _ in range(REPETITIONS):
            taken = work_s[name] / (1 - 0.5 * now / end) * (1 + NOISE * rng.gauss(0, 1))
            samples.append(taken)
            now += taken
        runs.append(samples)
    return runs


def measured(builder: "Builder", order: Sequence[str], work_s: dict[str, float], seed: int) -> list[Record]:
    """What bench would have recorded of these runs, one after the other."""
    seen = dict.fromkeys(work_s, 0)
    records = []
    for position, (name, samples) in enumerate(
        zip(order, slowing_machine(order, work_s, random.Random(seed)), strict=True)
    ):
        records.append(builder.latency(name, round=seen[name], prefill_s=samples, step_s=0.0, position=position))
        seen[name] += 1
    return records


def interleaved(names: Sequence[str], rounds: int = ROUNDS) -> Iterator[str]:
    """A B, B A, A B, ..."""
    for number in range(rounds):
        yield from names if number % 2 == 0 else reversed(names)


def compared(records: Iterable[Record], variant: str) -> Comparison:
    own = [record for record in records if record.subject.variant == variant]
    comparison = compare(PUBLISHED, own, [r for r in records if r.subject.variant == "fp16"])
    assert comparison is not None
    return comparison


def hits(builder: "Builder", order: Sequence[str], work_s: dict[str, float], variant: str) -> tuple[int, int]:
    """Of 100 seeds: how many estimates are within 0.02 of the planted ratio, how many intervals cover it."""
    truth = work_s[variant] / work_s["fp16"]
    near = covered = 0
    for seed in range(100):
        ratio = compared(measured(builder, order, work_s, seed), variant).ratios["total"]
        assert ratio.interval is not None
        near += abs(ratio.value - truth) <= 0.02
        covered += ratio.interval[0] <= truth <= ratio.interval[1]
    return near, covered


def test_the_planted_ratio_is_found_on_a_machine_that_slows_to_half(builder: "Builder") -> None:
    work_s = {"fp16": 1.0, "awq-gemm": 1.3}
    near, covered = hits(builder, list(interleaved(list(work_s))), work_s, "awq-gemm")
    assert near >= 93
    assert covered >= 93


def test_measuring_all_of_a_before_all_of_b_misses_it(builder: "Builder") -> None:
    """The order of today's tools, same machine, same ratio, same estimator: far off, and sure of it."""
    work_s = {"fp16": 1.0, "awq-gemm": 1.3}
    near, covered = hits(builder, ["fp16"] * ROUNDS + ["awq-gemm"] * ROUNDS, work_s, "awq-gemm")
    assert (near, covered) == (0, 0)


def test_drift_is_cancelled_for_the_variant_furthest_from_the_reference(builder: "Builder") -> None:
    work_s = {"fp16": 1.0, "awq-gemm": 1.4, "awq-gemv": 4.0, "bnb-4bit": 2.0, "bnb-8bit": 1.3}
    records = measured(builder, list(interleaved(list(work_s))), work_s, seed=3)
    ratio = compared(records, "bnb-8bit").ratios["total"]
    assert ratio.value == pytest.approx(1.3, abs=0.02)
    assert ratio.interval is not None
    assert ratio.interval[0] < 1.3 < ratio.interval[1]
    assert ratio.verdict == "slower"
    # Each round alone is off by the drift within it, to one side and then to the other.
    assert ratio.spread[1] - ratio.spread[0] > 0.1


def test_the_same_checkpoint_twice_is_never_slower_or_faster(builder: "Builder") -> None:
    work_s = {"fp16": 1.0, "awq-gemm": 1.0}
    for rounds in (3, 5, ROUNDS):
        order = list(interleaved(list(work_s), rounds))
        for seed in range(40):
            ratio = compared(measured(builder, order, work_s, seed), "awq-gemm").ratios["total"]
            assert ratio.verdict in ("same within noise", "unsure")


def test_phases_are_medians_of_their_own_samples(builder: "Builder") -> None:
    scenario = CHAT
    steps = ((0.1,) * 62 + (9.0,), (0.2,) * 63, (0.3,) * 63)
    latency = Latency(prefill_s=(1.0, 3.0, 2.0), decode_s=steps, warmup_s=(50.0,))
    record = builder.latency("fp16", scenario, latency=latency)
    assert phase_s(record, "prefill") == 2.0
    assert phase_s(record, "decode") == 0.2
    # The repetitions took 16.2, 15.6 and 20.9 s.
    assert phase_s(record, "total") == pytest.approx(16.2)


def test_a_scenario_of_one_new_token_has_no_decode(builder: "Builder") -> None:
    for decode_s in ((), ((), ())):
        record = builder.latency("fp16", latency=Latency((1.0, 2.0), decode_s, ()))
        assert phase_s(record, "decode") is None
        assert phase_s(record, "total") == phase_s(record, "prefill") == 1.5


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf])
def test_a_time_that_cannot_be_is_refused(builder: "Builder", seconds: float) -> None:
    record = builder.latency("fp16", prefill_s=(seconds,))
    with pytest.raises(UserError, match=r"Tiny-1M-FP16 holds a prefill time of .* no measurement"):
        phase_s(record, "prefill")


def test_runs_are_paired_by_round_and_a_missing_round_is_left_out(builder: "Builder") -> None:
    reference = [builder.latency("fp16", round=n, prefill_s=(float(n + 1),)) for n in (0, 1, 3)]
    variant = [builder.latency("bnb-4bit", round=n, prefill_s=(2.0 * (n + 1),)) for n in (3, 2, 1)]
    comparison = compare(PUBLISHED, variant, reference)
    assert comparison is not None
    assert comparison.rounds == 2
    assert comparison.ratios["prefill"].rounds == (2.0, 2.0)
    assert compare(PUBLISHED, variant[1:2], reference) is None


def test_a_round_measured_twice_is_paired_with_the_reference_closest_in_time(
    new_builder: "type[Builder]",
) -> None:
    """Two sessions with the same round numbers: each is paired within itself."""
    first = new_builder()
    second = new_builder(start=first.clock + timedelta(days=3))
    records = [
        first.latency("fp16", prefill_s=(1.0,)),
        first.latency("bnb-4bit", prefill_s=(2.0,)),
        second.latency("bnb-4bit", prefill_s=(20.0,)),
        second.latency("fp16", prefill_s=(10.0,)),
    ]
    comparison = compared(records, "bnb-4bit")
    assert comparison.ratios["prefill"].rounds == (2.0, 2.0)
    assert comparison.apart_s == 60


def test_how_far_apart_and_in_which_order_the_pairs_ran_is_kept(builder: "Builder") -> None:
    records = [builder.latency("fp16", round=0), builder.latency("bnb-4bit", round=0)]
    builder.clock += timedelta(hours=5)
    records.append(builder.latency("fp16", round=1))
    builder.clock += timedelta(hours=2)
    records.append(builder.latency("bnb-4bit", round=1))
    comparison = compared(records, "bnb-4bit")
    assert comparison.apart_s == timedelta(hours=2, minutes=1).total_seconds()
    assert comparison.first == 2
    assert not comparison.order_balanced
    records += [builder.latency("bnb-4bit", round=2), builder.latency("fp16", round=2)]
    assert compared(records, "bnb-4bit").order_balanced


def test_an_unreadable_start_is_unknown_and_zones_may_differ(builder: "Builder") -> None:
    reference = builder.latency("fp16", started_at="2025-03-01T12:00:00")
    east = builder.latency("bnb-4bit", started_at="2025-03-01T13:00:30+01:00")
    known = compare(PUBLISHED, [east], [reference])
    assert known is not None
    assert known.apart_s == 30
    unknown = compare(PUBLISHED, [builder.latency("bnb-4bit", started_at="yesterday")], [reference])
    assert unknown is not None
    assert unknown.apart_s is None
    assert datetime.fromisoformat(reference.started_at).tzinfo is None
