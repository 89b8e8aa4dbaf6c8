"""Latency of architectures on a device, from a table of what each block takes there.

Reads nasray's own tables (.parquet or .csv, written by latency_measure.py) and the folders
of NNN_lookup_table.yaml that Once-for-All published (spec 4.1). A network takes the sum of
its blocks; a population is priced by one gather per block. Measures nothing itself. PyYAML comes
with Ray.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from nasray import storage
from nasray.cost import smallest_sum
from nasray.errors import UserError
from nasray.spaces.mbconv import out_side
from nasray.spaces.space import Architecture, Population, Space

OFA_FILE = re.compile(r"(\d+)_lookup_table\.yaml")
OFA_SPACE = "ofa_mobilenetv3"  # the only one with published tables
# Columns of nasray's own tables that differ from line to line; all others are provenance,
# the same in every line: one table is one device, measured in one way.
LINE_COLUMNS = ("block", "ms", "spread_ms", "samples_ms", "measured_at")
NEEDED_COLUMNS = ("space", "device", "block", "ms")

Line = dict[str, str]
Price = Callable[[Any, int], float | None]  # (block, side of the network's input) -> ms


class LatencyTable:
    """Latencies of a space on one device, compiled: prices a population by gathers."""

    def __init__(self, path: str, provenance: dict[str, str], space: Space, price: Price) -> None:
        self.path = path
        self.provenance = provenance  # "space", "device" and whatever else the file says
        self.genes = space.genes
        self.parts = space.parts
        self.tables = _compile(space, price, path)  # per part: float64 (choices of its genes...)
        self._flatten()

    @classmethod
    def load(cls, path: str, space: Space) -> "LatencyTable":
        """Read the table at `path` and look up every block of `space` in it."""
        own = path.endswith((".parquet", ".csv"))
        price, provenance = _own_prices(path, space) if own else _ofa_prices(path, space)
        return cls(path, provenance, space, price)

    def __call__(self, population: Population) -> np.ndarray:
        """Price `population` (n, genes): float64 (n,), ms."""
        # No matrix product: it would wake BLAS threads, which then spin on the cores that a
        # predictor computes on.
        choices = population.T.astype(self.offsets.dtype)
        places = np.repeat(self.offsets[:, None], len(population), axis=1)
        for columns, strides in zip(self.columns, self.strides, strict=True):
            places += choices[columns] * strides[:, None]
        total = np.zeros(len(population))
        for latency in self.entries[places]:  # in this order, however many architectures
            total += latency
        return total

    def digest(self) -> str:
        """Tells tables with other prices for this space apart."""
        return hashlib.sha256(self.entries.tobytes()).hexdigest()

    def bounds(self) -> tuple[float, float]:
        """The smallest and largest latency that search can reach, ms, to the last digits."""
        terms = []
        for columns, table in zip(self.parts, self.tables, strict=True):
            drawn = tuple(slice(self.genes[column].first, None) for column in columns)
            terms.append((columns, table[drawn]))
        return smallest_sum(terms), -smallest_sum([(columns, -table) for columns, table in terms])

    def _flatten(self) -> None:
        """One array of all tables' entries, and how choices lead to a place in it."""
        self.entries = np.concatenate([table.ravel() for table in self.tables])
        sizes = [table.size for table in self.tables]
        dtype = np.int16 if len(self.entries) <= np.iinfo(np.int16).max else np.int32
        self.offsets = np.cumsum([0, *sizes[:-1]], dtype=dtype)  # of each part's entries
        # The first column of every part, the second, ...: (most genes of a part, parts).
        most = max(len(columns) for columns in self.parts)
        self.columns = np.zeros((most, len(self.parts)), dtype=np.intp)
        self.strides = np.zeros((most, len(self.parts)), dtype=dtype)  # 0: no such column
        for part, (columns, table) in enumerate(zip(self.parts, self.tables, strict=True)):
            self.columns[: len(columns), part] = columns
            self.strides[: len(columns), part] = np.array(table.strides) // table.itemsize


def block_key(block: Any) -> str:
    """What `block` computes, as text: its type and every field but its name."""
    fields = [field.name for field in dataclasses.fields(block) if field.name != "name"]
    values = ", ".join(f"{field}={getattr(block, field)}" for field in fields)
    return f"{type(block).__name__}({values})"


def read_lines(path: str) -> list[Line]:
    """Read the lines of nasray's own table at `path`, all values as text."""
    content = storage.read(path)
    try:
        if path.endswith(".csv"):
            text = io.StringIO(content.decode("utf-8-sig"))
            lines = list(csv.DictReader(text, strict=True))
        else:
            table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
            lines = [{key: str(value) for key, value in line.items()} for line in table.to_pylist()]
    except (csv.Error, UnicodeDecodeError, pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no latency table ({reason}); measure it again") from None
    for number, line in enumerate(lines, 1):
        missing = [column for column in NEEDED_COLUMNS if not line.get(column)]
        if missing or None in line or None in line.values():
            raise UserError(
                f"{path}: line {number} lacks {missing or 'a value'}; a latency table has the "
                f"columns {list(NEEDED_COLUMNS)} at least"
            )
        where = f"{path}: line {number}: {line['block']}"
        for value in (line["ms"], *line.get("samples_ms", "").split()):
            _milliseconds(value, where)
    twice = [
        block for block, number in Counter(line["block"] for line in lines).items() if number > 1
    ]
    if twice:
        raise UserError(f"{path} has {twice[0]} more than once; keep one line for each block")
    return lines


def write_lines(path: str, lines: Sequence[Line]) -> None:
    """Write nasray's own table whole, as .parquet or .csv."""
    columns = list(lines[0])
    if path.endswith(".csv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        storage.write(path, text.getvalue().encode())
    else:
        values: dict[str, list[Any]] = {key: [line[key] for line in lines] for key in columns}
        for column in {"ms", "spread_ms"} & set(columns):
            values[column] = [float(value) for value in values[column]]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(values), sink, compression="zstd", write_page_checksum=True)
        storage.write(path, sink.getvalue().to_pybytes())


def provenance_of(lines: Sequence[Line], path: str) -> dict[str, str]:
    """What all `lines` share: space, device, runtime... UserError if they do not share it."""
    found: dict[str, str] = {}
    for line in lines:
        for column, value in line.items():
            if column not in LINE_COLUMNS and found.setdefault(column, value) != value:
                raise UserError(
                    f"{path} mixes {column} {found[column]!r} and {value!r}; keep a table for each"
                )
    return found


def blocks_of(space: Space) -> dict[Any, tuple[int, Architecture]]:
    """Every block that some architecture has -> its position, and an architecture with it."""
    blocks: dict[Any, tuple[int, Architecture]] = {}
    for position, arch, _ in _choices(space):
        block = space.decode(arch)[position]
        if block is not None:
            blocks.setdefault(block, (position, arch))
    return blocks


def _choices(space: Space) -> Iterable[tuple[int, Architecture, tuple[int, ...]]]:
    """(position, architecture, choices) for all choices of each part's genes, the rest at 0."""
    for position, columns in enumerate(space.parts):
        sizes = [len(space.genes[column].choices) for column in columns]
        for choices in itertools.product(*map(range, sizes)):
            arch = [0] * len(space.genes)
            for column, choice in zip(columns, choices, strict=True):
                arch[column] = choice
            yield position, tuple(arch), choices


def _compile(space: Space, price: Price, path: str) -> list[np.ndarray]:
    """Price each part at every choice of its own genes; name the first block without a price."""
    tables = [
        np.zeros([len(space.genes[column].choices) for column in columns])
        for columns in space.parts
    ]
    missing: dict[str, str] = {}
    for position, arch, choices in _choices(space):
        block = space.decode(arch)[position]
        if block is None:  # left out by the depth: takes no time
            continue
        ms = price(block, space.side(arch))
        if ms is None:
            where = f"{block.name} at resolution {space.side(arch)}, {block_key(block)}"
            missing.setdefault(block_key(block), where)
        else:
            tables[position][choices] = ms
    if missing:
        more = f" (and {len(missing) - 1} more blocks)" if len(missing) > 1 else ""
        raise UserError(
            f"{path} has no latency of {next(iter(missing.values()))}{more}; measure what "
            "is missing, or search only what was measured (resolutions, width, ... of the space)"
        )
    return tables


def _milliseconds(value: Any, where: str) -> float:
    try:
        ms = float(value)
    except (TypeError, ValueError):
        ms = math.nan
    if not 0 < ms < math.inf:
        raise UserError(f"{where} takes {value!r} ms, which must be a number above 0")
    return ms


def _own_prices(path: str, space: Space) -> tuple[Price, dict[str, str]]:
    if not storage.exists(path):
        raise UserError(f"{path} does not exist; measure it first")
    lines = read_lines(path)
    if not lines:
        raise UserError(f"{path} is empty; measure it first")
    provenance = provenance_of(lines, path)
    if provenance["space"] != space.name:
        raise UserError(f"{path} is a table of the space {provenance['space']}, not {space.name}")
    prices = {line["block"]: float(line["ms"]) for line in lines}
    return lambda block, side: prices.get(block_key(block)), provenance


def _ofa_prices(folder: str, space: Space) -> tuple[Price, dict[str, str]]:
    """Read those of a folder's tables that `space` needs: one per resolution."""
    try:
        names = storage.list_names(folder)
    except NotADirectoryError:
        names = []
    files = {int(match[1]): name for name in names if (match := OFA_FILE.fullmatch(name))}
    if not names and not storage.exists(folder):
        raise UserError(f"{folder}, the latency table, does not exist; measure one, or correct it")
    if not files:
        raise UserError(
            f"{folder} is neither a .parquet or .csv file nor a folder of NNN_lookup_table.yaml"
        )
    if space.name != OFA_SPACE:
        raise UserError(f"{folder} holds tables of the space {OFA_SPACE}, not {space.name}")
    sides = next(gene.choices for gene in space.genes if gene.kind == "resolution")
    if absent := [side for side in sides if side not in files]:
        raise UserError(
            f"{folder} has no table for the resolutions {absent}; set space.resolutions to some "
            f"of {sorted(files)}"
        )
    tables = {side: _read_ofa(storage.join(folder, files[side])) for side in sides}

    def price(block: Any, side: int) -> float | None:
        prices = [tables[side].get(key) for key in _ofa_keys(block)]
        return None if None in prices else sum(prices)  # type: ignore[arg-type]

    device = folder.rstrip("/").rsplit("/", 1)[-1]
    return price, {"space": OFA_SPACE, "device": device, "runtime": "as published by OFA"}


def _read_ofa(path: str) -> dict[str, float]:
    """One file of Once-for-All's: {key: mean, ms}."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is 10 times as fast
    try:
        entries = yaml.load(storage.read(path), Loader=loader)
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not readable YAML ({reason}); restore it") from None
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) and "mean" in entry for entry in entries.values()
    ):
        raise UserError(f"{path} must map keys to {{count, mean, std}}; restore it")
    return {
        str(key): _milliseconds(entry["mean"], f"{path}: {key}") for key, entry in entries.items()
    }


def _ofa_keys(block: Any) -> list[str]:
    """The keys of Once-for-All's tables that make up `block` (spec 4.1)."""
    side, square = block.side, f"{block.side}x{block.side}"
    if block.name == "stem":
        out = out_side(side, 2)
        return [f"Conv-input:{square}x3-output:{out}x{out}x{block.out_channels}"]
    if block.name == "head":
        mixed, features = block.mid_channels, block.out_channels
        return [
            f"Conv_1-input:{square}x{block.in_channels}-output:{square}x{mixed}",
            f"AvgPool2D-input:{square}x{mixed}-output:1x1x{mixed}",
            f"Conv_2-input:1x1x{mixed}-output:1x1x{features}",
            f"Logits-input:1x1x{features}-output:{block.num_classes}",
        ]
    out = out_side(side, block.stride)
    return [
        f"expanded_conv-input:{square}x{block.in_channels}-output:{out}x{out}x"
        f"{block.out_channels}-expand:{block.mid_channels}-kernel:{block.kernel}-"
        f"stride:{block.stride}-idskip:{int(block.identity)}-se:{int(block.se)}-"
        f"hs:{int(block.act == 'h_swish')}"
    ]
