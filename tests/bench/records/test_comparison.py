"""Pairing by round, and the estimate on a machine that slows down while it measures."""

import math
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.compare import compare_files
from bench.records.comparison import Comparison, compare, unique, widest_interval
from bench.records.record import Latency, Record
from bench.records.scenario import SCENARIOS
from bench.records.stopping import RoundsRule
from bench.records.store import write
from quantize.errors import UserError

if TYPE_CHECKING:
    from tests.builder import Builder

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
    comparison = compare(own, [r for r in records if r.subject.variant == "fp16"])
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
    assert record.times["prefill"] == 2.0
    assert record.times["decode"] == 0.2
    # The repetitions took 16.2, 15.6 and 20.9 s.
    assert record.times["total"] == pytest.approx(16.2)


def test_a_scenario_of_one_new_token_has_no_decode(builder: "Builder") -> None:
    for decode_s in ((), ((), ())):
        record = builder.latency("fp16", latency=Latency((1.0, 2.0), decode_s, ()))
        assert record.times["decode"] is None
        assert record.times["total"] == record.times["prefill"] == 1.5


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf])
def test_a_time_that_cannot_be_is_refused(builder: "Builder", seconds: float) -> None:
    record = builder.latency("fp16", prefill_s=(seconds,))
    with pytest.raises(UserError, match=r"Tiny-1M-FP16 holds a prefill time of .* no measurement"):
        record.times["prefill"]


def test_runs_are_paired_by_round_and_a_missing_round_is_left_out(builder: "Builder") -> None:
    reference = [builder.latency("fp16", round=n, prefill_s=(float(n + 1),)) for n in (0, 1, 3)]
    variant = [builder.latency("bnb-4bit", round=n, prefill_s=(2.0 * (n + 1),)) for n in (3, 2, 1)]
    comparison = compare(variant, reference)
    assert comparison is not None
    assert comparison.rounds == 2
    assert comparison.ratios["prefill"].rounds == (2.0, 2.0)
    assert compare(variant[1:2], reference) is None


def test_a_round_measured_twice_is_paired_with_the_reference_closest_in_time(new_builder: "type[Builder]") -> None:
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
    known = compare([east], [reference])
    assert known is not None
    assert known.apart_s == 30
    unknown = compare([builder.latency("bnb-4bit", started_at="yesterday")], [reference])
    assert unknown is not None
    assert unknown.apart_s is None
    assert datetime.fromisoformat(reference.started_at).tzinfo is None


# Two devices, two compute dtypes, two files


def comparison_lines(*both: Sequence[Record]) -> list[str]:
    """What is said of two files of these records."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "a.jsonl"), Path(folder, "b.jsonl")]
        for file, records in zip(files, both, strict=True):
            write(file, records)
        return compare_files(*files).lines()


def of(new_builder: "type[Builder]", device: str, factor: float, dtype: str = "float32") -> list[Record]:
    """A bench of two checkpoints on a device of which one takes so many times the other's time, a little noisy."""
    return new_builder(device=device, compute_dtype=dtype).rounds({"fp16": 1.0, "awq-gemm": factor})


def test_devices_and_dtypes_in_one_file_are_each_what_they_are_alone(new_builder: "type[Builder]") -> None:
    """CPU and CUDA records, and two compute dtypes, with the same names and rounds."""
    parts = [of(new_builder, "cpu", 0.5), of(new_builder, "cuda", 4.0), of(new_builder, "cpu", 1.2, "bfloat16")]
    mixed = [record for turn in zip(*parts, strict=True) for record in turn]
    for part in parts:
        own = [record for record in part if record.subject.variant == "awq-gemm"]
        others = [record for record in mixed if record.subject.variant == "fp16"]
        alone = compare(own, [record for record in part if record.subject.variant == "fp16"])
        assert compare(own, others) == alone
    assert widest_interval(mixed) == max(widest_interval(part) or 0.0 for part in parts)


def test_the_stopping_rule_decides_by_its_own_device(new_builder: "type[Builder]") -> None:
    """A noisy CPU does not keep a quiet GPU measuring: `bench` hands over the records of its plan alone."""
    noisy = new_builder().rounds({"fp16": 1.0, "awq-gemm": 1.0}, noise=(0.5, 1.5, 1.0))
    quiet = new_builder(device="cuda").rounds({"fp16": 1.0, "awq-gemm": 1.0}, noise=(1.0, 1.001, 0.999))
    rule = RoundsRule()
    assert rule.stop_reason(3, lambda: widest_interval(noisy), 0.0, 0.0) is None
    assert rule.stop_reason(3, lambda: widest_interval(quiet), 0.0, 0.0) == "noise"


def test_a_record_that_stands_twice_counts_once(new_builder: "type[Builder]") -> None:
    once = of(new_builder, "cpu", 1.5)
    assert unique([*once, *once]) == once
    assert widest_interval([*once, *once]) == widest_interval(once)


def slow_and_noisy(builder: "Builder", factor: float, seed: int, rounds: int = 5) -> list[Record]:
    rng = random.Random(seed)
    return [
        builder.latency("fp16", round=number, prefill_s=(factor * math.exp(rng.gauss(0, 0.01)),))
        for number in range(rounds)
    ]


def test_two_files_measured_apart_are_independent_series(new_builder: "type[Builder]") -> None:
    """Planted 1.30: no round of one file is the neighbour of the same round in the other."""
    covered = near = 0
    for seed in range(100):
        before = slow_and_noisy(new_builder(), 1.0, seed)
        after = slow_and_noisy(new_builder(), 1.3, 1000 + seed, rounds=4)
        line = next(one for one in comparison_lines(before, after) if ", prefill, cpu, float32: x" in one)
        found = re.search(r": x([\d.]+) \(([\d.]+) to ([\d.]+)\), slower$", line)
        assert found is not None
        value, low, high = map(float, found.groups())
        near += abs(value - 1.3) <= 0.02
        covered += low <= 1.3 <= high
    assert near >= 93
    assert covered >= 93
    assert "independent series" in comparison_lines(before, after)[-1]


def test_two_files_are_compared_device_by_device(new_builder: "type[Builder]") -> None:
    gpu = replace(new_builder().environment, gpu="H100", gpu_driver="580", cuda="13.0")
    cpu_runs = of(new_builder, "cpu", 1.0)
    cuda_runs = [replace(one, environment=gpu) for one in of(new_builder, "cuda", 1.0)]
    assert comparison_lines(cpu_runs + cuda_runs, cuda_runs + cpu_runs)
    another = [replace(one, environment=replace(gpu, gpu_driver="570")) for one in cuda_runs]
    lines = [line.split() for line in comparison_lines(cpu_runs + cuda_runs, cpu_runs + another)]
    assert ["gpu_driver", "580", "570"] in lines


def test_a_reference_of_another_name_on_the_gpu_counts_there(new_builder: "type[Builder]") -> None:
    """Beside a CPU whose reference has another name, a noisy GPU still decides."""
    runs = new_builder(device="cuda").rounds({"fp16": 1.0, "awq-gemm": 1.0}, noise=(0.5, 1.5, 1.0))
    cuda = [replace(one, subject=replace(one.subject, name=f"{one.subject.name}-gpu")) for one in runs]
    quiet = of(new_builder, "cpu", 1.0)
    assert (widest_interval(quiet) or 0.0) < (widest_interval(cuda) or 0.0)
    assert widest_interval(quiet + cuda) == widest_interval(cuda)


def test_each_device_of_two_files_is_compared_with_itself(new_builder: "type[Builder]") -> None:
    before = of(new_builder, "cpu", 1.0) + of(new_builder, "cuda", 1.0)
    after = of(new_builder, "cpu", 2.0) + of(new_builder, "cuda", 1.0)
    lines = [line for line in comparison_lines(before, after) if "AWQ" in line and "total" in line]
    assert [line.split(": x")[1][:4] for line in lines] == ["2.00", "1.00"]
