"""The command `report`: parse, call, print."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.run import RECORDS_NAME
from quantize.errors import UserError
from reports.api import FORMATS, report, report_page

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 for bad input, which is said in one line on stderr."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the dash shows a question mark
    try:
        if options.out is None and options.format == "md" and sys.stdout.isatty():
            _show(options.source)
        else:
            text = report(options.source, format=options.format, out=options.out)
            print(f"wrote {options.out}" if options.out else text, end="\n" if options.out else "", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader, such as `head`, has seen enough: nothing is left to say at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _show(source: Path) -> None:
    from rich.console import Console

    from reports.markdown import print_page

    print_page(report_page(source), Console())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report", description="Turn what `bench` measured into the quantization table."
    )
    parser.add_argument("source", type=Path, metavar="DIR", help=f"a folder that was measured, or its {RECORDS_NAME}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of the screen")
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="md",
        help="md: the tables (default); csv: one flat row a checkpoint and scenario; json: everything",
    )
    return parser
