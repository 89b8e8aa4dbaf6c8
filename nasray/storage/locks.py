"""One process per folder: flock on a local disk, leases on an object store.

flock ends with its process, however that ends, and a shared flock tells whether a folder is held.
A lease is a file that its owner rewrites every few seconds. A process that finds the lease of
another one waits to see whether it changes; if not, its owner is dead. No clocks are compared.
"""

import _thread
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pyarrow import fs

from nasray.errors import UserError
from nasray.storage import files as storage
from nasray.storage import layout

logger = logging.getLogger(__name__)

RENEW_EVERY_S = 5.0
DEAD_AFTER = 4  # renewals missed


@contextmanager
def leased(folder: str) -> Iterator[None]:
    """Hold the lease of `folder`; that of a dead process is removed after some seconds.

    Raises:
        UserError: another process holds it.
    """
    names = storage.join(folder, layout.LEASES)
    own = storage.join(names, f"{uuid.uuid4().hex}.json")
    _renew(own, 0)
    # Renewed from the start: of two processes that start together, each sees the other one alive.
    ended = threading.Event()
    renewer = threading.Thread(target=_keep_renewing, args=(folder, own, ended), daemon=True)
    renewer.start()
    try:
        _remove_dead_leases(folder, names, os.path.basename(own))
        yield
    finally:
        ended.set()
        renewer.join()
        with suppress(OSError):
            storage.remove(own)


def holders(folder: str) -> list[str]:
    """Describe the owners of the leases of `folder`, some of which may be dead."""
    names = storage.join(folder, layout.LEASES)
    leases = [_content(storage.join(names, name)) for name in storage.list_names(names)]
    return [f"{_owner(lease)}, or left by it" for lease in leases if lease]


def _owner(lease: bytes) -> str:
    try:
        content = json.loads(lease)
        return f"process {content['pid']} on {content['host']}"
    except (ValueError, TypeError, KeyError):
        return "a nasray process"


def _remove_dead_leases(folder: str, names: str, own: str) -> None:
    others = [name for name in storage.list_names(names) if name != own]
    if not others:
        return
    logger.info("%s has the lease of another process; waiting to see if it is renewed", folder)
    before = {name: _content(storage.join(names, name)) for name in others}
    for _ in range(DEAD_AFTER):
        time.sleep(RENEW_EVERY_S)
        for name in others:
            now = _content(storage.join(names, name))
            if before[name] is None:
                before[name] = now
            if now is not None and now != before[name]:
                raise UserError(f"{folder} is in use by another nasray process")
    for name in others:
        storage.remove(storage.join(names, name))


def _keep_renewing(folder: str, own: str, ended: threading.Event) -> None:
    """Renew the lease until `ended`; interrupt this process if another one has taken over."""
    number, renewed = 0, time.monotonic()
    while not ended.wait(RENEW_EVERY_S):
        with suppress(OSError):  # the storage fails; the next renewal may succeed
            is_there = storage.exists(own)
            if is_there:
                number += 1
                _renew(own, number)
            # After a long pause, even within a renewal, another process may have taken over.
            late = time.monotonic() - renewed > DEAD_AFTER * RENEW_EVERY_S
            if not is_there or (late and len(storage.list_names(os.path.dirname(own))) > 1):
                logger.error("%s was taken over by another nasray process", folder)
                _thread.interrupt_main()
                return
            renewed = time.monotonic()


def _renew(own: str, number: int) -> None:
    content = {"host": os.uname().nodename, "pid": os.getpid(), "renewed": number}
    storage.write_json(own, content, retry_s=0)  # the next renewal is the repetition


def _content(path: str) -> bytes | None:
    try:
        return storage.read(path)
    except OSError:
        return None


def holder(folder: str) -> str:
    """Describe who holds a folder; empty if nobody does, or a file system has no locks."""
    filesystem, place = storage.resolve(folder)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return " and ".join(holders(folder))
    try:
        with open(os.path.join(place, layout.LOCK)) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "another nasray process"
    except OSError:  # no lock file, or a file system without locks
        pass
    return ""


@contextmanager
def held(folder: str) -> Iterator[None]:
    """Create a folder if need be, and hold its lock during the block.

    Raises:
        UserError: another process holds it, or the file system has no locks.
    """
    filesystem, place = storage.resolve(folder)
    if not isinstance(filesystem, fs.LocalFileSystem):
        with leased(folder):
            yield
        return
    storage.make_folder(folder)
    with open(os.path.join(place, layout.LOCK), "w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)  # holder() of another process takes a shared lock for a moment
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another nasray process") from None
        except OSError as error:
            raise UserError(
                f"{folder}: this file system has no locks ({error.strerror}); use another one, "
                "or a URI"
            ) from None
        yield
