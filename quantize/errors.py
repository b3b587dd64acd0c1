"""The one error that is the user's to fix."""


class UserError(Exception):
    """Bad input or a bad environment, with a message of one line that says what to do next.

    The commands print it as `error: MESSAGE` and exit with code 2. Any other exception is a bug of ours and
    keeps its traceback.
    """
