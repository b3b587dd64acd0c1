"""Memory holds one layer at a time: a model twice as deep needs no more of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUANTIZE = """
import sys
import quantize
from quantize.build import BuildOptions
from quantize.footprint import peak_resident_bytes

options = BuildOptions(blocks=4, block_tokens=128, device="cpu", rounding="nearest")
quantize.quantize(f"dummy:{sys.argv[1]}", ["awq-gemm"], sys.argv[2], options=options)
print(peak_resident_bytes())
"""


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
    command = [sys.executable, "-c", QUANTIZE, str(folder / "config.json"), str(folder / "out")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(ran.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks come from Linux's /proc")
def test_twice_the_layers_need_little_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    shallow = peak_bytes(tmp_path / "shallow", 4)
    # The C library's free lists make peaks differ between runs; what a layer leaves behind would be in each.
    deep = min(peak_bytes(tmp_path / f"deep-{attempt}", 8) for attempt in range(2))
    assert deep < 1.15 * shallow
    weights_bytes = 2 * 4 * (4 * 1024 * 1024 + 3 * 1024 * 2816)
    assert weights_bytes > 0.09 * shallow  # what four more layers would have added, had they stayed
