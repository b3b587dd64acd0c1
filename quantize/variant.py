"""Which quantized versions of a model there are: one row of VARIANTS each. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from quantize.errors import UserError

GROUP_SIZES = (128, 64, 32)  # of AWQ, which the published kernels run, in the order in which they are tried

AUTO_KERNEL, NATIVE_KERNEL = "auto", "native"
"""What `--kernel` takes beside the names of kernels: the fastest here, and what an AWQ layout is named after."""

KERNEL_NAMES = ("torch-cpu", "triton", "autoawq-gemm", "autoawq-gemv", "triton-gemv", "dequantize")
"""Every kernel of quantize.kernels, which imports torch; this module does not."""


def check_kernel(name: str | None) -> None:
    """Raise UserError, saying which exist, for what `--kernel` does not know; None is no choice."""
    known = (AUTO_KERNEL, NATIVE_KERNEL, *KERNEL_NAMES)
    if name is not None and name not in known:
        raise UserError(f"unknown kernel {name!r}; there are: {', '.join(known)}")


@dataclass(frozen=True)
class Variant:
    """One row of the quantization table.

    name:     what the user types.
    method:   the table's column "Method".
    w_bit:    bits a weight, None for the half-precision reference.
    version:  how groups of 4-bit codes are stored, a key of LAYOUTS; None where there are none.
    published: whether the published table has a row for it, so that `all` means it too."""

    name: str
    method: str
    w_bit: int | None = None
    version: str | None = None
    published: bool = True

    @property
    def is_awq(self) -> bool:
        """Whether the weights are stored as in AWQ's format: groups of 4-bit codes with scales and zero points."""
        return self.version is not None

    @property
    def is_gguf(self) -> bool:
        """Whether its tensors are in a GGUF file, not in safetensors."""
        return self.version == "GGUF"

    def folder_suffix(self, group_size: int | None = None) -> str:
        """What the published checkpoints append to the model's name: `AWQ-QGS128-W4-GEMM`, `BnB.4`, `FP16`."""
        return f"{self.method}-QGS{group_size}-W{self.w_bit}-{self.version}" if self.is_awq else self.method


REFERENCE = Variant("fp16", "FP16")

_ROWS = (
    REFERENCE,
    Variant("awq-gemm", "AWQ", w_bit=4, version="GEMM"),
    Variant("awq-gemv", "AWQ", w_bit=4, version="GEMV"),
    Variant("awq-ct", "AWQ", w_bit=4, version="CT", published=False),
    Variant("awq-gguf", "AWQ", w_bit=4, version="GGUF", published=False),
    Variant("rtn", "RTN", w_bit=4, version="GEMM", published=False),
    Variant("bnb-4bit", "BnB.4", w_bit=4),
    Variant("bnb-8bit", "BnB.8", w_bit=8),
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ROWS}
"""What `quantize` makes by name, in the order of the published table."""

_FOREIGN = (
    Variant("gptq", "GPTQ", w_bit=4, version="GPTQ", published=False),
    Variant("ct", "CT", w_bit=4, version="CT", published=False),
    Variant("foreign", "other", published=False),
)
FOREIGN: dict[str, Variant] = {variant.name: variant for variant in _FOREIGN}
"""What other makers' checkpoints are beside those, and what is read alone."""


def known_variants() -> dict[str, Variant]:
    """Every variant by name, those of other makers last."""
    return {**VARIANTS, **FOREIGN}


def variants_named(names: Iterable[str]) -> list[Variant]:
    """The variants of these names, without repeats, in the table's order; `all` stands for every published one.

    Raises UserError for a name that is no variant, saying which exist."""
    wanted = list(names)
    if not wanted:
        raise UserError(f"no variant is named: choose some of {', '.join(VARIANTS)}, or all")
    unknown = [name for name in wanted if name not in VARIANTS and name != "all"]
    if unknown:
        raise UserError(f"unknown variant {unknown[0]!r}; there are: {', '.join(VARIANTS)}, or all")
    return [one for one in VARIANTS.values() if one.name in wanted or ("all" in wanted and one.published)]
