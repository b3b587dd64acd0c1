"""gptqmodel, on the kernel that it chooses."""

import importlib.metadata
import os

import torch

from bench.engines.protocol import Asked
from bench.engines.transformers import TorchEngine


def start(asked: Asked) -> TorchEngine:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(torch.get_num_threads()))  # by itself it wants four cores
    from gptqmodel import BACKEND, GPTQModel

    how = {"dtype": getattr(torch, asked.dtype), "trust_remote_code": False}
    loaded = GPTQModel.load(asked.folder, backend=BACKEND.AUTO, device="cpu", **how)
    model = getattr(loaded, "model", loaded)
    kernels = sorted({type(one).__name__ for one in model.modules() if hasattr(one, "qweight")})
    return TorchEngine(model, importlib.metadata.version("gptqmodel"), ", ".join([asked.dtype, *kernels]))
