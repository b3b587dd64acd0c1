"""One call of `quantize`: the opened source and what was asked for."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantize.checkpoint import MANIFEST_NAME, Checkpoint, Manifest, SourceFacts, clear, open_checkpoint, verify
from quantize.dummy import dummy_weights
from quantize.errors import UserError
from quantize.methods import METHODS
from quantize.methods.base import Choices, Method, Recipe
from quantize.model.apart import take_apart
from quantize.model.architecture import Architecture
from quantize.model.pretrained import empty_model
from quantize.model.skeleton import Skeleton
from quantize.progress import Progress
from quantize.rounding.options import BnbOptions, Rounding
from quantize.source import Source
from quantize.variant import GROUP_SIZES, Variant
from quantize.versions import MAKERS, maker_versions
from quantize.weights import TensorReader

Say = Callable[[str], object]


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; every default is what the table is made with.

    group_size:   AWQ's, None for the largest that divides every layer.
    calibration:  a text as `text_from` reads it.
    blocks:       of it that are used.
    block_tokens: of each block.
    rounding:     of the 4-bit variants, "gptq" (error feedback on the calibration text) or "nearest".
    bnb:          how bitsandbytes' 4-bit weights are stored.
    revision:     of a hub source.
    device:       "cpu", "cuda" or "auto" (CUDA where there is some).
    force:        make finished checkpoints again.
    name:         of the base model, None for the source's own.
    spill:        keep the activations between two layers in files beside the output.
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
    name: str | None = None
    spill: bool = False


@dataclass(frozen=True)
class BuiltCheckpoint:
    """One checkpoint that `quantize` was asked for. kept: whether it was there already."""

    checkpoint: Checkpoint
    kept: bool


@dataclass(frozen=True)
class Job:
    """What all checkpoints of one call share.

    source:   the opened model.
    weights:  its tensors.
    empty:    its transformers model on the meta device, which the files are known to fit.
    out:      folder for the checkpoints.
    options:  the user's.
    device:   where it is computed.
    progress: told each step.
    say:      told each line that a user should read.
    several:  whether the call asked for more than one variant.
    refused:  variants that could not be made, and why: one does not lose the others.
    disk:     of a dry run, bytes that each variant will write.
    """

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
        """Whether the weights are random."""
        return self.source.facts.kind == "dummy"

    def skeleton(self) -> Skeleton:
        """Another model like `empty`, taken apart, to be filled."""
        model = empty_model(self.source.folder, config=self.empty.config)
        if self.is_dummy:  # drawn one expert at a time
            take_apart(model)
            return Skeleton.of(model, dummy_weights(model, self.device))
        made = Skeleton.of(model, self.weights)
        held = [name for name in made.stored if name in made]
        again = empty_model(self.source.folder, config=self.empty.config)
        found = Skeleton.of(again, self.weights, [made.stored[name] for name in held]).stored
        if lost := [name for name in held if found[name] != made.stored[name]]:
            raise UserError(f"{lost[0]} would not be found again in a checkpoint of its own: use bnb-8bit or fp16")
        return made

    def target(self, recipe: Recipe) -> Path:
        """The folder of this recipe's checkpoint."""
        return self.out / f"{self.source.base_model}-{recipe.variant.folder_suffix(recipe.group_size)}"

    def choices(self) -> Choices:
        """What the options and the weights say: bfloat16 for a source that is mostly in it, else float16."""
        dtypes = [self.weights.dtype(name) for name in self.weights.names()]
        half_dtype = torch.bfloat16 if dtypes.count(torch.bfloat16) > len(dtypes) / 2 else torch.float16
        return Choices(half_dtype, self.options.rounding, self.options.bnb)

    def in_groups(self, architecture: Architecture) -> tuple[Architecture, int]:
        """The size of groups of codes, and the architecture without the layers that it does not fit.

        Tells the user when the usual size does not fit. Raises UserError where none does.
        """
        fitting, chosen = architecture.with_group_size(self.options.group_size)
        if self.options.group_size is None and chosen != GROUP_SIZES[0]:
            self.say(f"group size {chosen}: {GROUP_SIZES[0]} does not divide every layer of this model")
        return fitting, chosen

    def kept(self, recipe: Recipe) -> BuiltCheckpoint | None:
        """The finished checkpoint that is there already, unless it is to be made again.

        Raises UserError where it is of another source, or was made with other options or calibration.
        """
        target = self.target(recipe)
        if self.options.force or not (target / MANIFEST_NAME).is_file():
            return None
        found = open_checkpoint(target)
        if difference := _difference(found.manifest, self.source.facts, recipe):
            raise UserError(
                f"{target} is there already, made {difference}: --force makes it again, another --out keeps both"
            )
        verify(found)
        clear(target)
        self.say(f"{target.name}: finished before, kept (--force makes it again)")
        return BuiltCheckpoint(found, kept=True)


def method_of(variant: Variant) -> Method:
    """The method that a variant names."""
    return METHODS[variant.method]


def _difference(manifest: Manifest, source: SourceFacts, recipe: Recipe) -> str | None:
    """In what a finished checkpoint differs from what would be made now; None where it is the same."""
    theirs, ours = manifest.source, recipe.options
    if theirs.weights_sha256 != source.weights_sha256 or (source.kind == "dummy" and theirs.id != source.id):
        return f"from other weights ({theirs.id})"
    for name in sorted(ours.keys() | manifest.options.keys()):
        if ours.get(name) != manifest.options.get(name):
            return f"with {name} = {manifest.options.get(name)}, now {ours.get(name)}"
    makers = maker_versions()
    for name in MAKERS:
        if manifest.libraries.get(name) != makers.get(name):
            return f"with {name} {manifest.libraries.get(name)}, now {makers.get(name)}"
    return None if manifest.calibration == recipe.calibration else "with another calibration text"
