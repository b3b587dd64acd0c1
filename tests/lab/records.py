"""What the laboratory leaves, a JSON line a record, `when` being ISO 8601 in UTC in all of it."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints, overload

from msgspec import Meta

from bench.records.environment import Environment
from bench.records.record import Kernels
from bench.records.scenario import Scenario
from quantize.errors import UserError
from quantize.schema import Count, Positive, Seconds, Share, from_data, parse_json

LAB_SCHEMA_VERSION = 2
Style = Literal["dense", "GEMM", "GEMV", "bitsandbytes"]
Mode = Literal["eager", "CUDA graph"]
Linear = tuple[str, int, int]


@dataclass(frozen=True)
class TextFacts:
    """A text as token ids. shape: [blocks, tokens]; sha256: of shape and ids."""

    shape: tuple[Count, Count]
    sha256: str


@dataclass(frozen=True)
class RaceRecord:
    """How one quantizer did (tests.lab.race).

    blocks:     [blocks, tokens] of the calibration; blocks_sha256: of its token ids.
    texts:      what it was judged on, by kind of text, as `perplexity` and `divergence` are.
    seconds:    of quantizing and packing, without loading libraries; peak_bytes: most resident memory of its process.
    perplexity: as of Quality; divergence: the mean KL(reference || contender) in nats a token; model: the source.
    """

    when: str
    contender: str
    model: str
    blocks: tuple[Count, Count]
    blocks_sha256: str
    texts: dict[str, TextFacts]
    environment: Environment
    seconds: Seconds | None = None
    peak_bytes: Count | None = None
    perplexity: dict[str, Positive] | None = None
    divergence: dict[str, float] | None = None
    reason: str | None = None
    kind: Literal["race"] = "race"
    schema_version: int = LAB_SCHEMA_VERSION


@dataclass(frozen=True)
class OverheadRecord:
    """Our decode loop against a bare `model.generate` (tests.lab.overhead).

    checkpoint:       its folder's name.
    decode_s_a_token: "ours" and "generate": seconds a token, one value a round.
    ratio:            ours over generate's; interval: its 95% interval, None for too few rounds.
    """

    when: str
    checkpoint: str
    scenario: Scenario
    compute_dtype: str
    decode_s_a_token: dict[str, tuple[Seconds, ...]]
    ratio: Positive
    interval: tuple[Positive, Positive] | None
    environment: Environment
    kind: Literal["overhead"] = "overhead"
    schema_version: int = LAB_SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not self.decode_s_a_token.get("ours") or not self.decode_s_a_token.get("generate"):
            raise ValueError("decode_s_a_token has rounds of ours and of generate")


@dataclass(frozen=True)
class SideBySideRecord:
    """One process of us or of optimum-benchmark (tests.lab.optimum_benchmark).

    round:       counted from 0; wall_s: of the whole process, start and imports included.
    model:       the checkpoint's folder; content_sha256: of its files; prompt, new: tokens; seed: of the prompt.
    iterations:  passes that the other tool times at least; duration_s: seconds that it goes on for at least.
    prefill_s:   seconds of each prompt pass; decode_s: for each pass the seconds of each decode step.
    raw:         what the tool itself reports, in its words.
    """

    when: str
    contender: str
    round: int
    wall_s: Seconds
    model: str
    content_sha256: str
    prompt: int
    new: int
    iterations: int
    duration_s: float
    seed: int
    environment: Environment
    prefill_s: tuple[Seconds, ...] = ()
    decode_s: tuple[tuple[Seconds, ...], ...] = ()
    raw: dict[str, Any] | None = None
    reason: str | None = None
    kind: Literal["side by side"] = "side by side"
    schema_version: int = LAB_SCHEMA_VERSION

    @property
    def launched(self) -> dict[str, float] | None:
        """Of another tool: its launcher's processor seconds, and p50, mean and count of its seconds a token."""
        try:
            raw: Any = self.raw
            per_token = raw["latency"]["per_token"]
            found = {"cpu_s": raw["launcher_cpu_s"], **{name: per_token[name] for name in ("p50", "mean", "count")}}
        except (KeyError, TypeError):
            return None
        return found if all(isinstance(one, int | float) for one in found.values()) else None

    @property
    def steps_s(self) -> list[float]:
        """Every decode step of every pass."""
        return [step for steps in self.decode_s for step in steps]


@dataclass(frozen=True)
class VariantOutcome:
    """What became of one variant of a small random model.

    share:        of the language model's matrices that are quantized, None for the reference.
    error:        |logits - those of the source| / |those of the source|, float32.
    kernel_error: |logits - those of the dequantized weights in float32| / |those|, of 4-bit layers in groups, with the
                  experts chosen that the latter chose.
    ratio:        measured time over the reference's; reason: why there is no checkpoint, or none that runs.
    engine:       another engine that was tried on it; engine_error: |its logits - ours| / |ours|; engine_reason: its
                  own words where it does not run.
    """

    share: Share | None = None
    error: float | None = None
    kernel_error: float | None = None
    ratio: Positive | None = None
    reason: str | None = None
    engine: str | None = None
    engine_error: float | None = None
    engine_reason: str | None = None


@dataclass(frozen=True)
class ArchitectureRecord:
    """One architecture, tried on a small random model (tests.architectures.trial).

    architecture: transformers' model type; model_class: of the model.
    linears:      linear layers in its decoder layers, experts' too; ungrouped: those that no scales reach.
    reached:      share of the decoder layers' weights, routers and gates aside, that AWQ quantizes.
    groups:       "source -> readers" for each kind of layer, experts' numbers left open.
    moved_error:  |change| / |logits| when random scales go through all groups; variants: by name.
    """

    when: str
    architecture: str
    model_class: str
    linears: Count
    ungrouped: Count
    groups: tuple[str, ...]
    moved_error: float | None
    variants: dict[str, VariantOutcome]
    environment: Environment
    reason: str | None = None
    reached: Share | None = None
    kind: Literal["architecture"] = "architecture"
    schema_version: int = LAB_SCHEMA_VERSION


@dataclass(frozen=True)
class Operation:
    """Kernels on a GPU, torch's operations on a CPU. name: all of this name; calls, seconds: of a pass."""

    name: str
    calls: float
    seconds: Annotated[float, Meta(ge=0, le=1e9)]


@dataclass(frozen=True)
class ProfileRecord:
    """Where the time of one phase goes (tests.lab.profile).

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
    schema_version: int = LAB_SCHEMA_VERSION

    @property
    def busy_s(self) -> float:
        """Seconds in which the device computes; what is missing to the wall's time it waits."""
        return sum(operation.seconds for operation in self.operations)


@dataclass(frozen=True)
class CrossoverEntry:
    """One way to run the linear layers of a decoder layer (a contender), with so many tokens at once
    (tests.lab.crossover).

    shape, linears: the model's name and its layer's (name, out features, in features). group_size: of the 4-bit weights
    in AWQ's format. tokens: at once; None where the contender cannot run at all. kernel: what ran for that many tokens.
    mode: whether the host asked for every kernel or a CUDA graph replayed them.
    seconds: of one pass through all of the linear layers, one value a turn; turn k of all contenders ran close
    together, the order reversed from one turn to the next.
    relative_error: largest |found - exact| / |exact| of a token's outputs, `error_bound` what was allowed.
    weights_bytes: of one copy of the layer; copies: how many took turns, so that a cache does not hold one.
    reason: why there are no seconds.
    """

    shape: str
    linears: tuple[Linear, ...]
    group_size: int
    device: str
    compute_dtype: str
    contender: str
    style: Style
    tokens: int | None
    measured_at: str
    environment: Environment
    kernel: str | None = None
    mode: Mode = "eager"
    seconds: tuple[Seconds, ...] = ()
    relative_error: float | None = None
    error_bound: float | None = None
    weights_bytes: int | None = None
    copies: int | None = None
    reason: str | None = None
    kind: Literal["crossover"] = "crossover"
    schema_version: int = LAB_SCHEMA_VERSION

    def __post_init__(self) -> None:
        if bool(self.seconds) == (self.reason is not None) or (self.seconds and self.tokens is None):
            raise ValueError(f"{self.contender}: either seconds, of so many tokens, or a reason why there are none")

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


LabRecord = RaceRecord | OverheadRecord | SideBySideRecord | ArchitectureRecord | ProfileRecord | CrossoverEntry
L = TypeVar("L", bound=LabRecord)

TYPES: dict[str, type[LabRecord]] = {
    kind: one for one in get_args(LabRecord) for kind in get_args(get_type_hints(one)["kind"])
}
"""By the `kind` of a line."""

WITHOUT_KIND = {
    "blocks_sha256": "race",
    "decode_s_a_token": "overhead",
    "iterations": "side by side",
    "style": "crossover",
}
"""Lines of schema 1 of these kinds do not say their kind: the field that tells it."""


@overload
def read_lab(path: Path) -> list[LabRecord]: ...
@overload
def read_lab(path: Path, wanted: type[L]) -> list[L]: ...
def read_lab(path: Path, wanted: type[Any] | None = None) -> list[Any]:
    """The records in a file, in the order written, all of one type: this one; a repeated line counts once.

    Raises UserError, naming the line, for what is no record of the laboratory, and for records of another type.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): name a file of the laboratory's records") from None
    records: dict[bytes, LabRecord] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip() and line not in records:
            where = f"{path}, line {number}"
            records[line] = record_from(parse_json(line, where), where)
            if type(records[line]) is not (wanted := wanted or type(records[line])):
                raise UserError(f"{where} is of kind {records[line].kind!r}, not {wanted.kind!r}: keep kinds apart")
    return list(records.values())


def record_from(data: object, where: str) -> LabRecord:
    """A record of any kind, from what its line holds, brought up to date. Raises UserError for what is none."""
    held: dict[str, Any] = data if isinstance(data, dict) else {}
    kind = held.get("kind") or next((kind for field, kind in WITHOUT_KIND.items() if field in held), None)
    if not isinstance(kind, str) or kind not in TYPES:
        raise UserError(f"{where} is no record of the laboratory (kind {kind!r}): try `report`")
    version = held.get("schema_version")
    if type(version) is not int or not 1 <= version <= LAB_SCHEMA_VERSION:
        said = f"{where}: record of schema version {version!r}, these are read up to {LAB_SCHEMA_VERSION}"
        raise UserError(f"{said}: measure again")
    return from_data(TYPES[kind], {**held, "kind": kind, "schema_version": LAB_SCHEMA_VERSION}, where)
