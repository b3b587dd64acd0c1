"""Who takes part in the race of AWQ quantizers: each turns a model folder and token ids into packed 4-bit layers.

Run as `python -m bench.lab.quantizers NAME REQUEST.json`, each in a process of its own, so that peak memory is its own.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.int4.packing import pack_gemm
from quantize.int4.weight import LEVELS, Int4Weight
from quantize.process_memory import peak_resident_bytes, prefer_huge_pages
from quantize.quiet import quiet_libraries
from quantize.rounding.options import AwqOptions

OFF_GRID = 1e-2
"""How far, in steps, a rounded weight may lie from its code: float32 division leaves a millionth."""

Work = Callable[["Task"], float]


@dataclass(frozen=True)
class Task:
    """What a contender is given: the model's folder, the calibration token ids and where its layers go.

    source: half-precision safetensors folder; blocks: a safetensors file with int64 `blocks` [blocks, tokens];
    out: a safetensors file to write, qweight, qzeros and scales in the GEMM layout and every other changed tensor.
    """

    source: str
    blocks: str
    out: str
    group_size: int

    def token_ids(self) -> Tensor:
        blocks: Tensor = load_file(self.blocks)["blocks"]
        return blocks


def ours(task: Task, options: AwqOptions) -> float:
    """Our pipeline from files to packed layers; its seconds include reading the weights and packing."""
    prefer_huge_pages()  # as the command does
    from quantize.building.stream import LayerStream
    from quantize.model.layer_calls import runnable
    from quantize.model.pretrained import empty_model
    from quantize.model.skeleton import Skeleton
    from quantize.weights import open_weights

    folder = Path(task.source)
    skeleton = Skeleton.of(empty_model(folder), open_weights(folder))
    architecture = runnable(skeleton, torch.device("cpu")).with_group_size(task.group_size)
    stream = LayerStream(skeleton, architecture, torch.device("cpu"))
    tensors: dict[str, Tensor] = {}
    started = time.perf_counter()
    with torch.inference_mode():
        for result, _ in stream.quantized(task.token_ids(), replace(options, group_size=task.group_size)):
            for name, weight in result.weights.items():
                tensors |= {f"{name}.{part}": tensor for part, tensor in pack_gemm(weight).items()}
            tensors |= {name: tensor.half() for name, tensor in result.others.items()}
    seconds = time.perf_counter() - started
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, task.out)
    return seconds


def autoawq(task: Task, *, repaired: bool) -> float:
    """autoawq's own quantizer in float32; its seconds include its packing, not the loading of the model.

    On a CPU its search scales the weights that it meant to have saved. `repaired` hands it a state dict of copies,
    from outside; nothing else is changed.
    """
    with quiet_libraries():
        from awq import AutoAWQForCausalLM
        from awq.quantize.quantizer import AwqQuantizer
        from transformers import AutoTokenizer

        class Repaired(AwqQuantizer):  # type: ignore[misc]
            def _compute_best_scale(
                self, x: Tensor, w_mean: Tensor, x_mean: Tensor, module2inspect: Any, *args: Any, **kwargs: Any
            ) -> Tensor:
                saved = {name: tensor.clone() for name, tensor in module2inspect.state_dict().items()}
                module2inspect.state_dict = lambda: saved
                try:
                    scales: Tensor = super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args, **kwargs)
                finally:
                    del module2inspect.state_dict
                return scales

        model = AutoAWQForCausalLM.from_pretrained(
            task.source, torch_dtype=torch.float32, trust_remote_code=False, safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(task.source, trust_remote_code=False)
        ids = task.token_ids()
        started = time.perf_counter()
        model.quantize(
            tokenizer,
            quant_config={"zero_point": True, "q_group_size": task.group_size, "w_bit": 4, "version": "GEMM"},
            calib_data=ids.tolist(),
            max_calib_samples=ids.shape[0],
            max_calib_seq_len=ids.shape[1],
            quantizer_cls=Repaired if repaired else AwqQuantizer,
        )
        seconds = time.perf_counter() - started
    state = model.model.state_dict()
    embeddings = model.model.get_input_embeddings().weight.data_ptr()
    kept = {name: tensor.contiguous() for name, tensor in state.items() if tensor.data_ptr() != embeddings}
    save_file(kept, task.out)
    return seconds


def gptqmodel(task: Task) -> float:
    """gptqmodel's AWQ with its defaults, where that package is installed; it saves a folder, which we read back."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(torch.get_num_threads()))  # without it, it wants more cores
    with quiet_libraries():
        from gptqmodel import GPTQModel
        from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig

        config = QuantizeConfig(bits=4, group_size=task.group_size, quant_method=METHOD.AWQ, format=FORMAT.GEMM)
        model = GPTQModel.load(task.source, config)
        data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in task.token_ids().tolist()]
        started = time.perf_counter()
        model.quantize(data, batch_size=8)
        seconds = time.perf_counter() - started
        folder = Path(task.out).with_suffix("")
        model.save(str(folder))
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    save_file(tensors, task.out)
    return seconds


def optimum_gptq(task: Task) -> float:
    """optimum's GPTQ with its defaults but for zero points, which AWQ's format has too; needs gptqmodel beside it.

    Its codes are packed in the GEMM layout here, outside its seconds, in place of its own packing.
    """
    with quiet_libraries():
        from optimum.gptq import GPTQQuantizer
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tensors: dict[str, Tensor] = {}
        rounded = 0.0

        class Unpacked(GPTQQuantizer):  # type: ignore[misc]
            def pack_model(self, model: Any, quantizers: dict[str, tuple[Any, Tensor, Tensor, Tensor]]) -> None:
                nonlocal rounded
                rounded = time.perf_counter()
                for name, (_, scales, zeros, group_of) in quantizers.items():
                    if not torch.equal(group_of.cpu(), torch.arange(len(group_of)) // task.group_size):
                        raise ValueError(f"{name}: its groups are not in the order of the columns")
                    weight = _as_codes(model.get_submodule(name).weight.data, scales.float(), zeros.float())
                    tensors.update({f"{name}.{part}": tensor for part, tensor in pack_gemm(weight).items()})

            def post_init_model(self, model: Any) -> Any:
                return model

        model = AutoModelForCausalLM.from_pretrained(
            task.source, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        rows = task.token_ids().unsqueeze(1).tolist()
        data = [{"input_ids": row, "attention_mask": [[1] * len(row[0])]} for row in rows]
        quantizer = Unpacked(bits=4, dataset=data, group_size=task.group_size, sym=False)
        tokenizer = AutoTokenizer.from_pretrained(task.source, trust_remote_code=False)
        started = time.perf_counter()
        quantizer.quantize_model(model, tokenizer)
    save_file(tensors, task.out)
    return rounded - started


def _as_codes(weight: Tensor, scales: Tensor, zeros: Tensor) -> Int4Weight:
    """The codes of a weight [out, in] that is rounded already, with its scales and zero points, both [out, groups]."""
    grouped = weight.float().view(len(weight), scales.shape[1], -1)
    exact = (grouped / scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1))
    codes = exact.round().clamp_(0, LEVELS)
    if float((codes - exact).abs().max()) > OFF_GRID:
        raise ValueError("its weights do not lie on the grid of its scales and zero points")
    return Int4Weight(codes.view(weight.shape).to(torch.uint8), scales.half(), zeros.to(torch.uint8))


OURS: dict[str, Work] = {
    "quantable, nearest": partial(ours, options=AwqOptions(0)),
    "quantable, gptq": partial(ours, options=AwqOptions(0, rounding="gptq")),
    "round to nearest": partial(ours, options=AwqOptions(0, search=False, clip=False, refit=False)),
}
"""What runs through our pipeline, by the name that the race prints."""

CONTENDERS: dict[str, Work] = {
    **OURS,
    "autoawq, repaired": partial(autoawq, repaired=True),
    "autoawq, as it is": partial(autoawq, repaired=False),
    "gptqmodel": gptqmodel,
    "optimum, gptq": optimum_gptq,
}
"""Every contender by the name that the race prints."""


def main(arguments: list[str]) -> int:
    """Run one contender; write {"seconds", "peak_bytes"} beside its layers. peak_bytes: highest resident set size."""
    name, path = arguments
    task = Task(**json.loads(Path(path).read_text()))
    facts = {"seconds": CONTENDERS[name](task), "peak_bytes": peak_resident_bytes()}
    Path(task.out).with_suffix(".json").write_text(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
