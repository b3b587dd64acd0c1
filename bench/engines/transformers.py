"""transformers by itself, with whatever its environment has to read a checkpoint."""

import importlib.metadata
import sys

from bench.engines.protocol import serve
from bench.engines.torch_model import TorchEngine


def start(folder: str, dtype: str, positions: int) -> TorchEngine:
    """bench.engines.protocol.Start."""
    import torch
    from transformers import AutoModelForCausalLM

    safe = {"trust_remote_code": False, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **safe)
    return TorchEngine(model, importlib.metadata.version("transformers"), dtype)


if __name__ == "__main__":
    sys.exit(serve(start))
