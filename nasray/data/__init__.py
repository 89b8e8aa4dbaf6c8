"""Data sets: from any source to shards of encoded images in Parquet, which all else reads.

A source is one function, listed in SOURCES: (config, seed) -> Pictures. Importing decodes
every image once, so that training meets none it cannot read.
"""

from collections.abc import Callable, Iterable

from nasray.config import DataConfig
from nasray.data.folders import imagefolder, tar
from nasray.data.shards import (
    INFO_NAME,
    Dataset,
    DatasetInfo,
    open_dataset,
    read_info,
    write_shards,
)
from nasray.data.source import Pictures, Record
from nasray.data.synthetic import GENERATOR_KEYS, shapes
from nasray.data.torchvision_sets import cifar10, fashion_mnist
from nasray.errors import UserError
from nasray.storage import files as storage
from nasray.storage import locks

__all__ = [
    "SOURCES",
    "Dataset",
    "DatasetInfo",
    "Pictures",
    "Record",
    "import_dataset",
    "open_dataset",
]

SOURCES: dict[str, Callable[[DataConfig, int], Iterable[Record]]] = {
    "imagefolder": imagefolder,
    "tar": tar,
    "cifar10": cifar10,
    "fashion_mnist": fashion_mnist,
    "synthetic": shapes,
}


def import_dataset(
    config: DataConfig,
    destination: str,
    *,
    seed: int,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> DatasetInfo:
    """Turn the source of `config` into shards at `destination`, a folder or a URI.

    `show(done, total)` hears how many images are done. A complete import is returned as it
    is; an interrupted one starts again. The source "parquet" is imported already.
    """
    if config.source == "parquet":
        return read_info(config.path)
    options = _options(config, seed)
    if storage.exists(storage.join(destination, INFO_NAME)):
        return _complete(config, destination, options)
    pictures = SOURCES[config.source](config, seed)
    with locks.held(destination):
        if storage.exists(storage.join(destination, INFO_NAME)):  # meanwhile, by another
            return _complete(config, destination, options)
        return write_shards(
            destination, pictures, source=config.source, seed=seed, options=options, show=show
        )


def _options(config: DataConfig, seed: int) -> dict[str, int | str]:
    """What, beside its source, decides which images a data set holds."""
    if config.source != "synthetic":
        return {"path": config.path}
    return {"seed": seed, **{key: getattr(config, key) for key in GENERATOR_KEYS}}


def _complete(config: DataConfig, destination: str, options: dict[str, int | str]) -> DatasetInfo:
    """The data set that is there; refused if the job asks for another one.

    Where the source lay does not count: it may have moved since.
    """
    info = read_info(destination)
    found = {"source": info.source, **info.options}
    for key, value in {"source": config.source, **options}.items():
        if key != "path" and found.get(key) != value:
            raise UserError(
                f"{destination}: holds a data set made with {key} = {found.get(key)!r}, the job "
                f"says {value!r}; remove that folder or import into another one"
            )
    return info
