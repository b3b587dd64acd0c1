"""How values look."""

import pytest

from reports.table import UNKNOWN, Cell, Column, Kind, Table


@pytest.mark.parametrize(
    ("kind", "cell", "shown"),
    [
        ("ratio", 1.414, "x1.41"),
        ("ratio", 1.0, "x1.00"),
        ("ratio", 10.3, "x10.30"),
        ("ratio", 14889.3, "x14,889"),
        ("gigabytes", 15_020_000_000, "15.02"),
        ("gigabytes", 4_684_000_000, "4.68"),
        ("gigabytes", 268_600_000, "0.269"),
        ("gigabytes", 141_000_000_000, "141.0"),
        ("gigabytes", 1_000_000_000, "1.00"),
        ("range", (1.376, 1.449), "1.38 to 1.45"),
        ("per_second", 1318.2, "1,318"),
        ("per_second", 24.84, "24.8"),
        ("per_second", 1.517, "1.52"),
        ("per_second", 0.03124, "0.0312"),
        ("milliseconds", 0.000131, "0.131"),
        ("milliseconds", 0.0024, "2.40"),
        ("milliseconds", 1.3182, "1,318"),
        ("perplexity", 14.932, "14.93"),
        ("perplexity", 222316.4, "222,316"),
        ("count", 128, "128"),
        ("text", "AWQ", "AWQ"),
        ("ratio", "oom", "oom"),
        ("range", "2 rounds", "2 rounds"),
        ("gigabytes", None, UNKNOWN),
    ],
)
def test_a_value_looks_as_its_column_says(kind: Kind, cell: Cell, shown: str) -> None:
    assert Column("title", kind).text(cell) == shown


def test_what_does_not_apply_may_be_left_empty() -> None:
    assert Column("w_bit", "count", missing="").text(None) == ""


def test_rows_have_one_cell_a_column() -> None:
    columns = (Column("a"), Column("b", "ratio"))
    assert Table(columns, (("x", 2.0), ("y", None))).texts() == [["x", "x2.00"], ["y", UNKNOWN]]
    with pytest.raises(ValueError, match="zip"):
        Table(columns, (("x",),)).texts()
