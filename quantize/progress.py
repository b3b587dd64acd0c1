"""How far long work is, and how much longer it takes by what is finished; the commands show it on standard error."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from quantize.errors import printable
from quantize.shell import say

Step = tuple[str, str, float]  # what is done, to what, and a cost in one unit for all steps of a plan
BAR_CHARACTERS = 16
FADING = 0.8  # what a finished step tells of those to come, once another is finished: a machine's load changes


def span(seconds: float) -> str:
    """A time as a reader wants it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Progress:
    """The steps of some work: those that are left, and what the finished ones took.

    changed: called after each change.
    row:     called with each line that is to stay on the screen.
    draws:   whether it is drawn on a terminal, which the bars of others may have before the first change.
    clock:   in seconds; before its time `grows_until_s` more steps may follow those that are planned."""

    def __init__(
        self,
        doing: str = "",
        changed: Callable[["Progress"], object] = lambda progress: None,
        row: Callable[[str], object] = lambda line: None,
        draws: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.doing, self.changed, self.row, self.draws, self.clock = doing, changed, row, draws, clock
        self.grows_until_s = -1.0
        self._left: list[Step] = []
        self._together, self._worked_s = 1, 0.0
        self._spent: dict[tuple[str, ...], tuple[float, float]] = {}  # cost, seconds
        self._began = self._mark = clock()

    def plan(self, steps: Iterable[Step]) -> None:
        """What is left, in order, in place of what was; the first step begins now."""
        self._left, self._mark = list(steps), self.clock()
        self.changed(self)

    def begin(self, doing: str, together: int = 1) -> None:
        """Say what is being done: the next step, or so many that end together."""
        self.doing, self._together = doing, together
        self.changed(self)

    def advance(self, cost: float | None = None, seconds: float | None = None) -> None:
        """So much of the next step is done, None for all that is left; seconds: None for all since the last."""
        if self._left:
            (kind, name, whole), *rest = self._left
            done = whole if cost is None else cost
            spent = self.clock() - self._mark if seconds is None else seconds
            self._worked_s += max(0.0, spent)
            fading = FADING if cost is None else 1.0
            for key in ((kind, name), (kind,), ()):
                before = self._spent.get(key, (0.0, 0.0))
                self._spent[key] = fading * before[0] + done, fading * before[1] + max(0.0, spent)
            self._left = rest if cost is None else [(kind, name, max(0.0, whole - done)), *rest]
            self._mark += spent
        self.changed(self)

    def seconds(self) -> tuple[float, float] | None:
        """Spent on steps so far, and left; None while most of what is left is of a kind that has not been seen."""
        left = self._left
        known = sum(cost for kind, _, cost in left if (kind,) in self._spent)
        if not self._spent or known < sum(cost for _, _, cost in left) / 2:
            return None
        expected = [self._expected_s(*step) for step in left]
        under_way = max(0.0, min(self.clock() - self._mark, sum(expected[: self._together])))
        return self._worked_s + under_way, sum(expected) - under_way

    def _expected_s(self, kind: str, name: str, cost: float) -> float:
        pairs = (self._spent.get(key, (0.0, 0.0)) for key in ((kind, name), (kind,), ()))
        return next((cost * seconds / of for of, seconds in pairs if of), 0.0)

    @property
    def share(self) -> float:
        """How much of the time is over, 0 where that is not known."""
        spent, left = self.seconds() or (0.0, 1.0)
        return spent / (spent + left) if left else 1.0

    @property
    def so_far(self) -> str:
        return f"after {span(self.clock() - self._began)}"

    def line(self) -> str:
        """Share, time so far and time left, as far as they are known, and what is being done."""
        seconds = self.seconds()
        if seconds is None or not self._left:
            return f"{self.so_far}: {self.doing}"
        least = "at least " if self.clock() + seconds[1] < self.grows_until_s else ""
        return f"{self.share:.0%} {self.so_far}, {least}{span(seconds[1])} left: {self.doing}"


@contextmanager
def progress_bar(first: str = "", *, quiet: bool = False, every_s: float = 30.0) -> Iterator[Progress]:
    """A Progress on standard error, after the line `first`: a bar on a terminal, elsewhere a line now and then."""
    if quiet or sys.stderr is None:
        yield Progress()
        return
    if first:
        say(first, to=sys.stderr)
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console, over = Console(stderr=True), threading.Event()
    draws = console.is_terminal and not console.is_dumb_terminal
    progress = Progress(first, draws=draws)
    progress.row = lambda line: console.print(Text(printable(line)), soft_wrap=True)

    def draw() -> Text:
        bar = f"[{'#' * round(BAR_CHARACTERS * progress.share):.<{BAR_CHARACTERS}}]"
        return Text(printable(f"{bar} {progress.line()}"), no_wrap=True, overflow="ellipsis")

    def tell() -> None:
        while not over.wait(every_s):
            progress.row(progress.line())

    both = sys.stdout is not None and sys.stdout.isatty()  # else it goes past the terminal
    live = Live(console=console, get_renderable=draw, refresh_per_second=1, transient=True, redirect_stdout=both)
    if draws:
        progress.changed = lambda _: live.start()
    else:
        threading.Thread(target=tell, daemon=True).start()
    try:
        yield progress
    finally:
        over.set()
        live.stop()
    if first and not draws:
        progress.row(f"done {progress.so_far}")
