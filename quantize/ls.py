"""`quantable ls`: what a folder holds, by the manifests alone; no weight is read. Imports no torch."""

import argparse
from pathlib import Path
from typing import Any

from quantize.checkpoint import checkpoint_folders, open_checkpoint
from quantize.errors import UserError
from quantize.shell import Parser, command, tell
from quantize.units import aligned


def contents(directory: Path) -> dict[str, list[Any]]:
    """Checkpoints with what their manifests say, or their `problem`; record files; working folders of killed runs."""
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


def parser() -> Parser:
    code = "Exit code 1: a checkpoint's manifest is damaged."
    p = Parser(prog="quantable ls", description="Say what a folder of checkpoints holds.", epilog=code)
    p.add_argument("directory", type=Path, metavar="DIR", help="where `quantize --out` put the checkpoints")
    p.add_argument("--json", action="store_true", help="as one JSON object")
    return p


def run(options: argparse.Namespace) -> int:
    """A table, and a line for each checkpoint that is damaged, for records and for unfinished work."""
    found = contents(options.directory)
    damaged = [one for one in found["checkpoints"] if "problem" in one]
    whole = [one for one in found["checkpoints"] if "problem" not in one]
    rows = [[name[0].upper() + name[1:] for name in one] for one in whole[:1]]
    rows += [["" if value is None else str(value) for value in one.values()] for one in whole]
    lines = aligned(rows) + [f"{one['checkpoint']} is damaged: {one['problem']}" for one in damaged]
    lines += [f"{kind}: {', '.join(found[kind]) or 'none'}" for kind in ("records", "unfinished")]
    tell(found, lines, as_json=options.json)
    return int(bool(damaged))


main = command(parser, run)
