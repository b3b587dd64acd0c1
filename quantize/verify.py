"""`quantable verify`: read every file of a checkpoint and compare it with the manifest. Imports no torch."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from quantize.checkpoint import MANIFEST_NAME, checkpoint_folders, problems, read_checkpoint
from quantize.errors import UserError
from quantize.shell import Parser, guarded, say


def verified(folder: Path) -> list[str]:
    """What is wrong with the checkpoint in this folder, a line a file; nothing where it is whole.

    Raises UserError where there is none.
    """
    try:
        return [f"{name} {problem}" for name, problem in problems(read_checkpoint(folder))]
    except UserError as error:
        if not (folder / MANIFEST_NAME).is_file():
            raise
        return [str(error)]


def parser() -> argparse.ArgumentParser:
    """The command line of `quantable verify`."""
    p = Parser(prog="quantable verify", description="Read checkpoints whole, compare their hashes.")
    p.add_argument("path", nargs="+", type=Path, help="a checkpoint, or a folder of checkpoints")
    p.add_argument("--json", action="store_true", help="as one JSON object: what is wrong, by folder")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is 1 where a checkpoint is not whole, else as `guarded` says."""
    return guarded("quantable verify", lambda: _run(parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> int:
    folders = [one for path in options.path for one in checkpoint_folders(path) or [path]]
    found = {str(folder): verified(folder) for folder in dict.fromkeys(folders)}
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        say(*(f"{folder}: {line}" for folder, wrong in found.items() for line in wrong or ["whole"]))
    return int(any(found.values()))
