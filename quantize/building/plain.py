"""Checkpoints whose tensors need no calibration: the reference, plain rounding, bitsandbytes' 8-bit."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.building.assemble import finish, write_part
from quantize.building.estimate import count_weights, stored_bytes
from quantize.building.job import BuiltCheckpoint, Job, method_of
from quantize.checkpoint import Checkpoint, writing
from quantize.methods.base import Recipe, Tensors, half
from quantize.model.layer_calls import runnable
from quantize.model.names import FileNames, Shapes, left_in_half, linear_layers, quantized_share
from quantize.model.skeleton import Skeleton, kept_names
from quantize.variant import Variant
from quantize.weights import check_finite

PART_BYTES = 256 * 10**6

Pieces = Iterator[tuple[str, Tensor, bool]]
"""(name in files, tensor, whether it is the weight of a linear layer to quantize)."""


def build_plain(job: Job, variant: Variant, *, dry_run: bool = False) -> dict[str, BuiltCheckpoint]:
    """The checkpoint of one variant by its name: made a tensor at a time, or there already. With dry_run, its size."""
    method, model = method_of(variant), job.empty
    choices, names = job.choices(), list[str]()
    share, count = None, len(job.weights.names())
    if method.in_groups:
        skeleton = job.skeleton()
        architecture, group_size = job.in_groups(runnable(skeleton, job.device))
        model, names = skeleton.model, [name for name, _, _ in architecture.shapes()]
        share = quantized_share(model, names, variant.name)
        choices = replace(choices, group_size=group_size, kept=kept_names(skeleton, set(names)))
        pieces, count = _apart(skeleton, set(names)), len(skeleton.stored)
    elif method.quantize_layer:
        names = linear_layers(job.empty)
        share = quantized_share(model, names, variant.name)
        choices = replace(choices, kept=kept_by_bnb(model, names))
        pieces = _as_filed(job, set(names))
    else:
        pieces = ((name, job.weights.get(name), False) for name in job.weights.names())
    recipe = method.recipe(variant, choices)
    if built := job.kept(recipe):
        return {variant.name: built}
    if dry_run:
        quantized = sum(one.numel() for name in names for one in model.get_submodule(name).parameters())
        job.disk[variant.name] = stored_bytes(count_weights(job.empty), quantized, recipe)
        return {}
    started = time.perf_counter()
    target = job.target(recipe)
    with writing(target, force=job.options.force) as folder:
        _write_parts(job, recipe, pieces, count, folder)
        job.progress.begin(f"{variant.name}, joining its files")
        manifest = finish(folder, job, recipe, {"total": time.perf_counter() - started}, quantized_share=share)
    job.progress.advance()
    return {variant.name: BuiltCheckpoint(Checkpoint(target, manifest), kept=False)}


def kept_by_bnb(model: Any, names: Sequence[str]) -> tuple[str, ...]:
    """What config.json has to name as left in half precision; nothing where transformers' own rule says the same."""
    left = [name for name in left_in_half(model, set(names)) if not _is_stack(model, name)]
    if not left:
        return ()
    modules = {module: name for name, module in model.named_modules()}
    return (*left, modules[model.get_output_embeddings()])


def _is_stack(model: Any, name: str) -> bool:
    return not any(type(module) is nn.Linear for module in model.get_submodule(name).modules())


def _as_filed(job: Job, quantized: Collection[str]) -> Pieces:
    """Every tensor as the files have it; those that make linear layers together, as the model has them."""
    model, files = Shapes(job.empty), FileNames.of(job.empty, job.weights.names())
    split: set[str] = set()
    for conversion in files.conversions.values():
        sources = [name for name, _ in conversion.sources]
        made = conversion.run(model, lambda name: torch.empty(job.weights.shape(name), device="meta"))
        if any(name.removesuffix(".weight") in quantized for name in made):
            split.update(sources)
            for name, tensor in conversion.run(model, job.weights.get).items():
                yield name, tensor, name.removesuffix(".weight") in quantized and name.endswith(".weight")
    for name in job.weights.names():
        if name not in split:
            home = files.homes[name]
            is_weight = home.endswith(".weight") and home.removesuffix(".weight") in quantized
            yield name, job.weights.get(name), is_weight and files.plain.get(home) == name


def _apart(skeleton: Skeleton, quantized: Collection[str]) -> Pieces:
    """Every tensor of the model taken apart, by the names that a checkpoint has for them."""
    for name in skeleton.stored:
        if name in skeleton and name not in skeleton.model.all_tied_weights_keys:
            if name.endswith(".weight") and name.removesuffix(".weight") in quantized:
                yield skeleton.stored[name], skeleton.read(name), True
            else:
                yield *skeleton.to_store(name, skeleton.read(name)), False


def _write_parts(job: Job, recipe: Recipe, pieces: Pieces, count: int, folder: Path) -> None:
    quantize_layer = method_of(recipe.variant).quantize_layer
    part: Tensors = {}
    parts = size = 0
    for number, (name, tensor, quantized) in enumerate(pieces, start=1):
        job.progress.begin(f"{recipe.variant.name}, tensor {number} of {count}")
        check_finite(name, tensor)
        if quantize_layer and quantized:
            made = quantize_layer(name.removesuffix(".weight"), tensor.to(job.device), recipe)
        else:
            made = {name: half(name, tensor, recipe.dtype)}
        if size and size + sum(one.nbytes for one in made.values()) > PART_BYTES:
            write_part(folder, parts, part)
            part, parts, size = {}, parts + 1, 0
        part |= made
        size += sum(one.nbytes for one in made.values())
        job.progress.advance(tensor.numel())
    write_part(folder, parts, part)
