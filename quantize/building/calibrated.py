"""Checkpoints that look at calibration text: one pass over the model for all of them."""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantize.building.assemble import PART_GLOB, finish, read_config, write_part
from quantize.building.estimate import Estimate, estimate, peak_bytes, steps_left, stored_bytes
from quantize.building.job import BuiltCheckpoint, Job, method_of
from quantize.building.journal import Journal, discard_finished
from quantize.building.layer import LayerResult
from quantize.building.plain import kept_by_bnb
from quantize.building.stream import HeldOut, HeldOutResult, LayerStream, batches_of
from quantize.calibration import blocks_sha256, builtin_texts, check_blocks, text_from, token_blocks
from quantize.checkpoint import CalibrationFacts, open_checkpoint, writing
from quantize.dummy import dummy_blocks
from quantize.errors import UserError
from quantize.files import disk_is_full
from quantize.methods.base import Recipe, Tensors, half
from quantize.model.architecture import Architecture
from quantize.model.layer_calls import runnable
from quantize.model.names import linear_layers, quantized_share
from quantize.model.pretrained import tokenizer_of
from quantize.model.skeleton import Skeleton, kept_names
from quantize.rounding.options import AwqOptions
from quantize.schema import to_data
from quantize.variant import Variant
from quantize.versions import maker_versions

HELD_OUT_BLOCKS = 4
"""Blocks of held-out text that run along with the calibration to tell what AWQ costs."""

Recipes = Mapping[str, Recipe]
"""By variant."""


def build_calibrated(job: Job, variants: Sequence[Variant], *, dry_run: bool = False) -> dict[str, BuiltCheckpoint]:
    """The checkpoints of these variants, by name; with dry_run, only say what it will take."""
    if not variants:
        job.say("nothing here needs calibration: it takes seconds and one layer's memory")
        return {}
    skeleton = job.skeleton()
    architecture, group_size, variants = _layers_of(job, skeleton, variants)
    names = [name for name, _, _ in architecture.shapes()]
    kept = kept_names(skeleton, set(names))
    blocks = _calibration_blocks(job, skeleton.model.config.get_text_config(decoder=True).vocab_size)
    check_blocks(blocks, skeleton.model)
    text = "random tokens" if job.is_dummy else job.options.calibration
    facts = CalibrationFacts(text, blocks.shape[0], blocks.shape[1], blocks_sha256(blocks))
    choices = replace(job.choices(), group_size=group_size, calibration=facts, kept=kept)
    recipes, shares = {}, {}
    for variant in variants:
        with job.sparing(variant):
            if method_of(variant).in_groups:
                shares[variant.name], own = quantized_share(skeleton.model, names, variant.name), choices
            else:
                linears = linear_layers(job.empty)
                shares[variant.name] = quantized_share(job.empty, linears, variant.name)
                own = replace(choices, kept=kept_by_bnb(job.empty, linears))
            recipes[variant.name] = method_of(variant).recipe(variant, own)
    built = {name: there for name, recipe in recipes.items() if (there := job.kept(recipe))}
    missing = {name: recipe for name, recipe in recipes.items() if name not in built}
    working_folder = job.out / f".{job.source.base_model}.unfinished"
    if missing:
        search = _shared_search(missing)
        expected = estimate(
            skeleton.model, architecture, missing.values(), tokens=blocks.numel(), out=job.out, device=job.device
        )
        if dry_run:
            job.say(replace(expected, disk_bytes=expected.disk_bytes + sum(job.disk.values())).line())
            quantized = sum(rows * columns for _, rows, columns in architecture.shapes())
            job.disk.update({name: stored_bytes(expected.parameters, quantized, one) for name, one in missing.items()})
            return built
        expected.check()
        journal = _journal(job, working_folder, blocks, missing, len(architecture.layers))
        stream = LayerStream(skeleton, architecture, job.device, journal.state.groups)
        _run(job, stream, blocks, missing, search, journal, expected, shares)
        for name, recipe in missing.items():
            built[name] = BuiltCheckpoint(open_checkpoint(job.target(recipe)), kept=False)
    elif not dry_run:
        discard_finished(working_folder, built)
    return built


def _layers_of(
    job: Job, skeleton: Skeleton, variants: Sequence[Variant]
) -> tuple[Architecture, int | None, Sequence[Variant]]:
    """The decoder layers, the size of groups of codes, and the variants that can be made of them."""
    grouped = [variant for variant in variants if method_of(variant).in_groups]
    try:
        architecture = runnable(skeleton, job.device)
    except UserError as error:
        raise UserError(f"{error}; --rounding nearest does not go layer by layer") from None
    if grouped:
        with job.sparing(*grouped):
            return *job.in_groups(architecture), variants
    return architecture, None, [variant for variant in variants if variant not in grouped]


def _calibration_blocks(job: Job, vocabulary: int) -> Tensor:
    options = job.options
    if job.is_dummy:
        return dummy_blocks(vocabulary, options.blocks, options.block_tokens)
    texts, tokenizer = text_from(options.calibration), tokenizer_of(job.source.folder)
    blocks = token_blocks(texts, tokenizer, blocks=options.blocks, block_tokens=options.block_tokens)
    if blocks.shape[0] < options.blocks:
        job.say(f"the calibration text fills {blocks.shape[0]} of {options.blocks} blocks")
    return blocks


def _shared_search(recipes: Recipes) -> AwqOptions | None:
    """The settings of the search, None for no search. Raises UserError where they differ: one run searches once."""
    searches = {recipe.search: name for name, recipe in recipes.items() if recipe.search}
    if len(searches) > 1:
        raise UserError(f"{' and '.join(searches.values())} search with different options: make them in separate calls")
    return next(iter(searches), None)


def _journal(job: Job, folder: Path, blocks: Tensor, recipes: Recipes, layers: int) -> Journal:
    """The journal of an unfinished run, or a new one; its key is everything that decides the bytes of the result."""
    key = {
        "source": job.source.facts.weights_sha256,
        "config": read_config(job.source.folder),
        "calibration": blocks_sha256(blocks),
        "options": {name: recipe.options for name, recipe in recipes.items()},
        "libraries": maker_versions(),
        "device": job.device.type,
        "threads": torch.get_num_threads(),
        "states": "calibration, held-out text, probe",
    }
    journal = Journal(folder, key)
    if journal.restarted:
        job.say("an unfinished run was with another source, calibration or options, or is damaged: starting anew")
    elif journal.finished_layers:
        job.say(f"going on with an unfinished run at layer {journal.finished_layers + 1} of {layers}")
    return journal


def _run(
    job: Job,
    stream: LayerStream,
    blocks: Tensor,
    recipes: Recipes,
    search: AwqOptions | None,
    journal: Journal,
    expected: Estimate,
    shares: Mapping[str, float],
) -> None:
    """Go through the layers from where an unfinished run left off, and turn the parts into checkpoints."""
    try:
        seconds, held_out = _layers(job, stream, blocks, recipes, search, journal)
        for name, recipe in recipes.items():
            measured = {"peak_bytes": peak_bytes(job.device), "seconds": round(sum(seconds.values()), 3)}
            if recipe.search and held_out:
                measured |= to_data(held_out)
            facts = [linear for layer in journal.state.layers for linear in layer] if recipe.search else []
            job.progress.begin(f"{name}, joining its files")
            with writing(job.target(recipe), force=job.options.force) as folder:
                for part in journal.parts(name).glob(PART_GLOB):
                    _link(part, folder / part.name)
                finish(
                    folder,
                    job,
                    recipe,
                    seconds,
                    quantized_share=shares[name],
                    layers=tuple(to_data(facts)),
                    estimate=to_data(expected),
                    measured=measured,
                )
            shutil.rmtree(journal.parts(name))  # else all variants are on the disk twice
            job.progress.advance()
    except BaseException as error:
        if disk_is_full(error):
            raise UserError(
                f"the disk is full while writing to {job.out}: free some space and run the same command, "
                "it goes on where it was"
            ) from None
        if isinstance(error, Exception):
            journal.discard()
        raise
    journal.discard()


def _layers(
    job: Job, stream: LayerStream, blocks: Tensor, recipes: Recipes, search: AwqOptions | None, journal: Journal
) -> tuple[dict[str, float], HeldOutResult | None]:
    """Seconds a phase, and what the search costs in quality on text that no calibration sees."""
    total, count = len(stream.architecture.layers), len(batches_of(blocks))
    folders = {name: journal.parts(name) for name in recipes}
    in_layers = [sum(one.weight.numel() for one in stream.architecture.linears(n).values()) for n in range(total)]
    variants = [recipe.variant for recipe in recipes.values()]
    job.progress.plan(steps_left(job, (), variants, in_layers[journal.finished_layers :]))
    job.progress.begin(f"layer {journal.finished_layers + 1} of {total} of {', '.join(recipes)}")
    packing, kept = 0.0, journal.hidden()
    held_out = None
    if search and not job.is_dummy:
        texts, tokenizer = builtin_texts("evaluation"), tokenizer_of(job.source.folder)  # which no calibration sees
        judged_on = token_blocks(texts, tokenizer, blocks=HELD_OUT_BLOCKS, block_tokens=blocks.shape[1])
        held_out = HeldOut(judged_on, kept[count:-1])
    layers = stream.quantized(
        blocks,
        search,
        start=journal.finished_layers,
        hidden=kept[:count],
        probed=kept[-1] if kept else None,
        before={
            name: lambda seen, make=make, recipe=recipe: make(seen, recipe)  # type: ignore[misc]
            for name, recipe in recipes.items()
            if (make := method_of(recipe.variant).from_inputs)
        },
        held_out=held_out,
        spill=journal.folder / "activations" if job.options.spill else None,
    )
    for result, hidden in layers:
        started = time.perf_counter()
        parts = [
            write_part(path, result.index + 1, _packed(job, stream, result, recipes[name]))
            for name, path in folders.items()
        ]
        states = [*hidden, *(held_out.states if held_out else []), stream.probed]
        journal.layer_done(result, states, parts, stream.groups)
        packing += time.perf_counter() - started
        job.progress.advance()
        if result.index + 1 < total:
            job.progress.begin(f"layer {result.index + 2} of {total} of {', '.join(recipes)}")
    started = time.perf_counter()
    outer = dict(stream.other_tensors())
    for name, folder in folders.items():
        write_part(folder, 0, {key: half(key, tensor, recipes[name].dtype) for key, tensor in outer.items()})
    del outer
    seconds = {**journal.state.seconds, "pack": packing + time.perf_counter() - started}
    found = stream.judge(held_out) if held_out else None
    if found:
        found.check()
    return seconds, found


def _packed(job: Job, stream: LayerStream, result: LayerResult, recipe: Recipe) -> Tensors:
    """One decoder layer's tensors as this variant's files hold them."""
    method, skeleton = method_of(recipe.variant), stream.skeleton
    if method.pack is None:  # its own linear layers, and the rest of the layer's tensors as the source has them
        linears, tensors = set(linear_layers(job.empty)), dict(result.before[recipe.variant.name])
        for name, tensor in stream.layer_tensors(result.index):
            home = skeleton.files.homes.get(name, name).removesuffix(".weight")
            if name in tensors:
                continue
            if home in linears and name.endswith(".weight") and method.quantize_layer:
                tensors |= method.quantize_layer(name.removesuffix(".weight"), tensor.to(job.device), recipe)
            else:
                tensors[name] = half(name, tensor, recipe.dtype)
        return tensors
    weights = {skeleton.stored[f"{name}.weight"].removesuffix(".weight"): w for name, w in result.weights.items()}
    others = dict(skeleton.to_store(name, tensor) for name, tensor in result.others.items())
    return method.pack(weights, recipe) | {name: half(name, tensor, recipe.dtype) for name, tensor in others.items()}


def _link(source: Path, target: Path) -> None:
    """The same file under a second name: the journal keeps its own until the checkpoint is finished."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
