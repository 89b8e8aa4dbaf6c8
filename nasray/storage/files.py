"""Files of a run directory, on a local path or a URI such as s3://bucket/run.

The only user of pyarrow.fs. A path is a `str` (`Path` would mangle `s3://`). Files are
written whole: a reader sees the old file or the new one, never half of one.
"""

import errno
import json
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
from pyarrow import fs
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay
from tenacity.wait import wait_exponential

from nasray.errors import UserError
from nasray.storage import layout

logger = logging.getLogger(__name__)

OBJECT_STORES = ("s3", "gcs", "abfs")  # Arrow's type names; these have no folders
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "file", "hdfs", "viewfs")  # Arrow's; az:// besides
# Without credentials, Arrow would retry for a quarter of an hour.
GOOGLE_RETRIES = "?retry_limit_seconds=60"
RETRY_S = 300.0  # for how long a failing write to an object store is repeated
MOUNTS = "/proc/self/mountinfo"
LOCAL_CACHE = "/var/tmp"  # survives a restart, unlike /tmp
NETWORK_FILESYSTEMS = (
    *("nfs", "nfs4", "cifs", "smb3", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "afs"),
    *("9p", "panfs", "wekafs", "orangefs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph"),
    *("fuse.juicefs", "fuse.gcsfuse", "fuse.s3fs", "fuse.mount-s3", "fuse.blobfuse2"),
)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write to a full disk raises
ADVICE = {
    **dict.fromkeys(DISK_FULL, "free some space, then run the same command again"),
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.ESTALE: "mount it anew, then run the same command again",
    errno.EIO: "check the disk or the mount, then run the same command again",
    errno.EMFILE: "raise `ulimit -n`, then run the same command again",
}

# Called before anything in these folders is written or removed: raises once another process
# has taken over the folder (locks.py).
guards: dict[str, Callable[[], None]] = {}


def cache_folder() -> str:
    """Return the folder on this node of what can be made or fetched again.

    NASRAY_CACHE; or a folder in XDG_CACHE_HOME or ~/.cache. Where this is on a network file system,
    which nodes share, a folder on this node's disk, or else one with the node's name.
    """
    if "NASRAY_CACHE" in os.environ:
        return os.environ["NASRAY_CACHE"]
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    shared = os.path.join(root, "nasray")
    if not on_network(root):
        return shared
    local = os.path.join(LOCAL_CACHE, f"nasray-{os.getuid()}")
    with suppress(OSError):
        os.makedirs(local, mode=0o700, exist_ok=True)
        is_own = not os.path.islink(local) and os.stat(local).st_uid == os.getuid()
        if is_own and not on_network(local):
            return local
    return os.path.join(shared, os.uname().nodename)


def on_network(path: str) -> bool:
    """Whether the local path `path` is on a network file system."""
    return filesystem_kind(path) in NETWORK_FILESYSTEMS


def filesystem_kind(path: str) -> str:
    """The kind of file system that the local path `path` is on, "ext4", say; "" if unknown."""
    where, found = f"{os.path.realpath(path)}/", ("", "")
    with suppress(OSError), open(MOUNTS) as mounts:  # Linux only
        for line in mounts:
            place, _, kind = line.partition(" - ")
            mount = place.split()[4].replace("\\040", " ").rstrip("/")
            if where.startswith(f"{mount}/") and len(mount) >= len(found[0]):
                found = mount, kind.split()[0]
    return found[1]


def told(error: OSError) -> str:
    """An error of a file in one line: the file, what is wrong, and what to do if that is known."""
    named = error.errno is not None and error.filename is not None
    text = f"{error.filename}: {error.strerror}" if named else " ".join(str(error).split())
    advice = ADVICE.get(error.errno) if error.errno is not None else None
    return f"{text}; {advice}" if advice else text


def is_url(path: str) -> bool:
    """Whether `path` is an address on the web, which this module does not read."""
    return path.lower().startswith(("http://", "https://"))


def is_uri(path: str) -> bool:
    """Whether `path` is a URI, not a local path."""
    return "://" in path


def absolute(path: str) -> str:
    """Return `path` as an absolute path or a URI, for workers with another working directory.

    az://container/run becomes Arrow's abfs://account@container/run, with the account from
    AZURE_STORAGE_ACCOUNT.

    Raises:
        UserError: a URI that cannot be a folder.
    """
    if path.startswith("az://"):
        account = os.environ.get("AZURE_STORAGE_ACCOUNT")
        if not account:
            raise UserError(f"{path}: AZURE_STORAGE_ACCOUNT must name the storage account")
        path = f"abfs://{account}@{path.removeprefix('az://')}"
    if is_uri(path):
        return _checked(path).rstrip("/")
    return os.path.abspath(path) if path else path


def _checked(uri: str) -> str:
    """Refuse a URI that is not a folder to which file names can be appended."""
    scheme, _, place = uri.partition("://")
    if scheme not in SCHEMES:
        raise UserError(f"{uri}: {scheme}:// is no storage; give a folder, or s3://, gs://, az://")
    for sign in ("?", "#", " "):
        if sign in place:
            raise UserError(
                f"{uri}: {sign!r} in a URI; give one without (options of a storage go into the "
                "environment, such as AWS_REGION)"
            )
    if not place.strip("/"):
        raise UserError(f"{uri} names no folder; give one such as {scheme}://bucket/run")
    if "//" in place:
        raise UserError(f"{uri}: an empty name between slashes; leave out one slash")
    return uri


def join(folder: str, *names: str) -> str:
    """Append names to a path or URI."""
    return "/".join((folder.rstrip("/"), *names))


def resolve(path: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem that holds `path`, and the path there.

    Raises:
        UserError: no filesystem is known for this URI, or the path is no UTF-8.
    """
    found = absolute(path)
    options = GOOGLE_RETRIES if found.startswith(("gs://", "gcs://")) else ""
    try:
        return fs.FileSystem.from_uri(found + options)
    except UnicodeEncodeError:
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise UserError(
            f"{name}: the name of a folder on the way is no UTF-8; rename it, or give a link to it"
        ) from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: {error}; give a folder, or s3://, gs://, az://") from None


def exists(path: str) -> bool:
    """Whether there is a file or folder at `path`."""
    filesystem, place = resolve(path)
    return filesystem.get_file_info(place).type != fs.FileType.NotFound


def list_names(folder: str) -> list[str]:
    """Names of the files and folders directly in `folder`, sorted; none if it is absent."""
    filesystem, place = resolve(folder)
    infos = filesystem.get_file_info(fs.FileSelector(place, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def list_numbered(folder: str) -> list[str]:
    """The same names, shorter ones first: numbers by their value, 9 before 10."""
    return sorted(list_names(folder), key=lambda name: (len(name), name))


def list_below(folder: str) -> tuple[list[str], list[str]]:
    """Paths of all files and of all folders below `folder`, relative to it, sorted."""
    filesystem, place = resolve(folder)
    if isinstance(filesystem, fs.LocalFileSystem):
        return _walk(place)
    infos = filesystem.get_file_info(fs.FileSelector(place, recursive=True, allow_not_found=True))
    below = {
        kind: sorted(
            info.path.removeprefix(place).strip("/") for info in infos if info.type == kind
        )
        for kind in (fs.FileType.File, fs.FileType.Directory)
    }
    return below[fs.FileType.File], below[fs.FileType.Directory]


def _walk(folder: str) -> tuple[list[str], list[str]]:
    """list_below() of a local folder; links to a folder that contains them are not followed."""
    files: list[str] = []
    folders: list[str] = []
    for place, below, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(place)
        below[:] = [
            name
            for name in below
            if not f"{here}/".startswith(f"{os.path.realpath(os.path.join(place, name))}/")
        ]
        prefix = os.path.relpath(place, folder)
        path = "" if prefix == "." else f"{prefix}/"
        files += [f"{path}{name}" for name in names if os.path.isfile(os.path.join(place, name))]
        folders += [f"{path}{name}" for name in below]
    return sorted(files), sorted(folders)


def stamps(path: str, names: Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
    """Size, in bytes, and time of the last change, in ns, of each file below the folder `path`.

    Keys are paths relative to it; the key of a file `path` is "". With `names`, only of those of
    them that there are.
    """
    filesystem, place = resolve(path)
    if names is None:
        names = [""] if filesystem.get_file_info(place).is_file else list_below(path)[0]
    if isinstance(filesystem, fs.LocalFileSystem):
        found = {}
        for name in names:
            # Removed meanwhile, not readable, or no name of a file.
            with suppress(FileNotFoundError, PermissionError, NotADirectoryError, ValueError):
                status = os.stat(os.path.join(place, name) if name else place)
                found[name] = status.st_size, status.st_mtime_ns
        return found
    infos = filesystem.get_file_info([f"{place}/{name}".rstrip("/") for name in names])
    return {
        name: (info.size or 0, info.mtime_ns or 0)
        for name, info in zip(names, infos, strict=True)
        if info.type != fs.FileType.NotFound
    }


def make_folder(folder: str) -> None:
    """Create a folder and those above it, where they are absent.

    Raises:
        UserError: there is a file of that name.
    """
    filesystem, place = resolve(folder)
    if filesystem.get_file_info(place).is_file:
        raise UserError(f"{folder} is a file; give a folder, or the name of one that is to be made")
    filesystem.create_dir(place, recursive=True)


def read(path: str) -> bytes:
    """Read a whole file.

    Raises:
        OSError: it is absent, or the storage fails.
    """
    filesystem, place = resolve(path)
    with filesystem.open_input_file(place) as file:
        return bytes(file.read())


def write(path: str, content: bytes, *, retry_s: float | None = None) -> None:
    """Write a whole file, replacing an old one.

    A write that fails is repeated, with pauses that grow to 30 s, until `retry_s` seconds have
    passed. Without `retry_s`, that is RETRY_S on an object store; on a disk, it is not repeated.

    Raises:
        OSError: the last attempt failed; its filename is `path` where it has an errno.
    """
    filesystem, place = resolve(path)
    if retry_s is None:
        retry_s = RETRY_S if filesystem.type_name in OBJECT_STORES else 0.0
    attempts = Retrying(
        retry=retry_if_exception_type(OSError),
        wait=wait_exponential(multiplier=0.5, max=30),
        stop=stop_after_delay(retry_s),
        before_sleep=_warn,
        reraise=True,
    )
    attempts(_write_once, filesystem, place, path, content)


def _warn(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    pause = state.next_action.sleep if state.next_action else 0.0
    logger.warning("writing failed: %s; trying again in %.1f s", error, pause)


def _write_once(filesystem: fs.FileSystem, place: str, path: str, content: bytes) -> None:
    _check_guards(path)
    try:
        if isinstance(filesystem, fs.LocalFileSystem):
            _replace(place, content)
            return
        # An object store shows an object only when it is whole.
        if filesystem.type_name not in OBJECT_STORES:
            filesystem.create_dir(os.path.dirname(place), recursive=True)
        with filesystem.open_output_stream(place) as file:
            file.write(content)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), path) from None


def _replace(place: str, content: bytes) -> None:
    """Write a local file under a name of its own, and rename it once it is on the disk."""
    folder = os.path.dirname(place)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:  # a file, whose name Python's words hide
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    # Other nodes may share the folder; in containers, hosts and processes often have one name.
    partial = f"{place}.partial-{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or, after a power failure, the new name has an empty file
        os.replace(partial, place)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # of the new name itself
    except OSError:  # some network file systems know no such thing
        pass
    finally:
        os.close(handle)


def _check_guards(path: str) -> None:
    if f"/{layout.LEASES}/" in path:
        return
    for folder, check in list(guards.items()):
        if path.startswith(f"{folder}/"):
            check()


def read_json(path: str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is not JSON.
        OSError: it is absent, or the storage fails.
    """
    try:
        return json.loads(read(path))
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}); restore or remove it") from None


def read_object(path: str, *keys: str) -> dict[str, Any]:
    """Read a JSON object that must have `keys`.

    Raises:
        UserError: it is not what nasray wrote there.
        OSError: it is absent, or the storage fails.
    """
    return _with_keys(path, read_json(path), keys)


def read_rows(path: str, *keys: str) -> list[dict[str, Any]]:
    """Read a JSON list of objects that must have `keys`; errors as of read_object()."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise _not_ours(path, "is no list")
    return [_with_keys(path, row, keys) for row in rows]


def _with_keys(path: str, value: Any, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _not_ours(path, "is no object")
    for key in keys:
        if key not in value:
            raise _not_ours(path, f"lacks {key!r}")
    return value


def _not_ours(path: str, why: str) -> UserError:
    return UserError(
        f"{path}: not written by nasray, it {why}; restore it, or remove it and run again"
    )


def write_json(path: str, value: Any, *, retry_s: float | None = None) -> None:
    """Write `value` as a JSON file; `retry_s` and errors as of write().

    Raises:
        ValueError: a number is not finite, which JSON cannot say.
    """
    content = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write(path, content.encode(), retry_s=retry_s)


def remove(path: str) -> None:
    """Delete a file or a whole folder; nothing happens if it is absent."""
    _check_guards(path)
    filesystem, place = resolve(path)
    info = filesystem.get_file_info(place)
    if info.type == fs.FileType.Directory:
        filesystem.delete_dir(place)
    elif info.type == fs.FileType.File:
        filesystem.delete_file(place)


def move(path: str, target: str) -> None:
    """Give a file or folder another name on the same storage; `target` must not exist.

    An object store has no folders to rename: there, a folder is copied, then deleted.
    """
    filesystem, place = resolve(path)
    _, there = resolve(target)
    if filesystem.type_name in OBJECT_STORES:
        fs.copy_files(place, there, filesystem, filesystem)
        remove(path)
        return
    filesystem.create_dir(os.path.dirname(there), recursive=True)
    filesystem.move(place, there)
