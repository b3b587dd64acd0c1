"""From parts of tensors to a finished checkpoint: safetensors files, config, tokenizer, manifest."""

import datetime
import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from quantize.building.job import Job
from quantize.checkpoint import MANIFEST_NAME, Manifest, seal
from quantize.gguf_file import GGUF_NAME, write_gguf
from quantize.kernels.base import dtype_name
from quantize.methods.base import Recipe
from quantize.source import BESIDE_WEIGHTS
from quantize.versions import maker_versions, version_of
from quantize.weights import INDEX_NAME, open_weights, read_json, regular_files

MAX_SHARD_BYTES = 5 * 10**9  # files grow to about this size, as published checkpoints do
PART_GLOB = "part-*.safetensors"


def finish(folder: Path, job: Job, recipe: Recipe, seconds: Mapping[str, float], **facts: Any) -> Manifest:
    """Join the parts in `folder`, write what stands beside the weights, and seal it with a manifest of these facts."""
    source, weights_bytes = job.source, join_parts(folder)
    source.check_unchanged()
    _write_config(job, folder, recipe)
    for path in regular_files(source.folder, BESIDE_WEIGHTS):
        if path.name in ("config.json", MANIFEST_NAME) or path.name.endswith(".index.json"):
            continue
        if path.suffix == ".json" and b'"auto_map"' in path.read_bytes():  # it names code that does not come along
            data = {key: value for key, value in read_json(path).items() if key != "auto_map"}
            (folder / path.name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, folder / path.name)
    if recipe.variant.is_gguf:
        packed = open_weights(folder)
        weights_bytes = write_gguf(packed, folder / GGUF_NAME, source.base_model, source.folder)
        for path in (*packed.files, *folder.glob(INDEX_NAME)):
            path.unlink()
    manifest = Manifest(
        name=job.target(recipe).name,
        base_model=source.base_model,
        variant=recipe.variant.name,
        q_group_size=recipe.group_size,
        source=source.facts,
        calibration=recipe.calibration,
        options=recipe.options,
        libraries=maker_versions() | {name: own for name in ("quantable",) if (own := version_of(name))},
        seconds={phase: round(spent, 3) for phase, spent in seconds.items()},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        weights_bytes=weights_bytes,
        quantized_share=recipe.quantized_share,
        **facts,
    )
    return seal(folder, manifest)


def _write_config(job: Job, target: Path, recipe: Recipe) -> None:
    config = read_json(job.source.folder / "config.json")
    for key in ("_name_or_path", "_model_name_or_path", "torch_dtype", "auto_map"):
        config.pop(key, None)
    for part, read in ((config, job.empty.config), (config.get("text_config"), job.empty.config.get_text_config())):
        if part and part.get("tie_word_embeddings", True) and not getattr(read, "tie_word_embeddings", True):
            part["tie_word_embeddings"] = False
    config["dtype"] = dtype_name(recipe.dtype)
    if recipe.quantization is not None:
        config["quantization_config"] = recipe.quantization
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_part(folder: Path, part: int, tensors: Mapping[str, Tensor]) -> Path:
    """Write one part (parts are joined in the order of their numbers); a part written twice is replaced."""
    path = folder / f"part-{part:05d}.safetensors"
    partial = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
    return partial.rename(path)


def join_parts(folder: Path) -> int:
    """Join the parts into model.safetensors, or several files and their index; return the tensors' bytes."""
    shards: list[list[Path]] = [[]]
    weight_map: dict[str, str] = {}
    size = total = 0
    for part in sorted(folder.glob(PART_GLOB)):
        if shards[-1] and size + part.stat().st_size > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.stat().st_size
    for number, members in enumerate(shards, start=1):
        several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file_name = f"model{several}.safetensors"
        names, data_bytes = _join(members, folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
        total += data_bytes
        for member in members:
            member.unlink()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")
    return total


def _join(parts: Sequence[Path], target: Path) -> tuple[list[str], int]:
    """Write `target` holding every tensor of `parts`; return the names and the bytes of data. Nothing is decoded.

    The format is a little-endian 64-bit header length, a JSON header of dtypes, shapes and offsets, then the data."""
    header: dict[str, Any] = {}
    data_starts = []
    offset = 0
    for part in parts:
        with part.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            header[name] = {**entry, "data_offsets": [begin + offset, end + offset]}
        data_starts.append(8 + length)
        offset += part.stat().st_size - data_starts[-1]
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for part, data_start in zip(parts, data_starts, strict=True):
            with part.open("rb") as file:
                file.seek(data_start)
                shutil.copyfileobj(file, out, length=1 << 22)
    return list(header), offset
