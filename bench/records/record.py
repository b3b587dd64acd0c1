"""What a run of one checkpoint leaves behind: immutable, versioned. Imports no torch.

A Record is written once, when its run ends, whether it went well or not; everything shown later (ratios, tables,
plots) is computed from records and nothing else. bench.records.store writes and reads them.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal, get_args

from bench.records.environment import Environment
from bench.records.gpu_state import GpuStates
from bench.records.scenario import Scenario
from bench.records.stopping import PassesStopReason, Rules
from quantize.errors import UserError
from quantize.schema import Count, Positive, Seconds, Share
from quantize.variant import AUTO_KERNEL, REFERENCE

SCHEMA_VERSION, LONG_TEXT_TOKENS = 8, 1024
Kind = Literal["latency", "quality", "tasks"]
Status = Literal["ok", "oom", "timeout", "unsupported", "error", "broken"]
"""unsupported: this machine, library or model cannot do it; broken: the model's output is no number."""

Phase = Literal["total", "prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)  # total: the prompt and all decode steps together; decode: one step


@dataclass(frozen=True)
class Subject:
    """What was measured, as its row in the table names it.

    name:               the checkpoint's folder; base_model: the model that was quantized.
    variant:            a name of quantize.variant.known_variants(); method: the table's column "Method".
    q_group_size:       AWQ's group size; w_bit: bits a weight, None in half precision; version: AWQ's layout.
    download:           where others find it, None where they do not.
    content_sha256:     over the manifest's file hashes: the same name with other contents is another subject.
    source_sha256:      of the weights that it was made from, None in older records and where they are random.
    file_weights_bytes: every tensor in the checkpoint's safetensors files, None where there are none.
    rounding:           how 4-bit codes were chosen, None where that was no choice.
    family:             the base model that its reference is of, None for its base model.
    kernel:             what the user chose for the quantized layers ("native" or a name), None for the fastest.
    engine:             what ran it, None for transformers with the kernels of this program.
    dummy:              the shape of weights that were random and never on disk, for the reader; dummy_layers,
                        dummy_hidden_size: of that shape."""

    name: str
    base_model: str
    variant: str
    method: str
    q_group_size: int | None
    w_bit: int | None
    version: str | None
    download: str | None
    content_sha256: str
    file_weights_bytes: Count | None
    rounding: str | None = None
    family: str | None = None
    kernel: str | None = None
    dummy: str | None = None
    dummy_layers: int | None = None
    dummy_hidden_size: int | None = None
    source_sha256: str | None = field(default=None, compare=False)
    engine: str | None = None

    def __hash__(self) -> int:  # of all fields it would be slow, and records are grouped by it
        return hash((self.name, self.content_sha256))

    @cached_property
    def baseline(self) -> str:
        """The base model whose reference this subject is compared with: rows of one baseline share one reference."""
        return self._in_engine(self.family or self.base_model)

    @cached_property
    def quality_baseline(self) -> str:
        """The base model whose expectations its own are compared with, in the same engine."""
        return self._in_engine(self.base_model)

    def _in_engine(self, model: str) -> str:
        return model if self.engine is None else f"{model} in {self.engine}"

    @property
    def folder(self) -> str:
        """Its checkpoint's: the name without the kernel that the user chose."""
        return self.name.removesuffix(name_on("", self.kernel, self.engine))

    @cached_property
    def may_be_reference(self) -> bool:
        """Whether its rows can be compared with it: half precision, of the base model that the baseline names."""
        return self.variant == REFERENCE.name and self.family in (None, self.base_model)


def name_on(name: str, kernel: str | None, engine: str | None = None) -> str:
    """What tells a row on a kernel of the user's choice, or in another engine, from the same row without."""
    name = name if kernel in (None, AUTO_KERNEL) else f"{name}, {kernel} kernel"
    return name if engine is None else f"{name}, {engine}"


@dataclass(frozen=True)
class Kernels:
    """What really ran the quantized linear layers. prefill, decode: the kernel, e.g. "torch int4 (cpu)"."""

    prefill: str
    decode: str

    @staticmethod
    def of(kernel: Callable[[int], str], scenario: Scenario | None) -> "Kernels":
        """kernel: tokens at once -> its name; scenario: None for long texts."""
        batch, lengths = (scenario.batch, scenario.prompt_lengths) if scenario else (1, (LONG_TEXT_TOKENS,))
        return Kernels(" / ".join(dict.fromkeys(kernel(batch * one) for one in lengths)), kernel(batch))


@dataclass(frozen=True)
class Latency:
    """Raw samples, in the order taken; nothing is dropped.

    prefill_s:   seconds of each repetition's prompt pass, the first new token included; over several prompts their sum.
    decode_s:    for each repetition, the seconds of each decode step: `decode_steps` of them for each of its prompts.
    warmup_s:    seconds of each warm-up repetition at the measured shape, not counted in the figures.
    steady:      whether the warm-up became steady before its passes ran out; None where its time was over before, and
                 in records of schema 1.
    stopped:     why no more repetitions were timed, "noise" (low enough), "time" or "passes"; None in schema 1.
    prefill_by_length_s: for each repetition, the seconds of each of the scenario's `lengths`; empty where it has none.
    decode_mode: how the decode steps ran, "eager", "CUDA graph", "static cache" (the same without a graph) or
                 "compiled"; None where there are none, and below schema 3, where all were eager.
    compile_s:   seconds that compiling a step took, in no other figure; None where none was compiled."""

    prefill_s: tuple[Seconds, ...]
    decode_s: tuple[tuple[Seconds, ...], ...]
    warmup_s: tuple[float, ...]
    steady: bool | None = None
    stopped: PassesStopReason | None = None
    prefill_by_length_s: tuple[tuple[Seconds, ...], ...] = ()
    decode_mode: str | None = None
    compile_s: Seconds | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes; unknown is None, never 0.

    weights_bytes:   parameters and buffers of the loaded model, each storage once.
    source:          what the peaks mean: "RSS" (resident set size of the process) or "CUDA allocator".
    baseline_bytes:  after load, before the first run.
    load_peak_bytes: highest while loading; run_peak_bytes: highest while running the scenario.
    nvml_process_bytes: NVML's view of this process after the run; nvml_device_bytes: NVML's view of the whole device.
    kv_cache_bytes:  keys and values held when the scenario's last token was made; a static cache holds all its slots.
    kv_cache_formula_bytes: 2 * layers * key-value heads * head size * tokens * batch * bytes of a value.
    reserved_peak_bytes: the most that CUDA's allocator had taken from the device, cached blocks included.
    decode_bytes:    what a decode step must read at least: every weight and buffer once but for the input embedding, of
                     which it takes one row, unless the output head is tied to it; keys and values are not in it."""

    weights_bytes: Count
    source: str
    baseline_bytes: Count | None
    load_peak_bytes: Count | None
    run_peak_bytes: Count | None
    nvml_process_bytes: Count | None = None
    nvml_device_bytes: Count | None = None
    kv_cache_bytes: Count | None = None
    kv_cache_formula_bytes: Count | None = None
    reserved_peak_bytes: Count | None = None
    decode_bytes: Count | None = None

    @property
    def activations_bytes(self) -> int | None:
        """What the run held at its peak beside the model and the cache: activations, logits, work space."""
        if self.run_peak_bytes is None or self.baseline_bytes is None or self.kv_cache_bytes is None:
            return None
        return max(0, self.run_peak_bytes - self.baseline_bytes - self.kv_cache_bytes)

    @property
    def rest_bytes(self) -> int | None:
        """What was held after loading beside the weights: the interpreter, the libraries, the allocator's slack."""
        return None if self.baseline_bytes is None else max(0, self.baseline_bytes - self.weights_bytes)


@dataclass(frozen=True)
class Divergence:
    """How far the next-token distributions are from the reference's, in nats: KL(reference || model).

    mean, median, p99: of that over the predicted tokens; flips: the share of those whose likeliest choice is another.
    """

    mean: float
    median: float
    p99: float
    flips: Share


@dataclass(frozen=True)
class Quality:
    """Perplexity on held-out text.

    perplexity:  exp(mean negative log-likelihood a predicted token); tokens: how many were predicted.
    text:        where the text is from; text_sha256: of its token ids.
    divergence:  from the reference; None for the reference itself and where it left nothing to compare with.
    noise_floor: of the reference alone: its divergence from itself when the same sums are done in another order.
    first_tokens: that the tokenizer put before each block; None in older records, which had none.
    vocabulary:  how many tokens the model chooses from; None in older records.
    from_exact:  of another engine: its divergence from the same checkpoint, dequantized to float32 by this program."""

    perplexity: Positive
    tokens: Count
    text: str
    text_sha256: str
    divergence: Divergence | None = None
    noise_floor: Divergence | None = None
    first_tokens: tuple[int, ...] | None = None
    vocabulary: Count | None = None
    from_exact: Divergence | None = None


@dataclass(frozen=True)
class TaskScore:
    """What lm-eval says of one task.

    name, metric: the task and its main metric; value, stderr: of that; samples: questions; shots: examples before each.
    dataset: of the hub, None where it is none or not all of it was asked; configuration: of the data set."""

    name: str
    metric: str
    value: float
    stderr: float | None = None
    samples: int | None = None
    shots: int | None = None
    dataset: str | None = None
    configuration: str | None = None


@dataclass(frozen=True)
class Record:
    """One run of one checkpoint: a latency run (one scenario, one round), a quality run, or tasks.

    kind:          which of the three; status: "ok" exactly when the figures of its kind are there.
    device:        "cpu" or "cuda"; compute_dtype: what the activations were.
    started_at:    ISO 8601, UTC; wall_s: of the whole run.
    reason:        in one line why there are no figures, None where there are.
    scenario, round: of a latency run; position: its place among the runs that were planned together.

    latency, memory, quality, tasks: the figures; prompt_sha256: of the prompt's token ids.
    kernels:       what ran the quantized layers; plan: the rules that it was measured under.
    quantization:  what the loaded model says of its quantization (bitsandbytes' threshold and type among it).
    placement:     how a model too big for one GPU was spread, None for one on one device.
    quantized_share: of the decoder's matrices, None in half precision, for random weights and in older records."""

    kind: Kind
    status: Status
    subject: Subject
    device: str
    started_at: str
    environment: Environment
    wall_s: float
    reason: str | None = None
    scenario: Scenario | None = None
    round: Count | None = None
    position: Count | None = None
    compute_dtype: str | None = None
    kernels: Kernels | None = None
    latency: Latency | None = None
    memory: Memory | None = None
    quality: Quality | None = None
    device_state: GpuStates | None = None
    prompt_sha256: str | None = None
    plan: Rules | None = None
    quantization: dict[str, Any] | None = None
    tasks: tuple[TaskScore, ...] | None = None
    placement: str | None = None
    quantized_share: Share | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if (self.status == "ok") == (self.reason is not None):
            raise ValueError("a record has a reason exactly when its status is not ok")
        if self.status == "ok" and getattr(self, self.kind) is None:
            raise ValueError(f"an ok {self.kind} record has {self.kind} figures")
        if self.kind == "latency" and self.scenario is None:
            raise ValueError("a latency record has a scenario")

    @cached_property
    def started(self) -> datetime | None:
        """When the run started; a time without a zone counts as UTC, an unreadable one is None."""
        try:
            moment = datetime.fromisoformat(self.started_at)
        except ValueError:
            return None
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

    @cached_property
    def times(self) -> dict[Phase, float | None]:
        """Seconds of this run by phase, None where it has no sample of one.

        total: median over repetitions of prefill plus all decode steps; prefill: median over repetitions; decode:
        median over all decode steps of all repetitions, that is seconds a token (of each prompt in the batch).
        Raises UserError for a time that is not above 0."""
        if self.latency is None:
            return dict.fromkeys(PHASES)
        prefill, by_pass = self.latency.prefill_s, self.latency.decode_s
        steps = list(itertools.chain.from_iterable(by_pass))
        total = [a + math.fsum(b) for a, b in zip(prefill, by_pass, strict=False)] if steps else prefill
        samples: dict[Phase, Sequence[float]] = {"prefill": prefill, "decode": steps, "total": total}
        found = {phase: statistics.median(some) if some else None for phase, some in samples.items()}
        for phase, seconds in found.items():
            if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
                said = f"a record of {self.subject.name} holds a {phase} time of {seconds} s, no measurement"
                raise UserError(f"{said}: remove that line and measure again")
        return found


def latency_records(records: Iterable[Record]) -> list[Record]:
    """Only the latency runs that ended well."""
    return [record for record in records if record.kind == "latency" and record.status == "ok"]
