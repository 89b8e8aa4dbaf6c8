"""Sources "imagefolder" and "tar": train/<class>/ and val/<class>/, in a folder or one tar.

Without val/, or with the class folders alone, the images are divided later (splits.py).

The same files give the same data set either way. A tar is read in place, member by
member: nothing is unpacked, so no member's name can reach the disk.
"""

import logging
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from nasray.config import DataConfig
from nasray.data import kinds, tars
from nasray.data.source import (
    BROKEN_LINK,
    FAULTS,
    HIDDEN,
    LOOP,
    NO_IMAGE,
    NO_SPLIT,
    RAW_ADVICE,
    SERVICE,
    STRAY,
    TRAIN_NAMES,
    UNDECODABLE,
    UNREADABLE,
    VAL_NAMES,
    Pictures,
    Record,
    Skipped,
    Unusable,
    shuffled,
    split_word,
    why_unreadable,
)
from nasray.errors import UserError
from nasray.storage import files as storage

MAX_NAMED = 5  # classes in one message

log = logging.getLogger(__name__)


# (path below the data set's folder, where its bytes are), of a folder (path, None).
Entry = tuple[str, Any]
# Class name -> its images.
Split = dict[str, list[Entry]]


@dataclass(frozen=True)
class Listing:
    """All that lies below a data set's folder, and how it is read from there."""

    entries: list[Entry]
    read: Callable[[Any, int | None], bytes]  # so many bytes of it, or all

    def is_image(self, path: str, where: Any) -> bool:
        """Whether it is an image by its name, or, if that says nothing, by how it begins."""
        name = path.rpartition("/")[2]
        if kinds.has_image_suffix(name):
            return True
        if isinstance(where, Unusable):
            return not kinds.says_another_kind(name)
        return kinds.begins_as_image(self.read(where, kinds.HEAD_BYTES))


def imagefolder(config: DataConfig, seed: int) -> Pictures:
    """Open the folder or URI `config.path`, which holds train/ and val/.

    Raises:
        UserError: it does not exist, or its folders are no two splits of the same classes.
    """
    origin = f"data.path = {config.path!r}"
    refuse_absent(config.path)
    if not _is_folder(config.path):
        packed = config.path.lower().endswith((".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".xz"))
        way_out = "unpack it first" if packed else 'give its folder, or set source = "tar"'
        raise UserError(f"{origin}: is a file; {way_out}")
    return _pictures(_listing(config.path), seed=seed, origin=origin)


def tar(config: DataConfig, seed: int) -> Pictures:
    """Open the uncompressed tar `config.path`; one folder may surround its train/ and val/.

    Raises:
        UserError: as for a folder; or the tar is compressed or damaged.
    """
    origin = f"data.path = {config.path!r}"
    refuse_absent(config.path)
    if _is_folder(config.path):
        raise UserError(f'{origin}: is a folder; set source = "imagefolder"')
    filesystem, place = storage.resolve(config.path)
    file = filesystem.open_input_file(place)
    entries = list(tars.entries(file, origin))
    tops = [path for path, where in entries if where is None and "/" not in path]
    around = [top for top in tops if not _aside(top)]
    if len(around) == 1 and split_word(around[0]) not in TRAIN_NAMES:
        inside = f"{around[0]}/"
        entries = [
            (path.removeprefix(inside), where) for path, where in entries if path != around[0]
        ]
    return _pictures(Listing(entries, partial(tars.read, file)), seed=seed, origin=origin)


def images_below(folder: str) -> list[str]:
    """Paths of the images in `folder`, a path or URI, however deep, sorted; not hidden ones."""
    listing = _listing(folder)
    return sorted(
        storage.join(folder, path)
        for path, where in listing.entries
        if where == path and not _aside(path) and listing.is_image(path, where)
    )


def files_below(folder: str) -> tuple[dict[str, str], list[str]]:
    """All that lies in `folder`, a path or URI, however deep, but folders.

    Returns the paths of images, each with why it cannot be opened, or ""; and those of the rest.
    """
    listing = _listing(folder)
    images, others = {}, []
    for path, where in sorted(listing.entries, key=lambda entry: entry[0]):
        if where is None:
            continue
        reason = " ".join(where).strip() if isinstance(where, Unusable) else ""
        try:
            is_image = reason != LOOP and not _aside(path) and listing.is_image(path, where)
        except OSError as error:  # it has no suffix, and does not open
            is_image, reason = True, str(error.strerror)
        if is_image:
            images[storage.join(folder, path)] = reason
        else:
            others.append(storage.join(folder, path))
    return images, others


def refuse_absent(path: str) -> None:
    """Check that data.path, `path`, is there.

    Raises:
        UserError: it is not.
    """
    if not storage.exists(path):
        raise UserError(f"data.path = {path!r}: does not exist; correct it or pass --data PATH")


def _is_folder(path: str) -> bool:
    """Whether it is a folder, or a prefix of an object store.

    Raises:
        UserError: it is neither that nor a file.
    """
    filesystem, place = storage.resolve(path)
    if filesystem.type_name == "local" and not (os.path.isdir(place) or os.path.isfile(place)):
        raise UserError(f"data.path = {path!r}: is neither a folder nor a regular file")
    return not filesystem.get_file_info(place).is_file


def _listing(root: str) -> Listing:
    filesystem, place = storage.resolve(root)
    if filesystem.type_name == "local":

        def read_local(path: str, number: int | None) -> bytes:  # names may be no UTF-8
            with open(f"{place}/{path}", "rb") as file:
                return file.read(number)

        return Listing(list(_walk(place, "", (os.path.realpath(place),))), read_local)
    files, folders = storage.list_below(root)

    def read(path: str, number: int | None) -> bytes:
        with filesystem.open_input_file(f"{place}/{path}") as file:
            return bytes(file.read(number))

    entries: list[Entry] = [(folder, None) for folder in folders]
    return Listing(entries + [(path, path) for path in files], read)


def _walk(root: str, path: str, above: tuple[str, ...]) -> Iterator[Entry]:
    """List all below `root`/`path`; `above` are the real paths of that folder and of those above.

    Links are followed, unless to a folder that contains them.
    """
    try:
        found = list(os.scandir(f"{root}/{path}"))
    except OSError as error:
        yield path, Unusable(UNREADABLE, str(error.strerror))
        return
    for entry in found:
        name = f"{path}/{entry.name}" if path else entry.name
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:  # links round in a circle
            yield name, Unusable(BROKEN_LINK, str(error.strerror))
            continue
        if is_folder:
            real = os.path.realpath(entry.path)
            if any(f"{each}/".startswith(f"{real}/") for each in above):
                yield name, Unusable(LOOP)
            else:
                yield name, None
                yield from _walk(root, name, (*above, real))
        elif is_file:
            yield name, name
        elif entry.is_symlink():
            yield name, Unusable(BROKEN_LINK, f"-> {os.readlink(entry.path)}")
        else:
            yield name, Unusable(UNREADABLE, "not a regular file")


def _aside(path: str) -> str:
    """Why what has this path is never part of a class; "" if it may be."""
    names = path.split("/")
    if any(map(kinds.is_service, names)):
        return SERVICE
    return HIDDEN if any(name.startswith(".") and name != ".." for name in names) else ""


def shown(name: str) -> str:
    """Return a name of any bytes as text: those that are no UTF-8 as \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _class_name(folder: str) -> str:
    """Return the class of a folder; the forms in which systems write one name are one class."""
    return unicodedata.normalize("NFC", shown(folder))


def _split_folders(names: Iterable[str], origin: str) -> dict[str, str]:
    """Return the folder of each split there is; "" is the data set's own."""
    found = sorted(names, reverse=True)  # small letters before large ones
    train, val = (
        [name for known in split for name in found if split_word(name) == known]
        for split in (TRAIN_NAMES, VAL_NAMES)
    )
    if not train and val:
        raise UserError(
            f"{origin}: has {val[0]}/ and no train/ folder; images belong in train/<class>/, or "
            "all of them straight in <class>/"
        )
    if not train:
        return {"train": ""}
    for used, *others in (train, val or [""]):
        if others:
            unused = " and ".join(f"{name}/" for name in others)
            log.warning("%s: %s/ is used, %s is not", origin, used, unused)
    return {"train": train[0]} | ({"val": val[0]} if val else {})


def _pictures(listing: Listing, *, seed: int, origin: str) -> Pictures:
    tops = [path for path, where in listing.entries if where is None and "/" not in path]
    for path, where in listing.entries:
        if isinstance(where, Unusable) and split_word(path) in (*TRAIN_NAMES, *VAL_NAMES):
            raise UserError(f"{origin}: {path}/ is {where.reason} ({shown(where.detail)})")
    folders = _split_folders((top for top in tops if not _aside(top)), origin)
    skipped = Skipped()
    splits = _sorted_out(listing, folders, skipped)
    classes = _common_classes(splits, folders, skipped, origin)
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
                yield Record(split, label, shown(path), partial(listing.read, where, None))

    return Pictures(classes, sum(map(len, images.values())), records(), skipped)


def _sorted_out(listing: Listing, folders: dict[str, str], skipped: Skipped) -> dict[str, Split]:
    """Find the classes of each split, which are folders, and the images below each, however deep.

    Adds to `skipped` what is no part of a class.
    """
    split_of = {folder: split for split, folder in folders.items()}
    splits: dict[str, Split] = {split: {} for split in folders}
    spellings: dict[str, set[str]] = {}
    for path, where in listing.entries:
        top, *below = path.split("/") if folders["train"] else ("", *path.split("/"))
        aside = _aside(path)
        if where is None:
            if top in split_of and len(below) == 1 and not aside:
                name = _class_name(below[0])
                splits[split_of[top]].setdefault(name, [])
                spellings.setdefault(f"{top}/{name}".lstrip("/"), set()).add(below[0])
            continue
        try:
            is_image = listing.is_image(path, where)
        except OSError as error:
            if why_unreadable(error) is None:
                raise
            is_image, where = True, Unusable(UNREADABLE, str(why_unreadable(error)))
        if not is_image:
            skipped.add(NO_IMAGE, shown(path))
        elif aside:
            skipped.add(aside, shown(path))
        elif top not in split_of:
            skipped.add(NO_SPLIT if below else STRAY, shown(path))
        elif isinstance(where, Unusable):
            skipped.add(where.reason, shown(path), shown(where.detail))
            if len(below) == 1 and where.reason in FAULTS and not kinds.has_image_suffix(path):
                splits[split_of[top]].setdefault(_class_name(below[0]), [])  # a whole class lost
        elif len(below) == 1:
            skipped.add(STRAY, shown(path))
        elif kinds.is_raw(path):
            skipped.add(UNDECODABLE, shown(path), RAW_ADVICE)
        else:
            splits[split_of[top]].setdefault(_class_name(below[0]), []).append((path, where))
    for folder, names in spellings.items():
        if len(names) > 1:
            log.warning(
                "%s: %d folders whose names differ only in how their letters are composed are "
                "taken for one class",
                folder,
                len(names),
            )
    return splits


def _common_classes(
    splits: dict[str, Split], folders: dict[str, str], skipped: Skipped, origin: str
) -> tuple[str, ...]:
    """Return the class names, sorted; refuse splits that differ and classes without images."""
    train = splits["train"]
    val = splits.get("val", train)
    if not folders["train"]:
        _check_undivided(train, origin)
    if len(train) < 2:
        which = f"{folders['train']}/ holds" if folders["train"] else "holds no train/ and"
        fault = skipped.first_below("")
        raise UserError(
            f"{origin}: {which} {len(train)} class folders{f' ({fault})' if fault else ''}, and a "
            "classifier needs two at least; use train/<class>/<image>, or <class>/<image>"
            + (f" (is {folders['train']}/ a class? call it otherwise)" if folders["train"] else "")
        )
    if set(train) != set(val):
        lacks = [
            f"{folders[split]}/ lacks {_some(set(others) - set(own))}"
            for split, own, others in (("train", train, val), ("val", val, train))
            if set(others) - set(own)
        ]
        fault = skipped.first_below("")
        raise UserError(
            f"{origin}: {' and '.join(lacks)}{f' ({fault})' if fault else ''}; both need the same "
            "class folders"
        )
    for split, folder in folders.items():
        empty = {name for name, images in splits[split].items() if not images}
        if empty:
            fault = skipped.first_below(f"{folder}/{min(empty)}/".lstrip("/"))
            raise UserError(
                f"{origin}: no images in {folder + '/' if folder else 'the folder'} of class "
                f"{_some(empty)}{f' ({fault})' if fault else ''}; add some or remove the class"
            )
    return tuple(sorted(train))


def _check_undivided(classes: Split, origin: str) -> None:
    """Refuse class folders that are splits or hold them; warn if all hold the same folders."""
    inside = {
        name: {path.split("/")[1] for path, _ in images if path.count("/") > 1}
        for name, images in classes.items()
    }
    divided = sorted(
        name for name, folders in inside.items() if {*map(split_word, folders)} & {*TRAIN_NAMES}
    )
    if len(divided) > 1:
        raise UserError(
            f"{origin}: has no train/ folder, but {_some(set(divided))} have one each; images "
            "belong in train/<class>/ and val/<class>/, not in <class>/train/"
        )
    if divided:
        name = divided[0]
        raise UserError(
            f"{origin}: has no train/ folder, but {name}/ has one; name {name}/, or pack it alone"
        )
    common = set.intersection(*inside.values()) if len(inside) > 1 else set()
    if len(common) > 1:
        log.warning(
            "%s: its folders %s are taken for the classes, and each of them holds the folders %s; "
            "if these are the classes, call the others train/ and val/",
            origin,
            _some(set(classes)),
            _some(common),
        )


def _some(names: set[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:MAX_NAMED]))
    more = len(names) - MAX_NAMED
    return f"{shown} and {more} more" if more > 0 else shown
