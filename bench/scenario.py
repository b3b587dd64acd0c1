"""What one run measures: prompt tokens in, new tokens out. Imports no torch."""

from dataclasses import asdict, dataclass
from typing import Any

from quantize.errors import UserError


@dataclass(frozen=True)
class Scenario:
    """A shape of work: `batch` prompts of `prompt_tokens` random tokens each, then `new_tokens` tokens each.

    The first new token comes out of the prefill; the other `new_tokens - 1` are decode steps of one token.
    `seed` fixes the prompt's token ids.
    """

    name: str
    prompt_tokens: int
    new_tokens: int
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("prompt_tokens", "new_tokens", "batch"):
            if getattr(self, field) < 1:
                raise UserError(f"scenario {self.name}: {field} must be at least 1")

    @property
    def decode_steps(self) -> int:
        """How many of the new tokens are decoded one by one after the prefill."""
        return self.new_tokens - 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Scenario":
        return Scenario(**data)


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("published", prompt_tokens=1024, new_tokens=1),
        Scenario("chat", prompt_tokens=256, new_tokens=64),
    )
}
"""The named scenarios: `published` is a pure prefill, as in the published table; `chat` has both phases."""


def scenario_named(name: str) -> Scenario:
    """The scenario of this name. Raises UserError for an unknown one, saying which exist."""
    if name not in SCENARIOS:
        raise UserError(f"unknown scenario {name!r}; there are: {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
