"""Who takes part in the race of AWQ quantizers: each turns a model folder and token ids into packed 4-bit layers.

`python -m tests.lab.quantizers NAME SOURCE BLOCKS GROUP_SIZE OUT`, a process each, so that peak memory is its own.
SOURCE is a half-precision safetensors folder, BLOCKS a safetensors file with `blocks`, OUT one to write: the layers,
and in its metadata `seconds` and `peak_bytes`, the highest resident set size.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.int4.packing import pack_gemm
from quantize.int4.weight import LEVELS, Int4Weight
from quantize.process_memory import peak_resident_bytes
from quantize.quiet import quiet_libraries
from quantize.rounding.options import AwqOptions

Tensors = dict[str, Tensor]
Work = Callable[[str, Tensor, int], tuple[float, Tensors]]
"""(the model's folder, calibration token ids int64 [blocks, tokens], group size) -> seconds, and qweight, qzeros and
scales in the GEMM layout and every other changed tensor."""


def ours(source: str, blocks: Tensor, group_size: int, options: AwqOptions) -> tuple[float, Tensors]:
    """Our pipeline from files to packed layers; its seconds include reading the weights and packing."""
    from quantize.building.stream import LayerStream
    from quantize.model.layer_calls import runnable
    from quantize.model.pretrained import empty_model
    from quantize.model.skeleton import Skeleton
    from quantize.weights import open_weights

    folder = Path(source)
    skeleton = Skeleton.of(empty_model(folder), open_weights(folder))
    architecture = runnable(skeleton, torch.device("cpu")).with_group_size(group_size)
    stream = LayerStream(skeleton, architecture, torch.device("cpu"))
    tensors: Tensors = {}
    started = time.perf_counter()
    with torch.inference_mode():
        for result, _ in stream.quantized(blocks, replace(options, group_size=group_size)):
            for name, weight in result.weights.items():
                tensors |= {f"{name}.{part}": tensor for part, tensor in pack_gemm(weight).items()}
            tensors |= {name: tensor.half() for name, tensor in result.others.items()}
    return time.perf_counter() - started, tensors


def autoawq(source: str, blocks: Tensor, group_size: int, *, repaired: bool) -> tuple[float, Tensors]:
    """autoawq's own quantizer in float32; its seconds include its packing, not the loading of the model.

    On a CPU its search scales the weights that it meant to have saved. `repaired` hands it a state dict of copies,
    from outside; nothing else is changed.
    """
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer
    from transformers import AutoTokenizer

    class Repaired(AwqQuantizer):  # type: ignore[misc]
        def _compute_best_scale(self, x: Tensor, w_mean: Tensor, x_mean: Tensor, inspected: Any, *args: Any) -> Any:
            saved = {name: tensor.clone() for name, tensor in inspected.state_dict().items()}
            inspected.state_dict = lambda: saved
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, inspected, *args)
            finally:
                del inspected.state_dict

    how = {"torch_dtype": torch.float32, "trust_remote_code": False, "safetensors": True}
    model = AutoAWQForCausalLM.from_pretrained(source, **how)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    config = {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
    how = {"quant_config": config, "quantizer_cls": Repaired if repaired else AwqQuantizer}
    how |= {"max_calib_samples": blocks.shape[0], "max_calib_seq_len": blocks.shape[1]}
    started = time.perf_counter()
    model.quantize(tokenizer, calib_data=blocks.tolist(), **how)
    seconds = time.perf_counter() - started
    embeddings = model.model.get_input_embeddings().weight.data_ptr()  # the output head may be the same
    state = model.model.state_dict()
    return seconds, {name: tensor for name, tensor in state.items() if tensor.data_ptr() != embeddings}


def gptqmodel(source: str, blocks: Tensor, group_size: int) -> tuple[float, Tensors]:
    """gptqmodel's AWQ with its defaults, where that package is installed; it saves a folder, which we read back."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(torch.get_num_threads()))  # without it, it wants more cores
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=group_size, quant_method=METHOD.AWQ, format=FORMAT.GEMM)
    model = GPTQModel.load(source, config)
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in blocks.tolist()]
    started = time.perf_counter()
    model.quantize(data, batch_size=8)
    seconds = time.perf_counter() - started
    tensors: Tensors = {}
    with tempfile.TemporaryDirectory(prefix="quantable-") as folder:
        model.save(folder)
        for file in sorted(Path(folder).glob("*.safetensors")):
            tensors |= load_file(file)
    return seconds, tensors


def optimum_gptq(source: str, blocks: Tensor, group_size: int) -> tuple[float, Tensors]:
    """optimum's GPTQ with its defaults but for zero points, which AWQ's format has too; needs gptqmodel beside it.

    Its codes are packed in the GEMM layout here, outside its seconds, in place of its own packing.
    """
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors: Tensors = {}
    rounded = 0.0

    class Unpacked(GPTQQuantizer):  # type: ignore[misc]
        def pack_model(self, model: Any, quantizers: dict[str, tuple[Any, Tensor, Tensor, Tensor]]) -> None:
            nonlocal rounded
            rounded = time.perf_counter()
            for name, (_, scales, zeros, group_of) in quantizers.items():
                if not torch.equal(group_of.cpu(), torch.arange(len(group_of)) // group_size):
                    raise ValueError(f"{name}: its groups are not in the order of the columns")
                weight = _as_codes(model.get_submodule(name).weight.data, scales.float(), zeros.float())
                tensors.update({f"{name}.{part}": tensor for part, tensor in pack_gemm(weight).items()})

        def post_init_model(self, model: Any) -> Any:
            return model

    how = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(source, **how)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    rows = blocks.unsqueeze(1).tolist()
    data = [{"input_ids": row, "attention_mask": [[1] * len(row[0])]} for row in rows]
    quantizer = Unpacked(bits=4, dataset=data, group_size=group_size, sym=False)
    started = time.perf_counter()
    quantizer.quantize_model(model, tokenizer)
    return rounded - started, tensors


def _as_codes(weight: Tensor, scales: Tensor, zeros: Tensor) -> Int4Weight:
    """The codes of a weight [out, in] that is rounded already, with its scales and zero points, both [out, groups]."""
    grouped = weight.float().view(len(weight), scales.shape[1], -1)
    exact = (grouped / scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1))
    codes = exact.round().clamp_(0, LEVELS)
    if float((codes - exact).abs().max()) > 1e-2:  # of a step; float32 division leaves a millionth
        raise ValueError("its weights do not lie on the grid of its scales and zero points")
    return Int4Weight(codes.view(weight.shape).to(torch.uint8), scales.half(), zeros.to(torch.uint8))


OURS: dict[str, Work] = {
    "quantable, nearest": partial(ours, options=AwqOptions(0)),
    "quantable, gptq": partial(ours, options=AwqOptions(0, rounding="gptq")),
    "round to nearest": partial(ours, options=AwqOptions(0, search=False, clip=False, refit=False)),
}
CONTENDERS: dict[str, Work] = {
    **OURS,
    "autoawq, repaired": partial(autoawq, repaired=True),
    "autoawq, as it is": partial(autoawq, repaired=False),
    "gptqmodel": gptqmodel,
    "optimum, gptq": optimum_gptq,
}
"""By the name that the race prints; those of OURS run through our pipeline."""


def main(arguments: list[str]) -> int:
    """Run one contender, as the top of this file says."""
    name, source, blocks, group_size, out = arguments
    with quiet_libraries():
        seconds, tensors = CONTENDERS[name](source, load_file(blocks)["blocks"], int(group_size))
    facts = {"seconds": str(seconds), "peak_bytes": str(peak_resident_bytes())}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out, metadata=facts)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
