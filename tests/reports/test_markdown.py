"""Markdown that reads well raw, survives odd characters, and the same page on a terminal."""

import io

import pytest

from reports.markdown import WIDTH, markdown, print_page, table_markdown
from reports.table import Bullets, Column, Heading, Paragraph, Table

TABLE = Table((Column("Row"), Column("Time", "ratio")), (("AWQ", 1.41), ("a longer name", 10.3)))


def test_columns_are_padded_to_one_width() -> None:
    assert table_markdown(TABLE).splitlines() == [
        "| Row           |   Time |",
        "| :------------ | -----: |",
        "| AWQ           |  x1.41 |",
        "| a longer name | x10.30 |",
    ]


def test_an_empty_table_still_has_its_header() -> None:
    assert table_markdown(Table(TABLE.columns, ())).splitlines() == ["| Row | Time |", "| :-- | ---: |"]


def test_what_would_end_a_cell_or_style_it_is_escaped() -> None:
    table = Table((Column("Reason"),), (("a|b\nc <d> *e* __init__",),))
    assert table_markdown(table).splitlines()[2] == r"| a\|b c \<d> \*e\* \_\_init\_\_ |"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[a](http://b)", r"\[a\](http\://b)"),
        ("![a](b)", r"!\[a\](b)"),
        ("www.b.c a@b.c", r"www\.b.c a\@b.c"),
        ("a`b", r"a\`b"),
        ("\x1b]8;;x\x07 \u202e", r"\\x1b\]8;;x\\x07 \\u202e"),
    ],
)
def test_a_name_makes_no_link_and_no_image_and_controls_nothing(text: str, shown: str) -> None:
    assert table_markdown(Table((Column("Row"),), ((text,),))).splitlines()[2].strip("| ") == shown


@pytest.mark.parametrize(("mark", "shown"), [("#", r"\#"), ("1.", r"1\."), ("-", r"\-"), (">", r"\>")])
def test_a_line_of_prose_begins_no_heading_and_no_list(mark: str, shown: str) -> None:
    first = "x" * (WIDTH - 3)
    assert markdown((Bullets((f"{first} {mark} b",)),)).splitlines()[1] == f"  {shown} b"


def test_a_terminal_is_given_no_control_characters() -> None:
    page = (Table((Column("Row"),), (("\x1b[2J\u202e",),)), Paragraph("\x9b2J"), Bullets(("\x07",)))
    file = io.StringIO()
    print_page(page, file=file, width=80)
    assert file.getvalue().replace("\n", "").isprintable()


def test_blocks_stand_apart_and_prose_is_wrapped() -> None:
    text = markdown((Heading("On cpu"), TABLE, Bullets(("one", "word " * 60)), Paragraph("long " * 60)))
    blocks = text.split("\n\n")
    assert blocks[0] == "### On cpu"
    assert blocks[1] == table_markdown(TABLE)
    assert blocks[2].splitlines()[:2][0] == "- one"
    assert all(line.startswith(("- ", "  ")) for line in blocks[2].splitlines())
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert text.endswith("long\n")


def shown(width: int) -> str:
    file = io.StringIO()
    page = (Heading("[bold]On cpu"), TABLE, Bullets(("[one]",)), Paragraph("some words"))
    print_page(page, file=file, width=width)
    return file.getvalue()


def test_a_terminal_shows_every_cell_and_takes_nothing_for_markup() -> None:
    text = shown(80)
    for words in ("[bold]On cpu", "AWQ", "a longer name", "x10.30", "- [one]", "some words"):
        assert words in text
    assert "|" not in text


def test_a_narrow_terminal_folds_and_cuts_nothing_off() -> None:
    text = shown(16)
    assert "…" not in text
    assert "x10.30" in text
    assert "alongername" in "".join(line[:8] for line in text.splitlines()).replace(" ", "")
