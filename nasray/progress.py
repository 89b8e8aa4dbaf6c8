"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

logger = logging.getLogger(__name__)
PLAIN_EVERY_S = 10.0
LOOK_EVERY_S = 1.0
JOIN_S = 10.0

Show = Callable[[int, str], None]  # how much is done, and a word on it


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Show]:
    """Show how far `label` is; the caller calls what this yields with (done, text)."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Bar(*columns, console=console) as bar:
            task = bar.add_task(label, total=total, completed=done, text="")

            def show(done: int, text: str = "") -> None:
                bar.update(task, completed=done, text=text)

            yield show
    else:
        yield _plain(label, total, done)


@contextmanager
def following(label: str, total: int, look: Callable[[], tuple[int, str]]) -> Iterator[None]:
    """Show progress of work done elsewhere: `look()` says how much is done, and a word on it."""
    ended = threading.Event()

    def watch(show: Show) -> None:
        while not ended.wait(LOOK_EVERY_S):
            # A storage is away, or its error is one for the user, a ValueError; the next look
            # may succeed.
            with suppress(OSError, ValueError):
                show(*look())

    with progress(label, total, look()[0]) as show:
        watcher = threading.Thread(target=watch, args=(show,), daemon=True)
        watcher.start()
        try:
            yield
            with suppress(OSError, ValueError):
                show(*look())
        finally:
            ended.set()
            watcher.join(JOIN_S)  # a storage may hang; the thread ends with the process


def _plain(label: str, total: int, already: int) -> Show:
    start, last = time.monotonic(), [0.0, already]

    def show(done: int, text: str = "") -> None:
        now = time.monotonic()
        if done == last[1] or (done < total and now - last[0] < PLAIN_EVERY_S):
            return
        last[:] = now, done
        rate = (now - start) / max(done - already, 1)
        left = "" if done >= total else f", about {duration(rate * (total - done))} left"
        logger.info("%s %d/%d%s%s", label, done, total, f": {text}" if text else "", left)

    return show


def duration(seconds: float) -> str:
    """A number of seconds as 1:02:03, or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
