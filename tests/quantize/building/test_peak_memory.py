"""Memory holds one layer at a time: a model three times as deep needs no more of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantize.checkpoint import MANIFEST_NAME

ROOT = Path(__file__).parents[3]


DENSE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
}
EXPERTS = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
}
LAYER_BYTES = {"llama": 4 * (4 * 1024**2 + 3 * 1024 * 2816), "mixtral": 4 * (4 * 512**2 + 8 * 3 * 512 * 1408)}
"""The float32 weights of one layer."""


def peak_bytes(folder: Path, shape: dict[str, Any], layers: int) -> int:
    folder.mkdir()
    config = {**shape, "num_hidden_layers": layers, "vocab_size": 1024, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    options = "--variant awq-gemm --blocks 4 --block-tokens 128 --device cpu --rounding nearest"
    source, out = f"dummy:{folder / 'config.json'}", folder / "out"
    command = [sys.executable, "-m", "quantize", source, "--out", str(out), *options.split()]
    # With AMX oneDNN keeps a program for each number of tokens, and experts see many: they are not the layers' memory.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, env=environment)
    (manifest,) = out.glob(f"*/{MANIFEST_NAME}")
    measured: int = json.loads(manifest.read_text())["measured"]["peak_bytes"]
    return measured


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks come from Linux's /proc")
@pytest.mark.parametrize("shape", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_three_times_the_layers_need_little_more_memory(
    shape: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    shallow, deep = (peak_bytes(tmp_path / f"{layers}", shape, layers) for layers in (2, 6))
    print(f"{shape['model_type']}: {shallow / 1e6:.0f} MB with 2 layers, {deep / 1e6:.0f} MB with 6")
    assert deep < 1.1 * shallow
    assert 4 * LAYER_BYTES[shape["model_type"]] > 0.15 * shallow  # what four more layers would have added
