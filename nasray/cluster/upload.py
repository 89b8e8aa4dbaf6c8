"""Which files are uploaded to the cluster: the working directory without runs and data sets.

Does not import Ray, which reads RAY_AUTH_MODE when it is imported.
"""

import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path

from nasray.errors import UserError
from nasray.storage import layout

# Never uploaded, even where git does not ignore it. A leading slash: only in the top folder.
EXCLUDED = ("/.git", "/.venv", "/runs", "*.parquet", "__pycache__", "*.egg-info")
MADE_BY_NASRAY = (layout.JOB, layout.DATASET)  # they mark run directories and imported data sets
DEEPEST = 3  # levels of folders that are searched for those


def uploaded_path(job: str) -> str:
    """Return the path of the job file relative to the working directory, which is uploaded.

    Raises:
        UserError: the file is not uploaded.
    """
    path = Path(job).resolve()
    if not path.is_relative_to(Path.cwd()):
        raise UserError(
            f"job {job}: not in the working directory, which is uploaded to the cluster"
        )
    inside = path.relative_to(Path.cwd())
    folders = [Path.cwd() / folder for folder in list(inside.parents)[:-1]]
    of_a_run = any((folder / name).exists() for folder in folders for name in MADE_BY_NASRAY)
    if of_a_run or f"/{inside.parts[0]}" in EXCLUDED or _git_ignores(path):
        raise UserError(f"job {job}: not among the files uploaded to a cluster; copy it to jobs/")
    return str(inside)


def _git_ignores(path: Path) -> bool:
    with suppress(OSError):  # no git
        asked = ["git", "check-ignore", "--quiet", str(path)]
        return subprocess.run(asked, stderr=subprocess.DEVNULL).returncode == 0
    return False


def excludes(folder: str) -> list[str]:
    """Patterns in .gitignore syntax of what is not uploaded: run directories, data sets, pipes."""
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
    """The .gitignore pattern of exactly this path."""
    return "/" + re.sub(r"([\\\\*?\[\]!#])", r"\\\1", path)


def _blocks(path: str) -> bool:
    """Whether opening `path` may block forever: a pipe, a socket, a device."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
