"""Progress bars with rate and time left, and the lines between them."""

import contextlib
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# A log is as wide as the tables need; a terminal is as wide as it is.
CONSOLE = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
_started = time.monotonic()


class _Rate(ProgressColumn):
    """Items a second since the bar began."""

    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


@contextlib.contextmanager
def bar(label: str, total: int | None):
    """Shows a bar over `total` items, None where nobody knows; yields `advance(count)`.

    On a terminal the bar is live and vanishes when done; in a log it leaves one line.
    """
    start, done = time.monotonic(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress.advance(task, count)

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        _Rate(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    live = CONSOLE.is_terminal
    with Progress(*columns, console=CONSOLE, transient=True, disable=not live) as progress:
        task = progress.add_task(label, total=total)
        yield advance
    if not live:
        total = done if total is None else total
        seconds = time.monotonic() - start
        rate = total / max(seconds, 1e-9)
        note(f"{label}: {total:,} in {seconds:.1f} s ({rate:,.0f}/s)")


def stage(title: str) -> None:
    """Announces a stage, with the time since the start."""
    elapsed = time.monotonic() - _started
    CONSOLE.print(f"[bold]== {title}[/bold]  [dim]({elapsed:.0f} s)[/dim]")


def note(text: str) -> None:
    """Prints one line of the story."""
    CONSOLE.print(f"  {text}", markup=False, soft_wrap=True)
