"""At how many tokens at once do two ways to run a decoder layer's linear layers cross over?

`python -m tests.lab.crossover --shape mistral-7b --device cuda --out DIR` writes DIR/crossover.jsonl, the page
crossover.md and the plot. Tokens at once are the batch in decode (1 to 32) and the prompt in prefill (64 to 2048).
"""

import argparse
from pathlib import Path

from bench.worker.options import DTYPES
from quantize.errors import UserError
from quantize.files import write_whole
from quantize.progress import progress_bar
from quantize.shell import Parser, command, say
from reports.markdown import markdown
from reports.plots.style import FORMATS, file_bytes, matplotlib_as_it_comes
from tests.lab.crossover.crossings import CROSSOVER_NAME, crossings
from tests.lab.crossover.page import crossover_page
from tests.lab.crossover.plot import crossover_figure


def parser() -> Parser:
    cli = Parser(prog="crossover", description=__doc__)
    add = cli.add_argument
    add("--shape", default="mistral-7b", help="mistral-7b, llama-2-7b or a config.json (default %(default)s)")
    add("--device", choices=("cpu", "cuda"), required=True, help="where to run")
    add("--dtype", choices=DTYPES, help="compute dtype; default float32 on a CPU, float16 on CUDA")
    add("--out", type=Path, required=True, metavar="DIR", help=f"folder for {CROSSOVER_NAME}, page and plot")
    add("--budget", dest="budget_s", type=float, default=60.0, metavar="S", help="seconds it may take (default 60)")
    return cli


def run(arguments: argparse.Namespace) -> None:
    """Measure, write page and plot, and say in a few lines what crosses over with the dense product."""
    from tests.lab.crossover.measure import measure_crossover

    with progress_bar() as progress:
        entries = measure_crossover(**vars(arguments), progress=progress)
    dense = {entry.contender for entry in entries if entry.style == "dense"}
    for crossing in crossings(entries):
        if crossing.tokens is not None and dense & set(crossing.pair):
            print(f"{crossing.faster_below} up to {crossing.tokens:.3g} tokens, then {crossing.faster_above}")
    path = arguments.out / CROSSOVER_NAME
    files = {path.with_suffix(".md"): markdown(crossover_page(entries)).encode()}
    try:
        with matplotlib_as_it_comes():
            figure = crossover_figure(entries)
        files |= {path.with_suffix(f".{form}"): file_bytes(figure, form) for form in FORMATS}
    except UserError as error:
        print(f"no plot: {error}")
    for file, content in files.items():
        write_whole(file, content)
    say(*(f"wrote {file}" for file in (path, *files)))


main = command(parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
