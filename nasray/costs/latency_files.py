"""Files of latency tables: nasray's own, and those that Once-for-All published.

nasray's own are .parquet or .csv, written by latency_measure.py; Once-for-All's are folders of
NNN_lookup_table.yaml (docs/spec.md, OFA 4.1). PyYAML comes with Ray.
"""

import csv
import dataclasses
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from nasray.errors import UserError
from nasray.spaces.space import Space, out_resolution
from nasray.storage import files as storage

OFA_FILE = re.compile(r"(\d+)_lookup_table\.yaml")
OFA_SPACE = "ofa_mobilenetv3"  # the only one with published tables
# Columns of nasray's own tables that differ from line to line; all others are provenance,
# the same in every line: one table is one device, measured in one way.
LINE_COLUMNS = ("block", "ms", "spread_ms", "samples_ms", "measured_at")
NEEDED_COLUMNS = ("space", "device", "block", "ms")
# Provenance that only describes: a table is continued, and checked, whatever it says. The governor
# belongs to the moment, and what it slows down the quantile of the runs and the median of the
# samples mostly leave out; the cores of a process change with the container or the job that it
# runs in. Who wants certain cores, as those of one kind of a phone's processor, names them: that
# is "cpus", which with all else must be equal, for it changes every latency alike.
DESCRIPTIVE = ("affinity", "governor")
# Of tables that were measured before these columns were there.
BEFORE = {"precision": "fp32", "cpus": ""}
Line = dict[str, str]
# (block, resolution of the network's input, pixels) -> its latency, ms, if the table has it.
LatencyOf = Callable[[Any, int], float | None]


def block_key(block: Any) -> str:
    """What `block` computes, as text: its type and every field but its name.

    Tables call the resolution "side"; it stays so, for measured tables must remain readable.
    """
    fields = [field.name for field in dataclasses.fields(block) if field.name != "name"]
    values = ", ".join(
        f"{'side' if field == 'resolution' else field}={getattr(block, field)}" for field in fields
    )
    return f"{type(block).__name__}({values})"


def read_lines(path: str) -> list[Line]:
    """Read the lines of nasray's own table at `path`, all values as text.

    Raises:
        UserError: the file is damaged, or a line lacks a value or names a block again.
    """
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
    """What all `lines` share: space, device, runtime...

    Raises:
        UserError: they differ in it.
    """
    found: dict[str, str] = {}
    for line in lines:
        for column, value in line.items():
            if column not in LINE_COLUMNS and found.setdefault(column, value) != value:
                raise UserError(
                    f"{path} mixes {column} {found[column]!r} and {value!r}; keep a table for each"
                )
    return found


def differing(provenance: dict[str, str], other: dict[str, str]) -> list[str]:
    """What of two provenances must be equal in one table, and is not."""
    old, new = BEFORE | provenance, BEFORE | other
    return [
        name for name in old | new if name not in DESCRIPTIVE and old.get(name) != new.get(name)
    ]


def _milliseconds(value: Any, where: str) -> float:
    """Check a latency that a file holds."""
    try:
        ms = float(value)
    except (TypeError, ValueError):
        ms = math.nan
    if not 0 < ms < math.inf:
        raise UserError(f"{where} takes {value!r} ms, which must be a number above 0")
    return ms


def read_own_file(path: str, space: Space) -> tuple[LatencyOf, dict[str, str]]:
    """Read nasray's own table at `path`: the latency of a block, and the provenance.

    Raises:
        UserError: the file is absent, damaged, or of another space.
    """
    if not storage.exists(path):
        raise UserError(f"{path} does not exist; measure it first")
    lines = read_lines(path)
    if not lines:
        raise UserError(f"{path} is empty; measure it first")
    provenance = provenance_of(lines, path)
    if provenance["space"] != space.name:
        raise UserError(f"{path} is a table of the space {provenance['space']}, not {space.name}")
    latencies = {line["block"]: float(line["ms"]) for line in lines}
    return lambda block, resolution: latencies.get(block_key(block)), provenance


def read_ofa_folder(folder: str, space: Space) -> tuple[LatencyOf, dict[str, str]]:
    """Read those of a folder's tables that `space` needs, one per resolution.

    Returns the latency of a block, and the provenance.

    Raises:
        UserError: a file is absent or damaged, or the tables are not of `space`.
    """
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
    resolutions = next(gene.choices for gene in space.genes if gene.kind == "resolution")
    if absent := [resolution for resolution in resolutions if resolution not in files]:
        raise UserError(
            f"{folder} has no table for the resolutions {absent}; set space.resolutions to some "
            f"of {sorted(files)}"
        )
    tables = {
        resolution: _read_ofa(storage.join(folder, files[resolution])) for resolution in resolutions
    }

    def latency_of(block: Any, resolution: int) -> float | None:
        operations = [tables[resolution].get(key) for key in _ofa_keys(block)]
        return None if None in operations else sum(operations)  # type: ignore[arg-type]

    device = folder.rstrip("/").rsplit("/", 1)[-1]
    return latency_of, {"space": OFA_SPACE, "device": device, "runtime": "as published by OFA"}


def _read_ofa(path: str) -> dict[str, float]:
    """Read one file of Once-for-All's: {key of an operation: its mean latency, ms}."""
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
    """The keys of Once-for-All's tables that make up `block` (docs/spec.md, OFA 4.1)."""
    side, square = block.resolution, f"{block.resolution}x{block.resolution}"
    if block.name == "stem":
        out = out_resolution(side, 2)
        return [f"Conv-input:{square}x3-output:{out}x{out}x{block.out_channels}"]
    if block.name == "head":
        mixed, features = block.mid_channels, block.out_channels
        return [
            f"Conv_1-input:{square}x{block.in_channels}-output:{square}x{mixed}",
            f"AvgPool2D-input:{square}x{mixed}-output:1x1x{mixed}",
            f"Conv_2-input:1x1x{mixed}-output:1x1x{features}",
            f"Logits-input:1x1x{features}-output:{block.num_classes}",
        ]
    out = out_resolution(side, block.stride)
    return [
        f"expanded_conv-input:{square}x{block.in_channels}-output:{out}x{out}x"
        f"{block.out_channels}-expand:{block.mid_channels}-kernel:{block.kernel}-"
        f"stride:{block.stride}-idskip:{int(block.identity)}-se:{int(block.se)}-"
        f"hs:{int(block.act == 'h_swish')}"
    ]
