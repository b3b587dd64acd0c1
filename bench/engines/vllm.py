"""vLLM, one request at a time, in the process itself and without compiling."""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from bench.engines.protocol import Asked, Start

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


class VllmEngine:
    """bench.engines.protocol.Engine; logits come from a hook on the model, since its log-probabilities take minutes."""

    def __init__(self, asked: Asked) -> None:
        os.environ.update(SETTINGS)
        stated = json.loads((Path(asked.folder) / "config.json").read_text()).get("quantization_config") or {}
        if stated.get("version") == "gemv":
            raise NotImplementedError("vLLM would read AWQ's GEMV layout as GEMM: make awq-gemm or awq-ct")
        if stated.get("quant_method") == "gguf":
            raise NotImplementedError("vLLM reads no folder with a GGUF file: make awq-gemm or awq-ct")
        from vllm import LLM

        how: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 1, "enable_prefix_caching": False}
        length = max(asked.positions, 1024)
        how |= {"max_model_len": length, "max_num_batched_tokens": length, "enable_chunked_prefill": False}
        how |= {"dtype": asked.dtype if asked.chosen else "auto", "load_format": "safetensors"}
        self._llm = LLM(model=asked.folder, trust_remote_code=False, **how)
        packages = (one for name in ("vllm-cpu", "vllm") for one in importlib.metadata.distributions(name=name))
        self.version = next(packages).version
        self.computes = f"{str(self._llm.llm_engine.model_config.dtype).removeprefix('torch.')}, eager"
        [self._model] = self._llm.apply_model(lambda model: model)
        self._count = 0
        self._length = length

    def prefill(self, tokens: list[int]) -> None:
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        if self._count:
            engine.abort_request([str(self._count)])
        self._count += 1
        asked = SamplingParams(temperature=0, max_tokens=self._length - len(tokens), ignore_eos=True)
        engine.add_request(str(self._count), {"prompt_token_ids": tokens}, asked)
        self.step()

    def step(self) -> None:
        while not self._llm.llm_engine.step():
            pass

    def log_probabilities(self, tokens: list[int]) -> Any:
        import torch

        found: list[Any] = []
        with self._model.register_forward_hook(lambda module, given, out: found.append(out)):
            self.prefill(tokens)
        hidden = torch.cat(found)[: len(tokens) - 1]
        logits = self._model.compute_logits(hidden).float()
        return torch.log_softmax(logits, -1).detach().numpy()


start: Start = VllmEngine
