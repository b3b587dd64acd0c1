"""How much slower or faster one series of runs is than another: estimate, interval, verdict.

The unit is the round: one run of the variant and one of the reference, close together in time, with the
order of the two reversed from one round to the next (A B, B A, A B, ...). A machine that slows down or
speeds up shifts the two runs of a round by different amounts, and by the opposite amount in the next round.
"""

import functools
import itertools
import math
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance
from typing import Literal

Verdict = Literal["faster", "slower", "same within noise", "unsure"]
EQUIVALENCE = 0.03  # a ratio between 1 / 1.03 and 1.03 is too close to 1 to matter
CONFIDENCE, INTERVAL_MIN_ROUNDS = 0.95, 3
SEED, RESAMPLES, NORMAL_FROM_ROUNDS = 20240219, 2000, 300  # means of more rounds than that are as good as normal


@dataclass(frozen=True)
class Ratio:
    """The variant's seconds over the reference's; above 1 the variant is slower.

    value:    the estimate over all rounds (see `ratio_of`).
    rounds:   the ratio of each round alone, in the order in which they ran; empty for series measured apart.
    interval: 95% bootstrap interval of `value`, None below INTERVAL_MIN_ROUNDS rounds; verdict: see `verdict_of`."""

    value: float
    rounds: tuple[float, ...]
    interval: tuple[float, float] | None
    verdict: Verdict

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest ratio of a single round; the ratio itself where there are no rounds."""
        return min(self.rounds, default=self.value), max(self.rounds, default=self.value)


def ratio_of(variant_s: Sequence[float], reference_s: Sequence[float]) -> Ratio:
    """The ratio of two equally long series of positive seconds, one entry a round, in the order they ran.

    The estimate is the geometric mean, over all pairs of neighbouring rounds, of (v1 + v2) / (r1 + r2). In such a pair
    the four runs lie as A B B A, so that a drift linear in time adds the same to both sums and leaves the quotient
    alone; a drift that bends is cancelled by the next pair, which lies as B A A B. One round alone gives v / r.

    The interval is for the logarithm of the ratio: rounds are drawn with replacement, and the distances of the 2.5% and
    97.5% points of their mean from the middle are stretched by t / z * sqrt(n / (n - 1)), t and z being the quantiles
    of Student's distribution with n - 1 degrees and of the normal one, since those of few rounds would be too short
    (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", arXiv:1411.5279). Drift only widens it.

    Raises ValueError for series of different or no length, or with a value that is not above 0."""
    if len(variant_s) != len(reference_s) or not variant_s:
        raise ValueError(f"series of {len(variant_s)} and {len(reference_s)} rounds are not paired")
    if not all(0 < value < math.inf for value in (*variant_s, *reference_s)):
        raise ValueError("seconds must be above 0")
    series = list(zip(variant_s, reference_s, strict=True))
    rounds, neighbours = tuple(v / r for v, r in series), itertools.pairwise(series if series[1:] else series * 2)
    log_estimate = fmean(math.log((v1 + v2) / (r1 + r2)) for (v1, r1), (v2, r2) in neighbours)
    interval = None
    if len(rounds) >= INTERVAL_MIN_ROUNDS:
        low, high = _bootstrap(tuple(math.log(ratio) for ratio in rounds))
        interval = (math.exp(log_estimate + low), math.exp(log_estimate + high))
    return Ratio(math.exp(log_estimate), rounds, interval, verdict_of(interval))


def verdict_of(interval: tuple[float, float] | None) -> Verdict:
    """What may be said about a ratio with this interval: "slower" where it is all above 1.03, "faster" all below
    1 / 1.03, "same within noise" all between; else, or without one, "unsure": more rounds would tell."""
    if interval is None:
        return "unsure"
    (low, high), upper = interval, 1 + EQUIVALENCE
    if low > upper:
        return "slower"
    if high < 1 / upper:
        return "faster"
    return "same within noise" if 1 / upper <= low and high <= upper else "unsure"


@functools.lru_cache(maxsize=64)  # without decoding, prompt and total are the same series
def _bootstrap(logs: tuple[float, ...]) -> tuple[float, float]:
    """How far below and above the estimate the interval reaches, in logarithms: (negative, positive)."""
    n, mean = len(logs), fmean(logs)
    deviations = [value - mean for value in logs]
    tail = (1 - CONFIDENCE) / 2
    if n > NORMAL_FROM_ROUNDS:
        high = NormalDist().inv_cdf(1 - tail) * math.sqrt(fmean(value**2 for value in deviations) / n)
        low = -high
    else:
        means = sorted(sum(draw(deviations)) / n for draw in _resamples(n))
        low = means[math.floor(tail * (RESAMPLES - 1))]
        high = means[math.ceil((1 - tail) * (RESAMPLES - 1))]
    stretch = student_quantile(n - 1) / NormalDist().inv_cdf(1 - tail) * math.sqrt(n / (n - 1))
    # The estimate counts the first and the last round half, which makes it a little noisier than a mean of n.
    weights = math.sqrt(n * (n - 1.5)) / (n - 1)
    return low * stretch * weights, high * stretch * weights


@functools.lru_cache(maxsize=32)
def _resamples(n: int) -> list[Callable[[list[float]], tuple[float, ...]]]:
    """What draws n of n values with replacement, RESAMPLES times: the same draws for every ratio of so many rounds."""
    generator = random.Random(SEED)
    return [operator.itemgetter(*generator.choices(range(n), k=n)) for _ in range(RESAMPLES)]


def independent_ratio_of(variant_s: Sequence[float], reference_s: Sequence[float]) -> Ratio:
    """The ratio of two series of positive seconds that were measured apart, of any two lengths.

    The estimate is the ratio of their geometric means. The interval is Welch's (1947) for the difference of the means
    of the logarithms: t * sqrt(v1 / n1 + v2 / n2), t with the degrees of Welch and Satterthwaite; None where a series
    has fewer than INTERVAL_MIN_ROUNDS values. Nothing pairs, so `rounds` is empty.

    Raises ValueError for an empty series, or a value that is not above 0."""
    if not (variant_s and reference_s and all(0 < value < math.inf for value in (*variant_s, *reference_s))):
        raise ValueError("seconds must be above 0")
    logs = [[math.log(value) for value in one] for one in (variant_s, reference_s)]
    middle = fmean(logs[0]) - fmean(logs[1])
    interval = None
    if min(map(len, logs)) >= INTERVAL_MIN_ROUNDS:
        errors = [variance(one) / len(one) for one in logs]
        spread = sum(error**2 / (len(one) - 1) for error, one in zip(errors, logs, strict=True))
        half = student_quantile(sum(errors) ** 2 / spread) * math.sqrt(sum(errors)) if spread else 0.0
        interval = (math.exp(middle - half), math.exp(middle + half))
    return Ratio(math.exp(middle), (), interval, verdict_of(interval))


STUDENT = (  # the 97.5% quantiles of Student's t distribution for 1 to 30 degrees of freedom
    12.706204735, 4.302652727, 3.182446303, 2.776445104, 2.570581835, 2.446911850, 2.364624251, 2.306004134,
    2.262157162, 2.228138850, 2.200985159, 2.178812828, 2.160368656, 2.144786688, 2.131449545, 2.119905298,
    2.109815577, 2.100922039, 2.093024053, 2.085963446, 2.079613845, 2.073873066, 2.068657610, 2.063898561,
    2.059538552, 2.055529437, 2.051830515, 2.048407142, 2.045229641, 2.042272456,
)  # fmt: skip


def student_quantile(degrees: float) -> float:
    """The 97.5% quantile of Student's t; between whole degrees it is straight in their reciprocals."""
    if degrees > len(STUDENT):  # the series of Abramowitz and Stegun 26.7.5
        z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2)
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    low = max(1, math.floor(degrees))
    if degrees <= low:
        return STUDENT[low - 1]
    share = (1 / low - 1 / degrees) / (1 / low - 1 / (low + 1))
    return STUDENT[low - 1] + share * (STUDENT[low] - STUDENT[low - 1])
