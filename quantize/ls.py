"""`quantable ls`: what a folder holds, by the manifests alone; no weight is read. Imports no torch."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.checkpoint import checkpoint_folders, open_checkpoint
from quantize.errors import UserError
from quantize.shell import Parser, guarded, say


def contents(directory: Path) -> dict[str, Any]:
    """Checkpoints with what their manifests say, or their `problem`; record files; working folders of killed runs.

    Raises UserError when the folder does not exist.
    """
    unfinished = (".unfinished", ".partial", ".old")
    return {
        "checkpoints": [_facts(folder) for folder in checkpoint_folders(directory)],
        "records": sorted(path.name for path in directory.glob("[!.]*.jsonl")),
        "unfinished": sorted(path.name for path in directory.glob(".*") if path.suffix in unfinished),
    }


def _facts(folder: Path) -> dict[str, Any]:
    """Where from: eight digits of the commit, else of the weights' hash, behind what the user named."""
    try:
        made = open_checkpoint(folder).manifest
    except UserError as error:
        return {"checkpoint": folder.name, "problem": str(error)}
    source, version = made.source, (made.source.revision or made.source.weights_sha256 or "")[:8]
    return {
        "checkpoint": folder.name,
        "base model": made.base_model,
        "variant": made.variant,
        "weights GB": round(made.weights_bytes / 1e9, 3),
        "quantized": None if made.quantized_share is None else f"{made.quantized_share:.1%}",
        "made": made.created[:10],
        "source": f"{source.kind} {Path(source.id).name if source.kind == 'folder' else source.id} {version}".strip(),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The contents for a terminal: a table, and a line for each thing damaged, for records and unfinished work."""
    whole = [one for one in found["checkpoints"] if "problem" not in one]
    rows = [[name[0].upper() + name[1:] for name in one] for one in whole[:1]]
    rows += [["" if value is None else str(value) for value in one.values()] for one in whole]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    said = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    said += [f"{one['checkpoint']} is damaged: {one['problem']}" for one in found["checkpoints"] if "problem" in one]
    return [*said, *(f"{kind}: {', '.join(found[kind]) or 'none'}" for kind in ("records", "unfinished"))]


def parser() -> argparse.ArgumentParser:
    """The command line of `quantable ls`."""
    p = Parser(prog="quantable ls", description="Say what a folder of checkpoints holds.")
    p.add_argument("directory", type=Path, metavar="DIR", help="where `quantize --out` put the checkpoints")
    p.add_argument("--json", action="store_true", help="as one JSON object")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is 1 where a checkpoint is damaged, else as `guarded` says."""
    return guarded("quantable ls", lambda: _run(parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> int:
    found = contents(options.directory)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        say(*lines(found))
    return int(any("problem" in one for one in found["checkpoints"]))
