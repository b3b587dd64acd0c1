"""The reference's log-probabilities at every token of a text, kept on disk while the others are compared with it."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from quantize.errors import UserError


class ReferenceLogprobs:
    """The reference's log-probabilities, float16 [tokens, vocabulary], in a .npy file read a few rows at a time.

    Half precision moves a divergence by about 1e-5 nats; a file of single precision would be twice as large.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, parts: Iterator[torch.Tensor], tokens: int) -> None:
        """Keep log-probabilities that come as [rows, vocabulary], `tokens` rows in all; whole or not at all."""
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            at, rows = 0, None
            for part in parts:
                if rows is None:
                    shape = (tokens, part.shape[1])
                    rows = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
                rows[at : at + len(part)] = part.half().cpu().numpy()
                at += len(part)
            if rows is None or at != tokens:
                raise ValueError(f"{at} rows came, {tokens} were announced")
            rows.flush()
            del rows
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)

    def rows(self, sizes: Iterator[int]) -> Iterator[torch.Tensor]:
        """float32 [rows, vocabulary], as many rows at a time as `sizes` says, normalised again after their rounding.

        Raises UserError for a file of other lengths than asked for.
        """
        kept = np.load(self.path, mmap_mode="r", allow_pickle=False)
        at = 0
        for size in sizes:
            if at + size > len(kept):
                raise UserError(f"{self.path} holds {len(kept)} tokens, more were asked for: delete it and run again")
            yield torch.log_softmax(torch.from_numpy(np.array(kept[at : at + size])).float(), dim=-1)
            at += size
