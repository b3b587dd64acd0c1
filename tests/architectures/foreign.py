"""What another engine makes of an AWQ checkpoint: transformers with gptqmodel's kernels, else GPTQModel's own loader.

`python foreign.py CHECKPOINT TOKENS OUT`, where gptqmodel is installed, writes the logits and, as the metadata of the
file, the engine. Each checkpoint gets a process: gptqmodel changes transformers once imported.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def load(checkpoint: str) -> tuple[Any, str]:
    """The model in float32 on the CPU, and the engine that has loaded it. Raises what the engine raises."""
    import transformers
    from gptqmodel import BACKEND, GPTQModel

    config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    kind = getattr(transformers, config.architectures[0])
    how = {"dtype": torch.float32, "device_map": "cpu", "output_loading_info": True}
    try:
        model, found = kind.from_pretrained(checkpoint, trust_remote_code=False, use_safetensors=True, **how)
        if not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            return model, "transformers with gptqmodel"
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError):
        pass  # it has no place for experts one by one
    return GPTQModel.load(checkpoint, backend=BACKEND.AUTO, device="cpu", dtype=torch.float32).model, "GPTQModel"


def main(argv: Sequence[str]) -> int:
    """Run it; an exception of the engine ends the process with its own words."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    checkpoint, tokens, out = argv
    model, engine = load(checkpoint)
    with torch.inference_mode():
        logits = model(input_ids=load_file(tokens)["tokens"], use_cache=False).logits.float()
    save_file({"logits": logits.contiguous()}, out, metadata={"engine": engine})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
