"""The one error that is the user's to fix."""


class UserError(Exception):
    """Bad input or a bad environment, with a message of one line that says what to do next.

    The commands print it as `error: MESSAGE` and exit with code 2. Any other exception is our bug, with a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text as one line that a terminal can be given: control, bidi and other unseen characters are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
