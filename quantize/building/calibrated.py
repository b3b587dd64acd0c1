"""Checkpoints that look at calibration text: one pass over the model for all of them."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantize.building.assemble import PART_GLOB, finish, write_part
from quantize.building.estimate import Estimate, checkpoint_bytes, estimate, peak_bytes, steps_left
from quantize.building.job import BuiltCheckpoint, Job, method_of
from quantize.building.journal import Journal, discard_finished
from quantize.building.layer import LayerResult, timed
from quantize.building.stream import HeldOutResult, LayerStream
from quantize.calibration import blocks_sha256, builtin_texts, check_blocks, text_from, token_blocks
from quantize.checkpoint import CalibrationFacts, open_checkpoint, writing
from quantize.dummy import dummy_blocks
from quantize.errors import UserError
from quantize.files import disk_is_full
from quantize.methods.base import Recipe, Tensors, half
from quantize.model.layer_calls import runnable
from quantize.model.pretrained import tokenizer_of
from quantize.rounding.options import AwqOptions
from quantize.schema import to_data
from quantize.variant import Variant
from quantize.versions import maker_versions
from quantize.weights import read_json

HELD_OUT_BLOCKS = 4  # blocks of held-out text that run along with the calibration to tell what AWQ costs
Recipes = Mapping[str, Recipe]  # by variant


def build_calibrated(job: Job, variants: Sequence[Variant], *, dry_run: bool = False) -> dict[str, BuiltCheckpoint]:
    """The checkpoints of these variants, by name; with dry_run, only say what it will take."""
    if not variants:
        job.say("nothing here needs calibration: it takes seconds and one layer's memory")
        return {}
    skeleton = job.skeleton()
    try:
        architecture = runnable(skeleton, job.device)
    except UserError as error:
        raise UserError(f"{error}; --rounding nearest does not go layer by layer") from None
    if grouped := [variant for variant in variants if method_of(variant).in_groups]:
        with job.sparing(*grouped):
            architecture = job.in_groups(architecture)
    blocks = _calibration_blocks(job, skeleton.model.config.get_text_config(decoder=True).vocab_size)
    check_blocks(blocks, skeleton.model)
    text = "random tokens" if job.is_dummy else job.options.calibration
    facts = CalibrationFacts(text, blocks.shape[0], blocks.shape[1], blocks_sha256(blocks))
    recipes = {}
    for variant in variants:
        if variant.name not in job.refused:
            with job.sparing(variant):
                recipes[variant.name] = job.recipe(variant, (skeleton, architecture), facts)
    built = {name: there for name, recipe in recipes.items() if (there := job.kept(recipe))}
    missing = {name: recipe for name, recipe in recipes.items() if name not in built}
    working_folder = job.out / f".{job.source.base_model}.unfinished"
    if missing:
        _shared_search(missing)
        expected = estimate(
            skeleton.model, architecture, missing.values(), tokens=blocks.numel(), out=job.out, device=job.device
        )
        if dry_run:
            job.say(replace(expected, disk_bytes=expected.disk_bytes + sum(job.disk.values())).line())
            quantized = sum(rows * columns for _, rows, columns in architecture.shapes())
            for name, one in missing.items():
                job.disk[name] = checkpoint_bytes(expected.parameters, quantized, one.variant, one.group_size)
            return built
        expected.check()
        journal = _journal(job, working_folder, facts, missing, len(architecture.layers))
        stream = LayerStream(skeleton, architecture, job.device, dict(journal.state.groups))
        _run(job, stream, blocks, missing, journal, expected)
        for name, recipe in missing.items():
            built[name] = BuiltCheckpoint(open_checkpoint(job.target(recipe)), kept=False)
    elif not dry_run:
        discard_finished(working_folder, built)
    return built


def _calibration_blocks(job: Job, vocabulary: int) -> Tensor:
    options = job.options
    if job.is_dummy:
        return dummy_blocks(vocabulary, options.blocks, options.block_tokens)
    texts, tokenizer = text_from(options.calibration, job.say), tokenizer_of(job.source.folder)
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


def _journal(job: Job, folder: Path, text: CalibrationFacts, recipes: Recipes, layers: int) -> Journal:
    """The journal of an unfinished run, or a new one; its key is everything that decides the bytes of the result."""
    key = {
        "source": job.source.facts.weights_sha256,
        "config": read_json(job.source.folder / "config.json"),
        "calibration": text.sha256,
        "options": {name: recipe.options for name, recipe in recipes.items()},
        "libraries": maker_versions(),
        "device": job.device.type,
        "threads": torch.get_num_threads(),
        "states": "source, quantized, held-out text, probe of some tokens",
    }
    journal = Journal(folder, key)
    if journal.restarted:
        job.say("an unfinished run was with another source, calibration or options, or is damaged: starting anew")
    elif journal.finished_layers:
        job.say(f"going on with an unfinished run at layer {journal.finished_layers + 1} of {layers}")
    return journal


def _run(job: Job, stream: LayerStream, blocks: Tensor, recipes: Recipes, journal: Journal, said: Estimate) -> None:
    """Go through the layers from where an unfinished run left off, and turn the parts into checkpoints."""
    try:
        seconds, held_out = _layers(job, stream, blocks, recipes, journal)
        for name, recipe in recipes.items():
            measured = {"peak_bytes": peak_bytes(job.device), "seconds": round(sum(seconds.values()), 3)}
            if recipe.search and held_out:
                measured |= to_data(held_out)
            facts = [linear for layer in journal.state.layers for linear in layer] if recipe.search else []
            job.progress.begin(f"{name}, joining its files")
            with writing(job.target(recipe), force=job.options.force) as folder:
                for part in journal.parts(name).glob(PART_GLOB):
                    try:  # the journal keeps its own until the checkpoint is finished
                        os.link(part, folder / part.name)
                    except OSError:  # a file system without hard links
                        shutil.copyfile(part, folder / part.name)
                layers, expected = tuple(to_data(facts)), to_data(said)
                finish(folder, job, recipe, seconds, layers=layers, estimate=expected, measured=measured)
            shutil.rmtree(journal.parts(name))  # else, without hard links, all variants are on the disk twice
            job.progress.advance()
    except BaseException as error:
        if disk_is_full(error):
            advice = "free some space and run the same command, it goes on where it was"
            raise UserError(f"the disk is full while writing to {job.out}: {advice}") from None
        if isinstance(error, Exception):
            journal.discard()
        raise
    journal.discard()


def _layers(
    job: Job, stream: LayerStream, blocks: Tensor, recipes: Recipes, journal: Journal
) -> tuple[dict[str, float], HeldOutResult | None]:
    """Seconds a phase, and what the search costs in quality on text that no calibration sees."""
    start, total = journal.finished_layers, len(stream.architecture.layers)
    folders = {name: journal.parts(name) for name in recipes}
    in_layers = [sum(one.weight.numel() for one in stream.architecture.linears(n).values()) for n in range(total)]
    calibrated = [recipe.variant for recipe in recipes.values()]
    job.progress.plan(steps_left(job, (), calibrated, in_layers[start:]))
    job.progress.begin(f"layer {min(start + 1, total)} of {total} of {', '.join(recipes)}")
    search, held_out = _shared_search(recipes), None
    if search and not job.is_dummy:
        texts, tokenizer = builtin_texts("evaluation"), tokenizer_of(job.source.folder)  # which no calibration sees
        held_out = token_blocks(texts, tokenizer, blocks=HELD_OUT_BLOCKS, block_tokens=blocks.shape[1])
    makers = {name: method_of(recipe.variant).from_inputs for name, recipe in recipes.items()}
    before = {name: partial(make, recipe=recipes[name]) for name, make in makers.items() if make}  # type: ignore[call-arg]
    spill = journal.folder / "activations" if job.options.spill else None
    layers = stream.quantized(
        blocks, search, start=start, states=journal.hidden(), before=before, held_out=held_out, spill=spill
    )
    seconds = {"pack": 0.0}
    for result, states in layers:
        with timed(seconds, "pack"):
            parts = [
                write_part(path, result.index + 1, _packed(job, stream, result, recipes[name]))
                for name, path in folders.items()
            ]
            journal.layer_done(result, states, parts, stream.groups)
        job.progress.advance()
        job.progress.begin(f"layer {min(result.index + 2, total)} of {total} of {', '.join(recipes)}")
    with timed(seconds, "pack"):
        outer = dict(stream.other_tensors())
        for name, folder in folders.items():
            write_part(folder, 0, {key: half(key, tensor, recipes[name].dtype) for key, tensor in outer.items()})
        del outer
    found = None if held_out is None else stream.judge(held_out)
    if found:
        found.check()
    return journal.state.seconds | seconds, found


def _packed(job: Job, stream: LayerStream, result: LayerResult, recipe: Recipe) -> Tensors:
    """One decoder layer's tensors as this variant's files hold them."""
    method, skeleton = method_of(recipe.variant), stream.skeleton
    if method.pack is None:  # its own linear layers, and the rest of the layer's tensors as the source has them
        tensors = dict(result.before[recipe.variant.name])
        within = stream.architecture.prefix(result.index)
        for name, tensor, is_linear in skeleton.files.pieces(skeleton.weights, job.linears, within):
            if name not in tensors and is_linear and method.quantize_layer:
                tensors |= method.quantize_layer(name.removesuffix(".weight"), tensor.to(job.device), recipe)
            elif name not in tensors:
                tensors[name] = half(name, tensor, recipe.dtype)
        return tensors
    weights = {skeleton.stored[f"{name}.weight"].removesuffix(".weight"): w for name, w in result.weights.items()}
    others = dict(skeleton.to_store(name, tensor) for name, tensor in result.others.items())
    return method.pack(weights, recipe) | {name: half(name, tensor, recipe.dtype) for name, tensor in others.items()}
