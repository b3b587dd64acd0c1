"""What calibration leaves of a linear layer's inputs: their Gram matrix and their mean magnitudes.

For a layer with weight W and inputs X [tokens, in], quantizing W to W + D changes the output by X D^T, whose squared
norm is tr(D H D^T) with H = X^T X. So H is all that a search over D needs, however many tokens went into it.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SHRINKAGE = 0.2  # of what two input features have in common: taken for an accident of the calibration text
WIDE = 2048  # from here on the time of feedback in float32 is felt; below, its codes are a little better
MOST_BLOCKS, SMALLEST_BLOCK = 8, 1024  # 8 by 8 blocks of a symmetric matrix take 36 products of 64


@dataclass(frozen=True)
class InputStats:
    """Statistics of a linear layer's inputs over all calibration tokens.

    gram:     float32 [in, in], X^T X divided by the number of tokens.
    abs_mean: float32 [in], the mean of |x| per input feature.
    cross:    [in, in], (Y - X)^T X divided by it, Y the inputs in the source model; None where X are those. Of weights
              with few rows [out, in], their product with it. In the dtype of products with it (`product_dtype`)."""

    gram: Tensor
    abs_mean: Tensor
    cross: Tensor | None = None

    @cached_property
    def gram_lowp(self) -> Tensor:
        """The Gram matrix in the dtype that errors are multiplied in: bfloat16 where the CPU has it, else float32."""
        return self.gram.to(product_dtype(self.gram.device))

    def scaled(self, scales: Tensor) -> "InputStats":
        """The statistics of inputs divided by `scales` [in]: what the layer sees once AWQ scales are applied."""
        return InputStats((self.gram / scales).div_(scales.unsqueeze(1)), self.abs_mean / scales)

    def shrunk(self) -> Tensor:
        """The Gram matrix with its off-diagonal entries lessened by SHRINKAGE (Ledoit and Wolf, 2004); [in, in], in the
        dtype of products with it."""
        gram = torch.empty_like(self.gram, dtype=product_dtype(self.gram.device, len(self.gram)))
        for own in column_blocks(len(gram)):
            gram[own] = self.gram[own] * (1 - SHRINKAGE)
        gram.diagonal().copy_(self.gram.diagonal())
        return gram


def column_blocks(features: int) -> list[slice]:
    """The blocks in which a symmetric [features, features] matrix is worked through."""
    count = max(1, min(MOST_BLOCKS, features // SMALLEST_BLOCK))
    size = -(-features // count)
    return [slice(start, min(start + size, features)) for start in range(0, features, size)]


def transposed(matrix: Tensor) -> Tensor:
    """A contiguous copy of M^T, strip after strip on a CPU: of large matrices several times as fast as torch's own."""
    copy = matrix.new_empty(matrix.shape[::-1])
    for rows in strips(matrix):
        copy[:, rows] = matrix[rows].t()
    return copy


def strips(matrix: Tensor) -> list[slice]:
    """The rows that are turned at a time: 64 on a CPU, where they stay in its cache."""
    size = 64 if matrix.device.type == "cpu" else max(1, len(matrix))
    return [slice(start, start + size) for start in range(0, len(matrix), size)]


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """d H d^T of every row d of D [out, in]: the mean square of the change of each output feature; [out].
    Their sum, tr(D H D^T), is the mean squared norm of the change of the output.

    difference: float32; gram: H, multiplied in its own dtype (InputStats.gram_lowp). H is symmetric, so each pair of
    column blocks is multiplied once and counted twice. Products in bfloat16 are added up in float32: their errors
    average out to about 1e-5 of the sum of all rows."""
    factors = difference.to(gram.dtype)
    total = difference.new_zeros(len(difference))
    for own in column_blocks(gram.shape[0]):
        product = factors[:, own] @ gram[own, own]
        if own.start:
            product.addmm_(factors[:, : own.start], gram[: own.start, own], alpha=2)
        total += torch.sum(difference[:, own] * product, dim=1)
    return total


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; told by its kind, so that reruns agree."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def product_dtype(device: torch.device, features: int = WIDE) -> torch.dtype:
    """What products with a matrix of so many features are in: bfloat16 for many where the CPU has it, else float32."""
    half = features >= WIDE and device.type == "cpu" and multiplies_bfloat16(device)
    return torch.bfloat16 if half else torch.float32


class StatsAccumulator:
    """Adds up InputStats over batches; keeps no token.

    Where the CPU multiplies in bfloat16, the inputs are rounded to it, as the layer's own product does; the sums of
    batches are added up in float32."""

    def __init__(self, in_features: int, device: torch.device, weight: Tensor | None = None) -> None:
        """weight: float32 [out, in], whose product with the cross term is asked for in place of it."""
        self._gram = torch.zeros((in_features, in_features), dtype=torch.float32, device=device)
        self._abs_sum = torch.zeros(in_features, dtype=torch.float32, device=device)
        self._cross: Tensor | None = None
        self._tokens = 0
        self._dtype = product_dtype(device)
        self._weight = None if weight is None else weight.to(self._dtype)
        self._turned: dict[str, Tensor] = {}  # batches as [in, tokens], in memory that all of them share

    def add(self, inputs: Tensor, exact: Tensor | None = None, scales: Tensor | None = None) -> None:
        """inputs: [..., in], every leading position a token; exact: what they are in the source model, as many, not yet
        divided by scales [in]."""
        x = inputs.reshape(-1, inputs.shape[-1])
        self._tokens += x.shape[0]
        blocks, rows = column_blocks(x.shape[1]), self._turn("found", x)
        for number, own in enumerate(blocks):
            for other in blocks[: number + 1]:
                self._gram[other, own] += rows[other] @ rows[own].t()
        if exact is None:
            self._abs_sum += torch.linalg.vector_norm(rows, 1, dim=1, dtype=torch.float32)
            return
        lost = self._turn("lost", exact, x, scales)
        lost = lost if self._weight is None else self._weight @ lost
        self._cross = self._gram.new_zeros((len(lost), len(rows))) if self._cross is None else self._cross
        for own, other in itertools.product(column_blocks(len(lost)), blocks):
            self._cross[own, other] += lost[own] @ rows[other].t()

    def _turn(self, kind: str, x: Tensor, less: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        """(x / scales - less)^T, both [tokens, in], in the dtype of products."""
        turned = self._turned.get(kind)
        if turned is None or turned.shape[1] != len(x):
            turned = self._turned[kind] = x.new_empty(x.shape[::-1], dtype=self._dtype)
        for rows in strips(x):
            strip = x[rows] if scales is None else x[rows] / scales
            if less is not None:
                strip = strip - less[rows].to(self._dtype)
            turned[:, rows] = strip.t()
        return turned

    def finish(self) -> InputStats:
        """The means over all tokens added; of none, as if all features were alike. The accumulator is then spent."""
        self._turned.clear()
        if self._tokens == 0:
            return InputStats(torch.eye(len(self._gram), device=self._gram.device), torch.ones_like(self._abs_sum))
        gram = self._gram.div_(self._tokens)
        for own in column_blocks(len(gram)):  # in place: of many features it is the largest there is
            block = gram[own, own].triu_()
            block += block.triu(1).t()
            gram[own, : own.start] = transposed(gram[: own.start, own])
        if self._cross is not None:
            self._cross = self._cross.div_(self._tokens).to(product_dtype(gram.device, len(gram)))
        return InputStats(gram, self._abs_sum.div_(self._tokens), self._cross)
