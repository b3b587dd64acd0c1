import getpass
import json
import os
import platform
import socket
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.records.environment import LIBRARIES
from bench.worker.machine import (
    COPY_BYTES,
    copy_probe,
    cpu_compute_dtype,
    cpu_model_name,
    fingerprint,
    matmul_probe,
    source_state,
)
from quantize.versions import version_of


def test_the_fingerprint_names_machine_libraries_and_source() -> None:
    found = fingerprint("cpu")
    assert found.cpu == cpu_model_name()
    assert found.cpu_cores == len(os.sched_getaffinity(0))
    assert found.torch_threads == torch.get_num_threads()
    assert (found.ram_bytes or 0) > 2**28
    assert found.python == platform.python_version()
    assert set(found.libraries) == set(LIBRARIES)
    assert found.libraries["torch"] == torch.__version__
    assert (found.gpu, found.gpu_memory_bytes, found.gpu_driver, found.cuda) == (None,) * 4


@pytest.mark.parametrize("driver", ["570.1", None])
def test_a_gpus_fingerprint_is_what_torch_and_nvml_say(driver: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    card, asked = SimpleNamespace(name="Card 9000", total_memory=80, uuid="1234"), list[str | None]()

    def open_nvml(uuid: str | None) -> Any:
        asked.append(uuid)
        return SimpleNamespace(driver=lambda: driver) if driver else None

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr("bench.worker.machine.open_nvml", open_nvml)
    found = fingerprint("cuda")
    assert asked == ["1234"]
    assert (found.gpu, found.gpu_memory_bytes, found.gpu_driver) == ("Card 9000", 80, driver)
    assert found.cuda == torch.version.cuda


def test_the_fingerprint_holds_neither_names_nor_paths() -> None:
    text = json.dumps(asdict(fingerprint("cpu")))
    assert socket.gethostname() not in text
    assert f'"{getpass.getuser()}"' not in text
    assert str(Path.cwd()) not in text


def test_a_library_that_is_not_there_is_none() -> None:
    assert version_of("no-such-distribution") is None


class Ticking:
    """A clock on which the n-th piece of work takes n seconds."""

    def __init__(self) -> None:
        self.marks = 0

    def settle(self) -> None:
        pass

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def intervals_s(self, marks: list[int]) -> list[float]:
        return [float(mark) for mark in marks[:-1]]


def test_a_copy_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.worker.machine.clock_for", lambda device_type: Ticking())
    monkeypatch.setitem(COPY_BYTES, "cpu", 4096)
    assert copy_probe("cpu", repeats=5) == 2 * 4096 / 3.0


def test_a_gpu_without_room_for_the_copy_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * COPY_BYTES["cuda"], 80 * 2**30))
    assert copy_probe("cuda") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpus_memory_is_faster_than_a_bus_and_slower_than_its_caches() -> None:
    measured = copy_probe("cuda")
    assert measured is not None
    assert 3e10 < measured < 2e13


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    clean = source_state(tmp_path)
    assert (clean.commit, clean.dirty) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "file").write_text("two")
    assert source_state(tmp_path).dirty is True


def test_a_folder_inside_someone_elses_tree_has_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    inside = tmp_path / "inside"
    inside.mkdir()
    state = source_state(inside)
    assert (state.commit, state.dirty) == (None, None)


def test_a_tree_without_a_commit_is_unknown(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    state = source_state(tmp_path)
    assert (state.commit, state.dirty) == (None, None)


@pytest.mark.parametrize(
    ("bfloat16_s", "dtype"),
    [(0.2, "bfloat16"), (0.79, "bfloat16"), (0.9, "float32"), (1.0, "float32"), (6.0, "float32")],
)
def test_bfloat16_is_taken_only_where_it_is_clearly_faster(bfloat16_s: float, dtype: str) -> None:
    assert cpu_compute_dtype({"float32": 1.0, "bfloat16": bfloat16_s}) == dtype


def test_the_probe_times_both_dtypes() -> None:
    seconds = matmul_probe(repeats=1)
    assert set(seconds) == {"float32", "bfloat16"}
    assert min(seconds.values()) > 0
