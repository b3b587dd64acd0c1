"""The rules of warming up and of stopping, on series of seconds that a fake clock gives."""

import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from bench.records.stopping import PassRule, repeat, standard_error, stop_reason, warm_up
from tests.fake_clock import FakeClock


def passes_of(series: Iterator[float]) -> Callable[[], float]:
    """One pass after the other, each as long as the series says, on a fake clock."""
    clock = FakeClock()

    def one() -> float:
        marks = [clock.mark()]
        clock.advance(next(series))
        marks.append(clock.mark())
        return clock.intervals_s(marks)[0]

    return one


def test_a_cold_start_is_warmed_away() -> None:
    seconds, steady = warm_up(passes_of(iter([5.0, 2.0, 1.2, 1.02, 1.0, 1.0])), PassRule())
    assert seconds == pytest.approx((5.0, 2.0, 1.2, 1.02, 1.0))
    assert steady


def test_a_steady_machine_needs_two_passes() -> None:
    assert warm_up(passes_of(itertools.repeat(1.0)), PassRule())[0] == (1.0, 1.0)


def test_a_machine_in_two_minds_never_becomes_steady_and_that_is_said() -> None:
    seconds, steady = warm_up(passes_of(itertools.cycle([1.0, 1.5])), PassRule(max_warmups=5))
    assert (len(seconds), steady) == (5, False)


def test_slow_passes_are_not_repeated_for_warmth() -> None:
    assert warm_up(passes_of(itertools.repeat(8.0)), PassRule(max_warmup_s=5.0)) == ((8.0,), None)
    assert warm_up(passes_of(iter([4.0, 1.0, 2.0])), PassRule(max_warmup_s=5.0)) == ((4.0, 1.0), None)
    assert warm_up(passes_of(iter([4.0, 4.0])), PassRule(max_warmup_s=5.0)) == ((4.0, 4.0), True)


def test_steady_looks_at_the_last_passes_alone() -> None:
    rule = PassRule(steady_passes=3)
    assert warm_up(passes_of(iter([9.0, 1.0, 1.0625, 1.0])), rule) == ((9.0, 1.0, 1.0625, 1.0), True)
    assert warm_up(passes_of(iter([1.0, 1.0, 1.25, 1.25, 1.25])), rule) == ((1.0, 1.0, 1.25, 1.25, 1.25), True)


def test_quiet_passes_stop_at_the_least_time() -> None:
    rule = PassRule(min_time_s=1.0, max_time_s=100.0)
    passes, stopped = repeat(passes_of(itertools.repeat(0.25)), float, rule)
    assert (len(passes), stopped) == (4, "noise")


def test_two_passes_that_happen_to_agree_are_not_enough() -> None:
    passes, _ = repeat(passes_of(itertools.repeat(10.0)), float, PassRule(max_time_s=100.0))
    assert len(passes) == 3


def test_noisy_passes_go_on_until_their_mean_is_known() -> None:
    generator = random.Random(1)
    rule = PassRule(min_passes=8, min_time_s=0.0, noise=0.02, max_time_s=1e6)
    passes, stopped = repeat(passes_of(generator.gauss(1.0, 0.15) for _ in itertools.count()), float, rule)
    assert stopped == "noise"
    assert 10 < len(passes) < 200
    assert standard_error(passes) <= 0.02
    assert standard_error(passes[:-1]) > 0.02


@pytest.mark.parametrize(
    "series",
    [
        itertools.cycle([9.0, 1.0, 1.0, 1.0]),  # spikes
        itertools.cycle([1.0, 2.0]),  # two speeds
        (1.0 + 0.2 * number for number in itertools.count()),  # ever slower
    ],
)
def test_what_never_settles_stops_at_the_time_limit(series: Iterator[float]) -> None:
    rule = PassRule(noise=0.001, max_time_s=50.0)
    passes, stopped = repeat(passes_of(series), float, rule)
    assert stopped == "time"
    assert 50.0 <= sum(passes) < 60.0


def test_very_short_passes_end_somewhere() -> None:
    passes, stopped = repeat(passes_of(itertools.repeat(1e-6)), float, PassRule())
    assert (len(passes), stopped) == (PassRule().max_passes, "passes")


def test_one_long_pass_is_enough_when_the_time_is_used_up() -> None:
    assert stop_reason([], PassRule(max_time_s=0.0)) is None
    assert stop_reason([7.0], PassRule(max_time_s=5.0)) == "time"


def test_a_rule_that_can_never_be_met_is_rejected() -> None:
    with pytest.raises(ValueError, match="can never be met"):
        PassRule(steady_passes=3, max_warmups=2)
    with pytest.raises(ValueError, match="can never be met"):
        PassRule(max_passes=0)
