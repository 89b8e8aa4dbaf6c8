"""One process per folder: flock on a local disk, leases where several nodes see the folder.

flock ends with its process, however that ends, and a shared flock tells whether a folder is held.
On network file systems it may hold on one node only (gcsfuse, s3fs, some of Lustre), so that a
lease is taken there, too, as on an object store.

A lease is a file that its owner rewrites every few seconds. A process that finds the lease of
another one waits to see whether it changes; if not, its owner is dead. No clocks are compared.
An owner that was only paused finds, before it writes anything more, that its lease is too old to
count, looks whether it is still there, and gives up if not. A single write that was under way when
it was paused may still arrive later: Arrow knows no conditional writes, which S3, Google and Azure
offer. So the name of a file tells what is in it (a position, a generation, an epoch), and a late
write repeats what is there.
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
# File systems that one node alone sees; on any other, a lease is taken beside the flock.
ON_ONE_NODE = frozenset(
    "apfs bcachefs btrfs exfat ext2 ext3 ext4 f2fs fuseblk hfs jfs ntfs3 overlay ramfs reiserfs "
    "tmpfs vfat xfs zfs".split()
)


class _Lease:
    """This process's lease of a folder, renewed by a thread until it ends or is lost."""

    def __init__(self, folder: str) -> None:
        self.folder, self.names = folder, storage.join(folder, layout.LEASES)
        self.path = storage.join(self.names, f"{uuid.uuid4().hex}.json")
        self.number, self.renewed = 0, _now()
        self.is_lost = False
        self.before = set(storage.list_names(self.names))  # of others, dead or to be respected
        self.renewing, self.ended = threading.RLock(), threading.Event()
        self._write()

    def check(self) -> None:
        """Return if this process still holds the folder, looking only if that is in doubt.

        Raises:
            UserError: another process has taken over.
            OSError: the storage fails.
        """
        if not self.is_lost and _now() - self.renewed > (DEAD_AFTER - 1) * RENEW_EVERY_S:
            self.renew()
        if self.is_lost:
            raise self.lost()

    def lost(self) -> UserError:
        """What to raise if another process has taken over."""
        return UserError(
            f"{self.folder} was taken over by another nasray process, as this one had not been "
            f"heard of for {DEAD_AFTER * RENEW_EVERY_S:.0f} s; it ends here, the other one goes on"
        )

    def renew(self) -> None:
        """Renew the lease, or note that it is lost."""
        with self.renewing:
            begun, is_there = _now(), storage.exists(self.path)
            if is_there:
                self.number += 1
                self._write()
            # After a long pause, even within a renewal, another process may have taken over.
            late = _now() - self.renewed > DEAD_AFTER * RENEW_EVERY_S
            if is_there and late and (newer := self._newer()):
                is_there, begun = not self._outlives(newer), _now()
            if is_there:
                self.renewed = begun
            else:
                self.is_lost = True

    def keep(self) -> None:
        """Renew until `ended`; interrupt this process if another one has taken over."""
        while not self.ended.wait(RENEW_EVERY_S):
            with suppress(OSError):  # the storage fails; the next renewal may succeed
                self.renew()
            if self.is_lost:
                _thread.interrupt_main()
                return

    def leave(self) -> None:
        """Remove the lease; if the storage fails, it is taken for a dead one some time later."""
        with suppress(OSError):
            storage.remove(self.path)

    def _outlives(self, newer: set[str]) -> bool:
        """Whether one of these leases is still there when its process must have seen this one."""
        for _ in range(DEAD_AFTER):
            time.sleep(RENEW_EVERY_S)
            if not newer & self._newer():  # it saw this lease renewed, and gave up
                return False
            self.number += 1
            self._write()
        return True

    def _newer(self) -> set[str]:
        """The leases of processes that came after this one."""
        return {*storage.list_names(self.names)} - self.before - {os.path.basename(self.path)}

    def _write(self) -> None:
        content = {"host": os.uname().nodename, "pid": os.getpid(), "renewed": self.number}
        storage.write_json(self.path, content, retry_s=0)  # the next renewal is the repetition


@contextmanager
def leased(folder: str) -> Iterator[None]:
    """Hold the lease of `folder`; that of a dead process is removed after some seconds.

    Raises:
        UserError: another process holds it, or has taken it over.
    """
    lease = _Lease(folder)
    # Renewed from the start: of two processes that start together, each sees the other one alive.
    renewer = threading.Thread(target=lease.keep, daemon=True)
    renewer.start()
    try:
        _remove_dead_leases(folder, lease.names, os.path.basename(lease.path))
        storage.guards[folder] = lease.check
        yield
    except KeyboardInterrupt:
        if lease.is_lost:
            raise lease.lost() from None
        raise
    finally:
        storage.guards.pop(folder, None)
        lease.ended.set()
        renewer.join()
        lease.leave()


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
    others = [name for name in storage.list_names(names) if name != own and name.endswith(".json")]
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
                raise UserError(f"{folder} is in use by another nasray process ({_owner(now)})")
    for name in others:
        storage.remove(storage.join(names, name))


def _content(path: str) -> bytes | None:
    try:
        return storage.read(path)
    except OSError:
        return None


def _now() -> float:
    """Seconds of a clock that also runs while this machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # of Linux only
    return time.clock_gettime(clock)


def holder(folder: str) -> str:
    """Describe who holds a folder; empty if nobody does, or a file system has no locks."""
    if _is_locked(folder):
        return "another nasray process"
    return " and ".join(holders(folder)) if _has_leases(folder) else ""


class Watcher:
    """Who holds a folder, for whoever looks again and again: a dead process renews no lease."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.seen: dict[str, tuple[bytes, float]] = {}  # leases, and when each was a new one

    def holder(self) -> str:
        """As holder(), without those whose lease has not changed for as long as a dead one's."""
        if _is_locked(self.folder):
            return "another nasray process"
        names = storage.join(self.folder, layout.LEASES)
        found, now = [], _now()
        for name in storage.list_names(names) if _has_leases(self.folder) else ():
            content = _content(storage.join(names, name))
            if content is None:
                continue
            if self.seen.get(name, (b"", now))[0] != content:
                self.seen[name] = content, now
            if now - self.seen[name][1] <= DEAD_AFTER * RENEW_EVERY_S:
                found.append(_owner(content))
        return " and ".join(found)


def _is_locked(folder: str) -> bool:
    """Whether a process of this machine holds a local folder."""
    filesystem, place = storage.resolve(folder)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return False
    try:
        with open(os.path.join(place, layout.LOCK)) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        pass
    return False


def _has_leases(folder: str) -> bool:
    filesystem, place = storage.resolve(folder)
    return not isinstance(filesystem, fs.LocalFileSystem) or seen_by_other_nodes(place)


@contextmanager
def held(folder: str, *, temporary: bool = False) -> Iterator[None]:
    """Create a folder if need be, and hold its lock during the block.

    A `temporary` folder, which exists for its lock alone, is removed in the end.

    Raises:
        UserError: another process holds it or has taken it over, or the file system has no locks.
    """
    filesystem, place = storage.resolve(folder)
    if not isinstance(filesystem, fs.LocalFileSystem):
        with leased(folder):
            yield
        return
    storage.make_folder(folder)
    others_see_it = seen_by_other_nodes(place)
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
            if not others_see_it:
                raise UserError(
                    f"{folder}: this file system has no locks ({error.strerror}); use another "
                    "one, or a URI"
                ) from None
        try:
            if others_see_it:
                with leased(folder):
                    yield
            else:
                yield
        finally:
            if temporary:
                storage.remove(folder)


def seen_by_other_nodes(place: str) -> bool:
    """Whether the local path `place` is on a file system that other nodes may have mounted."""
    kind = storage.filesystem_kind(place)
    return bool(kind) and kind not in ON_ONE_NODE
