"""What a worker process is asked to do: a JSON file. Imports no torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from bench.record import Kind, Record, Status, Subject
from bench.scenario import Scenario


@dataclass(frozen=True)
class Request:
    """One process's work: load one checkpoint, then measure each scenario in turn, or its quality.

    repetitions: timed passes a scenario, None for the rule of `repetitions_for`; warmups: passes before them.
    parent_pid: the worker ends when this process does; None to run on its own.
    `environment` and `subject` go into every record as they are.
    """

    kind: Kind
    checkpoint: str
    subject: Subject
    device: str
    compute_dtype: str
    environment: dict[str, Any]
    scenarios: tuple[Scenario, ...] = ()
    round: int | None = None
    position: int | None = None
    threads: int | None = None
    repetitions: int | None = None
    warmups: int = 1
    quality_blocks: int = 12
    quality_block_tokens: int = 512
    parent_pid: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"request of kind {self.kind!r}")
        if (self.kind == "latency") != bool(self.scenarios):
            raise ValueError("a latency request has scenarios and a quality request has none")

    def repetitions_for(self, scenario: Scenario) -> int:
        """Timed passes: a scenario with decode steps has many samples in one pass, a bare prefill has one."""
        if self.repetitions is not None:
            return self.repetitions
        return 1 if scenario.decode_steps else 2

    def record(
        self,
        status: Status,
        *,
        started_at: str,
        wall_s: float,
        scenario: Scenario | None = None,
        **figures: Any,
    ) -> Record:
        """A record of this request's run; `figures` are Record's own fields."""
        return Record(
            kind=self.kind,
            status=status,
            subject=self.subject,
            device=self.device,
            started_at=started_at,
            environment=self.environment,
            wall_s=wall_s,
            scenario=scenario,
            round=self.round,
            position=self.position,
            compute_dtype=self.compute_dtype,
            **figures,
        )

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "Request":
        """The request that `write` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["subject"] = Subject(**fields["subject"])
        fields["scenarios"] = tuple(Scenario.from_json(scenario) for scenario in fields["scenarios"])
        return Request(**fields)
