"""Turn a folder of tensor parts into a finished checkpoint: config, tokenizer, manifest."""

import datetime
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.building.job import Job
from quantize.building.shards import join_parts
from quantize.checkpoint import MANIFEST_NAME, Manifest, seal
from quantize.kernels.base import dtype_name
from quantize.methods.base import Recipe
from quantize.source import INDEX_NAME
from quantize.versions import maker_versions

COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""Tokenizer, generation settings and chat template: what stands beside the weights and is no weight."""
NOT_COPIED = ("config.json", MANIFEST_NAME, INDEX_NAME)


def finish(
    folder: Path,
    job: Job,
    recipe: Recipe,
    seconds: Mapping[str, float],
    *,
    layers: Sequence[dict[str, Any]] = (),
    estimate: dict[str, Any] | None = None,
    measured: dict[str, Any] | None = None,
) -> Manifest:
    """Join the parts in `folder`, write what stands beside the weights, and seal it with its manifest."""
    source, weights_bytes = job.source, join_parts(folder)
    _write_config(source.folder, folder, recipe)
    for path in (path for pattern in COPIED for path in source.folder.glob(pattern)):
        if path.is_file() and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    manifest = Manifest(
        name=job.target(recipe).name,
        base_model=source.base_model,
        variant=recipe.variant.name,
        q_group_size=recipe.group_size,
        source=source.facts,
        calibration=recipe.calibration,
        options=recipe.options,
        libraries=maker_versions(),
        seconds={phase: round(spent, 3) for phase, spent in seconds.items()},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        weights_bytes=weights_bytes,
        layers=tuple(layers),
        estimate=estimate,
        measured=measured,
    )
    return seal(folder, manifest)


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _write_config(source: Path, target: Path, recipe: Recipe) -> None:
    config = read_config(source)
    for key in ("_name_or_path", "_model_name_or_path", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = dtype_name(recipe.dtype)
    if recipe.quantization is not None:
        config["quantization_config"] = recipe.quantization
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
