"""Sources "imagefolder" and "tar": train/<class>/ and val/<class>/, in a folder or one tar.

Without val/, or with the class folders alone, the images are divided later (splits.py).

The same files give the same data set either way. A tar is read in place, member by
member: nothing is unpacked, so no member's name can reach the disk.
"""

import logging
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from pyarrow import NativeFile

from nasray.config import DataConfig
from nasray.data.source import Pictures, Record, shuffled
from nasray.errors import UserError
from nasray.storage import files as storage

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff")
VAL_NAMES = ("val", "valid", "validation", "test")  # the first found counts
MAX_NAMED = 5  # classes in one message
BLOCK = 512  # bytes; a tar is made of these and ends with zeroed ones

log = logging.getLogger(__name__)

# Class name -> [(path below the data set's folder, where its bytes are)].
Split = dict[str, list[tuple[str, Any]]]


def imagefolder(config: DataConfig, seed: int) -> Pictures:
    """Open the folder or URI `config.path`, which holds train/ and val/.

    Raises:
        UserError: it does not exist, or its folders are no two splits of the same classes.
    """
    root = config.path
    origin = f"data.path = {root!r}"
    _refuse_absent(root)
    if not _is_folder(root):
        raise UserError(f'{origin}: is a file; give its folder, or set source = "tar"')
    folders = _split_folders(storage.list_names(root), origin)
    splits = {split: _list_split(root, folder) for split, folder in folders.items()}
    filesystem, place = storage.resolve(root)

    def read(path: str) -> bytes:
        with filesystem.open_input_file(f"{place}/{path}") as file:
            return bytes(file.read())

    return _pictures(splits, folders, read, seed=seed, origin=origin)


def tar(config: DataConfig, seed: int) -> Pictures:
    """Open the uncompressed tar `config.path`; one folder may surround its train/ and val/.

    Raises:
        UserError: as for a folder; or the tar is compressed, damaged, or holds links.
    """
    origin = f"data.path = {config.path!r}"
    _refuse_absent(config.path)
    if _is_folder(config.path):
        raise UserError(f'{origin}: is a folder; set source = "imagefolder"')
    filesystem, place = storage.resolve(config.path)
    file = filesystem.open_input_file(place)
    members = list(_scan(file, origin))
    tops = {parts[0] for parts, _ in members}
    if "train" not in tops and len(tops) == 1:
        members = [(parts[1:], where) for parts, where in members if len(parts) > 1]
        tops = {parts[0] for parts, _ in members}
    folders = _split_folders(tops, origin)
    splits: dict[str, Split] = {split: {} for split in folders}
    split_of = {folder: split for split, folder in folders.items()}
    if not folders["train"]:
        members = [(("", *parts), where) for parts, where in members]
    for parts, where in members:
        is_image = where is not None
        if parts[0] in split_of and len(parts) >= 2 + is_image:
            images = splits[split_of[parts[0]]].setdefault(parts[1], [])
            if is_image:
                images.append(("/".join(parts).lstrip("/"), where))

    def read(where: tuple[int, int]) -> bytes:
        offset, size = where
        return file.read_at(size, offset)  # thread-safe, unlike seek and read

    return _pictures(splits, folders, read, seed=seed, origin=origin)


def images_below(folder: str) -> list[str]:
    """Paths of the images in `folder`, a path or URI, however deep, sorted; not hidden ones."""
    files, _ = storage.list_below(folder)
    return [storage.join(folder, name) for name in _shown_images(files)]


def _refuse_absent(path: str) -> None:
    if not storage.exists(path):
        raise UserError(f"data.path = {path!r}: does not exist; correct it or pass --data PATH")


def _is_folder(path: str) -> bool:
    filesystem, place = storage.resolve(path)
    return not filesystem.get_file_info(place).is_file


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")  # such as the ._x.jpg that macOS puts beside x.jpg


def _shown_images(paths: Iterable[str]) -> list[str]:
    """Those of the paths that are of images and not hidden."""
    return [path for path in paths if _is_image(path) and not any(map(_is_hidden, path.split("/")))]


def _split_folders(names: Iterable[str], origin: str) -> dict[str, str]:
    """Return the folder of each split there is; "" is the data set's own."""
    found = set(names)
    to_report_on = [name for name in VAL_NAMES if name in found]
    if "train" not in found and to_report_on:
        raise UserError(
            f"{origin}: has {to_report_on[0]}/ and no train/ folder; images belong in "
            "train/<class>/, or all of them straight in <class>/"
        )
    if "train" not in found:
        return {"train": ""}
    if len(to_report_on) > 1:
        log.warning(
            "%s: reports are on the images of %s/; %s is not used",
            origin,
            to_report_on[0],
            " and ".join(f"{name}/" for name in to_report_on[1:]),
        )
    return {"train": "train"} | ({"val": to_report_on[0]} if to_report_on else {})


def _list_split(root: str, folder: str) -> Split:
    """Find the classes, which are folders, and the images below each, however deep."""
    files, folders = storage.list_below(storage.join(root, folder))
    split: Split = {name: [] for name in folders if "/" not in name and not _is_hidden(name)}
    for name in _shown_images(files):
        parts = name.split("/")
        if len(parts) > 1:
            path = f"{folder}/{name}".lstrip("/")
            split.setdefault(parts[0], []).append((path, path))
    return split


def _scan(
    file: NativeFile, origin: str
) -> Iterator[tuple[tuple[str, ...], tuple[int, int] | None]]:
    """List the images of a tar with (offset, size), and its folders with None."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                # tarfile keeps all headers, 1 GB for ImageNet.
                archive.members = []  # type: ignore[attr-defined]
                parts = tuple(posixpath.normpath(member.name).strip("/").split("/"))
                if any(map(_is_hidden, parts)):  # and "." and ".."
                    continue
                if member.isdir():
                    yield parts, None
                elif member.isreg() and not member.issparse() and _is_image(parts[-1]):
                    yield parts, (member.offset_data, member.size)
                elif _is_image(parts[-1]):
                    raise UserError(
                        f"{origin}: member {member.name!r} is a link or sparse; "
                        "pack the tar again with --dereference --hard-dereference"
                    )
            end = archive.offset
    except tarfile.TarError as error:
        raise UserError(
            f"{origin}: {error}; not an uncompressed tar, or cut short: unzip it or fetch it again"
        ) from None
    # To tarfile a damaged header, or an end without the closing blocks, is the end.
    if file.read_at(BLOCK, end) != bytes(BLOCK):
        raise UserError(f"{origin}: damaged or cut short at byte {end}; fetch the tar again")


def _pictures(
    splits: dict[str, Split],
    folders: dict[str, str],
    read: Callable[[Any], bytes],
    *,
    seed: int,
    origin: str,
) -> Pictures:
    classes = _common_classes(splits, folders, origin)
    # Sorted, so that the order in which a folder or tar lists its files does not matter.
    images = {
        split: sorted(
            (label, path, where)
            for label, name in enumerate(classes)
            for path, where in splits[split][name]
        )
        for split in splits
    }

    def records() -> Iterator[Record]:
        for split in splits:
            for position in shuffled(len(images[split]), seed, split):
                label, path, where = images[split][position]
                yield Record(split, label, path, partial(read, where))

    return Pictures(classes, sum(map(len, images.values())), records())


def _common_classes(
    splits: dict[str, Split], folders: dict[str, str], origin: str
) -> tuple[str, ...]:
    """Return the class names, sorted; refuse splits that differ and classes without images."""
    train = splits["train"]
    val = splits.get("val", train)
    for name, images in train.items() if not folders["train"] else ():
        if any(path.startswith(f"{name}/train/") for path, _ in images):
            raise UserError(f"{origin}: has no train/ folder, but {name}/ has one; name {name}/")
    if len(train) < 2:
        shown = f"{folders['train']}/ holds" if folders["train"] else "holds no train/ and"
        raise UserError(
            f"{origin}: {shown} {len(train)} class folders, and a classifier needs two at least; "
            "use train/<class>/<image>, or <class>/<image>"
        )
    if set(train) != set(val):
        lacks = [
            f"{folders[split]}/ lacks {_some(set(others) - set(own))}"
            for split, own, others in (("train", train, val), ("val", val, train))
            if set(others) - set(own)
        ]
        raise UserError(f"{origin}: {' and '.join(lacks)}; both need the same class folders")
    for split, folder in folders.items():
        empty = {name for name, images in splits[split].items() if not images}
        if empty:
            raise UserError(
                f"{origin}: no images in {folder + '/' if folder else 'the folder'} of class "
                f"{_some(empty)}; "
                f"add some ({' '.join(IMAGE_SUFFIXES)}) or remove the class"
            )
    return tuple(sorted(train))


def _some(names: set[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:MAX_NAMED]))
    more = len(names) - MAX_NAMED
    return f"{shown} and {more} more" if more > 0 else shown
