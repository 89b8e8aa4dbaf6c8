"""What a search has evaluated: one Parquet data set, in the run directory.

FOLDER/search-0000.parquet and so on, one file per generation, written whole once all of it
is known. Before that every evaluation is a file of its own, FOLDER/_evaluations/000017.json,
written before any algorithm learns of it: a killed driver repeats none of them, and a
damaged Parquet file is made again from them. They go when the search is over.
"""

import base64
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nasray.errors import UserError
from nasray.search.candidate import FAILED, Candidate, Evaluation
from nasray.spaces.space import Architecture
from nasray.storage import files as storage
from nasray.storage import layout

logger = logging.getLogger(__name__)

SOURCE = "search"  # of the evaluations that an algorithm asked for
SINGLE = layout.SINGLE_EVALUATIONS
PATIENCE_S = 300.0  # with a storage that fails
OF_IMAGES = ("correct", "judged", "log_likelihoods")  # bytes
NEW = ("judged", "log_likelihoods")  # which older versions did not write
TYPES = {
    "generation": pa.int32(),
    "fitness": pa.float64(),  # null: could not be evaluated
    "seconds": pa.float64(),
    "images": pa.int32(),
    "slices": pa.list_(pa.float64()),
    "correct": pa.binary(),
    "judged": pa.binary(),
    "log_likelihoods": pa.binary(),
    "batch_size": pa.int32(),
    "error": pa.string(),
    "evaluator": pa.string(),
    "node": pa.string(),
    "attempt": pa.int32(),
}


class History:
    """The evaluations of one search by their position, the order in which they were asked for.

    `source` tells evaluations of another origin in the same data set apart.
    """

    def __init__(self, folder: str, source: str = SOURCE) -> None:
        self.folder, self.source = folder, source
        self.generations: list[list[Candidate]] = []  # those complete and on record, in order
        self.num_files = 0
        self.later: dict[int, Candidate] = {}  # on record behind a damaged file, by position
        self.single = {
            int(name.removesuffix(".json"))
            for name in storage.list_names(self._single_folder)
            if name.endswith(".json") and name[:-5].isdigit()
        }
        self._read_files()

    def __len__(self) -> int:
        return len(self.generations)

    def __iter__(self) -> Iterator[list[Candidate]]:
        return iter(self.generations)

    @property
    def empty(self) -> bool:
        """Whether not one evaluation is on record."""
        return not (self.generations or self.later or self.single)

    @property
    def candidates(self) -> list[Candidate]:
        """All of the complete generations, those that could not be evaluated among them."""
        return [candidate for generation in self.generations for candidate in generation]

    def find(self, position: int, arch: Architecture) -> Evaluation | None:
        """What is known of the candidate at `position` beyond the complete generations."""
        if (later := self.later.get(position)) is not None:
            return later if later.arch == arch else None
        if position not in self.single:
            return None
        try:
            entry = storage.read_json(self._single(position))
            evaluation = _from_json(entry) if tuple(entry["arch"]) == arch else None
        except (UserError, KeyError, TypeError, ValueError):
            evaluation = None
        if evaluation is None:
            logger.warning("%s is of no use; evaluating it again", self._single(position))
        return evaluation

    def record(self, position: int, arch: Architecture, evaluation: Evaluation) -> None:
        """Put one evaluation on storage, as soon as it is known."""
        content = {"arch": arch, **_to_json(evaluation)}
        storage.write_json(self._single(position), content, retry_s=PATIENCE_S)
        self.single.add(position)

    def forget(self, positions: Sequence[int]) -> None:
        """Drop evaluations that are on record one by one, so that they are done again.

        Generations that hold some of them are made again from the others.
        """
        while self.generations and sum(map(len, self.generations)) > min(positions):
            self.generations.pop()
            name = layout.generation(self.source, len(self))
            storage.remove(storage.join(self.folder, name))
        for position in positions:
            storage.remove(self._single(position))
            self.single.discard(position)

    def append(
        self, generation: list[Candidate], describe: Callable[[Architecture], Any] = list
    ) -> None:
        """Record the next generation, complete; `describe` gives an architecture's own keys."""
        first = sum(map(len, self.generations))
        content = io.BytesIO()
        table = self._table(generation, first, describe)
        pq.write_table(table, content, write_page_checksum=True)
        # A damaged file is made again, unless its evaluations are known to nobody.
        number = len(self) if self.single else self.num_files
        self.num_files = max(self.num_files, number + 1)
        path = storage.join(self.folder, layout.generation(self.source, number))
        storage.write(path, content.getvalue(), retry_s=PATIENCE_S)
        self.generations.append(generation)

    def close(self) -> None:
        """Remove the single evaluations once all are in complete generations."""
        storage.remove(self._single_folder)
        self.single = set()

    @property
    def _single_folder(self) -> str:
        return storage.join(self.folder, SINGLE, self.source)

    def _single(self, position: int) -> str:
        return storage.join(self._single_folder, f"{position:06d}.json")

    def _read_files(self) -> None:
        names = storage.list_names(self.folder)
        numbers = [
            int(name[len(self.source) + 1 : -8])
            for name in names
            if name.startswith(f"{self.source}-")
            and name.endswith(".parquet")
            and name[len(self.source) + 1 : -8].isdigit()
        ]
        self.num_files = max(numbers, default=-1) + 1
        for number in sorted(numbers):
            path = storage.join(self.folder, layout.generation(self.source, number))
            found = _read_file(path)
            if not found:
                logger.warning("%s is damaged; what other files know of it counts", path)
            elif number == len(self.generations):
                self.generations.append(list(found.values()))
            else:
                self.later |= found

    def _table(
        self, generation: list[Candidate], first: int, describe: Callable[[Architecture], Any]
    ) -> pa.Table:
        number = len(generation)
        columns = {
            "source": pa.array([self.source] * number, pa.string()),
            "position": pa.array(range(first, first + number), pa.int32()),
            "arch": pa.array([json.dumps(describe(c.arch)) for c in generation], pa.string()),
            "genes": pa.array([list(c.arch) for c in generation], pa.list_(pa.int8())),
        }
        for key, kind in TYPES.items():
            values = [getattr(candidate, key) for candidate in generation]
            if key == "fitness":
                values = [None if c.failed else c.fitness for c in generation]
            columns[key] = pa.array(values, kind)
        costs = list(generation[0].costs)
        for cost in costs:
            columns[cost] = pa.array([c.costs[cost] for c in generation], pa.float64())
        return pa.table(columns).replace_schema_metadata({"costs": json.dumps(costs)})


class Follower:
    """The evaluations of a search, for whoever looks on while it runs: nothing is read twice.

    `found` has them by position: a Candidate, which has costs, once its generation is complete.
    What is known of each image is not kept.
    """

    def __init__(self, folder: str, source: str = SOURCE) -> None:
        self.folder, self.source = folder, source
        self.found: dict[int, Evaluation] = {}
        self.files: set[str] = set()  # of generations, those that are read

    def look(self) -> None:
        """Read what is on record since the last call; what is damaged is left for later ones."""
        names = set(storage.list_names(self.folder))
        for name in sorted(names - self.files):
            if name.startswith(f"{self.source}-") and name.endswith(".parquet"):
                generation = _read_file(storage.join(self.folder, name))
                self.found |= {position: _brief(each) for position, each in generation.items()}
                self.files |= {name} if generation else set()
        single = storage.join(self.folder, SINGLE, self.source)
        for name in storage.list_names(single) if SINGLE in names else ():
            position = int(name[:-5]) if name.endswith(".json") and name[:-5].isdigit() else -1
            if position >= 0 and position not in self.found:
                # The search may just have ended, which removes these files.
                with suppress(FileNotFoundError, UserError, KeyError, TypeError, ValueError):
                    entry = storage.read_json(storage.join(single, name))
                    self.found[position] = _brief(_from_json(entry))

    @property
    def in_order(self) -> Iterator[Evaluation]:
        """Those of which all earlier ones are known, too."""
        for position in range(len(self.found)):
            if position not in self.found:
                return
            yield self.found[position]


def _brief(evaluation: Evaluation) -> Evaluation:
    return replace(evaluation, correct=b"", log_likelihoods=b"", slices=())


def _read_file(path: str) -> dict[int, Candidate]:
    """The candidates of one file by position; none if it is damaged."""
    content = storage.read(path)  # a storage that is away is no damage
    try:
        table = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
        costs = json.loads(table.schema.metadata[b"costs"])
        return {
            row["position"]: Candidate(
                **{key: row[key] for key in TYPES if key not in ("fitness", "slices", *NEW)},
                **{key: row.get(key, b"") for key in NEW},
                fitness=FAILED if row["fitness"] is None else row["fitness"],
                slices=tuple(row["slices"]),
                arch=tuple(row["genes"]),
                costs={cost: row[cost] for cost in costs},
            )
            for row in table.to_pylist()
        }
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return {}


def _to_json(evaluation: Evaluation) -> dict[str, Any]:
    values = {field.name: getattr(evaluation, field.name) for field in fields(Evaluation)}
    values["fitness"] = None if evaluation.failed else evaluation.fitness
    for key in OF_IMAGES:
        values[key] = base64.b64encode(values[key]).decode()
    return values


def _from_json(entry: dict[str, Any]) -> Evaluation:
    entry = dict.fromkeys(NEW, "") | entry
    values = {field.name: entry[field.name] for field in fields(Evaluation)}
    fitness = FAILED if entry["fitness"] is None else float(entry["fitness"])
    correct, judged, log_likelihoods = (base64.b64decode(entry[key]) for key in OF_IMAGES)
    number = int.from_bytes(judged).bit_count() if judged else values["images"]
    size = len(judged) or -(-number // 8)
    sizes = len(correct), len(log_likelihoods) or 2 * number
    if math.isnan(fitness) or number != values["images"] or sizes != (size, 2 * number):
        raise ValueError("not what an evaluation gives")
    slices = tuple(entry["slices"])
    known = {"fitness": fitness, "correct": correct, "judged": judged, "slices": slices}
    known |= {"log_likelihoods": log_likelihoods}
    return Evaluation(**values | known)
