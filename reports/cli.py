"""The command `report`: parse, call, print."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.records.store import RECORDS_NAME
from quantize.errors import UserError
from quantize.shell import Parser, called, guarded, say
from reports.api import FORMATS, Reading, draw_plots, write_all
from reports.markdown import print_page


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is as `guarded` says; 1 for a run that failed or a broken checkpoint."""
    return guarded(called("report"), lambda: run(parser().parse_args(arguments)))


def run(options: argparse.Namespace) -> int:
    """Do what the command line says. Raises UserError for bad input."""
    if options.all:
        if options.out is not None or options.format != "md" or options.published or options.plots:
            raise UserError("--all writes every page beside the records: leave the other options out")
        written, problems, sound = write_all(options.source)
        say(*(f"wrote {path}" for path in written), *problems)
        return 0 if sound and not problems else 1
    reading = Reading(options.source, options.published)
    if options.out is None and options.format == "md" and sys.stdout.isatty():
        from rich.console import Console

        print_page(reading.page(), Console())
    elif text := reading.write(options.format, options.out):
        if options.out:
            say(f"wrote {options.out}")
        else:
            print(text, end="", flush=True)
    if options.plots:
        say(*(f"wrote {path}" for path in draw_plots(options.source)), to=sys.stderr)
    return 0 if reading.sound else 1


def parser() -> Parser:
    """The command line of `report`."""
    parser = Parser(prog=called("report"), description="Turn what `bench` measured into the quantization table.")
    parser.add_argument("source", type=Path, metavar="DIR", help=f"a folder that was measured, or its {RECORDS_NAME}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of the screen")
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="md",
        help="md: the tables (default); csv: one flat row a checkpoint and scenario; json: everything",
    )
    parser.add_argument(
        "--published", action="store_true", help="the published table and the measured one side by side"
    )
    parser.add_argument("--all", action="store_true", help="write every page that DIR has records for beside them")
    parser.add_argument("--plots", action="store_true", help="draw the crossover, PNG and SVG, beside its record")
    return parser
