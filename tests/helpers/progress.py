"""A `Progress` that records its calls."""


class Watcher:
    """Tasks with the bytes counted in each; `open` counts those that have not finished."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int | None]] = []
        self.counts: list[int] = []
        self.open = 0

    def start(self, description: str, total: int | None) -> None:
        self.tasks.append((description, total))
        self.counts.append(0)
        self.open += 1

    def advance(self, n: int) -> None:
        assert n >= 0
        self.counts[-1] += n

    def finish(self) -> None:
        self.open -= 1
