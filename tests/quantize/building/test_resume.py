"""Runs that die go on to the same bytes."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import quantize
from quantize.building.job import BuildOptions
from quantize.checkpoint import find_checkpoints, verify
from quantize.methods.quantized_run import replace_batch
from tests.dying import every_death

ROOT = Path(__file__).parents[3]
VARIANTS = ["awq-gemm", "awq-gemv", "bnb-4bit"]
OPTIONS = BuildOptions(blocks=4, block_tokens=64, device="cpu")

KILLED = """
import os, sys
import quantize
from quantize.building.job import BuildOptions
from quantize.progress import Progress
def die(progress):
    if "joining" in progress.doing:
        os.kill(os.getpid(), 9)
options = BuildOptions(blocks=4, block_tokens=64, device="cpu")
quantize.quantize(sys.argv[1], ["awq-gemm", "awq-gemv", "bnb-4bit"], sys.argv[2],
    options=options, progress=Progress(changed=die))
"""


def hashes(out: Path) -> dict[str, str]:
    found = find_checkpoints(out) if any(out.glob("[!.]*/quantable.json")) else []
    return {checkpoint.manifest.name: checkpoint.content_sha256 for checkpoint in found}


@pytest.mark.parametrize("force", [False, True])
def test_dead_at_every_file_operation_the_files_are_those_of_the_unbroken_run(
    force: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    options, variants = replace(OPTIONS, blocks=1, block_tokens=16, rounding="nearest"), ["awq-gemm", "bnb-8bit"]
    quantize.quantize(str(tiny_llama), variants, tmp_path / "whole", options=options)
    expected, out = hashes(tmp_path / "whole"), tmp_path / "killed"
    if force:
        shutil.copytree(tmp_path / "whole", out)
    options = replace(options, force=force)
    said: list[str] = []
    deaths = 0
    for _ in every_death(lambda: quantize.quantize(str(tiny_llama), variants, out, options=options, say=said.append)):
        deaths += 1
        for checkpoint in find_checkpoints(out) if hashes(out) else []:
            verify(checkpoint)
        assert hashes(out).items() <= expected.items()
    assert deaths > len(expected)
    assert any("going on" in line for line in said)
    assert hashes(out) == expected
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)


def test_a_killed_process_goes_on_to_the_same_files(tiny_llama: Path, tmp_path: Path) -> None:
    quantize.quantize(str(tiny_llama), VARIANTS, tmp_path / "whole", options=OPTIONS)
    expected, out = hashes(tmp_path / "whole"), tmp_path / "killed"
    ran = subprocess.run([sys.executable, "-c", KILLED, str(tiny_llama), str(out)], cwd=ROOT, check=False)
    assert ran.returncode == -signal.SIGKILL
    said: list[str] = []
    quantize.quantize(str(tiny_llama), VARIANTS, out, options=OPTIONS, say=said.append)
    assert any("going on" in line for line in said)
    assert hashes(out) == expected
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)


def test_activations_in_files_give_the_same_files(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize.quantize(str(tiny_llama), VARIANTS, tmp_path / "memory", options=OPTIONS)
    seen: list[bool] = []

    def note(hidden: list[Any], position: int, output: Any) -> None:
        replace_batch(hidden, position, output)
        seen.append(hidden[position].untyped_storage().filename is not None)

    monkeypatch.setattr("quantize.building.stream.replace_batch", note)
    monkeypatch.setattr("quantize.methods.quantized_run.replace_batch", note)
    quantize.quantize(str(tiny_llama), VARIANTS, tmp_path / "files", options=replace(OPTIONS, spill=True))
    assert seen
    assert all(seen)
    assert hashes(tmp_path / "memory") == hashes(tmp_path / "files")
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == sorted(
        path.name for path in (tmp_path / "memory").iterdir()
    )
