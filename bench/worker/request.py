"""What a worker process is asked to do: settings that all runs share, and one run. A JSON file. Imports no torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.records.environment import Environment
from bench.records.record import Kind, Record, Status, Subject
from bench.records.scenario import Scenario
from bench.records.stopping import Rules
from bench.worker.options import BenchOptions
from quantize.schema import from_json

BUILTIN_LABEL = "builtin evaluation"
Work = tuple[Kind, Scenario | None]  # what leads to one record
QUALITY: Work = ("quality", None)
TASKS: Work = ("tasks", None)


@dataclass(frozen=True)
class QualityRequest:
    """What to judge on: `blocks` blocks of `block_tokens` tokens of a text.

    data: a text as `quantize.calibration.text_from` reads it, None for the built-in one; label: how records call it."""

    data: str | None = None
    label: str = BUILTIN_LABEL
    blocks: int = 12
    block_tokens: int = 512


@dataclass(frozen=True)
class Target:
    """One row to be: how its records name it, and what a worker makes the model of.

    checkpoint: the folder of the one on disk, None for random weights.
    dummy:      the shape of random weights in this variant, as `quantize.dummy.dummy_config` reads it.
    half_dtype: what the model's config names, "bfloat16" or "float16".
    has_text:   whether it can be judged on text: random weights have no quality, and no tokenizer.
    quantized_share: of the decoder's matrices, as its manifest says."""

    subject: Subject
    checkpoint: str | None = None
    dummy: str | None = None
    half_dtype: str = "float16"
    has_text: bool = False
    quantized_share: float | None = None

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.dummy is None):
            raise ValueError("a target is a checkpoint or random weights, one of the two")


@dataclass(frozen=True)
class PlannedRun:
    """One process: a target with all scenarios of one round, then its quality and its tasks where asked for.

    position:     its place among the runs that were planned together; round: of its latencies.
    tasks:        names of lm-eval.
    is_reference: whether its baseline is compared with it: of several half-precision checkpoints the first alone."""

    target: Target
    position: int
    scenarios: tuple[Scenario, ...] = ()
    round: int | None = None
    quality: bool = False
    tasks: tuple[str, ...] = ()
    is_reference: bool = False

    @property
    def works(self) -> tuple[Work, ...]:
        """What it leaves records of, in order."""
        works: list[Work] = [("latency", scenario) for scenario in self.scenarios]
        return (*works, *[QUALITY] * self.quality, *[TASKS] * bool(self.tasks))

    @property
    def subject(self) -> Subject:
        return self.target.subject


@dataclass(frozen=True)
class Settings:
    """What all runs of one `bench` share.

    device:             "cpu" or "cuda"; compute_dtypes: by baseline.
    environment:        the fingerprint, for every record.
    reference_logprobs: by quality baseline, the file that holds what its reference expects."""

    device: str
    compute_dtypes: dict[str, str]
    environment: Environment
    options: BenchOptions = field(default_factory=BenchOptions)
    quality: QualityRequest = field(default_factory=QualityRequest)
    reference_logprobs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One process's work: load one target, then measure each scenario in turn, its quality, its tasks.

    parent_pid: the worker ends when this process does; None to run on its own."""

    settings: Settings
    run: PlannedRun
    parent_pid: int | None = None

    def __post_init__(self) -> None:
        if not self.run.works:
            raise ValueError("a request without work")

    @property
    def compute_dtype(self) -> str:
        return self.settings.compute_dtypes[self.run.subject.baseline]

    @property
    def reference_logprobs(self) -> str | None:
        """The file of what the target's reference expects, None where nothing is compared with it."""
        return self.settings.reference_logprobs.get(self.run.subject.quality_baseline)

    def record(self, status: Status, work: Work, *, started_at: str, wall_s: float, **figures: Any) -> Record:
        """A record of one of this request's works; `figures` are Record's fields."""
        (kind, scenario), run, settings = work, self.run, self.settings
        figures |= {"scenario": scenario, "round": run.round if kind == "latency" else None, "position": run.position}
        figures |= {"compute_dtype": self.compute_dtype, "quantized_share": run.target.quantized_share}
        figures |= {"plan": Rules(settings.options.rounds, settings.options.rule)}
        return Record(kind, status, run.subject, settings.device, started_at, settings.environment, wall_s, **figures)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "Request":
        """The request that `write` wrote."""
        return from_json(Request, path.read_bytes(), str(path))
