"""Checkpoints that other programs make of one model, each in its own environment, judged by `bench`.

python -m tests.lab.makers --python gptqmodel=PATH --python auto-round=PATH --out runs/makers

Each is compared with its dequantized weights: unpacked here by shifts alone, in a dense model, on the same text.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.run.run import bench
from bench.worker.quality import evaluation_blocks, quality
from quantize.calibration import builtin_texts
from quantize.model.pretrained import model_of, tokenizer_of
from quantize.quiet import quiet_libraries
from quantize.shell import guarded
from quantize.source import open_source

LAYERS = "model.layers"

GPTQMODEL = """
import os
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count())))  # by itself it wants four cores
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD
def make(source, out, texts, **how):
    kinds = {"method": METHOD(how.pop("method")), "format": FORMAT(how.pop("format"))}
    how |= {"act_group_aware": False} if how.get("desc_act") else {}
    model = GPTQModel.load(source, QuantizeConfig(bits=4, group_size=64, **kinds, **how), device="cpu")
    model.quantize(texts, batch_size=1)
    model.save(out)
"""
AUTO_ROUND = """
import glob, os, shutil
from transformers import AutoModelForCausalLM, AutoTokenizer
from auto_round import AutoRound
def make(source, out, texts, format, **how):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    few = {"iters": 2, "nsamples": 8, "seqlen": 256, "batch_size": 1, "dataset": texts, "device_map": "cpu"}
    AutoRound(model, tokenizer, bits=4, group_size=64, **few, **how).quantize_and_save(out, format=format)
    for inner in [] if os.path.exists(out + "/config.json") else glob.glob(out + "/*/config.json"):
        shutil.copytree(os.path.dirname(inner), out, dirs_exist_ok=True)
"""
LLM_COMPRESSOR = """
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
torch.Tensor.pin_memory = lambda self, *rest: self
def make(source, out, texts, **how):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    data = Dataset.from_list([dict(tokenizer(text, truncation=True, max_length=256)) for text in texts])
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=64, **how)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(model=model, tokenizer=tokenizer, dataset=data, recipe=recipe, num_calibration_samples=len(texts),
            max_seq_length=256)
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
"""
AUTOAWQ = """
import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from transformers import AutoTokenizer
class Repaired(AwqQuantizer):  # on a CPU its search scales the weights that it meant to have saved
    def _compute_best_scale(self, x, w_mean, x_mean, inspected, *rest):
        saved = {name: one.clone() for name, one in inspected.state_dict().items()}
        inspected.state_dict = lambda: saved
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, inspected, *rest)
        finally:
            del inspected.state_dict
def make(source, out, texts, version):
    model = AutoAWQForCausalLM.from_pretrained(source, torch_dtype=torch.float32, safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": version}
    few = {"calib_data": texts, "max_calib_samples": len(texts), "max_calib_seq_len": 256}
    model.quantize(tokenizer, quant_config=config, quantizer_cls=Repaired, **few)
    model.save_quantized(out)
    tokenizer.save_pretrained(out)
"""
SCRIPTS = {"autoawq": AUTOAWQ, "gptqmodel": GPTQMODEL, "auto-round": AUTO_ROUND, "llm-compressor": LLM_COMPRESSOR}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "autoawq-gemm": ("autoawq", {"version": "GEMM"}),
    "autoawq-gemv": ("autoawq", {"version": "GEMV"}),
    "gptqmodel-awq": ("gptqmodel", {"method": "awq", "format": "gemm"}),
    "gptqmodel-gptq": ("gptqmodel", {"method": "gptq", "format": "gptq"}),
    "gptqmodel-gptq-v2-act-order": ("gptqmodel", {"method": "gptq", "format": "gptq_v2", "desc_act": True}),
    "auto-round-awq": ("auto-round", {"format": "auto_awq", "sym": False}),
    "auto-round-gptq-symmetric": ("auto-round", {"format": "auto_gptq", "sym": True}),
    "auto-round": ("auto-round", {"format": "auto_round", "sym": True}),
    "llm-compressor": ("llm-compressor", {"symmetric": True}),
    "llm-compressor-asymmetric": ("llm-compressor", {"symmetric": False}),
}  # fmt: skip


def make(name: str, python: str, source: Path, out: Path, texts: list[str]) -> str | None:
    """Make one checkpoint; why it could not be made, None where it was."""
    maker, how = CHECKPOINTS[name]
    call = f"\nimport json, sys\nhow = json.loads(sys.argv[1])\nmake({str(source)!r}, {str(out / name)!r}, **how)\n"
    command = [python, "-c", SCRIPTS[maker] + call, json.dumps({**how, "texts": texts})]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    (out / f"{name}.log").write_text(ended.stdout + ended.stderr)
    if ended.returncode == 0 and (out / name / "config.json").is_file():
        for path in (out / name).glob("quant_log.csv"):
            path.unlink()
        return None
    shutil.rmtree(out / name, ignore_errors=True)
    return (ended.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]


def nibbles(packed: Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """int32 [rows, n] -> int64 [rows, 8 n]."""
    shifts = torch.tensor([4 * order.index(place) for place in range(8)])
    return (packed.long().unsqueeze(-1) >> shifts & 15).flatten(1)


def dense_weight(parts: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """What the tensors of one layer stand for, float32 [out, in]."""
    if "weight_packed" in parts:
        codes, scales = nibbles(parts["weight_packed"]), parts["weight_scale"].float()
        zeros = torch.full(scales.shape, 8)
        if "weight_zero_point" in parts:
            zeros = nibbles(parts["weight_zero_point"].t().contiguous()).t()[: len(scales)]
        group = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
    elif config.get("version") == "gemv":
        codes, groups = nibbles(parts["qweight"]), 8 * parts["qweight"].shape[1] // config["group_size"]
        zeros, scales = nibbles(parts["qzeros"])[:, :groups], parts["scales"].float()[:, :groups]
        group = torch.arange(codes.shape[1]) // config["group_size"]
    elif "awq" in (config["quant_method"], str(config.get("packing_format", ""))[-3:]):
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        codes, zeros = nibbles(parts["qweight"], order).t(), nibbles(parts["qzeros"], order).t()
        scales = parts["scales"].float().t()
        group = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
    else:
        codes, zeros = nibbles(parts["qweight"].t().contiguous()), nibbles(parts["qzeros"]).t()
        zeros = zeros + (config.get("checkpoint_format") != "gptq_v2")
        scales, plain = parts["scales"].float().t(), torch.arange(codes.shape[1])
        group = parts.get("g_idx", plain // (codes.shape[1] // scales.shape[1])).long()
    return ((codes - zeros[:, group]) * scales[:, group]).contiguous()


def dense_folder(folder: Path, base: Path, out: Path) -> Path:
    """The base model in half precision's place: its layers dequantized from the checkpoint in `folder`."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    held = {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}
    exact = {name: one.float() for name, one in load_file(base / "model.safetensors").items()}
    for name in [name for name in exact if name.startswith(LAYERS) and name.endswith("_proj.weight")]:
        layer = name.removesuffix("weight")
        parts = {key.removeprefix(layer): one for key, one in held.items() if key.startswith(layer)}
        exact[name] = dense_weight(parts, config)
    exact |= {name: one.float() for name, one in held.items() if name in exact and "_proj" not in name}
    shutil.copytree(base, out, dirs_exist_ok=True)
    save_file(exact, out / "model.safetensors", metadata={"format": "pt"})
    return out


def run(arguments: argparse.Namespace) -> int:
    """Make, judge, compare; 1 where a perplexity is further than 0.1% from that of the dequantized weights."""
    given = dict(one.split("=", 1) for one in arguments.python)
    pythons = {"autoawq": sys.executable, **{name: str(Path(one).absolute()) for name, one in given.items()}}
    arguments.out.mkdir(parents=True, exist_ok=True)
    out, base, wrong = arguments.out.resolve(), open_source(arguments.source).folder, 0
    texts = [text[:2000] for text in builtin_texts("calibration")[:16]]
    for name in arguments.checkpoint or CHECKPOINTS:
        maker, _ = CHECKPOINTS[name]
        if not (out / name).is_dir() and maker in pythons and (why := make(name, pythons[maker], base, out, texts)):
            print(f"{name}: not made: {why}", flush=True)
    found = bench(out, scenarios=(), device="cpu", dtype="float32", reference=arguments.source)
    with quiet_libraries():
        blocks = evaluation_blocks(tokenizer_of(base), blocks=12, block_tokens=512)
    for record in found.records:
        name = record.subject.name
        if record.quality is None or name not in CHECKPOINTS:
            print(f"{name}: {record.reason or 'the reference'}", flush=True)
            continue
        with quiet_libraries():
            dense = quality(model_of(dense_folder(out / name, base, out / ".dense")), blocks).perplexity
        ratio = record.quality.perplexity / dense - 1
        wrong += abs(ratio) > 1e-3
        loss = record.quality.divergence.mean if record.quality.divergence else float("nan")
        print(
            f"{name}: {record.quality.perplexity:.4f}, dequantized {dense:.4f} ({ratio:+.4%}), KLD {loss:.4f}",
            flush=True,
        )
    return int(wrong > 0)


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--python", action="append", default=[], metavar="MAKER=PATH", help=", ".join(SCRIPTS))
    cli.add_argument("--checkpoint", action="append", choices=list(CHECKPOINTS), help="make these alone; repeatable")
    cli.add_argument("--source", default="smollm2-135m", help="the base model (default %(default)s)")
    cli.add_argument("--out", type=Path, default=Path("runs/makers"))
    return guarded("makers", lambda: run(cli.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
