"""The fingerprint: on which machine and with which libraries a figure was measured. No names, no paths, no torch."""

from dataclasses import dataclass, field

LIBRARIES = (  # every one that may touch a number
    "torch", "transformers", "autoawq", "autoawq-kernels", "bitsandbytes", "triton", "accelerate", "optimum",
    "gptqmodel", "tokenizers", "safetensors",
)  # fmt: skip

DECIDING = ("cpu", "cpu_cores", "torch_threads", "gpu", "gpu_driver", "cuda")
"""The fields that change figures, beside the libraries: records that differ in one of them do not compare."""


@dataclass(frozen=True)
class SourceState:
    """quantable: the version; commit: of its source, where that is a git tree; dirty: whether files differ from it."""

    quantable: str | None = None
    commit: str | None = None
    dirty: bool | None = None


@dataclass(frozen=True)
class Environment:
    """What is known of machine, libraries and source. Unknown, or not there, is None.

    cpu:            the processor's name for itself; cpu_cores: logical cores that the process may run on.
    torch_threads:  threads of torch's products; ram_bytes: memory of the machine.
    gpu:            the card's name, where the figures are of a GPU; gpu_memory_bytes, gpu_driver: its memory and its
                    driver's version; cuda: the version that torch is built for.
    os:             name, version and architecture of the system; python: its version; source: of this program.
    libraries:      version of each library that may touch a number, None for one that is not installed.
    matmul_probe_s: seconds of a matrix product on the CPU, by dtype; cpu_dtype: the compute dtype that suits this CPU.
    copy_bytes_per_s: what a plain copy on the device moves, read and written together."""

    cpu: str | None = None
    cpu_cores: int | None = None
    torch_threads: int | None = None
    ram_bytes: int | None = None
    gpu: str | None = None
    gpu_memory_bytes: int | None = None
    gpu_driver: str | None = None
    cuda: str | None = None
    os: str | None = None
    python: str | None = None
    libraries: dict[str, str | None] = field(default_factory=dict)
    source: SourceState | None = None
    matmul_probe_s: dict[str, float] | None = None
    cpu_dtype: str | None = None
    copy_bytes_per_s: float | None = None


def differing(one: Environment, other: Environment) -> dict[str, tuple[object, object]]:
    """What decides and is not the same in two fingerprints: field or library -> both values."""
    pairs: dict[str, tuple[object, object]] = {name: (getattr(one, name), getattr(other, name)) for name in DECIDING}
    pairs |= {name: (one.libraries.get(name), other.libraries.get(name)) for name in LIBRARIES}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def differences(one: Environment, other: Environment) -> list[str]:
    """Where two fingerprints differ in what decides, as "field: one against other"; empty if nowhere."""
    found = {} if one is other else differing(one, other)
    return [f"{name}: {mine} against {theirs}" for name, (mine, theirs) in found.items()]
