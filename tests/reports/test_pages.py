"""The tables of a report, cell by cell."""

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.records.record import Divergence, Memory, Quality, Record, TaskScore
from bench.records.scenario import SCENARIOS, Scenario
from reports.markdown import markdown
from reports.pages import (
    failure_table,
    length_table,
    memory_table,
    page,
    published_table,
    quality_table,
    speed_table,
    task_table,
)
from reports.results import Measurement, measurements
from reports.table import UNKNOWN, Heading, Paragraph, Table

if TYPE_CHECKING:
    from tests.builder import Builder

PUBLISHED, CHAT = SCENARIOS["published"], SCENARIOS["chat"]
CHAT_GRAPH = replace(CHAT, name="chat-graph", mode="graph")


def only(records: list[Record]) -> Measurement:
    [found] = measurements(records)
    return found


def column(table: Table, title: str) -> list[str]:
    place = table.titles.index(title)
    return [row[place] for row in table.texts()]


def test_the_published_columns_exactly(new_builder: "type[Builder]") -> None:
    builder = new_builder("BioMistral-7B", device="cuda", compute_dtype="bfloat16")
    records = [
        builder.latency("fp16", prefill_s=(1.0,), peak_bytes=15_020_000_000),
        builder.latency("awq-gemm", prefill_s=(1.41,), peak_bytes=4_680_000_000),
        builder.latency("awq-gemv", prefill_s=(10.30,), peak_bytes=4_680_000_000),
        builder.latency("bnb-4bit", prefill_s=(3.25,), peak_bytes=5_030_000_000),
        builder.latency("bnb-8bit", prefill_s=(4.34,), peak_bytes=8_040_000_000),
    ]
    table = published_table(only(records))
    assert table.titles == [
        "Base Model", "Method", "q_group_size", "w_bit", "version", "VRAM GB", "Time", "Download",
    ]  # fmt: skip
    name = "BioMistral-7B"
    assert table.texts() == [
        [name, "FP16/BF16", "", "", "", "15.02", "x1.00", f"{name}-FP16"],
        [name, "AWQ", "64", "4", "GEMM", "4.68", "x1.41", f"{name}-AWQ-QGS64-W4-GEMM"],
        [name, "AWQ", "64", "4", "GEMV", "4.68", "x10.30", f"{name}-AWQ-QGS64-W4-GEMV"],
        [name, "BnB.4", "", "4", "", "5.03", "x3.25", f"{name}-BnB.4"],
        [name, "BnB.8", "", "8", "", "8.04", "x4.34", f"{name}-BnB.8"],
    ]


def test_on_a_cpu_the_column_is_ram_and_the_reference_says_float32(builder: "Builder") -> None:
    table = published_table(only([builder.latency("fp16"), builder.latency("bnb-4bit")]))
    assert "RAM GB" in table.titles
    assert column(table, "Method") == ["FP16/BF16, computed in float32", "BnB.4"]


def test_time_is_the_total_of_published_alone(builder: "Builder") -> None:
    records = builder.rounds({"fp16": 1.0, "bnb-4bit": 3.0}, CHAT)
    assert column(published_table(only(records)), "Time") == [UNKNOWN, UNKNOWN]
    records += builder.rounds({"fp16": 1.0, "bnb-4bit": 2.0}, PUBLISHED)
    assert column(published_table(only(records)), "Time") == ["x1.00", "x2.00"]


def test_time_counts_new_tokens_where_published_has_some(builder: "Builder") -> None:
    """As much time in the prompt for both, and three times as much in each of 50 steps of 0.04 s."""
    longer = Scenario("published", prompt_tokens=1024, new_tokens=51)
    records = [builder.latency("fp16", longer), builder.latency("bnb-4bit", longer, step_s=0.12)]
    assert column(published_table(only(records)), "Time") == ["x1.00", "x2.00"]


def test_the_peak_is_that_of_published_or_of_what_there_is(builder: "Builder") -> None:
    chat = [builder.latency("fp16", CHAT, peak_bytes=3 * 10**9)]
    assert column(published_table(only(chat)), "RAM GB") == ["3.00"]
    both = [*chat, builder.latency("fp16", PUBLISHED, peak_bytes=2 * 10**9)]
    assert column(published_table(only(both)), "RAM GB") == ["2.00"]


def test_missing_pieces_are_dashes(builder: "Builder") -> None:
    """One variant has only perplexity, one only another scenario, one no memory and no kernels."""
    records = [
        builder.latency("fp16"),
        builder.quality("awq-gemm", 16.0),
        builder.latency("bnb-4bit", CHAT),
        builder.latency("bnb-8bit", memory=None, kernels=None),
    ]
    found = only(records)
    table = published_table(found)
    assert column(table, "Time") == ["x1.00", UNKNOWN, UNKNOWN, "x1.00"]
    assert column(table, "RAM GB") == ["1.50", UNKNOWN, UNKNOWN, UNKNOWN]
    assert column(quality_table(found), "Perplexity") == [UNKNOWN, "16.00", UNKNOWN, UNKNOWN]
    assert column(quality_table(found), "to reference") == [UNKNOWN] * 4
    assert column(speed_table(found, PUBLISHED), "Kernel") == ["fp16 long", UNKNOWN]
    assert column(speed_table(found, CHAT), "Time") == [UNKNOWN, UNKNOWN]
    assert markdown(page([found]))


def test_speed_has_a_row_for_each_phase_and_checkpoint(builder: "Builder") -> None:
    records = builder.rounds({"fp16": 1.0, "awq-gemm": 0.6, "bnb-4bit": 3.0}, CHAT)
    found = only(records)
    table = speed_table(found, CHAT)
    assert table.titles == [
        "Phase", "Row", "Time", "95% interval", "Spread", "Verdict", "Tokens/s", "Kernel",
    ]  # fmt: skip
    assert column(table, "Phase") == ["prefill"] * 3 + ["decode"] * 3
    assert column(table, "Row") == ["FP16/BF16", "AWQ GEMM, group 64", "BnB.4"] * 2
    assert column(table, "Time") == ["x1.00", "x0.60", "x3.01"] * 2
    assert column(table, "Spread") == ["", "0.59 to 0.61", "2.97 to 3.03"] * 2
    assert column(table, "Verdict") == ["", "faster", "slower"] * 2
    assert column(table, "Tokens/s") == ["128", "213", "42.7", "25.0", "41.7", "8.33"]
    assert column(table, "Kernel")[1] == "awq-gemm long"
    assert column(table, "Kernel")[4] == "awq-gemm short"


def on_gpu(new_builder: "type[Builder]", copy_bytes_per_s: float | None) -> "Builder":
    environment = replace(new_builder().environment, copy_bytes_per_s=copy_bytes_per_s)
    return new_builder(device="cuda", compute_dtype="float16", environment=environment)


def test_decode_rows_tell_what_they_read_and_how_much_of_a_copy_that_is(new_builder: "type[Builder]") -> None:
    builder = on_gpu(new_builder, 100e9)
    found = only([builder.decoded("fp16", "eager", read_bytes=2_000_000_000), builder.decoded("bnb-4bit", "eager")])
    table = speed_table(found, CHAT)
    assert table.titles[-4:] == ["Tokens/s", "GB/s", "of copy", "Kernel"]
    assert column(table, "GB/s") == ["", "", "50.00", ""]
    assert column(table, "of copy") == ["", "", "50.0%", ""]


def test_where_no_copy_was_measured_there_is_no_share_of_it(new_builder: "type[Builder]") -> None:
    builder = on_gpu(new_builder, None)
    found = only([builder.decoded("fp16", "eager", read_bytes=2_000_000_000)])
    table = speed_table(found, CHAT)
    assert table.titles[-3:] == ["Tokens/s", "GB/s", "Kernel"]
    assert column(table, "GB/s") == ["", "50.00"]


def test_graph_decode_is_told_from_eager_and_compared_with_the_references_graph(new_builder: "type[Builder]") -> None:
    builder = on_gpu(new_builder, None)
    records = [
        builder.decoded(variant, mode, scenario=scenario, step_s=seconds)
        for variant, scenario, mode, seconds in [
            ("fp16", CHAT, "eager", 0.04),
            ("awq-gemm", CHAT, "eager", 0.04),
            ("fp16", CHAT_GRAPH, "CUDA graph", 0.02),
            ("awq-gemm", CHAT_GRAPH, "CUDA graph", 0.01),
        ]
    ]
    found = only(records)
    eager, graph = (speed_table(found, scenario) for scenario in (CHAT, CHAT_GRAPH))
    assert column(eager, "Kernel") == ["fp16 long", "awq-gemm long", "fp16 short", "awq-gemm short"]
    assert column(graph, "Kernel")[2:] == ["fp16 short, CUDA graph", "awq-gemm short, CUDA graph"]
    assert column(graph, "Kernel")[:2] == column(eager, "Kernel")[:2]
    assert column(eager, "Time")[2:] == ["x1.00", "x1.00"]
    assert column(graph, "Time")[2:] == ["x1.00", "x0.50"]
    text = markdown(page([found]))
    assert "In `chat-graph` (256 prompt tokens, 64 new, batch 1, graph decode):" in text


def test_a_graph_row_without_a_known_kernel_still_says_how_it_ran(new_builder: "type[Builder]") -> None:
    found = only([on_gpu(new_builder, None).decoded("fp16", "static cache", scenario=CHAT_GRAPH, kernels=None)])
    assert column(speed_table(found, CHAT_GRAPH), "Kernel") == [UNKNOWN, "static cache"]


def test_prompt_lengths_have_a_table_relative_to_the_reference(builder: "Builder") -> None:
    scenario = Scenario.over("published", (100, 1300), 1)
    records = [
        builder.at_lengths("fp16", scenario, (1.0, 4.0), (1.0, 4.0), (9.0, 4.0)),
        builder.at_lengths("awq-gemm", scenario, (3.0, 2.0)),
        builder.latency("bnb-4bit", CHAT),
    ]
    found = only(records)
    table = length_table(found, scenario)
    assert table.titles == ["Row", "100", "1,300"]
    assert table.texts() == [["FP16/BF16", "x1.00", "x1.00"], ["AWQ GEMM, group 64", "x3.00", "x0.50"]]
    assert length_table(found, CHAT).rows == ()
    assert column(speed_table(found, scenario), "Tokens/s") == ["280", "280"]
    text = markdown(page([found]))
    assert "In `published` (2 prompts of 100 to 1,300 tokens, 1 new, batch 1):" in text
    assert "In `published`, prefill time by tokens of the prompt:" in text


def test_lengths_without_their_reference_have_no_table(builder: "Builder") -> None:
    scenario = Scenario.over("published", (100, 1300), 1)
    found = only([builder.latency("fp16", CHAT), builder.at_lengths("awq-gemm", scenario, (3.0, 2.0))])
    assert length_table(found, scenario).rows == ()


def test_few_rounds_say_how_many_in_place_of_an_interval(builder: "Builder") -> None:
    for count, words in ((1, "1 round"), (2, "2 rounds")):
        found = only(builder.rounds({"fp16": 1.0, "bnb-4bit": 2.0}, count=count))
        table = speed_table(found, PUBLISHED)
        assert column(table, "95% interval") == ["", words]
        assert column(table, "Verdict") == ["", "unsure"]


def test_a_bare_prefill_has_no_decode_rows(builder: "Builder") -> None:
    found = only(builder.rounds({"fp16": 1.0, "bnb-4bit": 2.0}, PUBLISHED))
    assert column(speed_table(found, PUBLISHED), "Phase") == ["prefill"] * 2


def test_quality_is_perplexity_divergence_and_the_noise_floor(builder: "Builder") -> None:
    floor = Quality(15.0, 4096, "pydoc topics", "t" * 64, noise_floor=Divergence(2e-5, 0.0, 0.0004, 0.001))
    judged = Quality(16.5, 4096, "pydoc topics", "t" * 64, divergence=Divergence(0.0628, 0.03, 0.61, 0.124))
    records = [builder.latency("fp16"), builder.quality("fp16", 15.0, quality=floor)]
    records += [builder.latency("awq-gemm"), builder.quality("awq-gemm", 16.5, quality=judged)]
    found = only(records)
    table = quality_table(found)
    assert table.titles == ["Row", "Perplexity", "to reference", "KLD mean", "median", "99%", "Flips"]
    assert table.texts() == [
        ["FP16/BF16", "15.00", "x1.00", "", "", "", ""],
        ["AWQ GEMM, group 64", "16.50", "x1.10", "0.0628", "0.0300", "0.6100", "12.4%"],
        ["FP16/BF16 against itself", "—", "—", "2e-05", "0.0000", "0.0004", "0.1%"],
    ]


def test_memory_by_role_has_the_columns_that_something_told(builder: "Builder") -> None:
    memory = Memory(
        weights_bytes=500_000_000,
        source="RSS",
        baseline_bytes=700_000_000,
        load_peak_bytes=900_000_000,
        run_peak_bytes=1_500_000_000,
        kv_cache_bytes=100_000_000,
    )
    found = only([builder.latency("fp16", memory=memory), builder.latency("awq-gemm")])
    table = memory_table(found, PUBLISHED)
    assert table.titles == [
        "Row", "Weights GB", "KV cache GB", "Activations GB", "Rest GB", "Run peak GB", "Load peak GB",
    ]  # fmt: skip
    assert table.texts() == [
        ["FP16/BF16", "0.500", "0.100", "0.700", "0.200", "1.50", "0.900"],
        ["AWQ GEMM, group 64", "0.500", "—", "—", "0.100", "1.50", "0.900"],
    ]


def test_task_scores_are_shares(builder: "Builder") -> None:
    scores = (TaskScore("anatomy", "acc", 0.5), TaskScore("medqa", "acc", 0.25))
    records = [builder.latency("fp16"), builder.latency("awq-gemm")]
    records += [builder.record("tasks", builder.subject("fp16"), tasks=scores)]
    records += [builder.record("tasks", builder.subject("awq-gemm"), tasks=scores[:1])]
    found = only(records)
    table = task_table(found)
    assert table.titles == ["Row", "anatomy", "medqa"]
    assert table.texts() == [["FP16/BF16", "50.0%", "25.0%"], ["AWQ GEMM, group 64", "50.0%", "—"]]


def test_a_failed_checkpoint_is_a_row_with_status_and_reason(builder: "Builder") -> None:
    records = builder.rounds({"fp16": 1.0, "bnb-4bit": 2.0}, count=2)
    records += [builder.failure("bnb-8bit", "oom", "needs 9 GB", round=n) for n in (0, 1)]
    records += [builder.failure("bnb-4bit", "timeout", "3600 s", round=2)]
    records += [builder.record("quality", builder.subject("bnb-8bit"), status="error", reason="NaN")]
    found = only(records)
    table = published_table(found)
    assert column(table, "Method")[-1] == "BnB.8"
    assert column(table, "Time") == ["x1.00", "x2.01", "oom"]
    assert column(table, "RAM GB")[-1] == UNKNOWN
    assert failure_table(found).texts() == [
        ["BnB.4", "published", "3", "timeout", "3600 s"],
        ["BnB.8", "published", "1, 2", "oom", "needs 9 GB"],
        ["BnB.8", "quality", "", "error", "NaN"],
    ]
    assert "| BnB.8 | published | 1, 2   | oom     | needs 9 GB |" in markdown(page([found]))


def test_a_device_on_which_everything_failed_is_still_shown(new_builder: "type[Builder]") -> None:
    cpu, gpu = new_builder(), new_builder(device="cuda")
    records = [cpu.latency("fp16"), gpu.failure("fp16", "unsupported", "no kernel for this GPU")]
    text = markdown(page(measurements(records)))
    assert "### On cpu, computing in float32" in text
    assert "### On cuda\n" in text
    assert "no kernel for this GPU" in text
    assert "VRAM GB" in text


def test_labels_are_short_but_never_ambiguous(new_builder: "type[Builder]") -> None:
    builder = new_builder()
    twin = builder.subject("bnb-4bit", name="Tiny-1M-twin")
    records = [builder.latency(name) for name in ("fp16", "awq-gemm", "bnb-4bit")]
    records.append(builder.latency("bnb-4bit", subject=twin))
    assert list(only(records).labels.values()) == [
        "FP16/BF16", "AWQ GEMM, group 64", "Tiny-1M-BnB.4", "Tiny-1M-twin",
    ]  # fmt: skip
    copy = builder.subject("fp16", name="Tiny-1M-again")
    records = [builder.latency("fp16"), builder.latency("fp16", subject=copy)]
    assert list(only(records).labels.values()) == ["FP16/BF16", "Tiny-1M-again"]
    other = new_builder("Huge-9T")
    records = [builder.latency("fp16"), other.latency("fp16"), other.latency("awq-gemv")]
    assert list(only(records).labels.values()) == [
        "Tiny-1M FP16/BF16", "Huge-9T FP16/BF16", "Huge-9T AWQ GEMV, group 64",
    ]  # fmt: skip


def test_two_base_models_share_one_table(new_builder: "type[Builder]") -> None:
    records = [record for model in ("Tiny-1M", "Huge-9T") for record in new_builder(model).five_rows()]
    table = published_table(only(records))
    assert column(table, "Base Model") == ["Tiny-1M"] * 5 + ["Huge-9T"] * 5
    assert column(table, "Time") == ["x1.00", "x1.41", "x10.33", "x3.26", "x0.80"] * 2


@pytest.mark.parametrize("several", [False, True])
def test_sections_stand_under_headings_and_measurements_where_there_are_several(
    new_builder: "type[Builder]", several: bool
) -> None:
    records = [new_builder().latency("fp16"), new_builder().quality("fp16", 15.0)]
    if several:
        records.append(new_builder(device="cuda", compute_dtype="float16").latency("fp16"))
    blocks = list(page(measurements(records)))
    headings = [(block.level, block.text) for block in blocks if isinstance(block, Heading)]
    sections = [(int(several), title) for title in ("Speed", "Memory", "Quality", "How it was measured")]
    if several:
        tops = [(0, "On cpu, computing in float32"), (0, "On cuda, computing in float16")]
        assert headings == [tops[0], *sections, tops[1], *sections]
    else:
        assert headings == sections
    assert isinstance(blocks[int(several)], Table)
    assert isinstance(blocks[-1], Paragraph)
    assert blocks[-1].text.endswith("docs/method.md.")


def test_a_scenario_of_ones_own_has_its_table(builder: "Builder") -> None:
    own = Scenario("512/128 x4", prompt_tokens=512, new_tokens=128, batch=4)
    text = markdown(page(measurements(builder.rounds({"fp16": 1.0, "bnb-4bit": 2.0}, own))))
    assert "In `512/128 x4` (512 prompt tokens, 128 new, batch 4):" in text


def test_the_share_that_is_quantized_is_shown_where_it_is_not_all(builder: "Builder") -> None:
    def titles(share: float) -> list[str]:
        records = [builder.latency("fp16"), builder.latency("awq-gemm", quantized_share=share)]
        [measurement] = measurements(records)
        return published_table(measurement).titles

    assert "Quantized" in titles(0.93)
    assert "Quantized" not in titles(1.0)


def test_a_compiled_step_tells_how_long_compiling_took(builder: "Builder") -> None:
    compiled = replace(CHAT, name="chat-compiled", mode="compiled")
    record = builder.latency("fp16", compiled)
    assert record.latency is not None
    record = replace(record, latency=replace(record.latency, decode_mode="compiled", compile_s=12.3))
    assert column(speed_table(only([record]), compiled), "Kernel")[-1] == "fp16 short, compiled in 12 s"
