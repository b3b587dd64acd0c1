"""One call of `quantize`: the opened source and what was asked for."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch

from quantize.checkpoint import MANIFEST_NAME, CalibrationFacts, Checkpoint, clear, open_checkpoint, verify
from quantize.dummy import dummy_weights
from quantize.errors import UserError
from quantize.gguf_file import check_gguf
from quantize.methods import METHODS
from quantize.methods.base import Choices, Method, Recipe
from quantize.model.apart import take_apart
from quantize.model.architecture import Architecture
from quantize.model.names import kept_by_bnb, linear_layers, quantized_share
from quantize.model.pretrained import empty_model
from quantize.model.skeleton import Skeleton, kept_names
from quantize.progress import Progress
from quantize.rounding.options import BnbOptions, QuantType, Rounding
from quantize.source import Say, Source
from quantize.variant import GROUP_SIZES, Variant
from quantize.versions import MAKERS, maker_versions
from quantize.weights import TensorReader


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; every default is what the table is made with.

    group_size:   AWQ's, None for the largest that divides every layer.
    calibration:  a text as `text_from` reads it.
    blocks:       of it that are used, of `block_tokens` tokens each.
    rounding:     of the 4-bit variants, "gptq" (error feedback on the calibration text) or "nearest".
    bnb:          how bitsandbytes' 4-bit weights are stored.
    revision:     of a hub source; device: "cpu", "cuda" or "auto" (CUDA where there is some).
    force:        make finished checkpoints again.
    name:         of the base model, None for the source's own.
    spill:        keep the activations between two layers in files beside the output."""

    group_size: int | None = None
    calibration: str = "builtin"
    blocks: int = 48
    block_tokens: int = 256
    rounding: Rounding = "gptq"
    bnb: BnbOptions = field(default_factory=BnbOptions)
    revision: str | None = None
    device: str = "auto"
    force: bool = False
    name: str | None = None
    spill: bool = False


BuildChoices = TypedDict("BuildChoices", {  # noqa: UP013
    "group_size": int | None, "calibration": str, "blocks": int, "block_tokens": int, "rounding": Rounding,
    "bnb": BnbOptions, "quant_type": QuantType, "double_quant": bool, "blocksize": int, "revision": str | None,
    "device": str, "force": bool, "name": str | None, "spill": bool,
}, total=False)  # fmt: skip
"""Keyword arguments of `quantize`: the fields of BuildOptions, and those of its BnbOptions."""


@dataclass(frozen=True)
class BuiltCheckpoint:
    """One checkpoint that `quantize` was asked for. kept: whether it was there already."""

    checkpoint: Checkpoint
    kept: bool


@dataclass(frozen=True)
class Job:
    """What all checkpoints of one call share.

    source:   the opened model; weights: its tensors.
    empty:    its transformers model on the meta device, which the files are known to fit.
    out:      folder for the checkpoints.
    options:  the user's.
    device:   where it is computed.
    progress: told each step; say: told each line that a user should read.
    several:  whether the call asked for more than one variant.
    refused:  variants that could not be made, and why: one does not lose the others.
    disk:     of a dry run, bytes that each variant will write."""

    source: Source
    weights: TensorReader
    empty: Any
    out: Path
    options: BuildOptions
    device: torch.device
    progress: Progress
    say: Say
    several: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def sparing(self, *variants: Variant) -> Iterator[None]:
        """A UserError inside the block is noted as these variants', where the call asked for several, and goes on."""
        try:
            yield
        except UserError as error:
            if not self.several:
                raise
            self.refused.update({variant.name: str(error) for variant in variants})

    @property
    def is_dummy(self) -> bool:
        return self.source.facts.kind == "dummy"

    @cached_property
    def linears(self) -> list[str]:
        """The linear layers that bitsandbytes quantizes. Raises UserError where there are none."""
        return linear_layers(self.empty)

    def skeleton(self) -> Skeleton:
        """Another model like `empty`, taken apart, to be filled."""
        model = empty_model(self.source.folder, config=self.empty.config)
        if self.is_dummy:  # drawn one expert at a time
            take_apart(model)
            return Skeleton.of(model, dummy_weights(model, self.device))
        made = Skeleton.of(model, self.weights)
        held = {name: made.stored[name] for name in made.stored if name in made}
        again = Skeleton.of(empty_model(self.source.folder, config=self.empty.config), self.weights, held.values())
        if lost := next((name for name, file_name in held.items() if again.stored[name] != file_name), None):
            raise UserError(f"{lost} would not be found again in a checkpoint of its own: use bnb-8bit or fp16")
        return made

    def target(self, recipe: Recipe) -> Path:
        return self.out / f"{self.source.base_model}-{recipe.variant.folder_suffix(recipe.group_size)}"

    def in_groups(self, architecture: Architecture) -> Architecture:
        """The architecture in groups of codes, without what they do not fit. Raises UserError where none fits."""
        fitting = architecture.with_group_size(self.options.group_size)
        if self.options.group_size is None and fitting.group_size != GROUP_SIZES[0]:
            self.say(f"group size {fitting.group_size}: {GROUP_SIZES[0]} does not divide every layer of this model")
        return fitting

    def recipe(
        self, variant: Variant, apart: tuple[Skeleton, Architecture] | None, calibration: CalibrationFacts | None = None
    ) -> Recipe:
        """What the options and the weights say: bfloat16 for a source that is mostly in it, else float16.

        apart: for a variant with groups of codes. Raises UserError where too little of the model can be quantized."""
        if variant.is_gguf:
            check_gguf(self.source.folder, self.weights.names())
        method, dtypes = method_of(variant), Counter(map(self.weights.dtype, self.weights.names()))
        half_dtype = torch.bfloat16 if dtypes[torch.bfloat16] > dtypes.total() / 2 else torch.float16
        choices = Choices(half_dtype, self.options.rounding, self.options.bnb, calibration=calibration)
        share = None
        if apart and method.in_groups:
            skeleton, names, group_size = apart[0], apart[1].names(), apart[1].group_size
            choices = replace(choices, group_size=group_size, kept=kept_names(skeleton, set(names)))
            share = quantized_share(skeleton.model, names, variant.name)
        elif method.quantize_layer:
            choices = replace(choices, kept=kept_by_bnb(self.empty, set(self.linears)))
            share = quantized_share(self.empty, self.linears, variant.name)
        return replace(method.recipe(variant, choices), quantized_share=share)

    def kept(self, recipe: Recipe) -> BuiltCheckpoint | None:
        """The finished checkpoint, unless it is to be made again. Raises UserError where it was made otherwise."""
        target = self.target(recipe)
        if self.options.force or not (target / MANIFEST_NAME).is_file():
            return None
        found = open_checkpoint(target)
        if difference := self._difference(found, recipe):
            advice = "--force makes it again, another --out keeps both"
            raise UserError(f"{target} is there already, made {difference}: {advice}")
        verify(found)
        clear(target)
        self.say(f"{target.name}: finished before, kept (--force makes it again)")
        return BuiltCheckpoint(found, kept=True)

    def _difference(self, found: Checkpoint, recipe: Recipe) -> str | None:
        """In what a finished checkpoint differs from what would be made now; None where it is the same."""
        made, ours, makers = found.manifest, recipe.options, maker_versions()
        same_weights = made.source.weights_sha256 == self.source.facts.weights_sha256
        if not same_weights or (self.is_dummy and made.source.id != self.source.facts.id):
            return f"from other weights ({made.source.id})"
        for name in sorted(ours.keys() | made.options.keys()):
            if ours.get(name) != made.options.get(name):
                return f"with {name} = {made.options.get(name)}, now {ours.get(name)}"
        for name in MAKERS:
            if made.libraries.get(name) != makers.get(name):
                return f"with {name} {made.libraries.get(name)}, now {makers.get(name)}"
        return None if made.calibration == recipe.calibration else "with another calibration text"


def method_of(variant: Variant) -> Method:
    return METHODS[variant.method]
