"""Builders of small record files: what `bench` would have written, with figures chosen by the test."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from bench.records.environment import Environment, SourceState
from bench.records.record import Kernels, Latency, Memory, Quality, Record, Subject
from bench.records.scenario import SCENARIOS, Scenario
from quantize.variant import VARIANTS

PUBLISHED, CHAT = SCENARIOS["published"], SCENARIOS["chat"]
START = datetime(2025, 3, 1, 12, tzinfo=UTC)

ENVIRONMENT = Environment(
    cpu="Epyc 9",
    cpu_cores=2,
    torch_threads=2,
    python="3.11.9",
    libraries={"torch": "2.13.0", "transformers": "5.23.0", "bitsandbytes": None},
    source=SourceState("0.1.0"),
)


class Builder:
    """Makes the records of one bench; every record starts a minute after the one before."""

    def __init__(
        self,
        base_model: str = "Tiny-1M",
        *,
        device: str = "cpu",
        compute_dtype: str = "float32",
        environment: Environment = ENVIRONMENT,
        start: datetime = START,
    ) -> None:
        self.base_model = base_model
        self.device = device
        self.compute_dtype = compute_dtype
        self.environment = environment
        self.clock = start

    def subject(self, variant: str, *, name: str | None = None, content: str | None = None) -> Subject:
        row = VARIANTS[variant]
        group = 64 if row.is_awq else None
        own = name or f"{self.base_model}-{row.folder_suffix(group)}"
        return Subject(
            name=own,
            base_model=self.base_model,
            variant=variant,
            method=row.method,
            q_group_size=group,
            w_bit=row.w_bit,
            version=row.version,
            download=None,
            content_sha256=content or f"sha of {own}",
            file_weights_bytes=1_000_000,
        )

    def record(self, kind: Any, subject: Subject, **fields: Any) -> Record:
        self.clock += timedelta(minutes=1)
        defaults: dict[str, Any] = {
            "status": "ok",
            "device": self.device,
            "started_at": self.clock.isoformat(),
            "environment": self.environment,
            "wall_s": 1.0,
            "compute_dtype": self.compute_dtype,
        }
        return Record(kind=kind, subject=subject, **{**defaults, **fields})

    def latency(
        self,
        variant: str,
        scenario: Scenario = PUBLISHED,
        *,
        round: int = 0,
        prefill_s: Sequence[float] = (2.0,),
        step_s: float | Sequence[float] = 0.04,
        peak_bytes: int | None = 1_500_000_000,
        subject: Subject | None = None,
        **fields: Any,
    ) -> Record:
        steps = [step_s] * len(prefill_s) if isinstance(step_s, float) else step_s
        defaults: dict[str, Any] = {
            "scenario": scenario,
            "round": round,
            "kernels": Kernels(f"{variant} long", f"{variant} short"),
            "memory": Memory(
                weights_bytes=500_000_000,
                source="RSS" if self.device == "cpu" else "CUDA allocator",
                baseline_bytes=600_000_000,
                load_peak_bytes=900_000_000,
                run_peak_bytes=peak_bytes,
            ),
            "latency": Latency(
                tuple(prefill_s), tuple((step,) * scenario.decode_steps for step in steps), warmup_s=(9.0,)
            ),
        }
        return self.record("latency", subject or self.subject(variant), **{**defaults, **fields})

    def decoded(self, variant: str, mode: str, *, read_bytes: int | None = None, **fields: Any) -> Record:
        """A latency record whose decode steps took 0.04 s each, ran in this way and read so many bytes."""
        memory = Memory(500_000_000, "CUDA allocator", None, None, 1_500_000_000, decode_bytes=read_bytes)
        record = self.latency(variant, **{"scenario": CHAT, "memory": memory, **fields})
        assert record.latency is not None
        return replace(record, latency=replace(record.latency, decode_mode=mode))

    def at_lengths(self, variant: str, scenario: Scenario, *passes: tuple[float, ...], **fields: Any) -> Record:
        """A latency record over several prompt lengths: for each pass the seconds of each."""
        sums = tuple(map(sum, passes))
        latency = Latency(sums, ((),) * len(passes), (9.0,), prefill_by_length_s=passes)
        return self.latency(variant, scenario, latency=latency, **fields)

    def quality(self, variant: str, perplexity: float, **fields: Any) -> Record:
        figures = Quality(perplexity, tokens=4096, text="pydoc topics", text_sha256="t" * 64)
        return self.record("quality", self.subject(variant), **{"quality": figures, **fields})

    def failure(self, variant: str, status: str, reason: str, **fields: Any) -> Record:
        defaults = {"scenario": PUBLISHED, "round": 0, "compute_dtype": None}
        return self.record("latency", self.subject(variant), status=status, reason=reason, **{**defaults, **fields})

    def rounds(
        self,
        latency_factors: dict[str, float],
        scenario: Scenario = PUBLISHED,
        *,
        count: int = 3,
        noise: Sequence[float] = (1.0, 1.01, 0.99, 1.005),
    ) -> list[Record]:
        """Rounds in turn reversed; a variant takes its factor times 2 s for the prompt and 0.04 s a step."""
        records = []
        for number in range(count):
            names = list(latency_factors)
            for name in names if number % 2 == 0 else reversed(names):
                factor = latency_factors[name] * (1.0 if name == "fp16" else noise[number % len(noise)])
                records.append(
                    self.latency(name, scenario, round=number, prefill_s=(2.0 * factor,), step_s=0.04 * factor)
                )
        return records

    def five_rows(self) -> list[Record]:
        """A whole bench of the published table's five variants, both scenarios, three rounds, and quality."""
        factors = {"fp16": 1.0, "awq-gemm": 1.41, "awq-gemv": 10.3, "bnb-4bit": 3.25, "bnb-8bit": 0.8}
        perplexities = {"fp16": 15.0, "awq-gemm": 16.5, "awq-gemv": 16.5, "bnb-4bit": 17.1, "bnb-8bit": 15.03}
        records = self.rounds(factors) + self.rounds(factors, CHAT)
        return records + [self.quality(name, value) for name, value in perplexities.items()]
