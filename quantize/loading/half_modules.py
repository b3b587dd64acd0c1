"""Embeddings and output head in half precision, in a model that computes in float32 otherwise."""

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY_CHUNK = 4096


class HalfEmbedding(nn.Module):
    """An embedding table stored in half precision that hands out rows in the compute dtype."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = embedding.weight
        self._embedding = (embedding,)  # in a tuple: not a submodule, its weight is counted here
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self._embedding[0](ids)
        return rows.to(self.dtype)


class HalfHead(nn.Module):
    """An output head stored in half precision: one token multiplies in it, more of them in the compute dtype.

    A CPU multiplies float16 matrices with one vector at memory speed and with several at a hundredth of float32's
    speed, so for several the rows are converted, a chunk of the vocabulary at a time.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.numel() == hidden.shape[-1]:
            logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight).to(hidden.dtype)
        else:
            chunks = torch.split(self.weight, VOCABULARY_CHUNK)
            logits = torch.cat([nn.functional.linear(hidden, rows.to(hidden.dtype)) for rows in chunks], dim=-1)
        return logits if self.bias is None else logits + self.bias.to(hidden.dtype)


def keep_half_embeddings(model: Any, dtype: torch.dtype) -> None:
    """On a CPU that computes in float32, embeddings and head stay as stored, in half the bytes."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, nn.Linear) and head.weight.dtype != dtype:
        names = {module: name for name, module in model.named_modules()}
        model.set_submodule(names[head], HalfHead(head))
    if embedding.weight.dtype != dtype:
        if type(embedding) is nn.Embedding:
            model.set_input_embeddings(HalfEmbedding(embedding, dtype))
        else:  # it scales its rows or more: no place for a wrapper
            embedding.to(dtype)
