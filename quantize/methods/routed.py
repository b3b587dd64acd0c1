"""What the experts of a mixture see: each only the tokens that are sent to it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quantize.model.apart import experts_of
from quantize.rounding.gram import InputStats, StatsAccumulator

FEW_TOKENS = 256  # an expert that saw fewer is shown tokens of its peers as well, up to this many in all


class RoutedTokens:
    """Tokens that one module of experts was called with; its experts' statistics are made when they are asked for."""

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.experts = experts_of(module)
        self._gate = module._gate
        self._inputs: list[Tensor] = []  # [n, hidden] each
        self._chosen: list[Tensor] = []  # [n, k] experts' numbers each

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the module."""
        given = [*args, *kwargs.values()]
        hidden: Tensor = given[0]
        if len(given) > 1:
            self._inputs.append(hidden.float().reshape(-1, hidden.shape[-1]).clone())
            self._chosen.append(given[1].reshape(-1, given[1].shape[-1]).clone())
            return
        rows = hidden.float().view(len(self.experts), -1, hidden.shape[-1])
        used = rows.any(dim=-1)
        self._inputs.append(rows[used])
        self._chosen.append(used.nonzero()[:, :1])

    def tokens(self) -> list[int]:
        """How many each expert saw."""
        counts = [0] * len(self.experts)
        for chosen in self._chosen:
            found = torch.bincount(chosen.flatten(), minlength=len(counts)).tolist()
            counts = [count + more for count, more in zip(counts, found, strict=False)]
        return counts

    def stats(self) -> InputStats:
        """Of the inputs of all experts together."""
        up = self.experts[0].up_proj
        accumulator = StatsAccumulator(up.in_features, up.weight.device)
        for rows in self._inputs:
            accumulator.add(rows)
        return accumulator.finish()

    def scale(self, scales: Tensor) -> None:
        """Divide what was seen by scales [hidden], as the module before the experts now does."""
        for rows in self._inputs:
            rows.div_(scales)

    @torch.no_grad()
    def expert_stats(self, number: int) -> tuple[InputStats, InputStats]:
        """Of the inputs of one expert's gate and up layers, and of its down layer, as its weights are now."""
        expert = self.experts[number]
        down = expert.down_proj
        outer = StatsAccumulator(expert.up_proj.in_features, down.weight.device)
        inner = StatsAccumulator(down.in_features, down.weight.device)
        with down.register_forward_pre_hook(lambda module, args: inner.add(args[0])):
            for rows in self._seen_by(number):
                outer.add(rows)
                expert(rows, self._gate)
        return outer.finish(), inner.finish()

    def _seen_by(self, number: int) -> Iterator[Tensor]:
        seen = 0
        for rows, chosen in zip(self._inputs, self._chosen, strict=True):
            own = rows[(chosen == number).any(dim=-1)]
            seen += len(own)
            if len(own):
                yield own
        if seen < FEW_TOKENS and self._inputs:
            step = max(1, sum(map(len, self._inputs)) // (FEW_TOKENS - seen))
            yield torch.cat([rows[::step] for rows in self._inputs])[: FEW_TOKENS - seen]
