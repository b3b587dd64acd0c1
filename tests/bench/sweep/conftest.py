"""Tiny models to sweep, and the words that make and measure them quickly."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SMALL = ["--variant", "fp16,awq-gemm", "--device", "cpu"]
SMALL += ["--quantize", "--rounding nearest --blocks 2 --block-tokens 64"]
SMALL += ["--bench", "--rounds 2 --max-time 1e-3 --prompt 8 --new 2 --no-quality --threads 1"]


@pytest.fixture
def tiny_models(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three, each with weights of its own."""
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path / "cache"))
    folders = []
    for number in range(3):
        folder = Path(shutil.copytree(tiny_llama, tmp_path / "models" / f"model-{number}"))
        weights = load_file(folder / "model.safetensors")
        torch.manual_seed(number)
        save_file({name: torch.randn_like(one) / 20 for name, one in weights.items()}, folder / "model.safetensors")
        folders.append(folder)
    return folders


def break_weights(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
