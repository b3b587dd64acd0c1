"""Models that several tests share: a tiny random one and the embedded one. Torch is imported late."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"

if TYPE_CHECKING:
    from quantize.source import Source
    from tests.builder import Builder

ROOT = Path(__file__).resolve().parents[1]
END = "<|end|>"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest first: the others go beside it."""
    items.sort(key=lambda item: item.path.name != "test_peak_memory.py")


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    """A shell that starts the tests in the background has them ignore Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def new_builder() -> "type[Builder]":
    """For tests with several base models, machines or devices."""
    from tests.builder import Builder

    return Builder


@pytest.fixture
def builder(new_builder: "type[Builder]") -> "Builder":
    return new_builder()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (float16, 2 layers, tied embeddings) and a working byte-level tokenizer.

    Every width is a multiple of 128, so each group size fits. Read it; copy it before changing anything.
    """
    import torch

    from quantize.calibration import builtin_texts
    from quantize.quiet import quiet_libraries

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    with quiet_libraries():
        from tokenizers import ByteLevelBPETokenizer
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        trained = ByteLevelBPETokenizer()
        texts = builtin_texts("calibration")[:8]
        trained.train_from_iterator(texts, vocab_size=512, special_tokens=[END], show_progress=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END, pad_token=END)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedded_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this test run's own, for QUANTABLE_CACHE; the workers of one run share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def embedded(embedded_cache: Path) -> "Source":
    """The embedded model, unpacked once a test run (half a minute); its tests are marked slow.

    It is unpacked in a process of its own, as a user would, which must not print a word.
    """
    from quantize.source import open_source

    program = "from quantize.source import open_source; open_source('smollm2-135m')"
    environment = {**os.environ, "QUANTABLE_CACHE": str(embedded_cache)}
    command = [sys.executable, "-c", program]
    with FileLock(embedded_cache.with_suffix(".lock")):
        ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTABLE_CACHE", str(embedded_cache))
        return open_source("smollm2-135m")


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What recording a CUDA graph asks of CUDA, without CUDA; a test puts its own torch.cuda.CUDAGraph in."""
    import torch

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    return monkeypatch
