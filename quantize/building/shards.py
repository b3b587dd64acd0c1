"""Write a checkpoint's tensors part by part and join the parts into safetensors files without loading them again."""

import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from quantize.source import INDEX_NAME

MAX_SHARD_BYTES = 5 * 10**9
"""Files grow to about this size, as published checkpoints do."""

PART_GLOB = "part-*.safetensors"


def write_part(folder: Path, part: int, tensors: Mapping[str, Tensor]) -> None:
    """Write one part (parts are joined in the order of their numbers); a part written twice is replaced."""
    path = folder / f"part-{part:05d}.safetensors"
    partial = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
    partial.rename(path)


def join_parts(folder: Path) -> int:
    """Join the parts into model.safetensors, or several files and their index; return the tensors' bytes.

    Bytes are copied from file to file.
    """
    shards: list[list[Path]] = [[]]
    size = 0
    for part in sorted(folder.glob(PART_GLOB)):
        if shards[-1] and size + part.stat().st_size > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.stat().st_size
    weight_map: dict[str, str] = {}
    total = 0
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

    The format is a little-endian 64-bit header length, a JSON header of dtypes, shapes and offsets, then the data.
    """
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
