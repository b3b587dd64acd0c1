"""Record files that the tests of reports share."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from bench.records.record import Record
from bench.records.store import append

Write = Callable[[Iterable[Record]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write records to a folder's records.jsonl and return the folder."""

    def write_records(records: Iterable[Record]) -> Path:
        for record in records:
            append(tmp_path / "records.jsonl", record)
        return tmp_path

    return write_records
