"""Data sets: from any source to shards of encoded images in Parquet, which all else reads.

A source is a function (config, seed) -> Pictures in a file of its own, listed in this table.
"""

from typing import TYPE_CHECKING

from nasray.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from nasray.config import DataConfig

# Imported when they are asked for: the command line lists the names without waiting for torch.
SOURCES = {
    "imagefolder": "nasray.data.folders:imagefolder",
    "tar": "nasray.data.folders:tar",
    "csv": "nasray.data.tables:csv",
    "table": "nasray.data.tables:table",
    "huggingface": "nasray.data.tables:huggingface",
    "cifar10": "nasray.data.torchvision_sets:cifar10",
    "fashion_mnist": "nasray.data.torchvision_sets:fashion_mnist",
    "synthetic": "nasray.data.synthetic:shapes",
}
# Sources that draw their images: they need no path; what they draw is decided by these keys of
# [data], beside the seed.
GENERATED = {"synthetic": ("num_classes", "train_per_class", "val_per_class", "image_side")}
# Sources of rows, whose columns these keys name.
TABULAR = ("csv", "table", "huggingface")
COLUMNS = ("image_column", "label_column", "split_column")
PUBLISHED = ("cifar10", "fashion_mnist")  # sources that hold the same wherever they lie
IMPORTED = "parquet"  # in place of a source: a data set that has been imported already


def check_source(config: "DataConfig") -> None:
    """Refuse a source that is not in the table, or lacks the path that it needs.

    Raises:
        UserError: as said.
    """
    known = [*sorted(SOURCES), IMPORTED]
    if config.source not in known:
        hint = did_you_mean(config.source, known) or ";"
        raise UserError(f"data.source = {config.source!r} is unknown{hint} there are {known}")
    if config.source not in GENERATED and not config.path:
        raise UserError(
            f"data: source = {config.source!r} needs `path` (or --data PATH; for an import --path)"
        )
