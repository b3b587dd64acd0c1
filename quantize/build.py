"""From a source to finished checkpoints: every variant asked for, from one look at the weights."""

import datetime
import importlib.metadata
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.awq.architecture import group_size_for, quantized_shapes
from quantize.awq.journal import Journal, options_key
from quantize.awq.packing import PACKERS
from quantize.awq.pipeline import AwqOptions, Rounding
from quantize.awq.stream import LayerStream, empty_model
from quantize.bnb import BnbOptions, bnb_layers, bnb_quantization_config, bnb_tensors
from quantize.calibration import blocks_sha256, text_from, token_blocks
from quantize.checkpoint import (
    CalibrationFacts,
    Checkpoint,
    Manifest,
    disk_is_full,
    open_checkpoint,
    seal,
    writing,
)
from quantize.errors import UserError
from quantize.loading import torch_device
from quantize.progress import Progress, silent
from quantize.quiet import quiet_libraries
from quantize.shards import ShardWriter
from quantize.source import Source, Weights, check_finite, open_source, open_weights
from quantize.variant import GROUP_SIZES, Variant, variants_named

PART_BYTES = 256 * 10**6
LIBRARIES = ("torch", "transformers", "autoawq", "bitsandbytes", "safetensors", "tokenizers")
NOT_COPIED = ("config.json", "quantable.json", "model.safetensors.index.json")
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""Tokenizer, generation settings and chat template: what stands beside the weights and is no weight."""


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; every default is what the table is made with.

    group_size: AWQ's, None for the largest that divides every layer. calibration: a text as `text_from` reads it,
    of which `blocks` blocks of `block_tokens` tokens are used. rounding: "nearest" or "gptq". device: "cpu", "cuda"
    or "auto" (CUDA where there is some). force: make finished checkpoints again.
    """

    group_size: int | None = None
    calibration: str = "builtin"
    blocks: int = 48
    block_tokens: int = 256
    rounding: Rounding = "nearest"
    bnb: BnbOptions = field(default_factory=BnbOptions)
    revision: str | None = None
    device: str = "auto"
    force: bool = False


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
    say: Any = None,
) -> list[Built]:
    """Make a checkpoint of each variant of the model `source` in the folder `out`; return them in the table's order.

    source: as `open_source` takes it. variants: names of VARIANTS, or "all". A finished checkpoint is kept unless
    `options.force`. progress is told each step; say is called with each line that a user should read.

    Raises UserError for everything that the user can mend; nothing half-written is left under a checkpoint's name.
    """
    options = options or BuildOptions()
    tell = say or (lambda line: None)
    chosen = variants_named(variants)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    device = torch_device(("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device)
    with quiet_libraries():
        opened = open_source(source, revision=options.revision)
        job = _Job(opened, open_weights(opened.folder), out, options, device, progress, tell)
        built = {}
        awq = [variant for variant in chosen if variant.is_awq]
        for variant in chosen:
            if not variant.is_awq:
                built[variant.name] = job.plain(variant)
        if awq:
            built |= job.awq(awq)
    return [built[variant.name] for variant in chosen]


@dataclass(frozen=True)
class _Job:
    """One call of `quantize`: the opened source and what was asked for."""

    source: Source
    weights: Weights
    out: Path
    options: BuildOptions
    device: torch.device
    progress: Progress
    tell: Any

    def target(self, variant: Variant, group_size: int | None = None) -> Path:
        return self.out / f"{self.source.base_model}-{variant.folder_suffix(group_size)}"

    def kept(self, target: Path) -> Built | None:
        """The finished checkpoint that is there already, unless it is to be made again."""
        if self.options.force or not (target / "quantable.json").is_file():
            return None
        self.tell(f"{target.name}: finished before, kept (--force makes it again)")
        return Built(open_checkpoint(target), kept=True)

    def plain(self, variant: Variant) -> Built:
        """A checkpoint whose tensors need no calibration: the reference and the bitsandbytes ones."""
        target = self.target(variant)
        if built := self.kept(target):
            return built
        started = time.perf_counter()
        quantized = set(bnb_layers(empty_model(self.source.folder))) if variant.w_bit else set()
        config = bnb_quantization_config(variant, self.options.bnb) if variant.w_bit else None
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
                    part |= bnb_tensors(layer, tensor.to(self.device), variant, self.options.bnb)
                else:
                    part[name] = _half(name, tensor, self.half_dtype)
                if sum(t.nbytes for t in part.values()) > PART_BYTES or done == len(names) - 1:
                    writer.add(parts, part)
                    part, parts = {}, parts + 1
            self.progress(variant.name, len(names), len(names))
            bnb = asdict(self.options.bnb) if variant.w_bit == 4 else {}
            manifest = self.finish(folder, writer, variant, config, {"total": started}, options=bnb)
        return Built(Checkpoint(target, manifest), kept=False)

    @property
    def half_dtype(self) -> torch.dtype:
        """bfloat16 for a source that is in it, else float16."""
        dtypes = [self.weights.dtype(name) for name in self.weights.names()]
        return torch.bfloat16 if dtypes.count(torch.bfloat16) > len(dtypes) / 2 else torch.float16

    def awq(self, variants: Sequence[Variant]) -> dict[str, Built]:
        """The AWQ checkpoints: one search, packed into every layout asked for."""
        stream = LayerStream(self.source.folder, self.weights, self.device)
        shapes = quantized_shapes(stream.architecture)
        group_size = group_size_for(shapes, self.options.group_size, GROUP_SIZES)
        if self.options.group_size is None and group_size != GROUP_SIZES[0]:
            self.tell(f"group size {group_size}: {GROUP_SIZES[0]} does not divide every layer of this model")
        built = {v.name: done for v in variants if (done := self.kept(self.target(v, group_size)))}
        missing = [variant for variant in variants if variant.name not in built]
        if missing:
            self._search(stream, missing, group_size)
            for variant in missing:
                built[variant.name] = Built(open_checkpoint(self.target(variant, group_size)), kept=False)
        return built

    def _search(self, stream: LayerStream, variants: Sequence[Variant], group_size: int) -> None:
        blocks = self._blocks()
        options = AwqOptions(group_size, rounding=self.options.rounding)
        layouts = [str(variant.version) for variant in variants]
        calibration = CalibrationFacts(
            self.options.calibration, blocks.shape[0], blocks.shape[1], blocks_sha256(blocks)
        )
        key = options_key(
            source_sha256=self.source.facts.weights_sha256,
            config=_read_config(self.source.folder),
            calibration_sha256=calibration.sha256,
            options=options,
            layouts=layouts,
            libraries=library_versions(),
            device=self.device,
        )
        journal = Journal(self.out / f".{self.source.base_model}.awq-work", key)
        total = len(stream.architecture.layers)
        if journal.restarted:
            self.tell("an unfinished run was with another source, calibration or options: starting anew")
        elif journal.finished_layers:
            self.tell(f"going on with an unfinished run at layer {journal.finished_layers + 1} of {total}")
        try:
            seconds = self._layers(stream, blocks, options, layouts, journal)
            for variant in variants:
                self._finish_awq(variant, stream, group_size, options, journal, calibration, seconds)
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
        self, stream: LayerStream, blocks: Tensor, options: AwqOptions, layouts: Sequence[str], journal: Journal
    ) -> dict[str, float]:
        """Run the pipeline from where the journal stands; return seconds a phase."""
        total = len(stream.architecture.layers)
        writers = {layout: journal.writer(layout) for layout in layouts}
        self.progress("AWQ layers", journal.finished_layers, total)
        packing = 0.0
        layers = stream.quantized(blocks, options, start=journal.finished_layers, hidden=journal.hidden())
        for result, hidden in layers:
            started = time.perf_counter()
            others = {name: _half(name, tensor, torch.float16) for name, tensor in result.others.items()}
            for layout, writer in writers.items():
                packed = {
                    f"{name}.{part}": tensor
                    for name, weight in result.weights.items()
                    for part, tensor in PACKERS[layout](weight).items()
                }
                writer.add(result.index + 1, packed | others)
            journal.layer_done(result, hidden)
            packing += time.perf_counter() - started
            self.progress("AWQ layers", result.index + 1, total)
        started = time.perf_counter()
        outer = {name: _half(name, tensor, torch.float16) for name, tensor in stream.other_tensors()}
        for writer in writers.values():
            writer.add(0, outer)
        return {**journal.seconds, "pack": packing + time.perf_counter() - started}

    def _finish_awq(
        self,
        variant: Variant,
        stream: LayerStream,
        group_size: int,
        options: AwqOptions,
        journal: Journal,
        calibration: CalibrationFacts,
        seconds: dict[str, float],
    ) -> None:
        config = {
            "quant_method": "awq",
            "bits": variant.w_bit,
            "group_size": group_size,
            "zero_point": True,
            "version": str(variant.version).lower(),
            "modules_to_not_convert": stream.architecture.modules_to_not_convert,
        }
        with writing(self.target(variant, group_size), force=self.options.force) as folder:
            for part in sorted((journal.folder / str(variant.version)).glob("part-*.safetensors")):
                shutil.move(part, folder / part.name)
            self.finish(
                folder, ShardWriter(folder), variant, config, {}, group_size=group_size, calibration=calibration,
                options=asdict(options), layers=journal.facts, seconds=seconds,
            )

    def _blocks(self) -> Tensor:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.source.folder)
        blocks = token_blocks(
            text_from(self.options.calibration),
            tokenizer,
            blocks=self.options.blocks,
            block_tokens=self.options.block_tokens,
        )
        if blocks.shape[0] < self.options.blocks:
            self.tell(f"the calibration text fills {blocks.shape[0]} of {self.options.blocks} blocks")
        return blocks

    def finish(
        self,
        folder: Path,
        writer: ShardWriter,
        variant: Variant,
        quantization: dict[str, Any] | None,
        started: dict[str, float],
        *,
        group_size: int | None = None,
        calibration: CalibrationFacts | None = None,
        options: dict[str, Any],
        layers: Sequence[dict[str, Any]] = (),
        seconds: dict[str, float] | None = None,
    ) -> Manifest:
        """Join the parts, write what stands beside the weights, and seal the folder with its manifest."""
        weights_bytes = writer.finish()
        dtype = torch.float16 if variant.is_awq else self.half_dtype
        _write_config(self.source.folder, folder, quantization, dtype)
        for path in _beside_weights(self.source.folder):
            shutil.copyfile(path, folder / path.name)
        spent = {name: round(time.perf_counter() - begun, 3) for name, begun in started.items()}
        spent |= {name: round(value, 3) for name, value in (seconds or {}).items()}
        return seal(
            folder,
            Manifest(
                name=self.target(variant, group_size).name,
                base_model=self.source.base_model,
                variant=variant.name,
                q_group_size=group_size,
                source=self.source.facts,
                calibration=calibration,
                options=options,
                libraries=library_versions(),
                seconds=spent,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                weights_bytes=weights_bytes,
                layers=tuple(layers),
            ),
        )


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that decide what a checkpoint holds."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _half(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in half precision. Raises UserError when a value does not fit."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.to(dtype)
    check_finite(f"{name}, rounded to {str(dtype).removeprefix('torch.')},", half)
    return half


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _write_config(source: Path, target: Path, quantization: dict[str, Any] | None, dtype: torch.dtype) -> None:
    """The source's config.json with the dtype of the file and what engines need to know of the quantization."""
    config = _read_config(source)
    for key in ("_name_or_path", "_model_name_or_path", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if quantization is not None:
        config["quantization_config"] = quantization
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _beside_weights(folder: Path) -> Iterator[Path]:
    for pattern in COPIED:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and path.name not in NOT_COPIED:
                yield path
