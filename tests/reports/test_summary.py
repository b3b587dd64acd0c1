"""The answer on one screen: what shares a line, what is advised, and that it fits."""

import functools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.records.record import Phase, Record
from reports import report
from reports.results import measurements
from reports.summary import Standing, advice, beaten, standings, summary
from reports.table import Table

if TYPE_CHECKING:
    from tests.builder import Builder

GALLERY = Path(__file__).parents[2] / "reports" / "gallery" / "cpu-smollm2-135m"


@pytest.mark.parametrize("folder", [".", "broken-by-autoawq", "same-twice"])
def test_it_fits_on_a_screen_of_80_columns_and_40_lines(folder: str) -> None:
    lines = report(GALLERY / folder, format="text").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


def test_a_broken_row_is_said_first_and_ranks_nowhere() -> None:
    text = report(GALLERY / "broken-by-autoawq", format="text")
    _title, first, table, *_ = text.split("\n\n")
    assert first.startswith("- AWQ GEMM, group 64, broken:")
    assert "AWQ" not in table


def test_layouts_with_the_same_codes_on_the_same_kernel_share_a_line() -> None:
    text = report(GALLERY, format="text")
    assert "AWQ GEMM, GEMV, group 64" in text
    assert text.count("AWQ GEMM") == 2, "in the table and in the advice"


def line_names(records: Iterable[Record]) -> list[str]:
    return [row.name for row in standings(measurements(list(records))[0])]


def test_other_codes_or_another_kernel_keep_a_line_of_their_own(builder: "Builder") -> None:
    records = [*builder.five_rows(), builder.quality("awq-gemm", 15.5), builder.quality("awq-gemv", 15.5)]
    apart = line_names(records)
    assert "AWQ GEMM, group 64" in apart
    assert "AWQ GEMV, group 64" in apart
    kernels = next(one.kernels for one in records if one.kernels and one.subject.variant == "awq-gemm")
    alike = [replace(one, kernels=kernels) if one.kernels else one for one in records]
    assert "AWQ GEMM, GEMV, group 64" in line_names(alike)
    other = [*alike[:-1], builder.quality("awq-gemv", 15.6)]
    assert "AWQ GEMV, group 64" in line_names(other)


def test_the_advice_names_the_fastest_the_least_loss_and_what_is_beaten() -> None:
    rows = standings(measurements(_gallery())[0])
    first, *others = advice(rows)
    assert first.startswith("Fastest in decoding: AWQ GEMM, GEMV, group 64 (2.0 times")
    assert "Least loss: BnB.8 (perplexity +1.8%)." in first
    assert others == ["FP16/BF16 beats BnB.8 in memory, speed and loss."]
    slow = [replace(row, marks={"decode": "unsure"}) for row in rows]
    assert advice(slow)[0].startswith("No variant is surely faster than FP16 in decoding.")


def test_a_row_of_unknown_loss_beats_none_and_is_not_beaten() -> None:
    rows = [replace(row, loss=None) if row.name == "BnB.8" else row for row in standings(measurements(_gallery())[0])]
    assert not any("beats" in line for line in advice(rows))


@functools.cache
def a_standing() -> Standing:
    return standings(measurements(_gallery())[0])[0]


@given(st.lists(st.tuples(*[st.integers(1, 4)] * 4), max_size=12), st.data())
def test_what_is_beaten_is_what_comparing_all_with_all_finds(costs: list[tuple[int, ...]], data: st.DataObject) -> None:
    like = a_standing()
    rows = []
    for number, (peak, loss, prefill, decode) in enumerate(costs):
        speeds: dict[Phase, float] = {"prefill": prefill, "decode": decode}
        rows.append(replace(like, name=str(number), peak_bytes=peak, loss=float(loss), speeds=speeds))
    if rows:
        rows[0] = replace(rows[0], loss=None) if data.draw(st.booleans()) else rows[0]
        rows[-1] = replace(rows[-1], speeds={"prefill": 9.0}) if data.draw(st.booleans()) else rows[-1]

    def beats(one: Standing, other: Standing) -> bool:
        if None in (one.loss, other.loss) or one.speeds.keys() != other.speeds.keys():
            return False
        return all(a <= b for a, b in zip(one.costs, other.costs, strict=True)) and one.costs != other.costs

    found, names = beaten(rows), {row.name: row for row in rows}
    assert all(beats(names[better], names[name]) and better not in found for name, better in found.items())
    most = max((len(row.speeds) for row in rows), default=0)  # of other phases nothing is said
    assert set(found) == {row.name for row in rows if len(row.speeds) == most and any(beats(x, row) for x in rows)}


def test_what_failed_is_said_with_its_reason(builder: "Builder") -> None:
    records = [*builder.five_rows(), builder.failure("awq-gemm", "oom", "no memory left", round=7)]
    blocks = summary(measurements(records))
    assert any("oom, no memory left" in str(block) for block in blocks if not isinstance(block, Table))


def _gallery() -> list[Record]:
    from bench.records.store import read_records

    return read_records(GALLERY / "records.jsonl")


def test_what_was_judged_alone_has_no_empty_columns(builder: "Builder") -> None:
    rows = [builder.quality("fp16", 16.0), builder.quality("awq-gemm", 17.0)]
    [table] = [block for block in summary(measurements(rows)) if isinstance(block, Table)]
    assert [column.title for column in table.columns] == ["Variant", "Weights GB", "PPL change"]
