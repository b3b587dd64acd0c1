"""A checkpoint is broken by any of its figures, and only by figures that no sound one has."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.records.broken import broken, broken_subjects
from bench.records.record import Divergence, Quality

if TYPE_CHECKING:
    from tests.builder import Builder


def figures(perplexity: float, **fields: object) -> Quality:
    return replace(Quality(perplexity, 4096, "text", "t" * 64, vocabulary=49152), **fields)  # type: ignore[arg-type]


NEAR = Divergence(mean=0.07, median=0.02, p99=0.8, flips=0.12)


@pytest.mark.parametrize(
    ("quality", "words"),
    [
        (figures(math.nan), "its perplexity is nan, which no model has"),
        (figures(math.inf), "its perplexity is inf, which"),
        (figures(-5.0), "its perplexity is -5, which"),
        (figures(0.5), "its perplexity is 0.5, which"),
        (figures(49152.0), "is no better than guessing among 49,152 tokens"),
        (figures(512.3, vocabulary=512), "is no better than guessing among 512 tokens"),
        (figures(30.0), "its perplexity is x2 the reference's"),
        (figures(14.0), "its perplexity is x0.933 the reference's"),
        (figures(2_000.0), "its perplexity is x133 the reference's"),
        (figures(15.0, divergence=replace(NEAR, mean=1.2)), "diverges from the reference by 1.20 nats a token"),
        (figures(15.0, divergence=replace(NEAR, flips=0.6)), "60% of the likeliest tokens are others"),
        (figures(15.0, divergence=replace(NEAR, mean=-0.5)), "its divergence from the reference is -0.5"),
        (figures(15.0, divergence=replace(NEAR, p99=math.nan)), "which no model has"),
        (figures(15.0, noise_floor=replace(NEAR, mean=3.0)), "diverges from the reference by 3.00 nats"),
    ],
)
def test_each_figure_can_tell(quality: Quality, words: str) -> None:
    why = broken(quality, figures(15.0))
    assert why is not None
    assert words in why


@pytest.mark.parametrize(
    "quality",
    [
        figures(16.0, divergence=NEAR),
        figures(29.9),
        figures(14.5),
        figures(40_000.0, vocabulary=None),
        figures(1.0),
        figures(15.0, divergence=replace(NEAR, mean=-1e-6)),
    ],
)
def test_what_quantization_costs_is_not_broken(quality: Quality) -> None:
    assert broken(quality, None if quality.perplexity in (40_000.0, 1.0) else figures(15.0)) is None


def test_a_reference_that_is_worse_than_what_is_made_of_it_is_broken(builder: "Builder") -> None:
    records = [builder.quality("fp16", 17.0), builder.quality("awq-gemm", 16.0), builder.quality("bnb-4bit", 15.0)]
    found = {subject.variant: why for subject, why in broken_subjects(records).items()}
    assert set(found) == {"fp16", "awq-gemm", "bnb-4bit"}, "16 is x0.94 of 17"
    assert found["fp16"] == "its perplexity is 17.00, a checkpoint that is compared with it has 15.00"


def test_output_that_is_no_number_is_broken_until_a_later_run_has_figures(builder: "Builder") -> None:
    failed = builder.quality("awq-gemm", 1.0, status="broken", reason="its output is not finite", quality=None)
    [(subject, why)] = broken_subjects([builder.quality("fp16", 15.0), failed]).items()
    assert (subject.variant, why) == ("awq-gemm", "its output is not finite")
    assert broken_subjects([failed, builder.quality("fp16", 15.0), builder.quality("awq-gemm", 16.0)]) == {}


def test_a_merged_model_is_not_judged_by_another_models_perplexity(
    builder: "Builder", new_builder: "type[Builder]"
) -> None:
    merged = new_builder("Merged").quality("awq-gemm", 90.0)
    assert broken_subjects([builder.quality("fp16", 15.0), merged]) == {}
