"""At how many tokens at once do two ways to run a decoder layer's linear layers cross over?

`quantable crossover --shape mistral-7b --device cuda --out DIR` writes DIR/crossover.jsonl. Tokens at once are the
batch in decode (1 to 32) and the prompt in prefill (64 to 2048).
"""

import argparse
from pathlib import Path

from bench.records.crossover import CROSSOVER_NAME, crossings
from bench.worker.options import DTYPES
from quantize.progress import progress_bar
from quantize.shell import Parser, command


def parser() -> Parser:
    cli = Parser(prog="quantable crossover", description=__doc__)
    add = cli.add_argument
    add("--shape", default="mistral-7b", help="mistral-7b, llama-2-7b or a config.json (default %(default)s)")
    add("--device", choices=("cpu", "cuda"), required=True, help="where to run")
    add("--dtype", choices=DTYPES, help="compute dtype; default float32 on a CPU, float16 on CUDA")
    add("--out", type=Path, required=True, metavar="DIR", help=f"folder for {CROSSOVER_NAME}")
    add("--budget", dest="budget_s", type=float, default=60.0, metavar="S", help="seconds it may take (default 60)")
    return cli


def run(arguments: argparse.Namespace) -> None:
    """Measure, and say in a few lines what crosses over with the dense product."""
    from bench.crossover.measure import measure_crossover

    with progress_bar() as progress:
        entries = measure_crossover(**vars(arguments), progress=progress)
    dense = {entry.contender for entry in entries if entry.style == "dense"}
    for crossing in crossings(entries):
        if crossing.tokens is not None and dense & set(crossing.pair):
            print(f"{crossing.faster_below} up to {crossing.tokens:.3g} tokens, then {crossing.faster_above}")
    path = arguments.out / CROSSOVER_NAME
    print(f"{path}: `report {path} --plots` makes tables and plots of it")


main = command(parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
