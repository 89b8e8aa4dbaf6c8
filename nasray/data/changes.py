"""Whether a source still holds the images that were imported from it.

Names, sizes and times of its files are compared first; then what the images are and, where times
differ, their bytes. A source that was moved, or copied, is the same.
"""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nasray.config import DataConfig
from nasray.data import GENERATED, PUBLISHED
from nasray.data.importing import INFO_NAME, decodable, made_of, open_source, stamps_beside
from nasray.data.shards import Dataset, open_dataset, read_stamps, write_stamps
from nasray.data.source import SPLITS, Pictures, Record
from nasray.errors import UserError, first_line
from nasray.storage import files as storage
from nasray.storage.cpus import usable_cpus

CHUNK_IMAGES = 256  # compared at once

log = logging.getLogger(__name__)


def difference(config: DataConfig, data_path: str, *, seed: int) -> str | None:
    """Say in words what differs first between the import at `data_path` and its source; or None.

    The source is that of `config`. One that is gone, or cannot be reached, counts as equal, and a
    warning says so.

    Raises:
        UserError: `config` names a source that is not there, and that was not imported.
    """
    dataset = open_dataset(data_path)
    before = {"source": dataset.info.source, **dataset.info.options}
    now = {"source": config.source, **made_of(config, seed)}
    for key in sorted({*before, *now} - {"path"}):
        if before.get(key) != now.get(key):
            return f"they were made with {key} = {before.get(key)!r}, not {now.get(key)!r}"
    if config.source in GENERATED or config.source in PUBLISHED:
        return None
    recorded = before.get("path")
    try:
        if storage.exists(config.path):
            return _compared(config, dataset, seed)
        reason = "is not there any more"
    except OSError as error:
        reason = f"cannot be read now ({first_line(error)})"
    if config.path != recorded:
        raise UserError(
            f"data.path = {config.path!r}: {reason.removesuffix(' any more')}; correct it, or give "
            f"--data {recorded} to go on with the images that were imported from there"
        )
    log.warning(
        "data.path = %r %s; going on with the images that were imported from it",
        config.path,
        reason,
    )
    return None


def _compared(config: DataConfig, dataset: Dataset, seed: int) -> str | None:
    before = read_stamps(dataset.path)
    now = storage.stamps(config.path) | stamps_beside(config, dataset.path)
    if before == now:
        return None
    try:
        pictures = open_source(config, seed)
    except UserError as error:
        return first_line(error)
    unchanged = {name for name, stamp in now.items() if before.get(name) == stamp}
    found = _first_difference(pictures, dataset, unchanged)
    if found is None:
        write_stamps(dataset.path, now)
    return found


def _first_difference(pictures: Pictures, dataset: Dataset, unchanged: set[str]) -> str | None:
    """Compare the images of a source with those imported; files `unchanged` are not read."""
    # A table may name one file in two classes or splits, or twice in one.
    imported: dict[tuple[str, str, str], list[tuple[str, int]]] = {}  # where they are stored
    for split in SPLITS:
        names, labels = dataset.column(split, "name").to_pylist(), dataset.labels(split).tolist()
        for position, (name, label) in enumerate(zip(names, labels, strict=True)):
            key = name, split, dataset.classes[label]
            imported.setdefault(key, []).append((split, position))
    before = {name: (split, label) for name, split, label in imported}
    common: list[tuple[tuple[str, int], Record]] = []  # with where they are stored
    for record in sorted(pictures, key=lambda each: each.name):
        key = record.name, record.split, pictures.classes[record.label]
        if imported.get(key):
            common.append((imported[key].pop(), record))
        elif record.name in before:
            split, name = before[record.name]
            return f"{record.name} was of class {name!r} in {split}"
        # Those that the import skipped are not new, unless they have become readable.
        elif record.name not in unchanged and decodable(record):
            return f"{record.name} is new"
    if gone := [name for (name, *_), places in imported.items() if places]:
        return f"{min(gone)} is gone"
    common.sort(key=lambda each: each[0])
    read = [(stored, record) for stored, record in common if record.name not in unchanged]
    if read:
        log.info("comparing %d images whose files were written since the import", len(read))
    with ThreadPoolExecutor(usable_cpus()) as pool:
        for start in range(0, len(read), CHUNK_IMAGES):
            chunk = read[start : start + CHUNK_IMAGES]
            images = pool.map(lambda each: each[1].load(), chunk)
            for ((split, position), record), image in zip(chunk, images, strict=True):
                if dataset.read(split, np.array([position])) != [image]:
                    return f"{record.name} has changed"
    return None


def is_imported(data_path: str) -> bool:
    """Whether there is a complete import at `data_path`."""
    return storage.exists(storage.join(data_path, INFO_NAME))
