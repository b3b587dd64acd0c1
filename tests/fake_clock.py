"""A clock for tests."""

from bench.worker.clock import Clock


class FakeClock(Clock):
    """Time that passes only when told to: `advance` stands for work."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def advance(self, seconds: float) -> None:
        self.now_s += seconds

    def mark(self) -> float:
        return self.now_s
