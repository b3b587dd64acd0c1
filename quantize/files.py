"""Files that are there whole or not at all."""

import contextlib
import os
from pathlib import Path

from quantize.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Write all of `content` to `path` or leave what was there. Raises UserError when it cannot be written."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file in it")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
