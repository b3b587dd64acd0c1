"""How many bytes a loaded model's weights take, and how many of them a decode step reads."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def weights_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, and of the scales that bitsandbytes keeps beside a weight.

    A storage that several tensors share (a tied embedding) counts once.
    """
    return _storage_bytes((*model.parameters(), *model.buffers()))


def decode_bytes(model: Any) -> int | None:
    """Bytes of weights and buffers that a decode step must read at least, each storage once.

    That is all of them but the input embedding, of which a step takes one row, unless something else holds the same
    storage (an output head tied to it). None for a model that does not name its input embedding.
    """
    if not hasattr(model, "get_input_embeddings"):
        return None
    embedding = model.get_input_embeddings()
    passed_over = set() if embedding is None else set(embedding.modules())
    read = [module for module in model.modules() if module not in passed_over]
    own = (tensor for module in read for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    return _storage_bytes(own)


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of these tensors, and of what bitsandbytes keeps beside them."""
    storages = {}
    for tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        holders = (tensor, state, getattr(state, "state2", None))
        beside = [getattr(holder, name, None) for holder in holders for name in ("SCB", "absmax", "code", "offset")]
        for part in (tensor, *beside):
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                storages[(str(part.device), storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())
