"""Lists and reads a tar in place, as what it unpacks to: links followed, later members win."""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from pyarrow import NativeFile

from nasray.data.source import BROKEN_LINK, LOOP, UNREADABLE, Unusable
from nasray.errors import UserError

BLOCK = 512  # bytes; a tar is made of these and ends with zeroed ones
MOST_LINKS = 40  # on the way to one file, as in Linux
COMPRESSED = {  # by how they begin: what they are, and what to do
    b"\x1f\x8b": ("gzip", "gunzip it"),
    b"BZh": ("bzip2", "bunzip2 it"),
    b"\xfd7zXZ": ("xz", "unxz it"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd it"),
    b"PK": ("zip", 'unzip it and set source = "imagefolder"'),
}


class File(NamedTuple):
    """Where the bytes of a member are."""

    offset: int
    size: int
    blocks: tuple[tuple[int, int], ...] = ()  # of a sparse one: start and size of what is not zero


class Link(NamedTuple):
    """A symbolic link."""

    target: str


# A folder is a dict of its names; a Link leads to another node.
Node = dict[str, Any] | File | Link | Unusable


def entries(file: NativeFile, origin: str) -> Iterator[tuple[str, Any]]:
    """List what the tar unpacks to: the path of a folder with None, of a file with a File.

    What cannot be used comes as an Unusable. Members that would lie outside are left out.

    Raises:
        UserError: it is compressed, no tar, or damaged; `origin` names it.
    """
    root: dict[str, Any] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                # tarfile keeps all headers, 1 GB for ImageNet.
                archive.members = []  # type: ignore[attr-defined]
                _unpack(member, root)
            end = archive.offset
    except (tarfile.TarError, ValueError, EOFError) as error:  # the others by damaged headers
        head = file.read_at(8, 0)
        for begin, (kind, advice) in COMPRESSED.items():
            if head.startswith(begin):
                raise UserError(
                    f"{origin}: is compressed by {kind}, not an uncompressed tar, and images are "
                    f"read in any order; {advice}"
                ) from None
        raise UserError(
            f"{origin}: {error}; not an uncompressed tar, or cut short: fetch it again"
        ) from None
    # To tarfile a damaged header, or an end without the closing blocks, is the end.
    if file.read_at(BLOCK, end) != bytes(BLOCK):
        raise UserError(f"{origin}: damaged or cut short at byte {end}; fetch the tar again")
    yield from _walk(root, root, "", [], (id(root),))


def read(file: NativeFile, where: File, number: int | None) -> bytes:
    """Return the first `number` bytes of a member, or all of it; from any thread."""
    if where.blocks:
        content, place = bytearray(where.size), where.offset
        for start, size in where.blocks:
            content[start : start + size] = file.read_at(size, place)
            place += size
        return bytes(content[:number])
    size = where.size if number is None else min(number, where.size)
    return bytes(file.read_at(size, where.offset))


def _unpack(member: tarfile.TarInfo, root: dict[str, Any]) -> None:
    """Put a member into the tree, in place of an earlier one of its name."""
    path = posixpath.normpath(member.name).strip("/")
    parts = path.split("/")
    if parts[0] in ("", "."):
        return
    if parts[0] == "..":
        root[path] = Unusable(UNREADABLE, "outside of the tar")
        return
    folder: Any = root
    real: list[str] = []
    for part in parts[:-1]:
        below = folder.get(part)
        if isinstance(below, Link):
            below, real = _find(root, [*real, *below.target.split("/")])
        else:
            real = [*real, part]
        if not isinstance(below, dict):
            below = folder[part] = {}
        folder = below
    name = parts[-1]
    if member.isdir():
        found = folder.get(name)
        if isinstance(found, Link):
            found, _ = _find(root, [*real, *found.target.split("/")])
        if not isinstance(found, dict):
            folder[name] = {}
    elif member.issym():
        folder[name] = Link(member.linkname)
    elif member.islnk():
        target = posixpath.normpath(member.linkname).strip("/").split("/")
        found, _ = _find(root, target, last_too=False)
        lost = found is None or isinstance(found, dict)
        folder[name] = Unusable(BROKEN_LINK, f"-> {member.linkname}") if lost else found
    elif member.isreg():
        sparse: Any = member.sparse if member.issparse() else ()
        folder[name] = File(member.offset_data, member.size, tuple(sparse))
    else:
        folder[name] = Unusable(UNREADABLE, "not a regular file")


def _find(
    root: dict[str, Any], parts: list[str], *, last_too: bool = True
) -> tuple[Node | None, list[str]]:
    """Follow `parts` from the root, and links on the way, the last one if `last_too`.

    Returns the node, None if there is none within the tar, and its path without links.
    """
    waiting, num_links = list(parts), 0
    nodes: list[Any] = [root]
    real: list[str] = []
    if waiting and not waiting[0]:
        return None, []  # an absolute link leads out of the tar
    while waiting:
        part = waiting.pop(0)
        if part in ("", "."):
            continue
        if part == "..":
            if not real:
                return None, []
            nodes.pop()
            real.pop()
            continue
        node = nodes[-1].get(part) if isinstance(nodes[-1], dict) else None
        if isinstance(node, Link) and (waiting or last_too):
            num_links += 1
            if num_links > MOST_LINKS or node.target.startswith("/"):
                return None, []
            waiting = node.target.split("/") + waiting
            continue
        if node is None:
            return None, []
        nodes.append(node)
        real.append(part)
    return nodes[-1], real


def _walk(
    root: dict[str, Any], folder: dict[str, Any], path: str, real: list[str], above: tuple[int, ...]
) -> Iterator[tuple[str, Any]]:
    """List a folder, whose path without links is `real`; `above` are the ids of those around it."""
    for name, node in folder.items():
        place, there = f"{path}{name}", [*real, name]
        if isinstance(node, Link):
            target = node.target
            outside = target.startswith("/")
            node, there = (None, []) if outside else _find(root, [*real, *target.split("/")])
            if node is None:
                node = Unusable(BROKEN_LINK, f"-> {target}")
        if not isinstance(node, dict):
            yield place, node
        elif id(node) in above:
            yield place, Unusable(LOOP)
        else:
            yield place, None
            yield from _walk(root, node, f"{place}/", there, (*above, id(node)))
