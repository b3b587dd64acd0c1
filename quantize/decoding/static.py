"""Decoding without Python in the way: a cache that stays in place, and on CUDA one step recorded and replayed.

On a fast GPU an eager step of one token waits for Python to launch some thousand kernels; a CUDA graph does it at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from quantize.decoding.eager import EagerDecoder
from quantize.decoding.fused import fused_steps, fused_write, llama_like, plain_norms
from quantize.errors import UserError
from quantize.kernels.triton import no_programs_reason

CUDA_GRAPH, STATIC_CACHE = "CUDA graph", "static cache"  # how steps of mode "graph" run: on CUDA, elsewhere
SLOTS_STEP = 64  # slots come in multiples of this: attention kernels want aligned masks, and pad others at every call
CAPTURE_WARMUPS = 3  # runs before the recorded one: libraries set themselves up, kernels are tuned outside the graph
CHECKED_STEPS = 4
RELATIVE_ERROR = {torch.float32: 2e-2, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""How far the logits may lie from the eager decoder's (2-norm of the difference over that of the eager ones): they add
up in different orders, 4e-7 apart in float32; bitsandbytes' 4-bit kernel for CPUs, bfloat16 inside, is 3e-3 apart."""

MASKED_ATTENTION = ("sdpa", "eager")  # the attention implementations of transformers that take a mask of ours


class _Slots(StaticLayer):  # type: ignore[misc]
    """Keys and values of one layer for a fixed number of positions, written at a position that lies on the device.

    transformers' own update computes the position anew in every layer; here all layers share one."""

    def __init__(self, like: Any, slots: int, position: Tensor, fused: bool) -> None:
        super().__init__(max_cache_len=slots)
        self.keys = like.keys.new_zeros((*like.keys.shape[:2], slots, like.keys.shape[-1]))
        self.values = like.values.new_zeros((*like.values.shape[:2], slots, like.values.shape[-1]))
        self.is_initialized = True
        self._position, self._fused = position.view(1), fused

    def take(self, layer: Any) -> None:
        """Copy what a prompt left in a growing cache's layer into the first slots."""
        tokens = layer.keys.shape[2]
        self.keys[:, :, :tokens].copy_(layer.keys)
        self.values[:, :, :tokens].copy_(layer.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._fused:
            fused_write(key_states, value_states, self._position, self.keys, self.values)
        else:
            self.keys.index_copy_(2, self._position, key_states)
            self.values.index_copy_(2, self._position, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Tensor:
        return self._position[0]


class StaticDecoder(EagerDecoder):
    """A decoder whose steps all run on the same memory, so that a CUDA graph can hold them.

    The prompt runs as in the eager decoder, and what it cached is copied into the slots. A step sees the slots up to
    its position through a mask; token, position and mask live on the device and are moved on by the step itself."""

    @torch.no_grad()
    def __init__(self, model: Any, *, batch: int, positions: int) -> None:
        """Make the cache for `batch` sequences of up to `positions` tokens, and on CUDA record a step.

        Raises UserError as `check_model` does, for caches of another kind, and for layers that wait for the host."""
        check_model(model, positions)
        device = next(model.parameters()).device
        super().__init__(model)
        fused = no_programs_reason(device) is None
        self._norms, self._rotary = (plain_norms(model), llama_like(model)) if fused else ([], [])
        self._position = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self.token = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        output = model(input_ids=self.token, use_cache=True)
        self.logits = output.logits[:, -1]
        slots = -(-positions // SLOTS_STEP) * SLOTS_STEP
        self._slots = torch.arange(slots, device=device)
        growing = getattr(output.past_key_values, "layers", ())
        if not growing or not all(isinstance(getattr(layer, "keys", None), Tensor) for layer in growing):
            raise UserError("mode graph knows caches of keys and values alone, this model keeps something else")
        self._cache = Cache(layers=[_Slots(layer, slots, self._position, fused) for layer in growing])
        # Added to the scores: attention would make such a mask of a boolean one anew in every layer.
        dtype = self._cache.layers[0].keys.dtype
        self._seen = torch.zeros((), dtype=dtype, device=device)
        self._unseen = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
        self._graph = self._record() if device.type == "cuda" else None
        self.name = STATIC_CACHE if self._graph is None else CUDA_GRAPH

    def prefill(self, prompt: Tensor) -> None:
        output = self._model(input_ids=prompt, use_cache=True, **self._last_only)
        for slots, layer in zip(self._cache.layers, output.past_key_values.layers, strict=True):
            slots.take(layer)
        self.logits = output.logits[:, -1]
        self.token.copy_(self.logits.argmax(dim=-1, keepdim=True))
        self._position.fill_(prompt.shape[1])

    def step(self) -> None:
        if self._graph is None:
            self.logits = self._run()
        else:
            self._graph.replay()
            self.logits = self._recorded_logits

    def _run(self) -> Tensor:
        """One step; everything that it reads and leaves is on the device."""
        with fused_steps(self._norms, self._rotary):
            return self._pass()

    def _pass(self) -> Tensor:
        mask = torch.where(self._slots <= self._position, self._seen, self._unseen).view(1, 1, 1, -1)
        mask = mask.expand(self.token.shape[0], -1, -1, -1)
        place = {"attention_mask": mask, "position_ids": self._position, "past_key_values": self._cache}
        output = self._model(input_ids=self.token, use_cache=True, **place)
        logits: Tensor = output.logits[:, -1]
        self.token.copy_(logits.argmax(dim=-1, keepdim=True))
        self._position.add_(1)
        return logits

    def _record(self) -> torch.cuda.CUDAGraph:
        warm_up(self._run)
        self._position.zero_()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._recorded_logits = self._run()
        except RuntimeError as error:
            cause = error.__context__ or error  # what failed first: ending the recording then fails as well
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            why = next(iter(str(cause).splitlines()), type(cause).__name__)
            raise UserError(f"a decode step cannot be recorded as a CUDA graph: {why}") from None
        return graph


def warm_up(work: Callable[[], object]) -> None:
    """Do it CAPTURE_WARMUPS times on a side stream, as torch's notes on CUDA graphs ask for before it is recorded."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(CAPTURE_WARMUPS):
            work()
    torch.cuda.current_stream().wait_stream(side)


def check_model(model: Any, positions: int) -> None:
    """Raises UserError, saying why, for a model that cannot decode on a static cache of so many positions."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise UserError(f"mode graph needs a model on one device, this one is spread over {len(devices)}")
    attention = model.config._attn_implementation
    if attention not in MASKED_ATTENTION:
        raise UserError(f"mode graph needs one of the attentions {', '.join(MASKED_ATTENTION)}, not {attention}")
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and positions > window:
        raise UserError(f"mode graph cannot slide a window: {positions} positions, the model attends to {window}")


@torch.no_grad()
def check_against_eager(decoder: EagerDecoder, model: Any, prompt: Tensor, steps: int, dtype: torch.dtype) -> None:
    """Run the prompt and up to CHECKED_STEPS steps eagerly, then in `decoder` with the same tokens fed to it.

    Raises RuntimeError where the logits lie further apart than RELATIVE_ERROR of the compute dtype allows."""
    eager = EagerDecoder(model)
    eager.prefill(prompt)
    fed, expected = [], []
    for _ in range(min(steps, CHECKED_STEPS)):
        fed.append(eager.token)
        eager.step()
        expected.append(eager.logits.float())
    del eager  # and its cache
    decoder.prefill(prompt)
    errors = []
    for token, logits in zip(fed, expected, strict=True):
        decoder.token.copy_(token)
        decoder.step()
        difference = torch.linalg.vector_norm(decoder.logits.float() - logits)
        errors.append(difference / torch.linalg.vector_norm(logits))
    worst, bound = float(torch.stack(errors).max()), RELATIVE_ERROR[dtype]
    if not worst <= bound:  # not a number is no agreement either
        raise RuntimeError(f"decoding on a {decoder.name} differs from eager decoding by {worst:.2g} (bound {bound:g})")
