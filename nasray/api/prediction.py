"""The classes of images by a trained network, fed exactly as its accuracy was measured.

An exported network needs no torch, which is not imported for it; a model.pt does.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nasray.data.crop import eval_crop, short_side
from nasray.data.decoding import DEFAULT_BACKGROUND, Undecodable, decode
from nasray.data.folders import files_below, shown
from nasray.errors import UserError, first_line
from nasray.storage import files as storage
from nasray.storage import layout
from nasray.storage.cpus import usable_cpus

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

MAX_NAMED = 5  # files in one message

AnyPath = str | os.PathLike[str]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A trained network, and how images become its input."""

    run: Callable[[np.ndarray], np.ndarray]  # float32 (n, 3, side, side), 0..1, to logits
    classes: tuple[str, ...]
    resolution: int  # side of the input, pixels
    short: int  # pixels to which the short side of an image is scaled
    background: str  # under transparent pixels

    def read(self, path: str) -> np.ndarray | str:
        """The crop of the image at `path`, uint8 (3, side, side); or why there is none."""
        try:
            if storage.is_uri(path):
                content = storage.read(path)
            else:  # a name in any bytes
                with open(path, "rb") as file:
                    content = file.read()
            return eval_crop(decode(content, self.background), self.resolution, self.short)
        except (Undecodable, OSError) as error:
            return getattr(error, "strerror", None) or first_line(error)

    def probabilities(self, crops: list[np.ndarray]) -> np.ndarray:
        """The probability of every class: float64 (n, classes)."""
        logits = self.run(np.stack(crops).astype(np.float32) / 255).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


def predict(
    model: AnyPath,
    images: AnyPath | Iterable[AnyPath],
    *,
    top: int = 1,
    batch_size: int = 32,
) -> Iterator[dict[str, Any]]:
    """Yield the classes of images, which are cropped exactly as for the validation top-1.

    Each is {"image": path, "classes": [{"class": name, "probability": p}, ...]}, the most probable
    class first, or {"image": path, "error": reason} for a file that cannot be read as an image.

    Args:
        model: an .onnx file of `nasray export`, which needs onnxruntime and no torch; a model.pt;
            or a run directory, for the first network that it exported.
        images: a file, a folder or several of them; a folder's images are taken however deep.
        top: how many classes of each image.
        batch_size: images that are computed at once.

    Raises:
        UserError: there is no such network, no image at all, or a number is not positive.
    """
    if top < 1 or batch_size < 1:
        raise UserError(f"top = {top} and batch_size = {batch_size} must be 1 or more")
    given = [images] if isinstance(images, str | os.PathLike) else images
    network = open_network(os.fspath(model))
    paths = find_images([os.fspath(path) for path in given])
    return _predict(network, paths, top, batch_size)


def _predict(
    network: Network, images: list[tuple[str, str]], top: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    def read(image: tuple[str, str]) -> np.ndarray | str:
        path, reason = image
        return reason or network.read(path)

    with ThreadPoolExecutor(usable_cpus()) as pool:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            found = list(pool.map(read, batch))
            crops = [crop for crop in found if not isinstance(crop, str)]
            rows = iter(network.probabilities(crops) if crops else ())
            for (path, _), crop in zip(batch, found, strict=True):
                if isinstance(crop, str):
                    yield {"image": path, "error": crop}
                    continue
                row = next(rows)
                best = np.argsort(-row, kind="stable")[:top].tolist()
                classes = [
                    {"class": network.classes[k], "probability": float(row[k])} for k in best
                ]
                yield {"image": path, "classes": classes}


def find_images(paths: Iterable[str]) -> list[tuple[str, str]]:
    """The files among `paths` and the images in the folders among them, however deep.

    Each has with it why it cannot be opened, or "". What else folders hold is named.

    Raises:
        UserError: there is none at all.
    """
    found: list[tuple[str, str]] = []
    for path in paths:
        images, others = files_below(path) if _is_folder(path) else ({path: ""}, [])
        found += images.items()
        if others:
            more = f" and {len(others) - MAX_NAMED} more" if len(others) > MAX_NAMED else ""
            logger.warning("No images: %s%s", ", ".join(map(shown, others[:MAX_NAMED])), more)
    if not found:
        raise UserError("no images: name files, or folders that hold some")
    return found


def _is_folder(path: str) -> bool:
    if not storage.is_uri(path):
        return os.path.isdir(path)
    filesystem, place = storage.resolve(path)
    return not filesystem.get_file_info(place).is_file and bool(storage.list_names(path))


def open_network(model: str) -> Network:
    """Open an .onnx file that nasray exported, a model.pt, or the first network of a run.

    Raises:
        UserError: it is none of these, it is damaged, or what runs it is not installed.
    """
    if _is_folder(model):
        model = _network_of_run(model)
    if not storage.exists(model):
        raise UserError(
            f"{model} does not exist; give an .onnx file, a model.pt or a run directory"
        )
    return _open_torch(model) if model.endswith((".pt", ".pth")) else _open_onnx(model)


def _network_of_run(folder: str) -> str:
    names = storage.list_numbered(storage.join(folder, layout.EXPORT))
    found = [storage.join(folder, layout.EXPORT, each) for each in names if each.endswith(".onnx")]
    if not found:
        names = storage.list_numbered(storage.join(folder, layout.RETRAIN))
        paths = [storage.join(folder, layout.retrained(name, layout.MODEL)) for name in names]
        found = [path for path in paths if storage.exists(path)]
    if not found:
        here = [each for each in storage.list_numbered(folder) if each.endswith((".onnx", ".pt"))]
        if here:
            named = storage.join(folder, here[0])
            raise UserError(f"{folder} is no run directory; name the file, such as {named}")
        raise UserError(f"{folder} holds no trained network; `nasray status` says how far it is")
    if len(found) > 1:
        logger.info(
            "%s, the first of %d files there; name another one for another network (%s, ...)",
            *(found[0], len(found), found[-1]),
        )
    return found[0]


def _open_onnx(path: str) -> Network:
    session = onnx_session(path, storage.read(path))

    def run(batch: np.ndarray) -> np.ndarray:
        return session.run(["logits"], {"images": batch})[0]

    return _network(run, session.get_modelmeta().custom_metadata_map, path)


def onnx_session(path: str, content: bytes) -> "InferenceSession":
    """Open the `content` of the ONNX file `path` in onnxruntime, on all cores.

    Raises:
        UserError: it is damaged, or onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path} needs onnxruntime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's have no class of their own to catch
        raise UserError(f"{path}: not a readable ONNX file ({first_line(error)})") from None


def _open_torch(path: str) -> Network:
    import torch

    from nasray import checkpoint
    from nasray.export import Normalised, input_metadata

    space, arch, subnet, extra = checkpoint.load_subnet(path)
    network = Normalised(subnet).eval()

    @torch.inference_mode()
    def run(batch: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(batch)).numpy()

    background = extra.get("background", DEFAULT_BACKGROUND)
    metadata = input_metadata(space.resolution_of(arch), background)
    classes = extra.get("classes") or [str(label) for label in range(space.num_classes)]
    return _network(run, metadata | {"classes": json.dumps(list(classes))}, path)


def _network(
    run: Callable[[np.ndarray], np.ndarray], metadata: Mapping[str, str], path: str
) -> Network:
    """A network by the metadata of its file; older files do not say how images are scaled."""
    try:
        classes, resolution = json.loads(metadata["classes"]), int(metadata["resolution"])
        short = int(metadata.get("resize", short_side(resolution)))
    except (KeyError, ValueError):
        raise UserError(
            f"{path} does not say of which classes and pixels it is: no file of `nasray export`"
        ) from None
    return Network(
        run=run,
        classes=tuple(classes),
        resolution=resolution,
        short=short,
        background=metadata.get("background", DEFAULT_BACKGROUND),
    )
