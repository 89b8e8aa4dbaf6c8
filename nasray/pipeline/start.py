"""What a supernet's training begins with, where the job names files for it.

They are read here once, and kept in the run directory: workers on other machines, and the same
command later, need no more than that.
"""

import hashlib
import logging
from typing import Any

from nasray import checkpoint
from nasray.errors import UserError
from nasray.pipeline.run import Run
from nasray.pretrained.start import start_from
from nasray.spaces import describe
from nasray.spaces.space import Space
from nasray.storage import files as storage
from nasray.storage import layout
from nasray.training.teacher import read_teacher

log = logging.getLogger(__name__)


def prepare_start(run: Run) -> None:
    """Write what training begins with into RUN/init/, or with epochs = 0 into RUN/supernet.pt.

    Raises:
        UserError: a file is absent, damaged, of another space or other classes, or not the one
            that this run began with.
    """
    if storage.exists(run.supernet_path):
        return
    config, path = run.job.supernet, run.path(layout.START_DIGESTS)
    digests = storage.read_json(path) if storage.exists(path) else {}
    for key, prepare in (("teacher", _prepare_teacher), ("init", _prepare_init)):
        file = getattr(config, key)
        if not file:
            continue
        if key not in digests:
            digests[key] = prepare(run, file)
            storage.write_json(path, digests)
        elif (
            not storage.is_url(file)
            and storage.exists(file)
            and checkpoint.digest(file) != digests[key]
        ):
            raise UserError(
                f"supernet.{key} = {file}: not the file that this run began with; restore it, or "
                "use another run directory"
            )


def _prepare_init(run: Run, path: str) -> str:
    """Write the supernet of the weights in `path`; return the digest of that file."""
    config = run.job.supernet
    classes = list(run.dataset.classes)
    sha256, seed = config.init_sha256, run.job.seed
    found = start_from(run.space, path, sha256=sha256, seed=seed, classes=classes)
    if config.epochs == 0:
        if found.new_head:
            raise UserError(
                f"supernet.epochs = 0: {path} knows other classes than the data set, which takes "
                "training; set it to 1 or more"
            )
        _check_trained(run.space, found.trained, path)
    target = run.path(layout.INIT) if config.epochs else run.supernet_path
    checkpoint.save_supernet(target, found.supernet, classes=classes)
    return found.digest


def _check_trained(space: Space, trained: dict[str, Any] | None, path: str) -> None:
    """Check that the file's supernet was trained with all choices of `space`.

    Raises:
        UserError: one of its resolutions or shares was not trained.
    """
    if trained is None:
        if space.name == "mbconv":
            log.warning(
                "supernet.epochs = 0: %s is one trained network, whose smaller subnets were never "
                "trained; set epochs to 1 or more to have them trained, too",
                path,
            )
        return
    wanted = describe(space)
    for key in ("resolutions", "expand_shares"):
        if more := sorted(set(wanted.get(key) or ()) - set(trained.get(key) or ())):
            raise UserError(
                f"supernet.epochs = 0: {path} was not trained with {more[0]} of space.{key} = "
                f"{list(wanted[key])}, but with {list(trained[key])}; leave {more[0]} out, or set "
                "epochs to 1 or more"
            )


def _prepare_teacher(run: Run, path: str) -> str:
    """Check the teacher in `path` and copy its file; return the file's digest."""
    read_teacher(path, run.dataset.classes)
    content = storage.read(path)
    storage.write(run.path(layout.TEACHER), content)
    return hashlib.sha256(content).hexdigest()
