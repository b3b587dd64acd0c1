"""Sizes and shares as a user writes them."""

import pytest

from quantize.errors import UserError
from quantize.units import parse_bytes, parse_share


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6 * 10**9),
        ("6 gb", 6 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("800MB", 8 * 10**8),
        ("8e9", 8 * 10**9),
        ("1700B", 1700),
    ],
)
def test_a_size_is_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "6", "24", "-6GB", "6XB", "6G", "nan", "8e99", "6GB 7", "٦GB"])
def test_what_is_no_size_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="is no size: write 6GB"):
        parse_bytes(text)


def test_a_share_is_a_percentage_or_a_fraction() -> None:
    assert [parse_share(text) for text in ("5%", "0.05", "0", "150%")] == [0.05, 0.05, 0.0, 1.5]
    for text in ("5", "", "%", "-1%", "x", "1"):
        with pytest.raises(UserError, match=r"is no share: write 5% or 0.05"):
            parse_share(text)
