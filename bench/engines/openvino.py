"""OpenVINO, on the graph that it makes of a transformers model: half precision, or AWQ's GEMM layout."""

import importlib.metadata
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import nn

from bench.engines.protocol import Asked, Start, log_softmax

INPUTS = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")


class Stateless(nn.Module):
    """A causal language model as a function of tensors alone: INPUTS, then each layer's keys and values."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, logits_to_keep: Any, *past: Any) -> Any:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):  # set, since an empty layer's cannot be traced
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        given = dict(zip(INPUTS, (input_ids, attention_mask, position_ids, logits_to_keep), strict=True))
        out = self.model(**given, past_key_values=cache)
        return out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def torch_model(folder: Path) -> Any:
    """The model in float32, its 4-bit layers as autoawq's modules, which OpenVINO's converter knows."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    stated, how = getattr(config, "quantization_config", None), {"dtype": torch.float32, "attn_implementation": "eager"}
    if stated is None:
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, **how).eval()
    if stated.get("quant_method") != "awq" or stated.get("version") != "gemm":
        raise NotImplementedError("OpenVINO reads half precision and AWQ's GEMM layout here: make awq-gemm")
    from awq.modules.linear import WQLinear_GEMM

    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **how).eval()
    held = {name: one for path in sorted(folder.glob("*.safetensors")) for name, one in load_file(path).items()}
    for name, linear in list(model.named_modules()):
        if f"{name}.qweight" in held:
            sizes = (linear.in_features, linear.out_features, linear.bias is not None, "cpu")
            model.set_submodule(name, WQLinear_GEMM(stated["bits"], stated["group_size"], *sizes))
    missing, extra = model.load_state_dict(held, strict=False)
    model.tie_weights()
    if extra or set(missing) - set(model.all_tied_weights_keys):
        raise ValueError(f"the files do not fit the model: {[*extra, *missing][0]}")
    model.config.quantization_config = AwqConfig(bits=stated["bits"], group_size=stated["group_size"])
    return model


def stateful(model: Any) -> Any:
    """OpenVINO's graph of a model, which keeps keys and values between calls."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers, shape = config.num_hidden_layers, (1, config.num_key_value_heads, 2, width)
    past = [torch.zeros(shape) for _ in range(2 * layers)]
    ids = torch.zeros(1, 3, dtype=torch.int64)
    example = (ids, torch.ones(1, 5, dtype=torch.int64), torch.arange(2, 5)[None], torch.tensor([1, 2]), *past)
    with torch.no_grad():
        graph = ov.convert_model(Stateless(model), example_input=example)
    kept = [f"past.{n}.{part}" for n in range(layers) for part in ("key", "value")]
    for node, name in zip(graph.inputs, (*INPUTS, *kept), strict=True):
        node.get_tensor().set_names({name})
        dims = [1, shape[1], -1, width] if name in kept else [-1] if name == INPUTS[-1] else [1, -1]
        node.get_node().set_partial_shape(ov.PartialShape(dims))
    results = ["logits", *(name.replace("past", "present") for name in kept)]
    for node, name in zip(graph.outputs, results, strict=True):
        node.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, dict(zip(kept, results[1:], strict=True)))
    return graph


EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
"""What it computes in where the user asks for float32; by itself it may take bfloat16, 8-bit activations and keys."""


class OpenVinoEngine:
    """bench.engines.protocol.Engine."""

    def __init__(self, asked: Asked) -> None:
        core = ov.Core()
        how: dict[str, Any] = dict(EXACT) if asked.chosen and asked.dtype == "float32" else {}
        if "OMP_NUM_THREADS" in os.environ:
            how["INFERENCE_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "model.xml"
            ov.save_model(stateful(torch_model(Path(asked.folder))), file, compress_to_fp16=True)
            compiled = core.compile_model(core.read_model(file), "CPU", {"PERFORMANCE_HINT": "LATENCY", **how})
        self._request = compiled.create_infer_request()
        self._position, self._token = 0, 0
        self.version = importlib.metadata.version("openvino")
        said = {name.lower(): compiled.get_property(name) for name in EXACT}
        self.computes = ", ".join(f"{k} {x.to_string() if isinstance(x, ov.Type) else x}" for k, x in said.items())

    def prefill(self, tokens: list[int]) -> None:
        self._position = 0
        self._token = int(self._take(tokens, [len(tokens) - 1]).argmax())

    def step(self) -> None:
        self._token = int(self._take([self._token], [0]).argmax())

    def log_probabilities(self, tokens: list[int]) -> Any:
        self._position = 0
        return log_softmax(self._take(tokens, list(range(len(tokens) - 1))))

    def _take(self, tokens: list[int], rows: list[int]) -> Any:
        """Run these after what is in the cache: logits float32 [rows, vocabulary]."""
        if self._position == 0:
            self._request.reset_state()
        begin, self._position = self._position, self._position + len(tokens)
        given = ([tokens], [[1] * self._position], [list(range(begin, self._position))], rows)
        self._request.infer({name: np.array(one, np.int64) for name, one in zip(INPUTS, given, strict=True)})
        return self._request.get_tensor("logits").data[0].astype(np.float32)


start: Start = OpenVinoEngine
