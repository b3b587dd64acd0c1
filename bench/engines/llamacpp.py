"""llama.cpp, on the GGUF file of a checkpoint, in the process itself."""

import ctypes
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from bench.engines.protocol import Asked, Start, log_softmax


class LlamaCppEngine:
    """bench.engines.protocol.Engine; activations are rounded to 8 bits for 4-bit weights, keys kept in float16."""

    def __init__(self, asked: Asked) -> None:
        file = Path(asked.folder) / "model.gguf"
        if not file.is_file():
            raise NotImplementedError("llama.cpp reads GGUF alone: make awq-gguf")
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        held = llama_cpp.llama_model_default_params()
        held.use_extra_bufts = False  # its AMX kernels end the process on Q4_1
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), held)
        threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        how = llama_cpp.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = max(asked.positions, 512)
        how.n_threads = how.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, how) if self._model else None
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot read {file.name}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._words, self._vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary), vocabulary
        self._batch = llama_cpp.llama_batch_init(how.n_batch, 0, 1)
        self._position, self._token = 0, 0
        self.version = importlib.metadata.version("llama-cpp-python")
        kind = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_desc(self._model, kind, len(kind))
        form = kind.value.decode().split()[-1]
        self.computes = f"{form}{', 8-bit activations, no AMX' * form.startswith('Q')}, {threads} threads"

    def prefill(self, tokens: list[int]) -> None:
        self._position = 0
        self._token = int(self._take(tokens).argmax())

    def step(self) -> None:
        self._token = int(self._take([self._token]).argmax())

    def log_probabilities(self, tokens: list[int]) -> Any:
        self._position = 0
        return log_softmax(self._take(tokens, every=True)[:-1])

    def _take(self, tokens: list[int], *, every: bool = False) -> Any:
        """Run these after what is in the cache; the logits float32 [n, vocabulary], of the last alone unless every."""
        if self._position == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        batch, last = self._batch, len(tokens) - 1
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.logits[at] = token, self._position + at, every or at == last
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self._position += len(tokens)
        rows = len(tokens) if every else 1
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape=(rows, self._words))

    def ids_of(self, text: str) -> list[int]:
        """What its own tokenizer makes of a text, without first tokens."""
        data = text.encode()
        ids = (llama_cpp.llama_token * (len(data) + 8))()
        found = llama_cpp.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), False, False)
        return list(ids[:found])


start: Start = LlamaCppEngine
