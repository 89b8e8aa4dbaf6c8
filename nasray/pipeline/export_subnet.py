"""One subnet of a supernet as ONNX: within a run, or of a supernet and some images alone."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import nn

from nasray.costs.profile import profile, total
from nasray.data.decoding import DEFAULT_BACKGROUND, Undecodable, decode
from nasray.data.folders import images_below
from nasray.data.transforms import eval_transform
from nasray.errors import UserError, first_line
from nasray.evaluation.evaluate import recalibrate_bn
from nasray.export import export_onnx, require_packages
from nasray.spaces import describe
from nasray.spaces.space import Architecture, Space
from nasray.spaces.supernet import Supernet
from nasray.storage import files as storage
from nasray.storage.cpus import usable_cpus

MOST_IMAGES = 2000  # of recalibration, as many as Once-for-All's own evaluation takes
BATCH_SIZE = 250  # the default of search.batch_size
CHECKED_IMAGES = 64  # on which ONNX is compared with torch


def export_subnet(
    supernet: Supernet, arch: Architecture, path: str, *, images: str, classes: Sequence[str]
) -> dict[str, Any]:
    """Write the subnet `arch` of `supernet` to `path`, its BN recalibrated on images.

    `images` is a folder with at least two of them, `classes` the names of the classes, or empty.
    Returns the check of the file, and how many images were used.

    Raises:
        UserError: there are too few images, one cannot be decoded, the names are not as many as
            the classes, or the [export] extra is not installed.
        ExportError: onnxruntime and torch disagree; then no file is at `path`.
    """
    space, number = supernet.space, supernet.space.num_classes
    if classes and len(classes) != number:
        raise UserError(f"classes: {len(classes)} names, but the supernet has {number} classes")
    require_packages(path)
    pixels = _pixels(images, space.resolution_of(arch))
    subnet = supernet.extract(arch).cpu()
    recalibrate_bn(subnet, pixels, batch_size=BATCH_SIZE)
    names = classes or [str(label) for label in range(number)]
    checked = pixels[:CHECKED_IMAGES]
    found = write_onnx(space, arch, subnet, path, classes=names, check_images=checked)
    return found | {"num_calibration_images": len(pixels)}


def write_onnx(
    space: Space,
    arch: Architecture,
    subnet: nn.Module,
    path: str,
    *,
    classes: Sequence[str],
    check_images: np.ndarray,
    background: str = DEFAULT_BACKGROUND,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `subnet`, the network of `arch`, with what the file says of itself; see export_onnx.

    `measured` are figures of its accuracy, where it has been measured.
    """
    options = {key: value for key, value in describe(space).items() if key != "name"}
    said = {"space": space.name, "space_options": options, "arch": space.to_json(arch)}
    said |= {"costs": total(profile(space, arch)), **(measured or {})}
    return export_onnx(
        subnet,
        path,
        resolution=space.resolution_of(arch),
        classes=classes,
        metadata={k: v if isinstance(v, str) else json.dumps(v) for k, v in said.items()},
        check_images=check_images,
        background=background,
    )


def _pixels(folder: str, resolution: int) -> np.ndarray:
    """The evaluation crops of the images in `folder`: uint8 (n, 3, resolution, resolution).

    Of more than MOST_IMAGES, so many are taken at equal distances in the order of their names,
    since one folder often holds the images of one class.
    """
    paths = images_below(folder)
    if len(paths) < 2:
        raise UserError(
            f"images = {folder!r}: a folder with {len(paths)} images; BN is recalibrated on 2 at "
            f"least, better {MOST_IMAGES}"
        )
    chosen = np.linspace(0, len(paths) - 1, min(len(paths), MOST_IMAGES)).round().astype(int)
    crop = eval_transform(resolution)

    def read(path: str) -> np.ndarray:
        content = storage.read(path)
        try:
            return crop(decode(content)).numpy()
        except Undecodable as error:
            raise UserError(f"{path} cannot be decoded ({first_line(error)}); remove it") from None

    with ThreadPoolExecutor(usable_cpus()) as pool:
        return np.stack(list(pool.map(read, [paths[index] for index in chosen])))
