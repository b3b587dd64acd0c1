"""From a source to finished checkpoints: every variant asked for, from one look at the weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

from quantize.building.calibrated import build_calibrated
from quantize.building.estimate import steps_left
from quantize.building.job import BuildChoices, BuildOptions, BuiltCheckpoint, Job, method_of
from quantize.building.plain import build_plain
from quantize.building.stream import tensor_core_products
from quantize.dummy import dummy_weights
from quantize.errors import UserError
from quantize.files import only_writer
from quantize.loading.device_map import torch_device
from quantize.model.fit import fitting_model
from quantize.model.pretrained import empty_model, tokenizer_of
from quantize.process_memory import collector_paused
from quantize.progress import Progress
from quantize.quiet import quiet_libraries
from quantize.schema import with_choices
from quantize.source import Say, open_source
from quantize.variant import variants_named
from quantize.weights import TensorReader, open_weights


def quantize(
    source: str,
    variants: str | Sequence[str] = "all",
    out: Path | str = "runs",
    *,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
    say: Say = lambda line: None,
    dry_run: bool = False,
    **choices: Unpack[BuildChoices],
) -> list[BuiltCheckpoint]:
    """Make a checkpoint of each variant of the model `source` in the folder `out`; return them in the table's order.

    source:   as `open_source` takes it.
    variants: a name of VARIANTS or several, or "all". A finished checkpoint is kept unless `force`.
    choices:  fields of BuildOptions by name, over those of `options`; of its `bnb`, too.
    progress: told each step; say: called with each line that a user should read.
    dry_run:  say what it will take in memory, disk and time, and make nothing.

    Raises UserError for everything that the user can fix; nothing half-written is left under a checkpoint's name. Of
    several variants, those that can be made are made first (NotAllMade)."""
    options, progress = with_choices(options or BuildOptions(), "bnb", choices), progress or Progress()
    chosen = variants_named([variants] if isinstance(variants, str) else variants)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    device = torch_device(options.device)
    with quiet_libraries(), tensor_core_products(device):
        with collector_paused():  # above all, it imports
            opened = open_source(source, revision=options.revision, name=options.name, bars=progress.draws, say=say)
            weights: TensorReader
            if opened.facts.kind == "dummy":
                model = empty_model(opened.folder)
                weights = dummy_weights(model, device)
            else:
                weights = open_weights(opened.folder)
                model = fitting_model(opened.folder, weights, say)
                tokenizer_of(opened.folder)
        job = Job(opened, weights, model, out, options, device, progress, say, len(chosen) > 1)
        calibrated = [one for one in chosen if method_of(one).needs_calibration(options.rounding)]
        plain = [one for one in chosen if one not in calibrated]
        built: dict[str, BuiltCheckpoint] = {}
        if dry_run:
            for variant in plain:
                with job.sparing(variant):
                    build_plain(job, variant, dry_run=True)
            build_calibrated(job, calibrated, dry_run=True)
            sizes = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in job.disk.items())
            say(f"{sizes or 'nothing'} to write, {sum(job.disk.values()) / 1e9:.3g} GB in all")
        else:
            busy = f"another `quantize` is making {opened.base_model} in {out}: wait for it, or choose another --out"
            with only_writer(out / f".{opened.base_model}.lock", busy):
                for number, variant in enumerate(plain):
                    progress.plan(steps_left(job, plain[number:], calibrated))
                    with job.sparing(variant):
                        built |= build_plain(job, variant)
                if calibrated:
                    with job.sparing(*calibrated):
                        built |= build_calibrated(job, calibrated)
    made = [built[variant.name] for variant in chosen if variant.name in built]
    if job.refused:
        raise NotAllMade(made, job.refused)
    return made


class NotAllMade(UserError):  # noqa: N818 - what is made is good
    """Some of several variants could not be made. made: the others; refused: why, by variant."""

    def __init__(self, made: list[BuiltCheckpoint], refused: Mapping[str, str]) -> None:
        reasons: dict[str, list[str]] = {}
        for name, reason in refused.items():
            reasons.setdefault(reason, []).append(name)
        super().__init__("; ".join(f"no {', '.join(names)}: {reason}" for reason, names in reasons.items()))
        self.made = made
        self.refused = dict(refused)
