"""Runs killed at random moments go on to the same bytes."""

import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quantize
from quantize.building.job import BuildOptions
from quantize.building.layer import is_spilled
from quantize.checkpoint import find_checkpoints, verify

ROOT = Path(__file__).parents[3]
VARIANTS = ["awq-gemm", "awq-gemv", "bnb-4bit"]
OPTIONS = BuildOptions(blocks=4, block_tokens=64, device="cpu")

KILLED = """
import os, sys, threading
import quantize
from quantize.building.job import BuildOptions
source, out, layer, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
timer = threading.Timer(seconds, os.kill, (os.getpid(), 9))
def begin(what, done, total):
    if what == "layers" and done == layer:
        timer.start()
options = BuildOptions(blocks=4, block_tokens=64, device="cpu")
quantize.quantize(source, ["awq-gemm", "awq-gemv", "bnb-4bit"], out, options=options, progress=begin)
os._exit(0)
"""


@pytest.fixture(scope="module")
def eight_layers(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of eight layers, so that a random moment falls between two of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("eight") / "eight-layers"
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama / name).read_bytes())
    return folder


def hashes(out: Path) -> dict[str, str]:
    return {checkpoint.manifest.name: checkpoint.content_sha256 for checkpoint in find_checkpoints(out)}


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_files_are_those_of_the_unbroken_run(
    eight_layers: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    began: list[float] = []

    def note(what: str, done: int, total: int) -> None:
        if what == "layers" and done == 1:
            began.append(time.perf_counter())

    quantize.quantize(str(eight_layers), VARIANTS, whole, options=OPTIONS, progress=note)
    took_s = time.perf_counter() - began[0]
    expected = hashes(whole)
    assert len(expected) == 3
    moments = random.Random(7)
    resumed = 0
    for number in range(10):
        out = tmp_path / str(number)
        layer = int(number < 8)  # libraries load while the first layer runs: only two moments from its beginning on
        seconds = moments.uniform(0, took_s)
        subprocess.run(
            [sys.executable, "-c", KILLED, str(eight_layers), str(out), str(layer), str(seconds)], cwd=ROOT, check=False
        )
        for checkpoint in find_checkpoints(out) if out.exists() and any(out.glob("*/quantable.json")) else []:
            verify(checkpoint)
        said: list[str] = []
        quantize.quantize(str(eight_layers), VARIANTS, out, options=OPTIONS, say=said.append)
        resumed += any("going on" in line for line in said)
        assert hashes(out) == expected, f"killed after {seconds} s"
        assert sorted(path.name for path in out.iterdir()) == sorted(expected)
    assert resumed >= 3  # else no moment fell into the layers, and the test shows nothing


def test_activations_in_files_give_the_same_files(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize.quantize(str(tiny_llama), VARIANTS, tmp_path / "memory", options=OPTIONS)
    seen: list[bool] = []

    def note(*arguments: Any) -> bool:
        seen.append(is_spilled(*arguments))
        return seen[-1]

    monkeypatch.setattr("quantize.building.layer.is_spilled", note)
    quantize.quantize(str(tiny_llama), VARIANTS, tmp_path / "files", options=replace(OPTIONS, spill=True))
    assert seen
    assert all(seen)
    assert hashes(tmp_path / "memory") == hashes(tmp_path / "files")
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == sorted(
        path.name for path in (tmp_path / "memory").iterdir()
    )
