"""The command `report`: parse, call, print."""

import argparse
import sys
from pathlib import Path

from quantize.errors import UserError
from quantize.shell import Parser, called, command, say

FORMATS, DEFAULT = ("text", "md", "csv", "json", "html"), "biomistral-7b"
"""Those of reports.api and reports.published, which are imported when something is to be read."""


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; 1 for a run that failed or a broken checkpoint. Raises UserError for bad input."""
    from reports.api import Reading, View, draw_plots, write_all
    from reports.markdown import print_page

    if options.source is None and options.published and Path(options.published).exists():  # `--published DIR`
        options.source, options.published = Path(options.published), DEFAULT
    if options.source is None:
        raise UserError("say which folder was measured: report DIR")
    if options.all:
        if options.out or options.format or options.view or options.published or options.plots:
            raise UserError("--all writes every page beside the records: leave the other options out")
        written, problems, sound = write_all(options.source)
        say(*(f"wrote {path}" for path in written), *problems)
        return 0 if sound and not problems else 1
    if options.plots:  # first, since its options can be wrong
        drawn, left_out = draw_plots(options.source, options.memory, options.context)
        say(*(f"wrote {path}" for path in drawn), *left_out, to=sys.stderr)
    elif options.memory is not None or options.context is not None:
        raise UserError("--memory and --context are of the plots: add --plots, or ask `quantable choose`")
    view: View = "versus" if options.published else options.view or "summary"
    reading = Reading(options.source, view, options.published or DEFAULT)
    shown = options.out is None and options.format is None
    if shown and sys.stdout.isatty():
        print_page(reading.page())
    else:
        text = reading.write("text" if shown and view == "summary" else options.format, options.out)
        say(f"wrote {options.out}") if options.out else print(text, end="", flush=True)
    return 0 if reading.sound else 1


def parser() -> Parser:
    cli = Parser(prog=called("report"), description="Turn what `bench` measured into the quantization table.")
    add = cli.add_argument
    add("source", type=Path, metavar="DIR", nargs="?", help="a folder that was measured, or a file of records")
    add("--out", type=Path, metavar="FILE", help="write there instead of the screen")
    kinds = "text: a screen; md: markdown; csv: one flat row a checkpoint and scenario; json: everything; html: a page"
    default = "default: as the ending of --out says, else text or, where a page is wide and not on a terminal, md"
    add("--format", choices=FORMATS, help=f"{kinds}; {default}")
    add("--json", dest="format", action="store_const", const="json", help="as --format json")
    view = cli.add_mutually_exclusive_group().add_argument
    view("--full", dest="view", action="store_const", const="full", help="every table, not one screen")
    view("--table", dest="view", choices=["published"], help="the published table's columns alone")
    words = "a published table (`quantable published` lists them; default: BioMistral-7B's) and ours"
    view("--published", metavar="NAME", nargs="?", const=DEFAULT, help=words)
    add("--all", action="store_true", help="write every page that DIR has records for beside them")
    add("--plots", action="store_true", help="draw what DIR has records for, PNG and SVG, beside them")
    add("--memory", metavar="SIZE", help="what there is, as 6GB or 6GiB: a line in the plots")
    add("--context", type=int, metavar="N", help="tokens that the plots reckon the KV cache for")
    return cli


main = command(parser, run)
