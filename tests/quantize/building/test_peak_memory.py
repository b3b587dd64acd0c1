"""Memory holds one layer at a time: a model three times as deep needs no more of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.checkpoint import MANIFEST_NAME

ROOT = Path(__file__).parents[3]


def peak_bytes(folder: Path, layers: int) -> int:
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    options = "--variant awq-gemm --blocks 4 --block-tokens 128 --device cpu --rounding nearest"
    source, out = f"dummy:{folder / 'config.json'}", folder / "out"
    command = [sys.executable, "-m", "quantize", source, "--out", str(out), *options.split()]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (manifest,) = out.glob(f"*/{MANIFEST_NAME}")
    measured: int = json.loads(manifest.read_text())["measured"]["peak_bytes"]
    return measured


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks come from Linux's /proc")
def test_three_times_the_layers_need_little_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    shallow, deep = (peak_bytes(tmp_path / f"{layers}", layers) for layers in (2, 6))
    assert deep < 1.1 * shallow
    weights_bytes = 2 * 4 * (4 * 1024 * 1024 + 3 * 1024 * 2816)
    assert weights_bytes > 0.09 * shallow  # what four more layers would have added, had they stayed
