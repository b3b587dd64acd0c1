"""What a user may choose of a bench. Imports no torch, and little else: `bench --help` is quick."""

from dataclasses import dataclass, field
from typing import TypedDict

from bench.records.scenario import Scenario
from bench.records.stopping import PassRule, RoundsRule
from quantize.errors import UserError
from quantize.variant import check_kernel

DEVICES, DTYPES = ("auto", "cpu", "cuda"), ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and how; every default is what the table is made with.

    scenarios:    None for `published` and `chat`.
    rounds:       how many processes for each checkpoint, each measuring all scenarios; rule: when one has enough.
    device:       "cpu", "cuda", or "auto": the GPU where there is one.
    dtype:        compute dtype of all runs. None: on a GPU the reference's half dtype, on a CPU float32, or bfloat16
                  where that is clearly faster.
    kernel:       of the AWQ layers: "native" or a kernel's name, None or "auto" for what is fastest. A row measured on
                  a kernel of the user's choice stands beside the same row without.
    engines:      what runs the checkpoints, in turn, each "NAME=PYTHON", a name and its environment's interpreter, or
                  "quantable" (bench.run.engine); none for this program alone.
    timeout_s:    for one process.
    threads:      CPU threads of each process, None for torch's choice.
    quality:      measure perplexity and divergence too.
    quality_data: on this text (a file, or hub:NAME) in place of the built-in one.
    tasks:        names of lm-eval tasks or of our groups.
    task_folder:  task files of the user's; task_limit: questions of each.
    fresh:        set an existing records file aside and measure everything."""

    scenarios: tuple[Scenario, ...] | None = None
    rounds: RoundsRule = field(default_factory=RoundsRule)
    rule: PassRule = field(default_factory=PassRule)
    device: str = "auto"
    dtype: str | None = None
    kernel: str | None = None
    engines: tuple[str, ...] = ()
    timeout_s: float = 3600.0
    threads: int | None = None
    quality: bool = True
    quality_data: str | None = None
    tasks: tuple[str, ...] = ()
    task_folder: str | None = None
    task_limit: int | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise UserError("--timeout must be above 0 seconds")
        if self.threads is not None and self.threads < 1:
            raise UserError("--threads must be at least 1")
        for name, value, known in (("dtype", self.dtype or DTYPES[0], DTYPES), ("device", self.device, DEVICES)):
            if value not in known:
                raise UserError(f"unknown {name} {value!r}; there are: {', '.join(known)}")
        check_kernel(self.kernel)


BenchChoices = TypedDict("BenchChoices", {  # noqa: UP013
    "scenarios": tuple[Scenario, ...] | None, "rounds": int | RoundsRule, "most": int, "noise": float,
    "max_time_s": float, "rule": PassRule, "device": str, "dtype": str | None, "kernel": str | None,
    "engines": tuple[str, ...], "timeout_s": float, "threads": int | None, "quality": bool, "quality_data": str | None,
    "tasks": tuple[str, ...], "task_folder": str | None, "task_limit": int | None, "fresh": bool,
}, total=False)  # fmt: skip
"""Keyword arguments of `bench`: the fields of BenchOptions, and of its RoundsRule. rounds: the least, or a rule."""
