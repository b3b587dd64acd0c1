"""Checkpoints whose tensors need no calibration: the reference, plain rounding, bitsandbytes' 8-bit."""

import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from quantize.building.assemble import finish, write_part
from quantize.building.job import BuiltCheckpoint, Job, method_of
from quantize.checkpoint import Checkpoint, writing
from quantize.methods.base import Recipe, Tensors, half
from quantize.model.names import linear_layers, quantized_share
from quantize.variant import Variant
from quantize.weights import check_finite

PART_BYTES = 256 * 10**6


def build_plain(job: Job, variant: Variant) -> BuiltCheckpoint:
    """Make one checkpoint, a tensor at a time; or the finished one that is there."""
    model = job.empty
    method = method_of(variant)
    quantized = sorted(linear_layers(model)) if method.quantize_layer else []
    share = quantized_share(model, quantized) if quantized else None
    choices = job.choices()
    if method.in_groups:
        sizes = {name: job.weights.shape(f"{name}.weight") for name in quantized}
        group_size = job.group_size([(name, rows, columns) for name, (rows, columns) in sizes.items()])
        choices = replace(choices, group_size=group_size)
    recipe = method.recipe(variant, choices)
    if built := job.kept(recipe):
        return built
    started = time.perf_counter()
    target = job.target(recipe)
    with writing(target, force=job.options.force) as folder:
        _write_parts(job, recipe, set(quantized), folder)
        manifest = finish(folder, job, recipe, {"total": time.perf_counter() - started}, quantized_share=share)
    return BuiltCheckpoint(Checkpoint(target, manifest), kept=False)


def _write_parts(job: Job, recipe: Recipe, quantized: Collection[str], folder: Path) -> None:
    quantize_layer = method_of(recipe.variant).quantize_layer
    names, variant = job.weights.names(), recipe.variant.name
    part: Tensors = {}
    parts = size = 0
    for done, name in enumerate(names):
        job.progress(variant, done, len(names))
        tensor = job.weights.get(name)
        check_finite(name, tensor)
        layer = name.removesuffix(".weight")
        if quantize_layer and layer in quantized and name.endswith(".weight"):
            made = quantize_layer(layer, tensor.to(job.device), recipe)
        else:
            made = {name: half(name, tensor, recipe.dtype)}
        part |= made
        size += sum(one.nbytes for one in made.values())
        if size > PART_BYTES or done == len(names) - 1:
            write_part(folder, parts, part)
            part, parts, size = {}, parts + 1, 0
    job.progress(variant, len(names), len(names))
