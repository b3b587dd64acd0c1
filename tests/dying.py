"""A process that dies at its n-th file operation, without a process: every later operation fails as well."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

OPERATIONS = ("rename", "replace", "link", "fsync", "mkdir", "unlink", "rmdir")
"""Functions of `os` that change what is on the disk; pathlib, shutil and tempfile call them too."""


class Died(BaseException):
    """The process is dead: no handler of errors runs."""


@contextmanager
def dying_at(number: int) -> Iterator[Callable[[], int]]:
    """Inside, file operation `number` (from 0) and all after it raise Died. Yields how many were asked for so far."""
    asked = 0

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked > number:
                raise Died
            return operation(*arguments, **named)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, dying(getattr(os, name)))
        yield lambda: asked


def every_death(attempt: Callable[[], object]) -> Iterator[int]:
    """Run `attempt` dying at operation 0, 1, 2, ...; yields after each death, and ends when an attempt finishes."""
    number = 0
    while True:
        try:
            with dying_at(number):
                attempt()
        except Died:
            yield number
            number += 1
        else:
            return
