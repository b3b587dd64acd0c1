"""Checkpoints whose tensors need no calibration: the reference, plain rounding, bitsandbytes' 8-bit."""

import time
from collections.abc import Collection
from pathlib import Path

from quantize.building.assemble import finish, write_part
from quantize.building.estimate import checkpoint_bytes, count_weights
from quantize.building.job import BuiltCheckpoint, Job, method_of
from quantize.checkpoint import Checkpoint, writing
from quantize.methods.base import Recipe, Tensors, half
from quantize.model.layer_calls import runnable
from quantize.model.names import FileNames, Pieces
from quantize.model.skeleton import Skeleton
from quantize.process_memory import collector_paused
from quantize.variant import Variant
from quantize.weights import check_finite

PART_BYTES = 256 * 10**6


def build_plain(job: Job, variant: Variant, *, dry_run: bool = False) -> dict[str, BuiltCheckpoint]:
    """The checkpoint of one variant by its name: made a tensor at a time, or there already. With dry_run, its size."""
    names, apart = job.weights.names(), None
    pieces: Pieces | None = None
    if method_of(variant).in_groups:
        skeleton = job.skeleton()
        apart = skeleton, job.in_groups(runnable(skeleton, job.device))
        names, pieces = list(skeleton.stored), _apart(skeleton, set(apart[1].names()))
    recipe = job.recipe(variant, apart)
    if built := job.kept(recipe):
        return {variant.name: built}
    if dry_run:
        model, linears = (apart[0].model, apart[1].names()) if apart else (job.empty, list[str]())
        if apart is None and method_of(variant).quantize_layer:
            linears = job.linears
        quantized = sum(model.get_submodule(name).weight.numel() for name in linears)
        job.disk[variant.name] = checkpoint_bytes(count_weights(job.empty), quantized, variant, recipe.group_size)
        return {}
    started, target = time.perf_counter(), job.target(recipe)
    if method_of(variant).quantize_layer is None:
        pieces = ((name, job.weights.get(name), False) for name in names)
    elif pieces is None:
        pieces = FileNames.of(job.empty, names).pieces(job.weights, job.linears)
    with writing(target, force=job.options.force) as folder, collector_paused():
        _write_parts(job, recipe, pieces, len(names), folder)
        job.progress.begin(f"{variant.name}, joining its files")
        manifest = finish(folder, job, recipe, {"total": time.perf_counter() - started})
    job.progress.advance()
    return {variant.name: BuiltCheckpoint(Checkpoint(target, manifest), kept=False)}


def _apart(skeleton: Skeleton, quantized: Collection[str]) -> Pieces:
    """Every tensor of the model taken apart, by the names that a checkpoint has for them."""
    for name in skeleton.stored:
        if name in skeleton and name not in skeleton.model.all_tied_weights_keys:
            if name.endswith(".weight") and name.removesuffix(".weight") in quantized:
                yield skeleton.stored[name], skeleton.read(name), True
            else:
                yield *skeleton.to_store(name, skeleton.read(name)), False


def _write_parts(job: Job, recipe: Recipe, pieces: Pieces, count: int, folder: Path) -> None:
    quantize_layer, part = method_of(recipe.variant).quantize_layer, Tensors()
    parts = size = 0
    for number, (name, tensor, quantized) in enumerate(pieces, start=1):
        job.progress.begin(f"{recipe.variant.name}, tensor {number} of {count}")
        if quantize_layer and quantized:
            check_finite(name, tensor)
            half(name, tensor.abs().amax(dim=-1), recipe.dtype)  # the model computes in it
            made = quantize_layer(name.removesuffix(".weight"), tensor.to(job.device), recipe)
        else:
            made = {name: half(name, tensor, recipe.dtype)}
        made_bytes = sum(one.nbytes for one in made.values())
        if size and size + made_bytes > PART_BYTES:
            write_part(folder, parts, part)
            part, parts, size = {}, parts + 1, 0
        part |= made
        size += made_bytes
        job.progress.advance(tensor.numel())
    write_part(folder, parts, part)
