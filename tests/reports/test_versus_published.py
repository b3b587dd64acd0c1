"""The published table and ours side by side: every published row, in its order, with the quotients."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.records.record import Latency, Memory, Record, Subject
from bench.records.store import append
from quantize.errors import UserError
from quantize.variant import VARIANTS
from reports import report
from reports.cli import main
from reports.published import BIOMISTRAL, published_tables, versus_page
from reports.results import Measurement, measurements
from reports.table import Table

if TYPE_CHECKING:
    from tests.builder import Builder

PUBLISHED = published_tables()[BIOMISTRAL]
LAYERS, HIDDEN_SIZE = PUBLISHED.layers, PUBLISHED.hidden_size
GPU = "the card of our tests"
ROWS = [
    ("BioMistral-7B", "fp16", None),
    ("BioMistral-7B", "awq-gemm", None),
    ("BioMistral-7B", "awq-gemv", None),
    ("BioMistral-7B", "bnb-4bit", None),
    ("BioMistral-7B", "bnb-8bit", None),
    ("BioMistral-7B-DARE", "awq-gemm", None),
    ("BioMistral-7B-TIES", "awq-gemm", None),
    ("BioMistral-7B-SLERP", "awq-gemm", None),
    ("BioMistral-7B", "awq-gemv", "native"),
]
SECONDS = [2.0, 2.2, 2.4, 3.0, 4.0, 2.2, 2.2, 2.2, 20.0]
PEAKS = [14e9, 4.2e9, 4.2e9, 4.9e9, 7.9e9, 4.2e9, 4.2e9, 4.2e9, 4.2e9]


def subject(base_model: str, variant: str, kernel: str | None, *, dummy: str | None) -> Subject:
    row = VARIANTS[variant]
    group = 128 if row.is_awq else None
    name = f"{base_model}-{row.folder_suffix(group)}" + (f", {kernel} kernel" if kernel else "")
    return Subject(
        name, base_model, variant, row.method, group, row.w_bit, row.version, None, f"sha of {name}", None,
        family="BioMistral-7B", kernel=kernel, dummy=dummy,
        dummy_layers=LAYERS if dummy else None, dummy_hidden_size=HIDDEN_SIZE if dummy else None,
    )  # fmt: skip


@pytest.fixture
def suite_records(new_builder: "type[Builder]") -> list[Record]:
    """Three rounds of all rows on a GPU, every other one backwards."""
    own = new_builder(device="cuda", compute_dtype="float16")
    own.environment = replace(own.environment, gpu=GPU)
    shape = f"mistral-7b, {LAYERS} layers, hidden size {HIDDEN_SIZE}"
    rows = [
        (subject(*row, dummy=shape), seconds, int(peak))
        for row, seconds, peak in zip(ROWS, SECONDS, PEAKS, strict=True)
    ]
    records: list[Record] = []
    for number in range(3):
        for row, seconds, peak in rows if number % 2 == 0 else reversed(rows):
            memory = Memory(int(peak * 0.9), "CUDA allocator", peak, peak, peak)
            records.append(
                own.latency(
                    row.variant,
                    round=number,
                    subject=row,
                    position=len(records),
                    prefill_s=(seconds * (1 + number / 1000),),
                    memory=memory,
                )
            )
    return records


def tables(measurement: Measurement) -> list[Table]:
    return [block for block in versus_page([measurement]) if isinstance(block, Table)]


def test_every_published_row_stands_beside_ours(suite_records: list[Record]) -> None:
    [measurement] = measurements(suite_records)
    table = tables(measurement)[0]
    assert table.titles == [
        "Base Model", "Method", "q_group_size", "w_bit", "version", "Published VRAM GB", "Measured weights GB",
        "Measured peak VRAM GB", "Peak / published", "Published Time", "Measured Time", "Time / published",
    ]  # fmt: skip
    assert [row[:5] for row in table.rows] == [
        (row.base_model, row.method, row.q_group_size, row.w_bit, row.version) for row in PUBLISHED.row
    ]
    assert table.texts()[1][5:] == ["4.68", "3.78", "4.20", "x0.90", "x1.41", "x1.10", "x0.78"]
    assert table.texts()[2][5:] == ["4.68", "3.78", "4.20", "x0.90", "x10.30", "x1.20", "x0.12"]
    assert [row[10] for row in table.rows] == pytest.approx([one / 2.0 for one in SECONDS[:8]])


def test_rows_on_the_layouts_own_kernels_have_a_table_of_their_own(suite_records: list[Record]) -> None:
    [measurement] = measurements(suite_records)
    _, own = tables(measurement)
    assert own.texts() == [
        ["BioMistral-7B", "AWQ", "128", "4", "GEMV", "4.68", "3.78", "4.20", "x0.90", "x10.30", "x10.00", "x0.97"]
    ]
    [without] = measurements([record for record in suite_records if record.subject.kernel is None])
    assert len(tables(without)) == 1


def test_the_words_say_what_was_published_and_what_was_measured(suite_records: list[Record]) -> None:
    page = report_text(suite_records)
    assert "one new token, over that of FP16/BF16: prefill and no decoding" in page
    assert "Machine: one GPU that the card does not name." in page
    assert f"on a GPU ({GPU}" in page
    shape = f"mistral-7b, {LAYERS} layers, hidden size {HIDDEN_SIZE}"
    assert f"The weights are random, in the shape {shape}: time and memory depend on it alone." in page
    assert "not the shape of the published models" not in page


def test_each_of_several_measurements_has_a_heading(suite_records: list[Record]) -> None:
    again = [replace(record, compute_dtype="bfloat16") for record in suite_records]
    assert report_text([*suite_records, *again]).count("### On cuda") == 2
    assert "### On cuda" not in report_text(suite_records)


def report_text(records: list[Record]) -> str:
    from reports.markdown import markdown

    return " ".join(markdown(versus_page(measurements(records))).split())


def test_another_shape_has_no_quotients_and_says_so(suite_records: list[Record]) -> None:
    small = [
        replace(record, subject=replace(record.subject, dummy="tiny", dummy_layers=2, dummy_hidden_size=256))
        for record in suite_records
    ]
    [measurement] = measurements(small)
    for table in tables(measurement):
        assert all(row[8] is None and row[11] is None for row in table.rows)
        assert all(row[7] is not None and row[10] is not None for row in table.rows)
    assert f"It is not the shape of the published models ({LAYERS} layers, hidden size {HIDDEN_SIZE})" in report_text(
        small
    )


def test_real_weights_are_not_called_random(suite_records: list[Record]) -> None:
    real = [replace(record, subject=replace(record.subject, dummy=None)) for record in suite_records]
    assert "random" not in report_text(real)
    [measurement] = measurements(real)
    assert tables(measurement)[0].texts()[1][8] == "x0.90"


def test_what_was_not_measured_is_a_dash(builder: "Builder") -> None:
    [measurement] = measurements(builder.five_rows())
    [table] = tables(measurement)
    assert len(table.rows) == 8
    assert all(row[6:] == ["—", "—", "—", one, "—", "—"] for row in table.texts() for one in [row[9]])
    assert "Measured peak RAM GB" in table.titles


def test_a_row_that_failed_says_how(suite_records: list[Record]) -> None:
    failed = [
        replace(record, status="oom", reason="no memory", latency=None, memory=None)
        if record.subject.variant == "bnb-8bit"
        else record
        for record in suite_records
    ]
    [measurement] = measurements(failed)
    assert tables(measurement)[0].texts()[4][6:] == ["—", "—", "—", "x4.34", "oom", "—"]


# The family, and the suite's order, in the ordinary report


def test_rows_of_other_base_models_are_compared_with_the_familys_reference(suite_records: list[Record]) -> None:
    [measurement] = measurements(suite_records)
    assert [(one.subject.base_model, one.subject.variant, one.subject.kernel) for one in measurement.results] == ROWS
    assert [result.is_reference for result in measurement.results] == [True] + [False] * 8
    for result in measurement.results[1:]:
        [timing] = result.timings.values()
        assert timing.comparison is not None
        assert timing.comparison.reference == "BioMistral-7B-FP16"


def test_the_suites_order_is_not_that_of_the_variants(suite_records: list[Record]) -> None:
    backwards = {record.subject: place for place, record in enumerate(reversed(suite_records[1:9]), start=1)}
    moved = [
        replace(record, position=backwards.get(record.subject, 0)) if record.round == 0 else record
        for record in suite_records
    ]
    [measurement] = measurements(moved)
    found = [(one.subject.base_model, one.subject.variant, one.subject.kernel) for one in measurement.results]
    assert found == [ROWS[0], *reversed(ROWS[1:])]


def test_the_perplexity_of_another_model_is_no_matter_of_quantization(
    suite_records: list[Record], builder: "Builder"
) -> None:
    judged = [
        replace(builder.quality("fp16", perplexity), subject=suite_records[place].subject, device="cuda",
                environment=suite_records[0].environment, compute_dtype="float16")
        for place, perplexity in ((0, 10.0), (1, 11.0), (5, 30.0))
    ]  # fmt: skip
    [measurement] = measurements([*suite_records, *judged])
    ratios = {result.subject.name: result.perplexity_ratio for result in measurement.results}
    assert ratios["BioMistral-7B-AWQ-QGS128-W4-GEMM"] == pytest.approx(1.1)
    assert ratios["BioMistral-7B-DARE-AWQ-QGS128-W4-GEMM"] is None


def test_a_half_precision_row_of_another_base_model_is_no_reference(suite_records: list[Record]) -> None:
    dare = subject("BioMistral-7B-DARE", "fp16", None, dummy=None)
    first = [replace(suite_records[0], subject=dare), *suite_records]
    [measurement] = measurements(first)
    assert [one.subject.name for one in measurement.results if one.is_reference] == ["BioMistral-7B-FP16"]


# The command


def test_the_command_writes_the_page(
    suite_records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for record in suite_records:
        append(tmp_path / "records.jsonl", record)
    assert main([str(tmp_path), "--published"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].startswith("| Base Model ")
    assert main([str(tmp_path), "--published", "--out", str(tmp_path / "p.md")]) == 0
    assert (tmp_path / "p.md").read_text(encoding="utf-8").rstrip("\n") == shown.rstrip("\n")
    assert main([str(tmp_path), "--published", "--format", "csv"]) == 2
    with pytest.raises(UserError, match="json has everything already"):
        report(tmp_path, format="json", view="versus")


def test_the_first_table_of_the_report_names_the_random_weights_and_the_kernels(
    suite_records: list[Record], tmp_path: Path
) -> None:
    records = [replace(one, latency=Latency((1.0,), ((),), ())) for one in suite_records]
    for record in records:
        append(tmp_path / "records.jsonl", record)
    text = report(tmp_path, view="full")
    assert "### Quality" not in text  # random weights have none
    assert "BioMistral-7B AWQ GEMV, group 128, native kernel" in text
    assert f"random, in the shape mistral-7b, {LAYERS} layers, hidden size {HIDDEN_SIZE}" in " ".join(text.split())
