"""The command `quantable`: one over all others, each imported when it is asked for."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from quantize.errors import UserError
from quantize.shell import Parser, guarded

COMMANDS = {
    "quantize": ("quantize.cli", "make 4-bit and 8-bit checkpoints of a model, and the reference"),
    "bench": ("bench.cli", "measure memory, latency and quality of each checkpoint"),
    "report": ("reports.cli", "turn what was measured into tables"),
    "sweep": ("bench.sweep.cli", "quantize and measure many models, on many devices"),
    "published": ("reports.published", "list the published tables that ours is set beside"),
    "choose": ("reports.choose", "say which checkpoint suits a memory, a speed and a loss of quality"),
    "compare": ("bench.compare", "compare two measurements of the same checkpoints"),
    "ls": ("quantize.ls", "list the checkpoints of a folder"),
    "verify": ("quantize.verify", "compare a checkpoint's files with its manifest"),
    "card": ("reports.card", "write a checkpoint's model card"),
    "push": ("reports.push", "put a checkpoint on the hub"),
    "chat": ("bench.chat", "talk to a checkpoint"),
}
"""Name -> the module that has its `parser()` and `main(argv)`, and what it does."""

ALONE = ("quantize", "bench", "report")
"""Those that are commands of their own, too."""


def parser(*, whole: bool = False) -> Parser:
    """The command line of `quantable`; whole: with the options of every command, which imports them all."""
    words = "Quantize a causal language model, measure what each variant costs, and show it."
    cli = Parser(prog="quantable", description=words, epilog="`quantable COMMAND --help` lists a command's options")
    words = 'for a shell: eval "$(quantable --print-completion bash)"'
    cli.add_argument("--print-completion", choices=("bash", "zsh"), help=words)
    commands = cli.add_subparsers(metavar="COMMAND", title="commands")
    for name, (module, text) in COMMANDS.items():
        options = [import_module(module).parser()] if whole else []
        commands.add_parser(name, help=text, parents=options, add_help=False)
    return cli


def completion(shell: str) -> str:
    """What a shell sources to complete the names of commands, options and files, of `quantable` and of those ALONE."""
    import shtab

    programs = [parser(whole=True), *(import_module(COMMANDS[name][0]).parser() for name in ALONE)]
    for program, name in zip(programs, ("quantable", *ALONE), strict=True):
        program.prog = name
        for option in program._actions:
            if option.type is Path:
                option.complete = shtab.FILE
    return "\n".join(shtab.complete(program, shell) for program in programs)


def bench(argv: Sequence[str] | None = None) -> int:
    """The command `bench`, which ends with the short report; return its exit code."""
    from bench.cli import main

    return main(argv, short_report)


def short_report(source: Path) -> str:
    """What was measured, on one screen; nothing where that cannot stand in one table, which `report` explains."""
    from bench.records.store import RECORDS_NAME
    from reports.api import report

    try:
        return report(source.parent if source.name == RECORDS_NAME else source, format="text")
    except UserError:
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that is named first; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "bench":
        return bench(argv[1:])
    if argv and argv[0] in COMMANDS:
        code: int = import_module(COMMANDS[argv[0]][0]).main(argv[1:])
        return code
    shell = parser().parse_args(argv).print_completion
    return guarded("quantable", lambda: print(completion(shell) if shell else parser().format_help()))
