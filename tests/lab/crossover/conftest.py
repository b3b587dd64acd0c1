"""A crossover that the tests of its page and its plot share."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.builder import ENVIRONMENT
from tests.lab.crossover.crossings import DECODE_BATCHES, PROMPT_TOKENS
from tests.lab.records import CrossoverEntry, Style


@pytest.fixture
def crossover() -> list[CrossoverEntry]:
    """A layer on a GPU: FP16 flat up to 256 tokens, `gemm` half of it up to 64 tokens and then twice it, `gemv` a
    quarter of it a token. `gemm` and FP16 cross over at 64 * 2 ** (1 / 2) tokens, `gemv` and FP16 at 4.
    """
    blank = CrossoverEntry(
        shape="mistral-7b",
        linears=(("self_attn.q_proj", 4096, 4096), ("mlp.down_proj", 4096, 14336)),
        group_size=128,
        device="cuda",
        compute_dtype="float16",
        contender="",
        style="dense",
        tokens=None,
        measured_at="2025-03-01T12:00:00Z",
        environment=replace(ENVIRONMENT, gpu="GPU 9"),
        reason="not measured",
    )
    contenders: dict[str, tuple[Style, Callable[[int], float]]] = {
        "FP16": ("dense", lambda tokens: 1e-4 * max(1.0, tokens / 256)),
        "gemm": ("GEMM", lambda tokens: 1e-4 * (0.5 if tokens <= 64 else 1.0 * max(2.0, tokens / 128))),
        "gemv": ("GEMV", lambda tokens: 1e-4 * tokens / 4),
    }
    entries = [replace(blank, contender="compiled", style="GEMV", reason="needs the package compiled")]
    for tokens in (*DECODE_BATCHES, *PROMPT_TOKENS):
        for name, (style, seconds_of) in contenders.items():
            seconds = (seconds_of(tokens),) * 5
            timed = replace(blank, contender=name, style=style, tokens=tokens, seconds=seconds, reason=None)
            entries.append(replace(timed, kernel=f"{name} kernel", mode="CUDA graph", copies=1))
    wrong = replace(blank, contender="broken", style="GEMM", tokens=1, kernel="broken kernel", reason="wrong: off by 1")
    return [*entries, wrong, replace(wrong, tokens=2)]
