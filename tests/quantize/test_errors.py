"""What a user reads is one line that cannot write to the terminal."""

import pytest

from quantize.errors import UserError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Grüße, 模型", "plain, Grüße, 模型"),
        ("a\nb\tc", "a b c"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("evil\u202egnp", "evil\\u202egnp"),
        ("\x9b31m\u200b", "\\x9b31m\\u200b"),
        ("bytes \udcff", "bytes \\udcff"),
    ],
)
def test_unseen_characters_are_escaped(text: str, shown: str) -> None:
    assert str(UserError(text)) == shown
