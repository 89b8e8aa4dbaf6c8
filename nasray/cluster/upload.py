"""What of the working directory a cluster gets: all but run directories, data sets and the like.

Imports no Ray: that must not happen before the environment says how to show the token.
"""

import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path

from nasray.errors import UserError
from nasray.storage import layout

# What a working tree holds beside the program: git ignores most of it, if there is git at all.
# Leading slashes: of the tree's own folder, not of any below.
EXCLUDED = ("/.git", "/.venv", "/runs", "*.parquet", "__pycache__", "*.egg-info")
MADE_BY_NASRAY = (layout.JOB, layout.DATASET)  # of run directories, and of imported data sets
DEEPEST = 3  # folders deep, for those


def sent_path(job: str) -> str:
    """The path of the job file in the working directory, which is what is sent."""
    path = Path(job).resolve()
    if not path.is_relative_to(Path.cwd()):
        raise UserError(f"job {job}: not in the working directory, which is what the cluster gets")
    inside = path.relative_to(Path.cwd())
    folders = [Path.cwd() / folder for folder in list(inside.parents)[:-1]]
    of_a_run = any((folder / name).exists() for folder in folders for name in MADE_BY_NASRAY)
    if of_a_run or f"/{inside.parts[0]}" in EXCLUDED or _git_ignores(path):
        raise UserError(f"job {job}: not among what is sent to a cluster; copy it to jobs/")
    return str(inside)


def _git_ignores(path: Path) -> bool:
    with suppress(OSError):  # no git
        asked = ["git", "check-ignore", "--quiet", str(path)]
        return subprocess.run(asked, stderr=subprocess.DEVNULL).returncode == 0
    return False


def excludes(folder: str) -> list[str]:
    """Patterns, as git has them, for what is not sent to a cluster: run directories and data."""
    found = list(EXCLUDED)
    for place, below, names in os.walk(folder):
        path = os.path.relpath(place, folder)
        pipes = [name for name in names if _blocks(os.path.join(place, name))]
        found += [_pattern(os.path.relpath(os.path.join(place, name), folder)) for name in pipes]
        if any(name in MADE_BY_NASRAY for name in names) and path != ".":
            found.append(_pattern(path))
            below.clear()
        if path.count(os.sep) + 1 >= DEEPEST:
            below.clear()
        below[:] = [name for name in below if not name.startswith(".")]
    return found


def _pattern(path: str) -> str:
    """git's pattern for exactly this path."""
    return "/" + re.sub(r"([\\\\*?\[\]!#])", r"\\\1", path)


def _blocks(path: str) -> bool:
    """Whether whoever opens `path` might wait forever: a pipe, a socket, a device."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
