"""An engine whose model is called as transformers' are."""

from typing import Any


class TorchEngine:
    """bench.engines.protocol.Engine on a causal language model in torch."""

    def __init__(self, model: Any, version: str, computes: str) -> None:
        self.version, self.computes = version, computes
        self._model = model.eval()
        self._cache: Any = None
        self._token: Any = None

    def prefill(self, tokens: list[int]) -> None:
        import torch

        self._cache = None
        self._take(torch.tensor([tokens]), logits_to_keep=1)

    def step(self) -> None:
        self._take(self._token)

    def _take(self, ids: Any, **more: Any) -> None:
        import torch

        with torch.no_grad():
            out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **more)
        self._token, self._cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def log_probabilities(self, tokens: list[int]) -> Any:
        import torch

        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1].float()
        return torch.log_softmax(logits, -1).numpy()
