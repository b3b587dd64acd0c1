"""`quantable verify`: read every file of a checkpoint and compare it with the manifest. Imports no torch."""

import argparse
from pathlib import Path

from quantize.checkpoint import MANIFEST_NAME, checkpoint_folders, problems, read_checkpoint
from quantize.errors import UserError
from quantize.shell import Parser, command, tell


def verified(folder: Path) -> list[str]:
    """What is wrong with the checkpoint in this folder, a line a file. Raises UserError where there is none."""
    try:
        return [f"{name} {problem}" for name, problem in problems(read_checkpoint(folder))]
    except UserError as error:
        if not (folder / MANIFEST_NAME).is_file():
            raise
        return [str(error)]


def parser() -> Parser:
    code = "Exit code 1: a checkpoint is not whole."
    p = Parser(prog="quantable verify", description="Read checkpoints whole, compare their hashes.", epilog=code)
    p.add_argument("path", nargs="+", type=Path, help="a checkpoint, or a folder of checkpoints")
    p.add_argument("--json", action="store_true", help="as one JSON object: what is wrong, by folder")
    return p


def run(options: argparse.Namespace) -> int:
    """Verify every checkpoint; 1 where one is not whole."""
    folders = [one for path in options.path for one in checkpoint_folders(path) or [path]]
    found = {str(folder): verified(folder) for folder in dict.fromkeys(folders)}
    lines = [f"{folder}: {line}" for folder, wrong in found.items() for line in wrong or ["whole"]]
    tell(found, lines, as_json=options.json)
    return int(any(found.values()))


main = command(parser, run)
