"""Published tables as data: their figures as they stand at the source, and the suites that measure what they give."""

import re
from pathlib import Path

import pytest

from bench.suite.suite import dummy_targets, suite_named
from quantable.cli import main
from quantize.errors import UserError
from quantize.suite import SUITES
from reports.published import BIOMISTRAL, published_table_named, published_tables, versus_page
from reports.results import measurements
from reports.table import Column, Paragraph, Table
from tests.builder import Builder

BIOMISTRAL_7B = published_tables()[BIOMISTRAL].row


def test_the_eight_rows_as_published() -> None:
    shown = [
        (row.base_model, row.method, row.q_group_size, row.w_bit, row.version, row.vram_gb, row.time)
        for row in BIOMISTRAL_7B
    ]
    assert shown == [
        ("BioMistral-7B", "FP16/BF16", None, None, None, 15.02, 1.00),
        ("BioMistral-7B", "AWQ", 128, 4, "GEMM", 4.68, 1.41),
        ("BioMistral-7B", "AWQ", 128, 4, "GEMV", 4.68, 10.30),
        ("BioMistral-7B", "BnB.4", None, 4, None, 5.03, 3.25),
        ("BioMistral-7B", "BnB.8", None, 8, None, 8.04, 4.34),
        ("BioMistral-7B-DARE", "AWQ", 128, 4, "GEMM", 4.68, 1.41),
        ("BioMistral-7B-TIES", "AWQ", 128, 4, "GEMM", 4.68, 1.41),
        ("BioMistral-7B-SLERP", "AWQ", 128, 4, "GEMM", 4.68, 1.41),
    ]


def test_our_formats_show_the_published_figures_as_published() -> None:
    times = [Column("Time", "ratio").text(row.time) for row in BIOMISTRAL_7B]
    assert times == ["x1.00", "x1.41", "x10.30", "x3.25", "x4.34", "x1.41", "x1.41", "x1.41"]
    memory = [Column("VRAM GB", "gigabytes").text((row.vram_gb or 0) * 1e9) for row in BIOMISTRAL_7B]
    assert memory == ["15.02", "4.68", "4.68", "5.03", "8.04", "4.68", "4.68", "4.68"]


def test_six_tables_with_their_sources_and_what_their_figures_mean() -> None:
    tables = published_tables()
    assert list(tables) == [
        *("biomistral-7b", "autoawq-mistral-7b", "biomistral-7b-exl2", "bitsandbytes-llama-3.1-8b", "qwen2-7b"),
        "torchao-llama-2-7b",
    ]
    for table in tables.values():
        for said in (table.title, table.source, table.engine, table.machine, table.memory, table.speed):
            assert said
            assert said in table.about() or said == table.title
        assert all(row.scenario in table.scenarios for row in table.row) or not table.scenarios
        assert all(row.vram_gb or row.tokens_per_s for row in table.row)


@pytest.mark.parametrize(
    ("name", "scenario", "method", "vram_gb", "tokens_per_s", "time"),
    [
        ("qwen2-7b", "in1", "BF16", 14.92, 37.97, 1.0),
        ("qwen2-7b", "in30720", "AWQ", 33.63, 17.87, 17.49 / 17.87),
        ("autoawq-mistral-7b", "batch8-2048", "AWQ", 16.82, 829.754, None),
        ("torchao-llama-2-7b", "generate", "awq-uint4", 7.31, 43.59, 107.38 / 43.59),
        ("bitsandbytes-llama-3.1-8b", "batch32", "INT8, threshold 6", None, 624.94, 1054.35 / 624.94),
        ("biomistral-7b-exl2", "context-16k", "EXL2, 4.25 bits, head 6.0", 6.7, None, None),
    ],
)
def test_figures_as_published(
    name: str, scenario: str, method: str, vram_gb: float | None, tokens_per_s: float | None, time: float | None
) -> None:
    table = published_table_named(name)
    row = next(one for one in table.row if (one.scenario, one.method) == (scenario, method))
    assert (row.vram_gb, row.tokens_per_s) == (vram_gb, tokens_per_s)
    assert table.time(row) == pytest.approx(time) if time else table.time(row) is None


@pytest.mark.parametrize("name", [path.stem for path in sorted(SUITES.glob("*.toml"))])
def test_each_suite_has_the_shape_of_its_table(name: str) -> None:
    suite = suite_named(name)
    table = published_table_named(BIOMISTRAL if name == "biomistral" else name)
    targets = dummy_targets(suite)
    assert {(one.subject.dummy_layers, one.subject.dummy_hidden_size) for one in targets} == {
        (table.layers, table.hidden_size)
    }
    scenarios = {one.name for one in suite.scenarios}
    made = {(one.subject.base_model, one.subject.variant, one.subject.q_group_size) for one in targets}
    for row in (one for one in table.row if one.variant and one.variant != "gptq"):
        assert (row.base_model, row.variant, row.q_group_size) in made, row
        assert row.scenario in scenarios


def test_a_table_of_speeds_stands_beside_ours(builder: Builder) -> None:
    """The half-precision row of its scenario is what its Time is over, as ours is."""
    [measurement] = measurements(builder.five_rows())
    blocks = list(versus_page([measurement], "qwen2-7b"))
    table = next(block for block in blocks if isinstance(block, Table))
    assert {"At", "Published tokens/s"} <= set(table.titles)
    place = table.titles.index("Published Time")
    assert [row[place] for row in table.texts()[:4]] == ["x1.00", "x1.23", "x1.05", "x1.15"]
    assert isinstance(blocks[-1], Paragraph)
    assert "5c4e69c" in blocks[-1].text


def test_an_unknown_table_names_those_there_are() -> None:
    with pytest.raises(UserError, match="no published table 'x'; there are: biomistral-7b, autoawq"):
        published_table_named("x")


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert re.match(r"biomistral-7b +BioMistral-7B: half precision, AWQ, bitsandbytes +the model card", lines[0])


def test_the_name_may_stand_before_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--published", str(tmp_path)]) == 2
    assert "no record" in capsys.readouterr().err
    assert main(["report", "--published", "qwen2-7b"]) == 2
    assert "say which folder was measured" in capsys.readouterr().err
