"""Checkpoints and records made of nothing, for tests that run no model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.records.environment import Environment
from bench.records.record import Latency, Quality, Record, TaskScore
from bench.run.probe import Machine
from bench.worker.request import PlannedRun
from quantize.checkpoint import Checkpoint, Manifest, SourceFacts, open_checkpoint, seal

ENVIRONMENT = Environment(
    cpu="Model 1",
    cpu_cores=4,
    torch_threads=4,
    libraries={"torch": "2.13.0", "bitsandbytes": None},
    cpu_dtype="float32",
)

SHRUNKEN = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Mistral in two layers: widths that every group size divides, positions enough for the longest prompt."""

MakeCheckpoint = Callable[..., Checkpoint]
MakeRecords = Callable[..., list[Record]]


@pytest.fixture
def machine() -> Machine:
    """A CPU that computes in float32."""
    return Machine("cpu", ENVIRONMENT)


@pytest.fixture(scope="session")
def shrunken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of a small Mistral, for rehearsals of what a GPU does at full size."""
    path = tmp_path_factory.mktemp("shape") / "shrunken" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SHRUNKEN))
    return path


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Makes a sealed checkpoint folder under tmp_path/models that holds a config and some bytes."""

    def make(variant: str, *, name: str | None = None, base_model: str = "Tiny", weights: bytes = b"w") -> Checkpoint:
        folder = tmp_path / "models" / (name or f"{base_model}-{variant}")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"dtype": "float16"}')
        (folder / "model.safetensors").write_bytes(weights)
        manifest = Manifest(
            name=folder.name,
            base_model=base_model,
            variant=variant,
            q_group_size=64 if variant.startswith("awq") else None,
            source=SourceFacts("folder", f"models/{base_model}", None, None),
            calibration=None,
            options={},
            libraries={},
            seconds={},
            created="2026-01-01T00:00:00+00:00",
            weights_bytes=len(weights),
        )
        seal(folder, manifest)
        return open_checkpoint(folder)

    return make


@pytest.fixture
def records_of() -> MakeRecords:
    """Makes the records that a run leaves: ok, or failed with a status and a reason."""

    def make(
        run: PlannedRun, *, status: str = "ok", reason: str | None = None, dtype: str = "float32", device: str = "cpu"
    ) -> list[Record]:
        ok = status == "ok"
        return [
            Record(
                kind=kind,
                status=status,  # type: ignore[arg-type]
                reason=reason,
                subject=run.subject,
                device=device,
                started_at="2026-01-01T00:00:00+00:00",
                environment=ENVIRONMENT,
                wall_s=1.0,
                scenario=scenario,
                round=run.round if kind == "latency" else None,
                position=run.position,
                compute_dtype=dtype,
                latency=Latency((1.0,), ((0.1,),), (1.5,)) if ok and scenario else None,
                tasks=(TaskScore("anatomy", "acc", 0.5),) if ok and kind == "tasks" else None,
                quality=Quality(15.0, 100, "builtin evaluation", "0" * 64) if ok and kind == "quality" else None,
            )
            for kind, scenario in run.works
        ]

    return make
