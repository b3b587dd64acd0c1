"""Which quantized versions of a model there are: one row of VARIANTS each. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from quantize.errors import UserError

GROUP_SIZES = (128, 64, 32)
"""AWQ group sizes that the published kernels run, in the order in which they are tried."""


@dataclass(frozen=True)
class Variant:
    """One row of the quantization table.

    name:     what the user types.
    method:   the table's column "Method".
    w_bit:    bits a weight, None for the half-precision reference.
    version:  AWQ's packing layout ("GEMM" or "GEMV"), None for what is not AWQ.
    """

    name: str
    method: str
    w_bit: int | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        if self.method == "AWQ" and (self.w_bit != 4 or self.version not in ("GEMM", "GEMV")):
            raise ValueError(f"{self.name}: AWQ is 4-bit with version GEMM or GEMV")
        if self.method != "AWQ" and self.version is not None:
            raise ValueError(f"{self.name}: only AWQ has a version")

    @property
    def is_awq(self) -> bool:
        """True where calibration text and a group size are needed."""
        return self.method == "AWQ"

    def folder_suffix(self, group_size: int | None = None) -> str:
        """What the published checkpoints append to the model's name: `AWQ-QGS128-W4-GEMM`, `BnB.4`, `FP16`."""
        if self.is_awq:
            return f"AWQ-QGS{group_size}-W{self.w_bit}-{self.version}"
        return self.method


REFERENCE = Variant("fp16", "FP16")

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        REFERENCE,
        Variant("awq-gemm", "AWQ", w_bit=4, version="GEMM"),
        Variant("awq-gemv", "AWQ", w_bit=4, version="GEMV"),
        Variant("bnb-4bit", "BnB.4", w_bit=4),
        Variant("bnb-8bit", "BnB.8", w_bit=8),
    )
}
"""Every variant by name, in the order of the published table."""


def variants_named(names: Iterable[str]) -> list[Variant]:
    """The variants of these names, without repeats, in the table's order; `all` stands for every one.

    Raises UserError for a name that is no variant, saying which exist.
    """
    wanted = list(names)
    unknown = [name for name in wanted if name not in VARIANTS and name != "all"]
    if unknown:
        raise UserError(f"unknown variant {unknown[0]!r}; there are: {', '.join(VARIANTS)}, or all")
    return [variant for variant in VARIANTS.values() if "all" in wanted or variant.name in wanted]
