"""What a person at a terminal sees of long work. On standard error: standard output is for results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def literal_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that prints names as they are: `[x]` in a column's name is no markup, `:x:` no picture."""
    return Console(stderr=stderr, width=width, markup=False, emoji=False)


class Reporter:
    """Bars and spinners for the steps of one command; silent where nobody watches."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = literal_console(stderr=True)
        self.disabled = quiet or not self.console.is_terminal

    @contextmanager
    def epochs(self, description: str, total: int) -> Iterator[Callable[[int, float], None]]:
        """A bar of `total` epochs; yields what to call after each with its number, from 1, and its loss."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs, loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=self.disabled) as progress:
            task = progress.add_task(description, total=total, loss=float("nan"))
            yield lambda epoch, loss: progress.update(task, completed=epoch, loss=loss)

    @contextmanager
    def share(self, description: str) -> Iterator[Callable[[float], None]]:
        """A bar of work that is counted in shares of the whole; yields what to call with the share that is done."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=self.disabled) as progress:
            task = progress.add_task(description, total=1.0)
            yield lambda share: progress.update(task, completed=share)

    @contextmanager
    def trials(self, name: str, total: int) -> Iterator[Callable[[str, int], None]]:
        """A bar of `total` trials for every search; yields what to call with the search's name and its trials done."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("trials"),
        )
        with Progress(*columns, console=self.console, disable=self.disabled) as progress:
            bars: dict[str, TaskID] = {}

            def advance(search: str, done: int) -> None:
                if search not in bars:
                    bars[search] = progress.add_task(f"{name}, {search}", total=total)
                progress.update(bars[search], completed=done)

            yield advance

    @contextmanager
    def step(self, description: str) -> Iterator[None]:
        """A spinner for a step whose length nobody knows."""
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=self.console, disable=self.disabled, transient=True) as progress:
            progress.add_task(description, total=None)
            yield
