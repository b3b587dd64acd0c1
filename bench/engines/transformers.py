"""transformers by itself, with whatever its environment has to read a checkpoint; and how a model of its kind runs."""

import importlib.metadata
import sys
from typing import Any

import torch

from bench.engines.protocol import serve


class TorchEngine:
    """bench.engines.protocol.Engine on a causal language model that is called as transformers' are."""

    def __init__(self, model: Any, version: str, computes: str) -> None:
        self.version, self.computes = version, computes
        self._model = model.eval()
        self._cache: Any = None
        self._token: Any = None

    def prefill(self, tokens: list[int]) -> None:
        self._cache = None
        self._take(torch.tensor([tokens]), logits_to_keep=1)

    def step(self) -> None:
        self._take(self._token)

    def _take(self, ids: Any, **more: Any) -> None:
        with torch.no_grad():
            out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **more)
        self._token, self._cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def log_probabilities(self, tokens: list[int]) -> Any:
        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1].float()
        return torch.log_softmax(logits, -1).numpy()


def start(folder: str, dtype: str, positions: int) -> TorchEngine:
    """bench.engines.protocol.Start."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True
    )
    return TorchEngine(model, importlib.metadata.version("transformers"), dtype)


if __name__ == "__main__":
    sys.exit(serve(start))
