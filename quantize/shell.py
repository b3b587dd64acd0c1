"""How a command meets the shell: exit codes, interrupts, readers that leave, devices that are full."""

import argparse
import errno
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from quantize.errors import UserError, printable
from quantize.schema import to_data

BAD_INPUT = 2
MODELS = ("torch", "transformers", "safetensors", "accelerate", "huggingface_hub")  # what the extra `models` brings


def called(command: str) -> str:
    """The command as the user called it: `quantable bench` where `quantable` is what was started, else `bench`."""
    started = Path(sys.argv[0])
    whole = started.name == "quantable" or started.match("quantable/__main__.py")
    return f"quantable {command}" if whole else command


class Parser(argparse.ArgumentParser):
    """Options of a command, `--version` among them; what is wrong with them is one line, as every error is."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        if self.add_help:
            words = "this version, and those of the libraries"
            self.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help=words)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {printable(message)}: `{self.prog} --help` lists what there is\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from quantize.versions import VERSION, maker_versions

        say(f"quantable {VERSION}", *(f"{name} {version}" for name, version in maker_versions().items()))
        parser.exit()


def command(parser: Callable[[], Parser], run: Callable[[argparse.Namespace], object]) -> Callable[..., int]:
    """The `main` of a command: parse these words, or those of the shell, and run; the exit code as `guarded` says."""

    def main(argv: Sequence[str] | None = None) -> int:
        cli = parser()
        return guarded(cli.prog, lambda: run(cli.parse_args(argv)))

    return main


def reject(given: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raise UserError for the first of these arguments that is given: its name as the user writes it, and why."""
    for name in names:
        if (value := getattr(given, name)) is not None and value is not False:
            shown = {"source": "source", "directory": "DIR"}.get(name, f"--{name.replace('_', '-')}")
            raise UserError(f"{shown} {why}")


class _Terminated(BaseException):
    """SIGTERM, raised where the work is, so that it cleans up."""


def guarded(command: str, work: Callable[[], object]) -> int:
    """Run a command's work; its exit code: the number it returns, else 0; 2 for a UserError, 130 and 143 for signals.

    What the user can fix and an interrupt are one line on standard error. Work goes on when nobody reads its output any
    more (`| head`). Output that cannot be written (a full device) is one line and code 2 at the end."""
    with _outlets() as outlets, _terminable():
        try:
            result = work()
            code = result if isinstance(result, int) else 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = BAD_INPUT
        except ModuleNotFoundError as error:
            if error.name not in MODELS:
                raise
            print(f"error: {command} needs {error.name}: pip install 'quantable[models]'", file=sys.stderr)
            code = BAD_INPUT
        except (KeyboardInterrupt, _Terminated) as stop:
            print(f"interrupted: what is finished is kept, the same {command} again goes on", file=sys.stderr)
            code = 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        if problem := next((o.problem for o in outlets if o.problem and o.problem.errno != errno.EPIPE), None):
            print(f"error: the output could not be written ({problem.strerror}): free some space", file=sys.stderr)
            code = code or BAD_INPUT
    return code


def say(*lines: str, to: TextIO | None = None, quiet: bool = False) -> None:
    """Print lines, control characters of the names in them escaped; to standard output where no stream is given."""
    for line in () if quiet else lines:
        print(printable(line), file=to or sys.stdout, flush=True)


def tell(found: object, lines: Iterable[str], *, as_json: bool) -> None:
    """Print what a command found: these lines, or all of it as one JSON object on one line."""
    say(*([json.dumps(to_data(found))] if as_json else lines))


class _Outlet(io.FileIO):
    """A file that swallows everything after its first error, which it keeps."""

    problem: OSError | None = None

    def write(self, data: Any) -> int:
        if self.problem is None:
            try:
                return os.write(self.fileno(), data)
            except OSError as error:
                self.problem = error
        return len(data)


@contextmanager
def _outlets() -> Iterator[list[_Outlet]]:
    """Standard output and error over outlets, in which a character that the encoding lacks is a question mark."""
    before = sys.stdout, sys.stderr
    outlets = []
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            outlets.append(_Outlet(stream.fileno(), "w", closefd=False))
            buffered = io.BufferedWriter(outlets[-1])
            setattr(sys, name, io.TextIOWrapper(buffered, stream.encoding, "replace", line_buffering=True))
    try:
        yield outlets
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(signum: int, frame: object) -> NoReturn:
        raise _Terminated

    ours = threading.current_thread() is threading.main_thread()  # else signals are somebody else's
    before = signal.signal(signal.SIGTERM, stop) if ours else None
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)
