"""From a source to finished checkpoints: every variant asked for, from one look at the weights."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.building.assemble import Recipe, finish, half, library_versions, read_config
from quantize.building.estimate import Estimate, estimate, peak_bytes
from quantize.building.held_out import Watch, Watched
from quantize.building.journal import Journal, options_key
from quantize.building.layer import AwqOptions, LayerResult, Observed, Rounding
from quantize.building.shards import PART_GLOB, ShardWriter
from quantize.building.stream import LayerStream, batches_of, tensor_core_products
from quantize.calibration import blocks_sha256, builtin_texts, text_from, token_blocks
from quantize.checkpoint import (
    MANIFEST_NAME,
    CalibrationFacts,
    Checkpoint,
    Manifest,
    SourceFacts,
    disk_is_full,
    open_checkpoint,
    writing,
)
from quantize.dummy import dummy_blocks, dummy_weights
from quantize.errors import UserError
from quantize.int4.packing import PACKERS
from quantize.int4.weight import round_to_nearest
from quantize.loading.loading import torch_device
from quantize.methods.bnb import BnbOptions, bnb_4bit_with_feedback, bnb_layers, bnb_quantization_config, bnb_tensors
from quantize.model.architecture import Architecture, group_size_for, quantized_shapes
from quantize.model.names import check_covered
from quantize.model.pretrained import empty_model, tokenizer_of
from quantize.process_memory import resident_bytes
from quantize.progress import Progress, silent
from quantize.quiet import quiet_libraries
from quantize.source import Source, TensorReader, check_finite, open_source, open_weights
from quantize.variant import GROUP_SIZES, Variant, variants_named

WATCHED_BLOCKS = 4
"""Blocks of held-out text that run along with the calibration to tell what AWQ costs."""

PART_BYTES = 256 * 10**6
Say = Callable[[str], object]


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; every default is what the table is made with.

    group_size: AWQ's, None for the largest that divides every layer. calibration: a text as `text_from` reads it,
    of which `blocks` blocks of `block_tokens` tokens are used. rounding: of the 4-bit variants, "gptq" (error feedback
    on the calibration text) or "nearest". device: "cpu", "cuda" or "auto" (CUDA where there is some). force: make
    finished checkpoints again. spill: keep the activations between two layers in files beside the output.
    """

    group_size: int | None = None
    calibration: str = "builtin"
    blocks: int = 48
    block_tokens: int = 256
    rounding: Rounding = "gptq"
    bnb: BnbOptions = field(default_factory=BnbOptions)
    revision: str | None = None
    device: str = "auto"
    force: bool = False
    spill: bool = False


@dataclass(frozen=True)
class Built:
    """One checkpoint that `quantize` was asked for, and whether it was there already and kept."""

    checkpoint: Checkpoint
    kept: bool


def quantize(
    source: str,
    variants: Sequence[str] = ("all",),
    out: Path | str = "runs",
    *,
    options: BuildOptions | None = None,
    progress: Progress = silent,
    say: Say = lambda line: None,
    dry_run: bool = False,
) -> list[Built]:
    """Make a checkpoint of each variant of the model `source` in the folder `out`; return them in the table's order.

    source: as `open_source` takes it. variants: names of VARIANTS, or "all". A finished checkpoint is kept unless
    `options.force`. progress is told each step; say is called with each line that a user should read. dry_run: say what
    the calibrated variants will take in memory, disk and time, and make nothing.

    Raises UserError for everything that the user can mend; nothing half-written is left under a checkpoint's name.
    """
    options = options or BuildOptions()
    chosen = variants_named(variants)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device = torch_device(wanted)
    with quiet_libraries(), tensor_core_products(device):
        opened = open_source(source, revision=options.revision)
        job = _Job(opened, _reader(opened, device), out, options, device, progress, say)
        built: dict[str, Built] = {}
        calibrated = [variant for variant in chosen if job.needs_calibration(variant)]
        if dry_run:
            job.calibrated(calibrated, dry_run=True)
            return []
        for variant in chosen:
            if variant not in calibrated:
                built[variant.name] = job.plain(variant)
        if calibrated:
            built |= job.calibrated(calibrated)
    return [built[variant.name] for variant in chosen]


@dataclass(frozen=True)
class _Job:
    """One call of `quantize`: the opened source and what was asked for."""

    source: Source
    weights: TensorReader
    out: Path
    options: BuildOptions
    device: torch.device
    progress: Progress
    say: Say

    def needs_calibration(self, variant: Variant) -> bool:
        """AWQ always does, 4-bit bitsandbytes when its rounding feeds errors back."""
        return variant.is_searched or (variant.name == "bnb-4bit" and self.options.rounding == "gptq")

    def target(self, variant: Variant, group_size: int | None = None) -> Path:
        return self.out / f"{self.source.base_model}-{variant.folder_suffix(group_size)}"

    def kept(self, target: Path, recipe: Recipe) -> Built | None:
        """The finished checkpoint that is there already, unless it is to be made again.

        Raises UserError where it is of another source, or was made with other options or calibration.
        """
        if self.options.force or not (target / MANIFEST_NAME).is_file():
            return None
        found = open_checkpoint(target)
        difference = _difference(found.manifest, self.source.facts, recipe)
        if difference:
            raise UserError(
                f"{target} is there already, made {difference}: --force makes it again, another --out keeps both"
            )
        self.say(f"{target.name}: finished before, kept (--force makes it again)")
        return Built(found, kept=True)

    @property
    def half_dtype(self) -> torch.dtype:
        """bfloat16 for a source that is in it, else float16."""
        dtypes = [self.weights.dtype(name) for name in self.weights.names()]
        return torch.bfloat16 if dtypes.count(torch.bfloat16) > len(dtypes) / 2 else torch.float16

    def plain(self, variant: Variant) -> Built:
        """A checkpoint whose tensors need no calibration: the reference, plain rounding, the bitsandbytes ones."""
        model = empty_model(self.source.folder)
        if self.source.facts.kind != "dummy":
            check_covered(model, self.weights.names())
        quantized = set(bnb_layers(model)) if variant.w_bit else set()
        recipe = self.recipe(variant, group_size=self.group_size(quantized) if variant.is_awq else None)
        target = self.target(variant, recipe.group_size)
        if built := self.kept(target, recipe):
            return built
        started = time.perf_counter()
        names = self.weights.names()
        with writing(target, force=self.options.force) as folder:
            writer = ShardWriter(folder)
            part: dict[str, Tensor] = {}
            parts = 0
            for done, name in enumerate(names):
                self.progress(variant.name, done, len(names))
                tensor = self.weights.get(name)
                check_finite(name, tensor)
                layer = name.removesuffix(".weight")
                if layer in quantized and name.endswith(".weight"):
                    part |= self.quantized_layer(layer, tensor.to(self.device), recipe)
                else:
                    part[name] = half(name, tensor, recipe.dtype)
                if sum(t.nbytes for t in part.values()) > PART_BYTES or done == len(names) - 1:
                    writer.add(parts, part)
                    part, parts = {}, parts + 1
            self.progress(variant.name, len(names), len(names))
            seconds = {"total": time.perf_counter() - started}
            manifest = finish(folder, self.source, target.name, recipe, seconds=seconds)
        return Built(Checkpoint(target, manifest), kept=False)

    def quantized_layer(self, name: str, weight: Tensor, recipe: Recipe) -> dict[str, Tensor]:
        """One linear layer's tensors, made without calibration."""
        if recipe.group_size is None:
            return bnb_tensors(name, weight, recipe.variant, self.options.bnb)
        packed = PACKERS[str(recipe.variant.version)](round_to_nearest(weight, recipe.group_size))
        return {f"{name}.{part}": tensor for part, tensor in packed.items()}

    def group_size(self, layers: Iterable[str]) -> int:
        """AWQ's group size for these linear layers, named as in the source's files."""
        shapes = [(name, *_matrix_shape(self.weights, name)) for name in sorted(layers)]
        return self.say_group_size(group_size_for(shapes, self.options.group_size, GROUP_SIZES))

    def say_group_size(self, group_size: int) -> int:
        """Tell the user when the usual group size does not fit this model."""
        if self.options.group_size is None and group_size != GROUP_SIZES[0]:
            self.say(f"group size {group_size}: {GROUP_SIZES[0]} does not divide every layer of this model")
        return group_size

    def recipe(
        self,
        variant: Variant,
        *,
        group_size: int | None = None,
        calibration: CalibrationFacts | None = None,
        architecture: Architecture | None = None,
    ) -> Recipe:
        """How this variant is made with these options."""
        if variant.is_awq:
            quantization = {
                "quant_method": "awq",
                "bits": variant.w_bit,
                "group_size": group_size,
                "zero_point": True,
                "version": str(variant.version).lower(),
                "modules_to_not_convert": architecture.modules_to_not_convert if architecture else None,
            }
            searched = AwqOptions(group_size or 0, rounding=self.options.rounding)
            options = asdict(
                searched if variant.is_searched else AwqOptions(group_size or 0, search=False, clip=False, refit=False)
            )
            return Recipe(variant, torch.float16, quantization, group_size, calibration, options)
        if variant.w_bit is None:
            return Recipe(variant, self.half_dtype)
        options = {**asdict(self.options.bnb), "rounding": self.options.rounding} if variant.w_bit == 4 else {}
        quantization = bnb_quantization_config(variant, self.options.bnb)
        return Recipe(variant, self.half_dtype, quantization, None, calibration, options)

    def calibrated(self, variants: Sequence[Variant], *, dry_run: bool = False) -> dict[str, Built]:
        """The checkpoints that look at text: one pass over the model for all of them."""
        if not variants:
            self.say("nothing here needs calibration: it takes seconds and one tensor's memory")
            return {}
        try:
            stream = LayerStream(self.source.folder, self.weights, self.device)
        except UserError as error:
            if any(variant.is_awq for variant in variants):
                raise
            raise UserError(f"--rounding gptq needs a layer map: {error} with --rounding nearest") from None
        group_size = None
        if any(variant.is_awq for variant in variants):
            shapes = quantized_shapes(stream.architecture)
            group_size = self.say_group_size(group_size_for(shapes, self.options.group_size, GROUP_SIZES))
        sizes = {variant: group_size if variant.is_awq else None for variant in variants}
        blocks = self._blocks(stream.model.config.get_text_config().vocab_size)
        text = "random tokens" if self.source.facts.kind == "dummy" else self.options.calibration
        calibration = CalibrationFacts(text, blocks.shape[0], blocks.shape[1], blocks_sha256(blocks))
        recipes = {
            variant: self.recipe(variant, group_size=size, calibration=calibration, architecture=stream.architecture)
            for variant, size in sizes.items()
        }
        built = {v.name: done for v, one in recipes.items() if (done := self.kept(self.target(v, sizes[v]), one))}
        missing = {variant.name: recipe for variant, recipe in recipes.items() if variant.name not in built}
        if missing:
            self._search(stream, blocks, missing, dry_run=dry_run)
        if not dry_run:
            for recipe in missing.values():
                target = self.target(recipe.variant, recipe.group_size)
                built[recipe.variant.name] = Built(open_checkpoint(target), kept=False)
        return built

    def _search(self, stream: LayerStream, blocks: Tensor, recipes: Mapping[str, Recipe], *, dry_run: bool) -> None:
        expected = estimate(
            stream.model,
            stream.architecture,
            recipes.values(),
            tokens=blocks.numel(),
            out=self.out,
            device=self.device,
            already_bytes=(resident_bytes() or 0) if self.device.type == "cpu" else 0,
        )
        if dry_run:
            self.say(expected.line())
            return
        expected.check()
        key = options_key(
            source_sha256=self.source.facts.weights_sha256,
            config=read_config(self.source.folder),
            calibration_sha256=blocks_sha256(blocks),
            options={name: dict(recipe.options) for name, recipe in recipes.items()},
            libraries=library_versions(),
            device=self.device,
        )
        journal = Journal(self.out / f".{self.source.base_model}.unfinished", key)
        total = len(stream.architecture.layers)
        if journal.restarted:
            self.say("an unfinished run was with another source, calibration or options: starting anew")
        elif journal.finished_layers:
            self.say(f"going on with an unfinished run at layer {journal.finished_layers + 1} of {total}")
        try:
            seconds, watched = self._layers(stream, blocks, recipes, journal)
            for recipe in recipes.values():
                measured = {"peak_bytes": peak_bytes(self.device), "seconds": round(sum(seconds.values()), 3)}
                if recipe.variant.is_searched and watched:
                    measured |= watched.to_json()
                target = self.target(recipe.variant, recipe.group_size)
                self._move_parts(recipe, target, journal, seconds, expected, measured)
        except BaseException as error:
            if disk_is_full(error):
                raise UserError(
                    f"the disk is full while writing to {self.out}: free some space and run the same command, "
                    "it goes on where it was"
                ) from None
            if not isinstance(error, KeyboardInterrupt):
                journal.discard()
            raise
        journal.discard()

    def _layers(
        self, stream: LayerStream, blocks: Tensor, recipes: Mapping[str, Recipe], journal: Journal
    ) -> tuple[dict[str, float], Watched | None]:
        """Run the pipeline from where the journal stands; return seconds a phase, and what AWQ costs in quality."""
        total = len(stream.architecture.layers)
        writers = {name: journal.writer(name) for name in recipes}
        group_size = next((recipe.group_size for recipe in recipes.values() if recipe.group_size), None)
        options = None if group_size is None else AwqOptions(group_size, rounding=self.options.rounding)
        self.progress("layers", journal.finished_layers, total)
        packing = 0.0
        kept = journal.hidden()
        count = len(batches_of(blocks))
        watch = None
        if options is not None and self.source.facts.kind != "dummy":
            watch = Watch(self._watched_blocks(blocks.shape[1]), kept[count:] if kept else None)
        layers = stream.quantized(
            blocks,
            options,
            start=journal.finished_layers,
            hidden=kept[:count] if kept else None,
            before=self._bnb_layer if "bnb-4bit" in recipes else None,
            watch=watch,
            spill=journal.folder / "activations" if self.options.spill else None,
        )
        for result, hidden in layers:
            started = time.perf_counter()
            for name, writer in writers.items():
                writer.add(result.index + 1, _packed(result, recipes[name]))
            journal.layer_done(result, hidden + (watch.state if watch else []))
            packing += time.perf_counter() - started
            self.progress("layers", result.index + 1, total)
        started = time.perf_counter()
        outer = dict(stream.other_tensors())
        for name, writer in writers.items():
            writer.add(0, {key: half(key, tensor, recipes[name].dtype) for key, tensor in outer.items()})
        del outer
        seconds = {**journal.seconds, "pack": packing + time.perf_counter() - started}
        if watch is None:
            return seconds, None
        watched = stream.judge(watch)
        watched.check()
        return seconds, watched

    def _bnb_layer(self, seen: Observed) -> dict[str, Tensor]:
        """The bnb-4bit tensors of one decoder layer, from its weights as they came."""
        tensors = {name: half(name, tensor, self.half_dtype) for name, tensor in seen.others().items()}
        for owner, stats in seen.stats.items():
            weights = {
                seen.prefix + name: seen.linears[name].weight.data.to(self.half_dtype) for name in seen.sharing(owner)
            }
            tensors |= bnb_4bit_with_feedback(weights, stats.shrunk(), self.options.bnb)
        return tensors

    def _move_parts(
        self,
        recipe: Recipe,
        target: Path,
        journal: Journal,
        seconds: Mapping[str, float],
        expected: Estimate,
        measured: dict[str, Any],
    ) -> None:
        """Turn one variant's parts into its checkpoint."""
        with writing(target, force=self.options.force) as folder:
            for part in sorted((journal.folder / recipe.variant.name).glob(PART_GLOB)):
                _link(part, folder / part.name)
            layers = journal.facts if recipe.variant.is_awq else ()
            finish(
                folder,
                self.source,
                target.name,
                recipe,
                seconds=seconds,
                layers=layers,
                estimate=expected.to_json(),
                measured=measured,
            )

    def _watched_blocks(self, block_tokens: int) -> Tensor:
        """A little of the built-in evaluation text, which no calibration sees."""
        tokenizer = tokenizer_of(self.source.folder)
        return token_blocks(builtin_texts("evaluation"), tokenizer, blocks=WATCHED_BLOCKS, block_tokens=block_tokens)

    def _blocks(self, vocabulary: int) -> Tensor:
        if self.source.facts.kind == "dummy":
            return dummy_blocks(vocabulary, self.options.blocks, self.options.block_tokens)

        tokenizer = tokenizer_of(self.source.folder)
        blocks = token_blocks(
            text_from(self.options.calibration),
            tokenizer,
            blocks=self.options.blocks,
            block_tokens=self.options.block_tokens,
        )
        if blocks.shape[0] < self.options.blocks:
            self.say(f"the calibration text fills {blocks.shape[0]} of {self.options.blocks} blocks")
        return blocks


def _difference(manifest: Manifest, source: SourceFacts, recipe: Recipe) -> str | None:
    """In what a finished checkpoint differs from what would be made now; None where it is the same."""
    if (manifest.source.kind == "dummy", manifest.source.weights_sha256) != (
        source.kind == "dummy",
        source.weights_sha256,
    ) or (source.kind == "dummy" and manifest.source.id != source.id):
        return f"from other weights ({manifest.source.id})"
    ours = json.loads(json.dumps(dict(recipe.options)))
    for name in sorted(ours.keys() | manifest.options.keys()):
        if ours.get(name) != manifest.options.get(name):
            return f"with {name} = {manifest.options.get(name)}, now {ours.get(name)}"
    if manifest.calibration != recipe.calibration:
        return "with another calibration text"
    return None


def _reader(source: Source, device: torch.device) -> TensorReader:
    """The source's tensors: from its files, or drawn at random in its shape."""
    if source.facts.kind == "dummy":
        return dummy_weights(empty_model(source.folder), device)
    return open_weights(source.folder)


def _link(source: Path, target: Path) -> None:
    """The same file under a second name: the journal keeps its own until the checkpoint is finished."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _matrix_shape(weights: TensorReader, layer: str) -> tuple[int, int]:
    out_features, in_features = weights.shape(f"{layer}.weight")
    return out_features, in_features


def _packed(result: LayerResult, recipe: Recipe) -> dict[str, Tensor]:
    """One decoder layer's tensors as this variant's files hold them."""
    if not recipe.variant.is_awq:
        return result.before
    pack = PACKERS[str(recipe.variant.version)]
    packed = {
        f"{name}.{part}": tensor for name, weight in result.weights.items() for part, tensor in pack(weight).items()
    }
    return packed | {name: half(name, tensor, recipe.dtype) for name, tensor in result.others.items()}
