"""What a worker process is asked to do: a JSON file. Imports no torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.records.record import Kind, Record, Status, Subject
from bench.records.scenario import Scenario
from bench.records.steady import Rule

BUILTIN_LABEL = "builtin evaluation"


@dataclass(frozen=True)
class QualityRequest:
    """What to judge on: `blocks` blocks of `block_tokens` tokens of a text.

    data: a text as `quantize.calibration.text_from` reads it, None for the built-in evaluation text; label: how
    records call it. expectations: where the reference's are, or go.
    """

    expectations: str | None = None
    data: str | None = None
    label: str = BUILTIN_LABEL
    blocks: int = 12
    block_tokens: int = 512


@dataclass(frozen=True)
class TaskRequest:
    """Which tasks of lm-eval to run. folder: holds task files of the user's own; limit: questions of each task."""

    names: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Dummy:
    """Random weights to draw in place of a checkpoint.

    spec: of the shape, as `quantize.dummy.dummy_config` reads it. group_size: of AWQ variants, None for the others.
    """

    spec: str
    variant: str
    group_size: int | None = None


@dataclass(frozen=True)
class Request:
    """One process's work: load one checkpoint, then measure each scenario in turn, its quality, its tasks.

    checkpoint: its folder, None where `dummy` says what to draw instead. rule: when a scenario is warm, and when it has
    enough. parent_pid: the worker ends when this process does; None to run on its own. `environment` and `subject` go
    into every record as they are.
    """

    checkpoint: str | None
    subject: Subject
    device: str
    compute_dtype: str
    environment: dict[str, Any]
    scenarios: tuple[Scenario, ...] = ()
    round: int | None = None
    position: int | None = None
    threads: int | None = None
    rule: Rule = field(default_factory=Rule)
    quality: QualityRequest | None = None
    tasks: TaskRequest | None = None
    is_reference: bool = False
    plan: dict[str, Any] | None = None
    parent_pid: int | None = None
    dummy: Dummy | None = None

    def __post_init__(self) -> None:
        if not self.works:
            raise ValueError("a request without work")
        if (self.checkpoint is None) == (self.dummy is None):
            raise ValueError("a request has a checkpoint or random weights, one of the two")

    @property
    def kernel(self) -> str | None:
        """What the quantized layers shall run on: "native", a kernel's name, or None for what is fastest."""
        return self.subject.kernel

    @property
    def works(self) -> tuple[tuple[Kind, Scenario | None], ...]:
        """What records it leads to: (kind, scenario), in order."""
        works: list[tuple[Kind, Scenario | None]] = [("latency", scenario) for scenario in self.scenarios]
        if self.quality:
            works.append(("quality", None))
        if self.tasks:
            works.append(("tasks", None))
        return tuple(works)

    def record(
        self,
        status: Status,
        work: tuple[Kind, Scenario | None],
        *,
        started_at: str,
        wall_s: float,
        **figures: Any,
    ) -> Record:
        """A record of one of this request's works; `figures` are Record's own fields."""
        kind, scenario = work
        return Record(
            kind=kind,
            status=status,
            subject=self.subject,
            device=self.device,
            started_at=started_at,
            environment=self.environment,
            wall_s=wall_s,
            scenario=scenario,
            round=self.round if kind == "latency" else None,
            position=self.position,
            compute_dtype=self.compute_dtype,
            plan={**(self.plan or {}), "rule": asdict(self.rule)},
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
        fields["rule"] = Rule(**fields["rule"])
        if fields["dummy"]:
            fields["dummy"] = Dummy(**fields["dummy"])
        if fields["quality"]:
            fields["quality"] = QualityRequest(**fields["quality"])
        if fields["tasks"]:
            fields["tasks"] = TaskRequest(**{**fields["tasks"], "names": tuple(fields["tasks"]["names"])})
        return Request(**fields)
