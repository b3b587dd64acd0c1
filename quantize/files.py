"""Files that are there whole or not at all, and their hashes. Imports no torch."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from quantize.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


def write_whole(path: Path, content: bytes) -> None:
    """Write all of `content` to `path` or leave what was there. Raises UserError when it cannot be written."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file in it")
    try:
        replace_file(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another place") from None


def replace_file(path: Path, content: bytes) -> None:
    """Write all of `content` to `path` or leave what was there. Raises OSError when it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_working_folder(folder: Path, mark: str) -> None:
    """Remove a folder of an earlier run: empty, or with its `mark`, which goes last. Raises UserError for any other."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir() or (any(folder.iterdir()) and not (folder / mark).is_file()):
        raise UserError(f"{folder} is in the way, and is not of an earlier run: move it away")
    try:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != mark:
                path.unlink()
        (folder / mark).unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        raise UserError(f"cannot remove {folder} ({error.strerror}): remove it, or choose another --out") from None


@contextlib.contextmanager
def only_writer(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock file while the block runs. Raises UserError: `busy` while another process holds it."""
    from filelock import FileLock, Timeout  # slow, and no --help needs it

    held = FileLock(lock, timeout=0)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        raise UserError(busy) from None
    except OSError as error:
        raise UserError(f"cannot write {lock.parent} ({error.strerror}): choose another place") from None
    with contextlib.ExitStack() as after:
        after.callback(held.release)
        after.callback(lock.unlink, missing_ok=True)  # which goes first
        yield


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_hashes(files: Mapping[str, str]) -> str:
    """One hex SHA-256 for several files: over their sorted names and their own hashes."""
    lines = (f"{name} {sha256}\n" for name, sha256 in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space or quota; safetensors says so in words, not as an OSError."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return type(error).__name__ == "SafetensorError" and any(f"(os error {code})" in str(error) for code in FULL)
