"""What this machine has and lacks for nasray, and what to do about it. Changes nothing."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nasray.errors import UserError
from nasray.storage import files as storage
from nasray.storage.cpus import usable_cpus

GB = 1e9
LOW_DISK_GB, LOW_SHARED_GB, LOW_FILES = 5.0, 1.0, 4096
OBJECT_STORE_SHARE = 0.3  # of the memory, which Ray shares between processes unless told
INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}  # of /proc/cpuinfo
CPUINFO, SHARED = Path("/proc/cpuinfo"), "/dev/shm"
DRIVER = Path("/proc/driver/nvidia/version")

# Of each kind of object store: the variables and the files that hold credentials.
CREDENTIALS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "s3": (
        ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
        ("~/.aws/credentials", "~/.aws/config"),
    ),
    "gs": (
        ("GOOGLE_APPLICATION_CREDENTIALS",),
        ("~/.config/gcloud/application_default_credentials.json",),
    ),
    "az": (("AZURE_STORAGE_ACCOUNT", "AZURE_CLIENT_ID"), ()),
}

# Packages that nasray does without: what each is for, and how to get it.
OPTIONAL = {
    "onnx": ("`nasray export`, and the last stage of `nasray run`", "pip install 'nasray[export]'"),
    "onnxscript": ("the same", "pip install 'nasray[export]'"),
    "onnxruntime": ("the check of an exported network", "pip install 'nasray[export]'"),
    "torchcodec": ('data.decoder = "torchcodec"', "pip install 'nasray[decode]'"),
    "tensorboard": ('tracking = "tensorboard"', "pip install 'nasray[track]'"),
    "mlflow": ('tracking = "mlflow"', "pip install 'nasray[track]'"),
    "wandb": ('tracking = "wandb"', "pip install 'nasray[track]'"),
    "safetensors": ("supernet.init = a .safetensors file", "pip install safetensors"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "note", "problem"]
    subject: str
    text: str
    fix: str = ""  # what to do; empty where nothing is amiss


def examine(places: Sequence[str] = ()) -> list[Finding]:
    """Look at this machine, and at `places`, folders or URIs that runs are to be kept in."""
    return [
        *_packages(),
        _gpu(),
        _cpu(),
        _shared_memory(),
        _open_files(),
        *_disks(),
        *(_credentials() if not places else ()),
        *map(_place, places),
        *_optional(),
    ]


def check_torch() -> None:
    """Say in one line that torch and torchvision are no pair, before a deep import does.

    Raises:
        UserError: they do not match.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"torch and torchvision do not match ({str(error).splitlines()[0]}); install both "
            "from the same index: pip install 'torch>=2.14' 'torchvision>=0.29'"
        ) from None


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _packages() -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding("ok", "python", f"{python}, nasray {_version('nasray')}")
    try:
        check_torch()
        both = f"{_version('torch')}, torchvision {_version('torchvision')}"
        yield Finding("ok", "torch", both)
    except UserError as error:
        text, fix = str(error).rsplit("; ", 1)
        yield Finding("problem", "torch", text, fix)
    address = os.environ.get("RAY_ADDRESS")
    where = f"commands connect to RAY_ADDRESS = {address}" if address else "started here as needed"
    yield Finding("ok", "ray", f"{_version('ray')}, {where}")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} ({card.total_memory / GB:.0f} GB)" for card in cards)
        return Finding("ok", "gpu", names)
    if not DRIVER.exists():
        return Finding("ok", "gpu", "none; CPUs are used")
    if torch.version.cuda is None:
        why, fix = "torch is a build for CPUs", "install torch from its index for CUDA"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        why, fix = "CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES"
    else:
        why = f"torch, which is built for CUDA {torch.version.cuda}, cannot use it"
        fix = "see what `nvidia-smi` says: an older driver needs a torch for an older CUDA"
    return Finding("problem", "gpu", f"there is a driver, but {why}", fix)


def _cpu() -> Finding:
    flags: set[str] = set()
    with suppress(OSError):
        for line in CPUINFO.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.split(":", 1)[1].split())
                break
    number = f"{usable_cpus()} of {os.cpu_count()} CPUs may be used"
    if found := sorted(flags & INT8_FLAGS):
        return Finding("ok", "cpu", f"{number}; int8 products in hardware ({', '.join(found)})")
    return Finding("note", "cpu", f"{number}; no int8 products in hardware, int8 may be slow")


def _shared_memory() -> Finding:
    if not os.path.isdir(SHARED):
        return Finding("ok", "shared memory", f"no {SHARED}; Ray keeps objects in files")
    size, wanted = shutil.disk_usage(SHARED).total / GB, OBJECT_STORE_SHARE * _memory() / GB
    text = f"{size:.1f} GB in {SHARED}; Ray's object store wants {wanted:.1f} GB"
    if size >= min(wanted, LOW_SHARED_GB):
        return Finding("ok", "shared memory", text)
    fix = f"docker run --shm-size={max(wanted, LOW_SHARED_GB):.0f}g, or a memory-backed emptyDir"
    return Finding("problem", "shared memory", f"{text}, and is slow on a disk", fix)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= LOW_FILES:
        return Finding("ok", "open files", f"{soft:,}")
    fix = f"ulimit -n {LOW_FILES if hard < 0 else min(max(hard, soft), 65536)}"
    return Finding("note", "open files", f"{soft:,}; the head of a large cluster needs more", fix)


def _disks() -> Iterator[Finding]:
    places = {
        "decoded images (NASRAY_CACHE)": storage.cache_folder(),
        "Ray's session (RAY_TMPDIR)": os.environ.get("RAY_TMPDIR", "/tmp"),
        "this folder": os.getcwd(),
    }
    for name, place in places.items():
        there = _nearest(place)
        free = shutil.disk_usage(there).free / GB
        text = f"{free:.0f} GB free in {place} for {name}"
        if not os.access(there, os.W_OK):
            yield Finding("problem", "disk", f"{text}; not writable", "name another folder")
        elif free < LOW_DISK_GB:
            yield Finding("problem", "disk", text, "free some, or name a folder on another disk")
        else:
            yield Finding("ok", "disk", text)


def _nearest(place: str) -> str:
    """The folder `place`, or the nearest one above it that exists."""
    there = Path(place).absolute()
    return str(next(each for each in (there, *there.parents) if each.is_dir()))


def _credentials() -> Iterator[Finding]:
    found = []
    for scheme, (variables, files) in CREDENTIALS.items():
        held = [name for name in variables if os.environ.get(name)]
        held += [name for name in files if os.path.exists(os.path.expanduser(name))]
        found += [f"{scheme}:// from {held[0]}"] if held else []
    text = ", ".join(found) or "no credentials; on a cloud's own machine its role serves"
    yield Finding("ok", "object stores", f"{text}. `nasray doctor s3://BUCKET/FOLDER` tries one")


def _place(place: str) -> Finding:
    """Whether a file can be written, read and removed there."""
    there = place if storage.is_uri(place) else _nearest(place)
    path, content = storage.join(there, f".nasray-doctor-{uuid.uuid4().hex}"), b"nasray"
    try:
        storage.write(path, content, retry_s=0)
        same = storage.read(path) == content
        storage.remove(path)
    except (OSError, UserError) as error:
        told = storage.told(error) if isinstance(error, OSError) else str(error)
        return Finding("problem", place, told, "give its credentials, or another place")
    if not same:
        return Finding("problem", place, "reads other bytes than were written", "another place")
    return Finding("ok", place, "can be written, read and removed from")


def _optional() -> Iterator[Finding]:
    for package, (purpose, install) in OPTIONAL.items():
        if importlib.util.find_spec(package):
            with suppress(importlib.metadata.PackageNotFoundError):
                yield Finding("ok", package, f"{_version(package)}, for {purpose}")
        else:
            yield Finding("note", package, f"absent; it is for {purpose}", install)


def is_well(findings: Sequence[Finding]) -> bool:
    """Whether there is no problem among them."""
    return all(found.level != "problem" for found in findings)
