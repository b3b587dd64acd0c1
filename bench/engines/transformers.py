"""transformers by itself, with whatever its environment has to read a checkpoint; and how a model of its kind runs."""

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from bench.engines.protocol import Asked
from quantize.decoding.eager import EagerDecoder


class TorchEngine:
    """bench.engines.protocol.Engine on a causal language model that is called as transformers' are."""

    def __init__(self, model: Any, version: str, computes: str) -> None:
        self.version, self.computes = version, computes
        self._model, self._decoder = model.eval(), EagerDecoder(model)

    @torch.no_grad()
    def prefill(self, tokens: list[int]) -> None:
        self._decoder.prefill(torch.tensor([tokens]))

    @torch.no_grad()
    def step(self) -> None:
        self._decoder.step()

    @torch.no_grad()
    def log_probabilities(self, tokens: list[int]) -> Any:
        logits = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1].float()
        return torch.log_softmax(logits, -1).numpy()


def start(asked: Asked) -> TorchEngine:
    from transformers import AutoModelForCausalLM

    how = {"dtype": getattr(torch, asked.dtype)}
    how |= {"gguf_file": "model.gguf"} if (Path(asked.folder) / "model.gguf").is_file() else {}
    model = AutoModelForCausalLM.from_pretrained(asked.folder, trust_remote_code=False, use_safetensors=True, **how)
    return TorchEngine(model, importlib.metadata.version("transformers"), asked.dtype)
