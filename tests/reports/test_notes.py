"""The words under the tables say what the records say."""

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from bench.records.environment import Environment
from bench.records.gpu_state import GpuExtremes, GpuState, GpuStates
from bench.records.record import Latency, Record
from bench.records.scenario import SCENARIOS, Scenario
from reports.notes import broken_lines, how_measured, warnings
from reports.results import measurements

if TYPE_CHECKING:
    from tests.builder import Builder

CHAT = SCENARIOS["chat"]


def words(records: list[Record]) -> str:
    [found] = measurements(records)
    return " ".join(how_measured(found))


def warned(records: list[Record]) -> tuple[str, ...]:
    [found] = measurements(records)
    return tuple(warnings(found))


def test_what_is_said_of_a_cpu(builder: "Builder") -> None:
    text = words(builder.five_rows())
    for sentence in (
        "Measured on a CPU (Epyc 9, 2 threads) on 2025-03-01 in 3 rounds.",
        "Versions: Python 3.11.9, torch 2.13.0, transformers 5.23.0, quantable 0.1.0.",
        "The reference is stored in half precision and computed in float32.",
        "Scenarios: `published` (1024 prompt tokens, 1 new, batch 1), `chat` (256 prompt tokens, 64 new, batch 1).",
        "Perplexity is over 4096 tokens of held-out text (pydoc topics).",
    ):
        assert sentence in text
    assert "None" not in text
    assert "bitsandbytes" not in text


def test_what_is_said_of_a_gpu(new_builder: "type[Builder]") -> None:
    card = {"gpu": "NVIDIA H100", "gpu_memory_bytes": 85_000_000_000, "gpu_driver": "570.1", "cuda": "12.8"}
    environment = replace(new_builder().environment, **card)  # type: ignore[arg-type]
    builder = new_builder(device="cuda", compute_dtype="bfloat16", environment=environment)
    text = words([builder.latency("fp16")])
    assert "Measured on a GPU (NVIDIA H100, 85.00 GB, driver 570.1, CUDA 12.8; host Epyc 9)" in text
    assert "The reference computed in bfloat16." in text
    assert "in 1 round." in text


def test_several_prompt_lengths_are_told(builder: "Builder") -> None:
    scenario = Scenario.over("published", (100, 1300), 1)
    text = words([builder.at_lengths("fp16", scenario, (1.0, 2.0))])
    assert "`published` (2 prompts of 100 to 1,300 tokens, 1 new, batch 1)" in text


def test_what_a_copy_moves_is_said_where_bytes_a_second_are(new_builder: "type[Builder]") -> None:
    environment = replace(new_builder().environment, copy_bytes_per_s=2.5e12)
    builder = new_builder(device="cuda", compute_dtype="float16", environment=environment)
    assert "GB/s" not in words([builder.decoded("fp16", "eager")])
    text = words([builder.decoded("fp16", "eager", read_bytes=10**9)])
    assert "A plain copy moves 2500.0 GB/s, read and written together." in text
    bare = new_builder(device="cuda", compute_dtype="float16")
    assert "GB/s" not in words([bare.decoded("fp16", "eager", read_bytes=10**9)])


def test_what_the_fingerprint_does_not_know_is_not_said(new_builder: "type[Builder]") -> None:
    bare = new_builder(environment=Environment(), device="cuda")
    text = words([bare.latency("fp16", memory=None, compute_dtype=None)])
    assert "None" not in text
    assert "Versions" not in text
    assert "GB" not in text


def test_dates_and_rounds_may_be_ranges(builder: "Builder") -> None:
    records = builder.rounds({"fp16": 1.0, "bnb-4bit": 2.0}, count=2)
    builder.clock += timedelta(days=1)
    records.append(builder.latency("fp16", round=2))
    text = words(records)
    assert "from 2025-03-01 to 2025-03-02 in 2 to 3 rounds." in text


def test_without_published_time_and_peak_are_explained(builder: "Builder") -> None:
    text = words([builder.latency("fp16", CHAT)])
    assert "`published` was not run: there is no Time, and peaks are of `chat`." in text


def test_references_in_several_dtypes_are_named(new_builder: "type[Builder]") -> None:
    records = [
        new_builder(model, device="cuda", compute_dtype=dtype).latency("fp16")
        for model, dtype in (("A", "bfloat16"), ("B", "float16"))
    ]
    assert "The references computed: A in bfloat16, B in float16." in words(records)


def test_a_sound_bench_has_no_warnings(builder: "Builder") -> None:
    assert warned(builder.five_rows()) == ()


def test_an_order_that_was_never_reversed_is_told(builder: "Builder") -> None:
    records = [builder.latency("fp16", round=n) for n in range(3)]
    records += [builder.latency("bnb-4bit", round=n) for n in range(3)]
    [line] = warned(records)
    assert line.startswith("BnB.4: in `published` it ran on the same side of the reference in every round")


def test_pairs_measured_days_apart_are_told(builder: "Builder") -> None:
    records = [builder.latency("fp16")]
    builder.clock += timedelta(days=4)
    records.append(builder.latency("bnb-4bit"))
    [line] = warned(records)
    assert line == "BnB.4: in `published` it and its reference ran up to 4 days apart; measure both again in one go."


def test_a_base_model_without_reference_is_told(new_builder: "type[Builder]") -> None:
    records = [new_builder().latency("fp16"), new_builder("Huge-9T").latency("bnb-4bit")]
    assert warned(records) == ("Huge-9T: no reference was measured, so its rows have no ratios.",)


def test_a_warm_up_that_never_became_steady_is_said(builder: "Builder") -> None:
    unsteady = Latency((2.0, 2.0, 2.0), ((), (), ()), (9.0, 5.0), steady=False, stopped="time")
    records = [builder.latency("fp16", round=0), builder.latency("awq-gemm", round=0, latency=unsteady)]
    [line] = [line for line in warned(records) if "steady" in line]
    assert line.startswith("AWQ GEMM, group 64: in `published` the warm-up never became steady in 1 of 1 rounds: close")


def test_outliers_are_counted_told_and_not_dropped(builder: "Builder") -> None:
    records = [
        builder.latency("fp16", prefill_s=(2.0,) * 8),
        builder.latency("awq-gemm", prefill_s=(2.0, 2.01, 1.99, 2.0, 2.02, 1.98, 2.0, 9.0)),
    ]
    assert "1 of 16 samples are outliers; none is dropped" in words(records)
    assert any(
        "in `published` 1 of 8 samples lie far from the rest (none is dropped)" in line for line in warned(records)
    )
    [found] = measurements(records)
    timing = found.results[1].timings[SCENARIOS["published"]]
    assert (timing.outliers, timing.samples) == (1, 8)


def test_a_throttled_gpu_and_other_programs_on_it_are_said(new_builder: "type[Builder]") -> None:
    builder = new_builder(device="cuda", compute_dtype="float16")
    state = GpuStates(
        GpuState(energy_j=100.0, throttle_reasons=(), other_processes=0),
        GpuExtremes(throttle_reasons=("power cap",), other_processes=2),
        GpuState(energy_j=350.0, throttle_reasons=()),
    )
    records = [builder.latency("fp16"), builder.latency("awq-gemm", device_state=state)]
    lines = warned(records)
    assert any("the GPU's clocks were held down (power cap): let it cool" in line for line in lines)
    assert any("2 other programs used the GPU: stop what runs there" in line for line in lines)
    [found] = measurements(records)
    assert [result.timings[SCENARIOS["published"]].energy_j for result in found.results] == [None, 250.0]


def test_a_broken_checkpoint_is_called_that(builder: "Builder") -> None:
    records = [builder.latency("fp16"), builder.quality("fp16", 15.0), builder.quality("awq-gemm", 222_316.0)]
    [measurement] = measurements(records)
    assert broken_lines(measurement) == (
        "AWQ GEMM, group 64, broken: its perplexity is x14,821 the reference's. Do not use it.",
    )
    assert warned(records) == ()


def test_a_model_spread_over_devices_is_said(builder: "Builder") -> None:
    how = "decoder layers: 13 on cuda:0, 19 in RAM"
    lines = warned([builder.latency("fp16", placement=how), builder.latency("fp16", round=1, placement=how)])
    assert [line for line in lines if f"too big for one GPU, so accelerate spread it ({how})" in line] == list(lines)
    assert len(lines) == 1
