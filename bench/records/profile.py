"""What `quantable profile` leaves: where the time of a prompt and of a decode step goes. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from bench.records.environment import Environment
from bench.records.record import Kernels
from bench.records.scenario import Scenario
from quantize.schema import Seconds


@dataclass(frozen=True)
class Operation:
    """Kernels on a GPU, torch's operations on a CPU. name: all of this name; calls, seconds: of a pass."""

    name: str
    calls: float
    seconds: Annotated[float, Meta(ge=0, le=1e9)]


@dataclass(frozen=True)
class ProfileRecord:
    """Where the time of one phase goes (bench.profile).

    source:     a checkpoint's folder name, or the shape of random weights.
    variant:    of random weights, None for a checkpoint; phase: "prefill" or "decode step" and how it ran.
    wall_s:     seconds of a pass without the profiler; operations: of a pass under the profiler, the longest first.
    """

    when: str
    source: str
    variant: str | None
    scenario: Scenario
    kernels: Kernels
    environment: Environment
    phase: str
    wall_s: Seconds
    operations: tuple[Operation, ...]
    kind: Literal["profile"] = "profile"
    schema_version: int = 2

    @property
    def busy_s(self) -> float:
        """Seconds in which the device computes; what is missing to the wall's time it waits."""
        return sum(operation.seconds for operation in self.operations)
