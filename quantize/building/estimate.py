"""Before any work: how much memory, disk and time a run will take, beside what there is."""

import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from quantize.building.job import Job
from quantize.building.layer import BATCH_TOKENS
from quantize.errors import UserError
from quantize.methods.base import Recipe
from quantize.model.apart import experts_of, take_apart
from quantize.model.architecture import Architecture, architecture_of
from quantize.model.pretrained import empty_model
from quantize.process_memory import peak_resident_bytes, resident_bytes
from quantize.progress import Step, span
from quantize.rounding.awq_search import FINALISTS, MOST_WEIGHTS, SCALE_GRID, SOME_WEIGHTS
from quantize.rounding.correction import ROW_BLOCK
from quantize.rounding.gram import column_blocks, product_dtype
from quantize.source import config_source
from quantize.variant import Variant, variants_named

FLOAT_BYTES, PROBE_SIZE, PROBE_S, CALL_SIZE = 4, 2048, 0.3, 4096
AGAIN = 1.8  # of a forward pass that running up to each input in turn takes
SHARE = 0.67  # of its best speed that a product has amid what feeds it
SEARCHED, ROUNDED = 150, 290  # times that the search, and the choice of codes in a quantized model, round each weight
PASSED = 55  # times that a forward pass rounds each input
CALLS = {"cpu": 50, "cuda": 13}  # roundings that one column of ROW_BLOCK rows takes while its codes are chosen
SEARCH_COPIES, ROUNDING_COPIES = 2, 8  # of the largest group of weights, of a block of rows, at once
CUDA_SHARE = 1.2  # of what is counted that torch held on a GPU
LIBRARIES_BYTES = 120 * 10**6  # that products take on a CPU beside their operands
LAYER_COPIES = 150  # what a layer's search and codes cost, in copies of its weights


@dataclass(frozen=True)
class Estimate:
    """What a calibrated run will take. Bytes and seconds.

    parameters, layers: of the model.
    peak_bytes:        of the process on a CPU, of the device on CUDA.
    disk_bytes:        parts and finished files together, at the worst moment.
    free_memory_bytes: that this process may hold in all; free_disk_bytes: where the checkpoints go."""

    parameters: int
    layers: int
    peak_bytes: int
    disk_bytes: int
    seconds: float
    free_memory_bytes: int
    free_disk_bytes: int

    def line(self) -> str:
        memory = f"{self.peak_bytes / 1e9:.1f} GB of memory ({self.free_memory_bytes / 1e9:.1f} free)"
        disk = f"{self.disk_bytes / 1e9:.1f} GB of disk ({self.free_disk_bytes / 1e9:.1f} free)"
        weights = f"{self.parameters / 1e9:.2f} billion weights in {self.layers} layers"
        return f"{weights}: about {memory}, {disk}, {span(self.seconds)}"

    def check(self) -> None:
        """Raise UserError when memory or disk will not do."""
        for what, needed, free, way_out in (
            ("memory", self.peak_bytes, self.free_memory_bytes, "use fewer --blocks, or a machine with more"),
            ("disk", self.disk_bytes, self.free_disk_bytes, "choose another --out"),
        ):
            if needed > free:
                raise UserError(f"needs about {needed / 1e9:.1f} GB of {what}, {free / 1e9:.1f} are free: {way_out}")


def estimate(
    model: Any, architecture: Architecture, recipes: Iterable[Recipe], *, tokens: int, out: Path, device: torch.device
) -> Estimate:
    """What it takes to make these calibrated variants of a model (weights on the meta device) from `tokens` tokens."""
    already_bytes, recipes = resident_bytes() if device.type == "cpu" else 0, list(recipes)
    corrected = [one for one in recipes if one.settings.rounding == "gptq"]  # in a quantized model of their own each
    runs = len({"" if one.search else one.variant.name for one in corrected})
    embedding, layers = model.get_input_embeddings().weight, len(architecture.layers)
    hidden = getattr(model.config.get_text_config(decoder=True), "hidden_size", embedding.shape[1])
    by_layer = [architecture.linears(index) for index in range(layers)]
    weights = [sum(one.weight.numel() for one in own.values()) for own in by_layer]
    largest = max(range(layers), key=weights.__getitem__)
    linears = {name: (m.out_features, m.in_features) for name, m in by_layer[largest].items()}
    together: dict[tuple[str, int], list[str]] = {}  # layers of one module and width mostly share an input
    for name, (_, columns) in linears.items():
        together.setdefault((name.rpartition(".")[0], columns), []).append(name)
    inputs = [columns for _, columns in together]
    widest = max(*inputs, hidden)
    largest_group = max(sum(linears[name][0] * linears[name][1] for name in names) for names in together.values())
    experts = any(experts_of(module) for module in architecture.layers[largest].modules())
    parameters = count_weights(model)

    activations, held = tokens * hidden, set(inputs) if experts else inputs  # one expert's at a time
    rows = min(ROW_BLOCK, max(rows for rows, _ in linears.values()))
    rounding = (2.5 if runs else 1) * widest * widest + ROUNDING_COPIES * rows * widest
    exact = tokens * sum(held) * product_dtype(device).itemsize // FLOAT_BYTES if runs else 0
    batch = BATCH_TOKENS * (3 * widest + 6 * hidden)
    held_inputs = activations * (runs + (2 if experts else 1))
    at_work = max(exact + max(batch, SEARCH_COPIES * largest_group), rounding)
    in_layers = held_inputs + weights[largest] + sum(width * width for width in held) + at_work
    peak = FLOAT_BYTES * int(max(in_layers, embedding.numel() + activations, 2 * embedding.numel())) + already_bytes
    peak = peak + LIBRARIES_BYTES if device.type == "cpu" else int(CUDA_SHARE * peak)

    quantized = sum(weights)
    bytes_of = [checkpoint_bytes(parameters, quantized, one.variant, one.group_size) for one in recipes]
    disk = sum(bytes_of) + max(bytes_of, default=0) + FLOAT_BYTES * 2 * activations * (1 + runs)

    existing = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    seconds = sum(weights) / weights[largest] * layer_seconds(linears.values(), inputs, tokens, runs, speeds(device))
    free_memory_bytes, free_disk_bytes = free_memory(device, already_bytes), shutil.disk_usage(existing).free
    return Estimate(parameters, layers, peak, disk, seconds, free_memory_bytes, free_disk_bytes)


def count_weights(model: Any) -> int:
    """Of a model, tied ones once."""
    return sum(one.numel() for name, one in model.named_parameters() if name not in model.all_tied_weights_keys)


def checkpoint_bytes(parameters: int, quantized: int, variant: Variant, group_size: int | None) -> int:
    """The quantized weights at their bits, with what groups and blocks need beside, and the rest in half precision."""
    bits = (variant.w_bit or 16) + (20 / group_size if group_size else 0.5 if variant.w_bit == 4 else 0)
    return int(quantized * bits / 8 + (parameters - quantized) * 2)


def variants_of(source: str) -> list[tuple[str, str, Variant, int, Any]]:
    """Name, base model, variant, bytes of the weights and config of each checkpoint that `all` would make of a source.

    From its config alone; what cannot be made is left out. Raises UserError as `config_source` and `empty_model` do."""
    folder, base_model = config_source(source)
    model, found = empty_model(folder), []
    parameters = count_weights(model)
    for variant in sorted(variants_named(["all"]), key=lambda one: one.is_awq):
        architecture = architecture_of(model)
        if variant.is_awq:  # experts are quantized in groups only
            take_apart(model)
            try:
                architecture = architecture_of(model).with_group_size()
            except UserError:
                continue
        quantized = sum(rows * columns for _, rows, columns in architecture.shapes())
        size = checkpoint_bytes(parameters, quantized, variant, architecture.group_size)
        name = f"{base_model}-{variant.folder_suffix(architecture.group_size)}"
        found.append((name, base_model, variant, size, model.config))
    return found


def steps_left(
    job: Job, plain: Sequence[Variant], calibrated: Sequence[Variant], layers: Sequence[int] | None = None
) -> list[Step]:
    """What is left of a call, in weights copied. layers: weights of each that is left, None for all of one."""
    count = count_weights(job.empty)
    left = ([count] if layers is None else layers) if calibrated else []
    in_layers = [("layer", "", float(LAYER_COPIES * weights)) for weights in left]
    joined = [("copy", one.name, count * (one.w_bit or 16) / 16) for one in calibrated]
    return [*(("copy", one.name, 2.0 * count) for one in plain), *in_layers, *joined]


def layer_seconds(
    linears: Collection[tuple[int, int]], inputs: Sequence[int], tokens: int, runs: int, speed: tuple[float, ...]
) -> float:
    """What a decoder layer takes. linears: (out, in); inputs: features of each distinct input; runs: quantized models
    in which codes are chosen; speed: as `speeds` gives it."""
    weights, wide = (sum(rows * columns**power for rows, columns in linears) for power in (1, 2))
    symmetric = {width: sum(one.stop * (one.stop - one.start) for one in column_blocks(width)) for width in set(inputs)}
    passes = 1 + AGAIN * runs
    products = 2 * tokens * weights * passes + 5 * runs * wide
    products += sum(2 * tokens * ((1 + runs) * symmetric[width] + runs * width * width) for width in inputs)
    for most, tried in ((SOME_WEIGHTS, SCALE_GRID), (MOST_WEIGHTS, FINALISTS)):
        products += sum(2 * tried * min(rows, most // width) * symmetric[width] for rows, width in linears)
    factors = runs * sum(width**3 for width in inputs) / 3
    columns = runs * max(sum(inputs), weights / ROW_BLOCK)
    rounded = (SEARCHED + runs * ROUNDED) * weights + PASSED * passes * tokens * sum(inputs)
    work = (rounded, columns, factors / SHARE, products / SHARE)
    return float(sum(amount / of for amount, of in zip(work, speed, strict=True)))


def speeds(device: torch.device) -> tuple[float, ...]:
    """What a device does in a second: weights rounded, columns of ROW_BLOCK rows whose codes are chosen, operations of
    float32 products and of those that the layers take. The best of several tries: what else runs slows some of them."""
    x = torch.randn((PROBE_SIZE, PROBE_SIZE), device=device)
    half, few, out, spent = x.to(product_dtype(device)), x.flatten()[:CALL_SIZE], x.clone(), []
    rounds = (lambda: torch.round(x, out=out), lambda: [few.round_() for _ in range(100)])
    for work in (*rounds, lambda: x @ x, lambda: half @ half):
        tries = list[float]()
        while sum(tries) < PROBE_S:
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            tries.append(time.perf_counter() - started)
        spent.append(min(tries))
    amounts = (x.numel(), 100 / CALLS[device.type], 2 * PROBE_SIZE**3, 2 * PROBE_SIZE**3)
    return tuple(amount / least for amount, least in zip(amounts, spent, strict=True))


def free_memory(device: torch.device, already_bytes: int) -> int:
    """Bytes that this process may hold in all: what it has and what is free."""
    on_cuda = device.type == "cuda"
    return int(torch.cuda.mem_get_info(device)[0] if on_cuda else psutil.virtual_memory().available + already_bytes)


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far: resident on a CPU, allocated on CUDA."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_resident_bytes()
