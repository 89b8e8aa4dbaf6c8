"""The verb that follows a run until it is finished."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from nasray.errors import UserError

if TYPE_CHECKING:
    from nasray.pipeline.status import Stage

BAR = 20  # characters
NOBODY = "no nasray process works on it now; the command that began it goes on with it"

Show = Callable[[Sequence["Stage"], str], None]  # stages, and a note on the run or nothing


@click.command()
@click.argument("run_dir", metavar="URI")
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(0.1),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
def watch(run_dir: str, every_s: float) -> None:
    """Follow the run at URI, a folder or a bucket, until it is finished.

    One screen that is kept up to date; where there is no terminal, a line for what has changed.
    Ctrl-C ends only the display.
    """
    from rich.console import Console

    from nasray.storage import files as storage

    console = Console()
    try:
        with _screen(console) if console.is_terminal else _lines() as show:
            _follow(storage.absolute(run_dir), every_s, show)
    except KeyboardInterrupt:
        click.echo("the run goes on, if it is running", err=True)
        click.get_current_context().exit(130)


def _follow(folder: str, every_s: float, show: Show) -> None:
    """Show how far a run is until all of its stages are done.

    Raises:
        UserError: there is no run. What cannot be read later is a note, and is tried again.
    """
    from nasray.pipeline.status import stages
    from nasray.search.history import Follower
    from nasray.storage import files as storage
    from nasray.storage import layout, locks

    evaluations, watcher = Follower(storage.join(folder, layout.HISTORY)), locks.Watcher(folder)
    found, note = stages(folder, evaluations), "" if watcher.holder() else NOBODY
    while any(stage.state != "done" for stage in found):
        show(found, note)
        time.sleep(every_s)
        try:
            found, note = stages(folder, evaluations), "" if watcher.holder() else NOBODY
        except (UserError, OSError) as error:
            note = f"cannot be read now: {error}"
    show(found, "")


@contextmanager
def _screen(console: Any) -> Iterator[Show]:
    """A table on the terminal, with a bar and an estimate of the time left."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    pace = _Pace()
    with Live(console=console, auto_refresh=False) as live:

        def show(found: Sequence["Stage"], note: str) -> None:
            table = Table.grid(padding=(0, 2))
            for stage in found:
                bar = ProgressBar(total=stage.total, completed=stage.done, width=BAR)
                text = "  ".join(filter(None, (stage.text, pace.left(stage))))
                cells = (stage.name, stage.state, bar if stage.total else "", Text(text))
                table.add_row(*cells)
            live.update(Group(table, Text(note)), refresh=True)

        yield show


@contextmanager
def _lines() -> Iterator[Show]:
    """A line for each stage, and each note, whenever it is another one than before."""
    shown: list[str] = []

    def show(found: Sequence["Stage"], note: str) -> None:
        lines = [stage.line for stage in found]
        lines += [note] if note else []
        for line in lines:
            if line not in shown:
                click.echo(line)
        shown[:] = lines

    yield show


class _Pace:
    """How long a stage still takes, by what has been done since the first look at it."""

    def __init__(self) -> None:
        self.first: dict[tuple[str, int], tuple[int, float]] = {}

    def left(self, stage: "Stage") -> str:
        """A word on it; empty where there is no telling."""
        from nasray.progress import duration

        now = time.monotonic()
        done, since = self.first.setdefault((stage.name, stage.total), (stage.done, now))
        if not done < stage.done < stage.total:
            return ""
        seconds = (now - since) / (stage.done - done) * (stage.total - stage.done)
        return f"about {duration(seconds)} left"
