"""What one run measures: prompt tokens in, new tokens out. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, get_args

from quantize.errors import UserError

Mode = Literal["eager", "graph", "compiled"]
"""How the decode steps run: "eager", from Python as `model.generate` does; "graph", on a static cache, which a CUDA
device replays as a CUDA graph (quantize.decoding.static); "compiled", on a static cache as well, one step compiled by
torch.compile, for a CPU (quantize.decoding.compiled). The prompt runs eagerly in all."""


@dataclass(frozen=True)
class Scenario:
    """A shape of work: `batch` prompts of `prompt_tokens` random tokens each, then `new_tokens` tokens each.

    The first new token comes out of the prefill; the other `new_tokens - 1` are decode steps of one token.

    name:          as the user and the tables call it.
    prompt_tokens: of one prompt, or the mean of `lengths`; new_tokens: of each prompt.
    batch:         prompts at once; seed: fixes the prompts' token ids; mode: how the decode steps run.
    lengths:       tokens of several prompts, which take turns in every pass, in place of one (`Scenario.over`)."""

    name: str
    prompt_tokens: int
    new_tokens: int
    batch: int = 1
    seed: int = 0
    lengths: tuple[int, ...] = ()
    mode: Mode = "eager"

    def __post_init__(self) -> None:
        for field in ("prompt_tokens", "new_tokens", "batch"):
            if getattr(self, field) < 1:
                raise UserError(f"scenario {self.name}: {field} must be at least 1")
        if self.mode not in get_args(Mode):
            raise UserError(f"scenario {self.name}: mode must be one of {', '.join(get_args(Mode))}")
        if self.mode != "eager" and self.new_tokens < 2:
            needed = f"mode {self.mode} needs new_tokens of at least 2, since it is of decoding"
            raise UserError(f"scenario {self.name}: {needed}")
        if self.lengths and min(self.lengths) < 1:
            raise UserError(f"scenario {self.name}: each of the lengths must be at least 1")
        if self.lengths and self.prompt_tokens != (mean := round(fmean(self.lengths))):
            raise UserError(f"scenario {self.name}: prompt_tokens must be the mean of its lengths, {mean}")

    @staticmethod
    def over(name: str, lengths: Sequence[int], new_tokens: int, **fields: Any) -> "Scenario":
        """A scenario over several prompt lengths. fields: batch, seed, mode."""
        if not lengths:
            raise UserError(f"scenario {name}: no prompt lengths")
        return Scenario(name, max(1, round(fmean(lengths))), new_tokens, lengths=tuple(lengths), **fields)

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt that a pass runs, in order."""
        return self.lengths or (self.prompt_tokens,)

    @property
    def pass_prompt_tokens(self) -> int:
        """Prompt tokens of a whole pass, over the batch and all lengths."""
        return self.batch * sum(self.prompt_lengths)

    @property
    def decode_steps(self) -> int:
        """How many of the new tokens are decoded one by one after each prefill."""
        return self.new_tokens - 1

    @property
    def is_plain(self) -> bool:
        """One prompt at a time, eagerly: what every engine does."""
        return self.batch == 1 and self.mode == "eager"

    @property
    def positions(self) -> int:
        """The most tokens that a model must be able to hold: the longest prompt and what is fed back after it."""
        return max(self.prompt_lengths) + self.decode_steps


SCENARIOS = {"published": Scenario("published", 1024, 1), "chat": Scenario("chat", 256, 64)}
"""By name: `published` is a pure prefill, as in the published table (its own lengths: bench.suite.prompts)."""


def scenario_named(name: str) -> Scenario:
    """The scenario of this name. Raises UserError for an unknown one, saying which exist."""
    if name not in SCENARIOS:
        raise UserError(f"unknown scenario {name!r}; there are: {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
