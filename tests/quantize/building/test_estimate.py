"""What a run is expected to take, against what it took."""

import dataclasses
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantize
from quantize.building.estimate import Estimate, layer_seconds, speeds
from quantize.building.job import BuildOptions
from quantize.checkpoint import open_checkpoint
from quantize.cli import main
from quantize.errors import UserError
from quantize.weights import open_weights

ROOT = Path(__file__).parents[3]

ENOUGH = Estimate(
    parameters=10**9,
    layers=10,
    peak_bytes=2 * 10**9,
    disk_bytes=10**9,
    seconds=300.0,
    free_memory_bytes=3 * 10**9,
    free_disk_bytes=2 * 10**9,
)


def test_what_is_there_is_enough_or_the_line_says_what_is_not() -> None:
    ENOUGH.check()
    with pytest.raises(UserError, match=r"2\.0 GB of memory, 1\.0 are free"):
        dataclasses.replace(ENOUGH, free_memory_bytes=10**9).check()
    with pytest.raises(UserError, match=r"1\.0 GB of disk, 0\.5 are free: choose another --out"):
        dataclasses.replace(ENOUGH, free_disk_bytes=5 * 10**8).check()


def test_the_line_names_everything() -> None:
    line = ENOUGH.line()
    for words in ("1.00 billion weights in 10 layers", "2.0 GB of memory (3.0 free)", "1.0 GB of disk", "5 min"):
        assert words in line


def test_seconds_grow_as_the_algebra_says() -> None:
    speed = (1e9, 1e5, 1e11, 1e11)
    small, wide = (layer_seconds([(64, 64)], [64], tokens, 1, speed) for tokens in (1000, 2000))
    assert wide < 2 * small  # the search does not see the tokens
    assert layer_seconds([(64, 64)] * 2, [64, 64], 1000, 1, speed) > 1.5 * small
    assert layer_seconds([(64, 64)], [64], 1000, 2, speed) > 1.5 * small
    assert layer_seconds([(64, 64)], [64], 1000, 1, tuple(2 * one for one in speed)) == pytest.approx(small / 2)
    assert min(speeds(torch.device("cpu"))) > 0


def test_a_dry_run_makes_nothing(capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
    assert main([str(tiny_llama), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert "of memory" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main([str(tiny_llama), "--dry-run", "--variant", "fp16", "--out", str(tmp_path / "out")]) == 0
    assert "nothing here needs calibration" in capsys.readouterr().out


def test_a_dry_run_adds_up_what_all_variants_will_write_but_not_what_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path
) -> None:
    def told() -> tuple[dict[str, float], float, float]:
        """GB by variant, in all, and at the worst moment."""
        monkeypatch.setattr(Estimate, "line", lambda self: f"{self.disk_bytes / 1e9} GB of disk")
        capsys.readouterr()
        assert main([str(tiny_llama), "--variant", "all", "--blocks", "2", "--dry-run", "--out", str(tmp_path)]) == 0
        worst, sizes = capsys.readouterr().out.splitlines()[-2:]
        in_all = re.search(r"to write, (\S+) GB in all", sizes)
        at_once = re.search(r"(\S+) GB of disk", worst)
        assert in_all
        assert at_once
        own = {name: float(size) for name, size in re.findall(r"(\S+) (\S+) GB(?:,| to)", sizes)}
        return own, float(in_all[1]), float(at_once[1])

    sizes, in_all, at_once = told()
    assert in_all < at_once < 2 * in_all
    assert list(sizes) == ["fp16", "bnb-8bit", "awq-gemm", "awq-gemv", "bnb-4bit"]
    assert in_all == pytest.approx(sum(sizes.values()), rel=0.02)
    options = BuildOptions(device="cpu", blocks=2)
    for item in quantize.quantize(str(tiny_llama), ["all"], tmp_path, options=options):
        manifest = item.checkpoint.manifest
        # GEMV's zeros are padded to eight groups, which counts in layers as narrow as these.
        assert sizes[manifest.variant] == pytest.approx(manifest.weights_bytes / 1e9, rel=0.12)
    shutil.rmtree(tmp_path / "tiny-llama-FP16")
    shutil.rmtree(tmp_path / "tiny-llama-BnB.4")
    assert list(told()[0]) == ["fp16", "bnb-4bit"]


def test_a_run_that_cannot_fit_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("quantize.building.estimate.free_memory", lambda device, already: 10**6)
    assert main([str(tiny_llama), "--variant", "awq-gemm", "--out", str(tmp_path), "--blocks", "2"]) == 2
    assert "of memory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def source_shapes(folder: Path) -> list[tuple[int, ...]]:
    weights = open_weights(folder)
    return [weights.shape(name) for name in weights.names()]


PROGRAM = """
import sys, quantize
from quantize.building.job import BuildOptions
quantize.quantize(sys.argv[1], ["awq-gemm"], sys.argv[2], options=BuildOptions(blocks=16, device="cpu"))
"""


def test_the_manifest_keeps_the_estimate_beside_what_was_measured(tiny_llama: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(tiny_llama), str(tmp_path)], cwd=ROOT, check=True)
    manifest = open_checkpoint(next(tmp_path.glob("*GEMM"))).manifest
    assert manifest.estimate is not None
    assert manifest.measured is not None
    assert manifest.estimate["layers"] == 2
    assert manifest.estimate["parameters"] == sum(map(math.prod, source_shapes(tiny_llama)))
    assert 0.7 < manifest.estimate["peak_bytes"] / manifest.measured["peak_bytes"] < 1.5


def test_older_manifests_without_an_estimate_still_open(tiny_llama: Path, tmp_path: Path) -> None:
    import json

    options = BuildOptions(device="cpu")
    (item,) = quantize.quantize(str(tiny_llama), ["fp16"], tmp_path, options=options)
    path = item.checkpoint.path / "quantable.json"
    data = json.loads(path.read_text())
    del data["estimate"], data["measured"]
    path.write_text(json.dumps(data))
    assert open_checkpoint(item.checkpoint.path).manifest.estimate is None
