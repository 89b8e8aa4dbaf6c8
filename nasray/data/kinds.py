"""Which files are images, by their suffix or by how they begin, and which are in the way."""

import mimetypes
import os
import re
from functools import cache

from PIL import Image

from nasray.data.decoding import formats

HEAD_BYTES = 64  # of a file, which tell what it is

# Images that Pillow does not read, beside those that it does. Of the second it would take the small
# preview for the picture.
UNREAD = (".heic", ".heif", ".hif", ".jxl", ".svg", ".exr", ".eps", ".wmf", ".emf")
RAW = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw")

# How images begin; of the weaker signatures also what follows, for some texts begin with BM or P5.
SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|II[*+]\0|MM\0[*+]|8BPS|qoif|DDS |\xffO\xffQ"
    rb"|\0\0\0\x0cjP  |\0\0\0\x0cJXL |\xff\x0a|RIFF....WEBP|....ftyp(?:avi|hei|hev|mif|msf)"
    rb"|BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|P[1-6]\s+(?:#[^\n]*\n\s*)*\d+\s+\d+\s"
    rb"|P[Ff]\s+\d+\s+\d+\s+-?\d",
    re.DOTALL,
)

# Folders and files that operating systems, file servers and notebooks leave, in lower case.
SERVICE = {
    "@eadir",
    "__macosx",
    "__pycache__",
    "#recycle",
    "@recycle",
    "recycler",
    "#snapshot",
    "$recycle.bin",
    ".ds_store",
    ".ipynb_checkpoints",
    "desktop.ini",
    "lost+found",
    "system volume information",
    "thumbs.db",
}


def is_service(name: str) -> bool:
    """Whether a file or folder of this name comes from a program, not from the user."""
    return name.lower() in SERVICE or name.startswith(("._", ".trash"))


def has_image_suffix(name: str) -> bool:
    """Whether `name` says that it is an image, be it one that Pillow does not read."""
    return _suffix(name) in _image_suffixes()


def is_raw(name: str) -> bool:
    """Whether `name` is that of a camera's raw image."""
    return _suffix(name) in RAW


def says_another_kind(name: str) -> bool:
    """Whether `name` says that it is a text, a table, a film or the like."""
    kind = _known_kinds().get(_suffix(name), "application/octet-stream")
    return kind != "application/octet-stream"


def begins_as_image(head: bytes) -> bool:
    """Whether a file whose first HEAD_BYTES are `head` is an image."""
    return SIGNATURE.match(head) is not None


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


@cache
def _known_kinds() -> dict[str, str]:
    return mimetypes.MimeTypes().types_map[True]  # Python's own table, not this machine's


@cache
def _image_suffixes() -> frozenset[str]:
    known = {*formats(), "MPO"}  # which Pillow reads as a JPEG
    read = {suffix for suffix, name in Image.registered_extensions().items() if name in known}
    return frozenset(read | {*UNREAD, *RAW})
