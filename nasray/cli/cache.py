"""The verb that lists decoded images kept on this machine, and removes them."""

import os
import re
import time

import click

from nasray.errors import UserError

DAY_S = 86_400
UNITS_S = {"h": 3600, "d": DAY_S, "w": 7 * DAY_S}


@click.group(invoke_without_command=True)
@click.pass_context
def cache(context: click.Context) -> None:
    """List the decoded images that are kept on this machine, those used last first."""
    if context.invoked_subcommand is not None:
        return
    from nasray.data.cache import caches, limit_bytes
    from nasray.storage import files as storage

    folder = storage.cache_folder()
    found = caches(folder)
    for each in found:
        what = f"{each.images} {each.split} images at {each.resolution}" if each.data_set else "?"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.used))
        click.echo(f"{each.num_bytes / 1e9:8.2f} GB  {used}  {what}  {each.data_set}  {each.path}")
    place = folder if os.path.isdir(folder) else "/"
    taken = sum(each.num_bytes for each in found)
    click.echo(f"{taken / 1e9:8.2f} GB in {folder}, of {limit_bytes(place) / 1e9:.0f} GB at most")


@cache.command("clear")
@click.option("--older-than", metavar="TIME", help="Only those not used for e.g. 12h, 30d, 4w.")
def clear(older_than: str | None) -> None:
    """Remove these images, but for those that a process uses; they are decoded again if needed."""
    from nasray.data.cache import caches, remove
    from nasray.storage import files as storage

    limit = time.time() - (_seconds(older_than) if older_than else 0)
    found = [each for each in caches(storage.cache_folder()) if not older_than or each.used < limit]
    removed = [each for each in found if remove(each)]
    click.echo(
        f"removed {len(removed)} caches, {sum(each.num_bytes for each in removed) / 1e9:.2f} GB"
    )
    if len(removed) < len(found):
        click.echo(f"{len(found) - len(removed)} are in use and were kept")


def _seconds(text: str) -> float:
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text)
    if parts is None:
        raise UserError(f"--older-than {text}: give hours, days or weeks, such as 12h, 30d, 4w")
    return float(parts[1]) * UNITS_S[parts[2]]
