"""Runs killed at random moments, and memory that does not grow with the number of layers."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantize
from quantize.build import BuildOptions
from quantize.checkpoint import find_checkpoints, open_checkpoint, verify

ROOT = Path(__file__).parents[2]
VARIANTS = ["awq-gemm", "awq-gemv", "bnb-4bit"]
OPTIONS = BuildOptions(blocks=4, block_tokens=64, device="cpu")

KILLED = """
import os, sys, threading, time
import quantize, quantize.build
from quantize.build import BuildOptions
source, out, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
threading.Timer(seconds, os.kill, (os.getpid(), 9)).start()
options = BuildOptions(blocks=4, block_tokens=64, device="cpu")
quantize.quantize(source, ["awq-gemm", "awq-gemv", "bnb-4bit"], out, options=options)
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
    quantize.quantize(str(eight_layers), VARIANTS, whole, options=OPTIONS)
    expected = hashes(whole)
    assert len(expected) == 3
    moments = random.Random(7)
    resumed = 0
    for number in range(10):
        out = tmp_path / str(number)
        seconds = moments.uniform(0.05, 6.0)
        subprocess.run([sys.executable, "-c", KILLED, str(eight_layers), str(out), str(seconds)], cwd=ROOT, check=False)
        for checkpoint in find_checkpoints(out) if out.exists() and any(out.glob("*/quantable.json")) else []:
            verify(checkpoint)
        said: list[str] = []
        quantize.quantize(str(eight_layers), VARIANTS, out, options=OPTIONS, say=said.append)
        resumed += any("going on" in line for line in said)
        assert hashes(out) == expected, f"killed after {seconds} s"
        assert sorted(path.name for path in out.iterdir()) == sorted(expected)
    assert resumed >= 1  # else no moment fell into the layers, and the test shows nothing


MEASURED = """
import sys
import quantize
from quantize.build import BuildOptions
options = BuildOptions(blocks=2, block_tokens=64, device="cpu", rounding="nearest")
quantize.quantize(sys.argv[1], ["awq-gemm"], sys.argv[2], options=options)
"""


@pytest.mark.slow
def test_twice_the_layers_take_the_same_memory(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    peaks = []
    for layers in (5, 10):
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
        folder = tmp_path / f"layers{layers}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        out = tmp_path / f"out{layers}"
        source = f"dummy:{folder / 'config.json'}"
        subprocess.run([sys.executable, "-c", MEASURED, source, str(out)], cwd=ROOT, check=True)
        manifest = open_checkpoint(next(out.glob("*GEMM"))).manifest
        assert manifest.measured is not None
        peaks.append(manifest.measured["peak_bytes"])
    layer_bytes = 4 * (2 * 1024**2 + 2 * 1024 * 256 + 3 * 1024 * 2816)
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] - peaks[0] < 2 * layer_bytes  # five more layers held in memory would be five times that
