"""What is gathered of each checkpoint: order of rows, figures, failures, references."""

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.records.record import Kernels, Record
from bench.records.scenario import SCENARIOS, Scenario
from quantize.errors import UserError
from reports.results import Measurement, Result, measurements

if TYPE_CHECKING:
    from tests.builder import Builder

PUBLISHED, CHAT = SCENARIOS["published"], SCENARIOS["chat"]


def only(records: list[Record]) -> Measurement:
    [found] = measurements(records)
    return found


def row(records: list[Record], variant: str) -> Result:
    [found] = [result for result in only(records).results if result.subject.variant == variant]
    return found


def test_rows_stand_in_the_published_order_whatever_ran_first(builder: "Builder") -> None:
    names = ["bnb-8bit", "awq-gemv", "fp16", "bnb-4bit", "awq-gemm"]
    found = only([builder.latency(name) for name in names])
    assert [result.subject.variant for result in found.results] == [
        "fp16",
        "awq-gemm",
        "awq-gemv",
        "bnb-4bit",
        "bnb-8bit",
    ]
    assert [result.is_reference for result in found.results] == [True, False, False, False, False]


def test_each_base_model_has_a_reference_of_its_own(new_builder: "type[Builder]") -> None:
    one, other = new_builder("Zeta-7B"), new_builder("Alpha-7B")
    records = [
        one.latency("fp16", prefill_s=(1.0,)),
        one.latency("bnb-4bit", prefill_s=(2.0,)),
        other.latency("fp16", prefill_s=(10.0,)),
        other.latency("bnb-4bit", prefill_s=(30.0,)),
    ]
    found = only(records)
    assert [result.subject.base_model for result in found.results] == ["Zeta-7B"] * 2 + ["Alpha-7B"] * 2
    comparisons = [result.timings[PUBLISHED].comparison for result in found.results]
    assert [c.ratios["total"].value if c else None for c in comparisons] == [
        None,
        pytest.approx(2.0),
        None,
        pytest.approx(3.0),
    ]


def test_base_models_in_different_half_dtypes_share_a_measurement(new_builder: "type[Builder]") -> None:
    one = new_builder("Zeta-7B", device="cuda", compute_dtype="bfloat16")
    other = new_builder("Alpha-7B", device="cuda", compute_dtype="float16")
    found = only([one.latency("fp16"), other.latency("fp16")])
    assert found.compute_dtypes == ("bfloat16", "float16")


def test_one_base_model_in_two_dtypes_is_two_measurements(new_builder: "type[Builder]") -> None:
    builders = [new_builder(compute_dtype=dtype) for dtype in ("float32", "bfloat16")]
    records = [b.latency(name) for b in builders for name in ("fp16", "bnb-4bit")]
    records.append(builders[0].failure("bnb-8bit", "timeout", "no end"))
    found = measurements(records)
    assert [one.compute_dtypes for one in found] == [("float32",), ("bfloat16",)]
    assert [len(one.results) for one in found] == [3, 3]


def test_figures_are_medians_over_rounds_and_peaks_maxima(builder: "Builder") -> None:
    records = [
        builder.latency("fp16", CHAT, round=n, prefill_s=(seconds,), step_s=seconds / 10, peak_bytes=peak)
        for n, (seconds, peak) in enumerate([(1.0, 5), (4.0, 7), (2.0, 6)])
    ]
    timing = row(records, "fp16").timings[CHAT]
    assert timing.rounds == 3
    assert timing.seconds["prefill"] == 2.0
    assert timing.seconds["decode"] == pytest.approx(0.2)
    assert timing.run_peak_bytes == 7
    assert timing.tokens_per_s("prefill") == pytest.approx(256 / 2.0)
    assert timing.tokens_per_s("decode") == pytest.approx(1 / 0.2)


def test_tokens_per_second_count_the_whole_batch(builder: "Builder") -> None:
    scenario = Scenario("100/11 x8", prompt_tokens=100, new_tokens=11, batch=8)
    timing = row([builder.latency("fp16", scenario, prefill_s=(4.0,), step_s=0.5)], "fp16").timings[scenario]
    assert timing.tokens_per_s("prefill") == pytest.approx(200.0)
    assert timing.tokens_per_s("decode") == pytest.approx(16.0)


def test_lengths_count_all_their_tokens_and_keep_their_medians(builder: "Builder") -> None:
    scenario = Scenario.over("published", (100, 300), 1, batch=2)
    records = [
        builder.at_lengths("fp16", scenario, (1.0, 3.0), (1.2, 3.0), round=0),
        builder.at_lengths("fp16", scenario, (1.1, 9.0), round=1),
    ]
    timing = row(records, "fp16").timings[scenario]
    assert timing.prefill_by_length_s == (1.1, 3.0)
    assert timing.tokens_per_s("prefill") == pytest.approx(2 * 400 / timing.seconds["prefill"])


def test_bytes_a_second_are_what_a_step_reads_over_its_time(new_builder: "type[Builder]") -> None:
    builder = new_builder(environment=replace(new_builder().environment, copy_bytes_per_s=1e11))
    found = only(
        [
            builder.decoded("fp16", "eager", read_bytes=2 * 10**9, round=0, step_s=0.03),
            builder.decoded("fp16", "CUDA graph", read_bytes=2 * 10**9, round=1, step_s=0.05),
            builder.decoded("bnb-4bit", "eager"),
        ]
    )
    known, unknown = (result.timings[CHAT] for result in found.results)
    assert known.decode_bytes_per_s == pytest.approx(2e9 / 0.04)
    assert found.copy_share(known) == pytest.approx(0.5)
    assert known.decode_mode == "eager / CUDA graph"
    assert (unknown.decode_bytes_per_s, found.copy_share(unknown)) == (None, None)
    bare = row([builder.latency("fp16", kernels=None)], "fp16").timings[PUBLISHED]
    assert (bare.decode_mode, bare.decode_bytes_per_s, bare.prefill_by_length_s) == (None, None, ())


def test_unknown_peaks_stay_unknown(builder: "Builder") -> None:
    result = row([builder.latency("fp16", peak_bytes=None), builder.latency("bnb-4bit", memory=None)], "fp16")
    assert result.timings[PUBLISHED].run_peak_bytes is None
    bare = row([builder.latency("fp16"), builder.latency("bnb-4bit", memory=None, kernels=None)], "bnb-4bit")
    assert (bare.weights_bytes, bare.load_peak_bytes, bare.timings[PUBLISHED].kernels) == (None, None, {})


def test_a_kernel_that_changed_between_rounds_is_named_with_the_other(builder: "Builder") -> None:
    records = [builder.latency("fp16", round=n, kernels=Kernels(prefill, "d")) for n, prefill in enumerate("aba")]
    timing = row(records, "fp16").timings[PUBLISHED]
    assert timing.kernels == {"prefill": "a / b", "decode": "d"}


def test_perplexity_is_the_latest_and_its_ratio_to_the_reference(builder: "Builder") -> None:
    records = [builder.latency("fp16"), builder.quality("fp16", 10.0), builder.quality("awq-gemm", 99.0)]
    records.append(builder.quality("awq-gemm", 12.0))
    assert row(records, "awq-gemm").perplexity_ratio == pytest.approx(1.2)
    assert row(records, "fp16").perplexity_ratio is None
    without = [record for record in records if record.kind == "latency" or record.subject.variant != "fp16"]
    assert row(without, "awq-gemm").perplexity_ratio is None


def test_failures_of_one_reason_are_one_and_a_later_good_run_clears_them(builder: "Builder") -> None:
    records = [builder.latency("fp16")]
    records += [builder.failure("bnb-4bit", "oom", "too big", round=n) for n in (0, 1)]
    records += [builder.failure("bnb-4bit", "oom", "too big", scenario=CHAT)]
    records += [builder.failure("bnb-8bit", "timeout", "no end"), builder.latency("bnb-8bit")]
    failures = row(records, "bnb-4bit").failures
    assert [(one.work, one.status, one.reason, one.rounds) for one in failures] == [
        ("published", "oom", "too big", (0, 1)),
        ("chat", "oom", "too big", (0,)),
    ]
    assert row(records, "bnb-8bit").failures == ()


def test_a_second_reference_of_a_base_model_is_compared_with_the_first(builder: "Builder") -> None:
    again = builder.subject("fp16", name="Tiny-1M-again")
    records = [builder.latency("fp16"), builder.latency("fp16", subject=again, prefill_s=(3.0,))]
    first, second = only(records).results
    assert (first.is_reference, second.is_reference) == (True, False)
    comparison = second.timings[PUBLISHED].comparison
    assert comparison is not None
    assert comparison.reference == "Tiny-1M-FP16"
    assert comparison.ratios["total"].value == pytest.approx(1.5)


def test_without_a_reference_there_is_no_table(builder: "Builder") -> None:
    with pytest.raises(UserError, match="no latency record of the reference: quantize --variant fp16"):
        measurements([builder.latency("bnb-4bit"), builder.quality("fp16", 15.0)])


def test_a_reference_that_failed_is_named_with_its_reason(builder: "Builder") -> None:
    records = [builder.latency("bnb-4bit"), builder.failure("fp16", "oom", "killed by the kernel")]
    with pytest.raises(UserError, match=r"did not run \(oom: killed by the kernel\)"):
        measurements(records)
