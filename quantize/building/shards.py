"""Write a checkpoint's tensors part by part and join the parts into safetensors files without loading them again."""

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

MAX_SHARD_BYTES = 5 * 10**9
"""Files grow to about this size, as published checkpoints do."""

PART_GLOB = "part-*.safetensors"


class ShardWriter:
    """Collects tensors in part files inside `folder`; `finish` turns them into what other software reads.

    Memory holds one part at a time, and joining copies bytes from file to file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, part: int, tensors: dict[str, Tensor]) -> Path:
        """Write one part (parts are joined in the order of their numbers); a part written twice is replaced."""
        path = self._folder / f"part-{part:05d}.safetensors"
        partial = path.with_suffix(".tmp")
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
        partial.rename(path)
        return path

    def finish(self, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
        """Join the parts into model.safetensors, or several files and their index; return the tensors' bytes."""
        parts = sorted(self._folder.glob(PART_GLOB))
        shards: list[list[Path]] = [[]]
        size = 0
        for part in parts:
            if shards[-1] and size + part.stat().st_size > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(part)
            size += part.stat().st_size
        weight_map: dict[str, str] = {}
        total = 0
        for number, members in enumerate(shards, start=1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            names, data_bytes = join_safetensors(members, self._folder / name)
            weight_map |= dict.fromkeys(names, name)
            total += data_bytes
            for member in members:
                member.unlink()
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        return total


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, without its metadata, and where its data begins (bytes)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def join_safetensors(parts: Sequence[Path], target: Path) -> tuple[list[str], int]:
    """Write `target` holding every tensor of `parts`; return the names and the bytes of data. Nothing is decoded.

    The format is a little-endian 64-bit header length, a JSON header of dtypes, shapes and offsets, then the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sources: list[tuple[Path, int]] = []
    offset = 0
    for part in parts:
        entries, data_start = read_header(part)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            header[name] = {**entry, "data_offsets": [begin + offset, end + offset]}
        sources.append((part, data_start))
        offset += part.stat().st_size - data_start
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)))
        out.write(encoded)
        for part, data_start in sources:
            with part.open("rb") as file:
                file.seek(data_start)
                shutil.copyfileobj(file, out, length=1 << 22)
    return [name for name in header if name != "__metadata__"], offset
