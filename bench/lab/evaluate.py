"""Evaluates packed 4-bit layers by what the model predicts with them, on two kinds of held-out text."""

import importlib.metadata
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.records.lab import RaceRecord, TextFacts
from bench.worker.machine import fingerprint
from bench.worker.quality import divergences, perplexity
from quantize.calibration import PARAGRAPH, blocks_sha256, builtin_texts, text_from, token_blocks, unseen_paragraphs
from quantize.int4.packing import unpack_gemm
from quantize.model.pretrained import model_of, tokenizer_of
from quantize.source import open_source

EVALUATION_BLOCKS = {"blocks": 8, "block_tokens": 512}


def licence_texts() -> list[str]:
    """The licence files of the installed packages, each paragraph once: English that is no documentation."""
    files = [
        Path(str(file.locate()))
        for distribution in sorted(importlib.metadata.distributions(), key=lambda one: one.name.lower())
        for file in sorted(distribution.files or [], key=str)
        if file.suffix in ("", ".txt", ".md", ".rst") and "licens" in file.name.lower()
    ]
    seen: set[str] = set()
    found = [path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file()]
    return [text for one in found if (text := PARAGRAPH.join(unseen_paragraphs(one, seen)))]


@dataclass(frozen=True)
class Evaluation:
    """The reference model in float32, the calibration tokens that all contenders get, and the texts to evaluate on.

    folder:    the reference's.
    reference: the model.
    blocks:    calibration token ids, int64 [blocks, tokens].
    texts:     "calibration" (held-out text of the calibration's kind) and "other", token ids [blocks, tokens].
    """

    folder: Path
    reference: Any
    blocks: Tensor
    texts: dict[str, Tensor]

    @staticmethod
    def prepare(source: str, blocks: int, block_tokens: int, other: Path | None) -> "Evaluation":
        """Open the source, load the reference, tokenise the texts."""
        folder = open_source(source).folder
        tokenizer = tokenizer_of(folder)
        texts = {
            "calibration": builtin_texts("evaluation"),
            "other": text_from(str(other)) if other is not None else licence_texts(),
        }
        return Evaluation(
            folder,
            model_of(folder, dtype=torch.float32),
            token_blocks(builtin_texts("calibration"), tokenizer, blocks=blocks, block_tokens=block_tokens),
            {kind: token_blocks(text, tokenizer, **EVALUATION_BLOCKS) for kind, text in texts.items()},
        )

    def figures(self, layers: Path, group_size: int) -> dict[str, Any]:
        """`perplexity` and `divergence` (mean KL, nats a token) of the model with these layers, on each text."""
        model = model_of(self.folder, dtype=torch.float32)
        put_layers(model, load_file(layers), group_size)
        means = {kind: float(divergences(self.reference, model, text).mean()) for kind, text in self.texts.items()}
        return {"perplexity": {kind: perplexity(model, text) for kind, text in self.texts.items()}, "divergence": means}

    def record(self, contender: str) -> RaceRecord:
        """What is raced, without the contender's figures."""
        return RaceRecord(
            when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            contender=contender,
            model=self.folder.name,
            blocks=tuple(self.blocks.shape),
            blocks_sha256=blocks_sha256(self.blocks),
            texts={kind: TextFacts(tuple(t.shape), blocks_sha256(t)) for kind, t in self.texts.items()},
            environment=fingerprint("cpu"),
        )


@torch.no_grad()
def put_layers(model: Any, tensors: dict[str, Tensor], group_size: int) -> None:
    """Overwrite a dense model's weights with packed layers (GEMM layout) and the other tensors, dequantized exactly."""
    parameters = dict(model.named_parameters())
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        packed = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
        weight = unpack_gemm(packed, packed["qweight"].shape[0], group_size)
        parameters[f"{name}.weight"].copy_(weight.dequantize())
    for name, tensor in tensors.items():
        if name in parameters:
            parameters[name].copy_(tensor)
