"""The estimator, its interval and the verdict on plain series."""

import math
import random

import pytest

from bench.records.ratio import (
    EQUIVALENCE,
    INTERVAL_MIN_ROUNDS,
    independent_ratio_of,
    ratio_of,
    student_quantile,
    verdict_of,
)


def test_a_ratio_keeps_each_round_and_its_spread() -> None:
    ratio = ratio_of([2.0, 6.0, 2.0], [1.0, 2.0, 2.0])
    assert ratio.rounds == (2.0, 3.0, 1.0)
    assert ratio.spread == (1.0, 3.0)
    # Pairs of neighbouring rounds: (2 + 6) / (1 + 2) and (6 + 2) / (2 + 2).
    assert ratio.value == pytest.approx(math.sqrt(8 / 3 * 2))


def test_linear_drift_leaves_the_estimate_alone() -> None:
    """Runs at the moments 0, 1, 2, ... of a machine whose times grow by 10% a run; A B, B A, A B, B A."""

    def slow(moment: int) -> float:
        return 1 + 0.1 * moment

    reference = [slow(0), slow(3), slow(4), slow(7)]
    variant = [1.3 * slow(1), 1.3 * slow(2), 1.3 * slow(5), 1.3 * slow(6)]
    assert ratio_of(variant, reference).value == pytest.approx(1.3, rel=1e-3)
    assert ratio_of(variant[:2], reference[:2]).value == pytest.approx(1.3, rel=1e-12)
    for_contrast = math.prod(v / r for v, r in zip(variant[::2], reference[::2], strict=True)) ** 0.5
    assert for_contrast > 1.37


@pytest.mark.parametrize("rounds", [1, 2])
def test_few_rounds_have_no_interval_and_no_verdict(rounds: int) -> None:
    ratio = ratio_of([5.0] * rounds, [1.0] * rounds)
    assert rounds < INTERVAL_MIN_ROUNDS
    assert ratio.interval is None
    assert ratio.verdict == "unsure"


def test_the_interval_is_the_same_every_time() -> None:
    rng = random.Random(7)
    reference = [1 + 0.05 * rng.random() for _ in range(6)]
    variant = [1.2 + 0.05 * rng.random() for _ in range(6)]
    assert ratio_of(variant, reference) == ratio_of(variant, reference)


def test_exact_series_have_an_interval_without_width() -> None:
    ratio = ratio_of([1.5] * 4, [1.0] * 4)
    assert ratio.interval == pytest.approx((1.5, 1.5))
    assert ratio.verdict == "slower"


@pytest.mark.parametrize("rounds", [3, 4, 5, 8, 16])
def test_the_interval_covers_the_truth_as_often_as_it_says(rounds: int) -> None:
    """Independent 5% noise on every run: 95% of intervals should cover; of 400, at least 92% do."""
    covered = 0
    for seed in range(400):
        rng = random.Random(1000 * rounds + seed)
        reference = [math.exp(rng.gauss(0, 0.05)) for _ in range(rounds)]
        variant = [1.3 * math.exp(rng.gauss(0, 0.05)) for _ in range(rounds)]
        interval = ratio_of(variant, reference).interval
        assert interval is not None
        covered += interval[0] <= 1.3 <= interval[1]
    assert 0.92 <= covered / 400 <= 0.985


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((1.04, 1.20), "slower"),
        ((0.70, 0.96), "faster"),
        ((0.98, 1.02), "same within noise"),
        ((1 / (1 + EQUIVALENCE), 1 + EQUIVALENCE), "same within noise"),
        ((1.01, 1.02), "same within noise"),
        ((1.02, 1.10), "unsure"),
        ((0.90, 0.98), "unsure"),
        ((0.50, 2.00), "unsure"),
        (None, "unsure"),
    ],
)
def test_the_verdict_holds_the_whole_interval_against_three_percent(
    interval: tuple[float, float] | None, verdict: str
) -> None:
    assert verdict_of(interval) == verdict


def test_the_verdict_is_the_same_from_both_sides() -> None:
    """Whether A is slower than B or B faster than A must not depend on who is the reference."""
    mirrored = {"slower": "faster", "faster": "slower"}
    for low, high in [(1.029, 1.031), (1.031, 1.2), (0.99, 1.03), (1.03, 1.031), (0.2, 0.97)]:
        verdict = verdict_of((low, high))
        assert verdict_of((1 / high, 1 / low)) == mirrored.get(verdict, verdict)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (60, 2.0003), (1e9, 1.9600)],
)
def test_student_quantiles_are_those_of_the_tables(degrees: float, expected: float) -> None:
    assert student_quantile(degrees) == pytest.approx(expected, abs=2e-3 if degrees == 60 else 5e-5)


@pytest.mark.parametrize(
    ("variant", "reference"),
    [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0]), ([math.nan], [1.0]), ([1.0], [math.inf])],
)
def test_what_is_no_pair_of_series_is_refused(variant: list[float], reference: list[float]) -> None:
    with pytest.raises(ValueError, match=r"paired|above 0"):
        ratio_of(variant, reference)


def test_between_whole_degrees_the_quantile_lies_between_theirs() -> None:
    assert student_quantile(3) > student_quantile(3.5) > student_quantile(4)
    assert student_quantile(0.5) == student_quantile(1)
    assert student_quantile(29.999) == pytest.approx(student_quantile(30.001), abs=2e-3)


@pytest.mark.parametrize("counts", [(3, 3), (3, 8), (5, 20)])
def test_the_interval_of_independent_series_covers_the_truth(counts: tuple[int, int]) -> None:
    """Of 100 seeds, planted 1.30 with unequal noise."""
    near = covered = 0
    for seed in range(100):
        rng = random.Random(seed)
        variant = [1.3 * math.exp(rng.gauss(0, 0.004)) for _ in range(counts[0])]
        reference = [math.exp(rng.gauss(0, 0.008)) for _ in range(counts[1])]
        ratio = independent_ratio_of(variant, reference)
        assert ratio.interval is not None
        assert ratio.verdict == "slower"
        near += abs(ratio.value - 1.3) <= 0.02
        covered += ratio.interval[0] <= 1.3 <= ratio.interval[1]
    assert near >= 93
    assert covered >= 93


def test_independent_series_of_few_values_have_no_interval() -> None:
    ratio = independent_ratio_of([2.0, 2.0], [1.0, 1.0, 1.0])
    assert ratio.value == pytest.approx(2.0)
    assert (ratio.interval, ratio.verdict, ratio.rounds) == (None, "unsure", ())
    exact = independent_ratio_of([2.0] * 3, [1.0] * 4)
    assert exact.interval == pytest.approx((2.0, 2.0))
    for wrong in ([], [0.0], [math.nan]):
        with pytest.raises(ValueError, match="above 0"):
            independent_ratio_of(wrong, [1.0])
