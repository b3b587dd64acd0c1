"""A prompt and the tokens after it, step by step, as the model itself does it."""

from inspect import signature
from typing import Any

from torch import Tensor


class EagerDecoder:
    """Greedy decoding of a batch on a loaded model: a prompt, then one token a step, always the likeliest.

    Calls the model as `model.generate` does without a stop token, and does no more; of the prompt only the last
    position's logits are computed where the model can do that.

    name:   how the steps run, as records and tables say it.
    logits: [batch, vocabulary] behind the last prompt or step; a later step may overwrite them in place.
    token:  [batch, 1], the likeliest; the next step feeds it. A caller may write others into it.
    compile_s: seconds that compiling a step took, None where none is compiled."""

    name = "eager"
    logits: Tensor
    token: Tensor
    compile_s: float | None = None

    def __init__(self, model: Any) -> None:
        self._model = model
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        self._cache: Any = None

    def prefill(self, prompt: Tensor) -> None:
        """Run prompts [batch, tokens] into an empty cache and take the first new token of each."""
        self._cache = None  # given back first: two caches at once would count in the peak
        self._take(self._model(input_ids=prompt, use_cache=True, **self._last_only))

    def step(self) -> None:
        self._take(self._model(input_ids=self.token, past_key_values=self._cache, use_cache=True))

    def _take(self, output: Any) -> None:
        self.logits = output.logits[:, -1]
        self.token = self.logits.argmax(dim=-1, keepdim=True)
        self._cache = output.past_key_values

    def cache_bytes(self) -> int | None:
        """Bytes of keys and values that the cache holds now; None where that cannot be told."""
        layers = getattr(self._cache, "layers", [])
        found = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        return sum(tensor.nbytes for tensor in found if isinstance(tensor, Tensor)) or None
