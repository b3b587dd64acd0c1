"""How many bytes a loaded model's weights take, and giving back what this process no longer needs."""

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn


def weights_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, and of the scales that bitsandbytes keeps beside a weight.

    A storage that several tensors share (a tied embedding) counts once.
    """
    return _storage_bytes(_weight_tensors((*model.parameters(), *model.buffers())))


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
    return _storage_bytes(_weight_tensors(own))


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[(str(tensor.device), storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


def _weight_tensors(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """These, and what bitsandbytes keeps beside them."""
    for tensor in tensors:
        yield tensor
        state = getattr(tensor, "quant_state", None)
        for holder in (tensor, state, getattr(state, "state2", None)):
            for name in ("SCB", "absmax", "code", "offset"):
                beside = getattr(holder, name, None)
                if isinstance(beside, torch.Tensor):
                    yield beside


def peak_resident_bytes() -> int | None:
    """The largest resident set size of this process so far; None where the system does not tell.

    Linux's own count in /proc comes first: `getrusage` passes the size of the process that started this one on to it.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_freed_memory() -> None:
    """Have the C library return freed pages to the system, where it can: kept ones count as this process's memory."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
