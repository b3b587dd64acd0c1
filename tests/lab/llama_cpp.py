"""Small random models as GGUF, in llama.cpp: its expectations beside transformers' in float32, a line each.

python -m tests.lab.llama_cpp        (in an environment that has llama-cpp-python too: `nox -s engines`)
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.engines.llamacpp import LlamaCppEngine
from bench.engines.protocol import Asked
from bench.worker.quality import kl_nats
from quantize.gguf_file import GGUF_NAME, check_gguf, write_gguf
from quantize.quiet import quiet_libraries
from quantize.source import open_source
from quantize.weights import open_weights

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "vocab_size": 49152}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_parameters": {**LLAMA_3, "original_max_position_embeddings": 256}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("llama", {"attention_bias": True}),
    ("llama", {"head_dim": 32}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 128}),
]
MOST = 2e-4  # nats a token: float16 keys; rows in another order make 1,000 times that


def divergence(kind: str, fields: dict[str, Any], tokenizer: Path, folder: Path) -> float:
    """Mean KL(transformers || llama.cpp) over 300 random tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = {**SIZES, "tie_word_embeddings": False, "rope_theta": 5e4, **fields}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # else norms are ones, and attention hardly looks
            parameter.copy_((3 * parameter if parameter.dim() > 1 else 1 + 0.2 * torch.randn_like(parameter)).half())
        model.half().save_pretrained(folder)
        weights = open_weights(folder)
        check_gguf(folder, weights.names())
        write_gguf(weights, folder / GGUF_NAME, kind, folder)
        tokens = torch.randint(10, 40_000, (1, 300))
        expected = torch.log_softmax(model.float()(input_ids=tokens).logits[0, :-1], -1)
    engine = LlamaCppEngine(Asked(str(folder), "float32", chosen=False, positions=512))
    return float(kl_nats(expected, torch.tensor(engine.log_probabilities(tokens[0].tolist()))).mean())


def main() -> int:
    wrong = 0
    with quiet_libraries():
        tokenizer = open_source("smollm2-135m").folder
        for kind, fields in MODELS:
            with tempfile.TemporaryDirectory() as scratch:
                found = divergence(kind, fields, tokenizer, Path(scratch) / "model")
            wrong += not found <= MOST
            print(f"{kind} {fields}: {found:.1e} nats a token", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
