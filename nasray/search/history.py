"""What a search has evaluated: one Parquet file per generation, in the run directory.

A generation is written whole when it is complete. Evaluations of a generation still
running are kept one by one beside it, so that a killed driver repeats none of them.
"""

import io
import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from nasray import storage
from nasray.errors import UserError
from nasray.search.candidate import Candidate
from nasray.spaces.space import Architecture


class History:
    """The recorded generations of one search, oldest first; append to it, iterate over it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.generations = [
            _read_generation(storage.join(folder, name))
            for name in storage.list_names(folder)
            if name.startswith("generation-") and name.endswith(".parquet")
        ]

    def __len__(self) -> int:
        return len(self.generations)

    def __iter__(self) -> Iterator[list[Candidate]]:
        return iter(self.generations)

    @property
    def candidates(self) -> list[Candidate]:
        return [candidate for generation in self.generations for candidate in generation]

    def append(self, generation: list[Candidate]) -> None:
        """Record a complete generation; its single evaluations are then no longer needed."""
        buffer = io.BytesIO()
        pq.write_table(_to_table(generation), buffer)
        storage.write(
            storage.join(self.folder, f"generation-{len(self):04d}.parquet"), buffer.getvalue()
        )
        self.generations.append(generation)
        storage.remove(self._pending_folder)

    def record(self, position: int, arch: Architecture, fitness: float, seconds: float) -> None:
        """Record one evaluation of the generation now running."""
        storage.write_json(
            storage.join(self._pending_folder, f"{position:05d}.json"),
            {"generation": len(self), "arch": arch, "fitness": fitness, "seconds": seconds},
        )

    def pending(self) -> dict[Architecture, tuple[float, float]]:
        """Evaluations of the generation that was running: arch -> (fitness, seconds)."""
        found = {}
        for name in storage.list_names(self._pending_folder):
            if name.endswith(".json"):
                entry = storage.read_json(storage.join(self._pending_folder, name))
                if entry["generation"] == len(self):
                    found[tuple(entry["arch"])] = (entry["fitness"], entry["seconds"])
        return found

    @property
    def _pending_folder(self) -> str:
        return storage.join(self.folder, "running")


def _to_table(generation: list[Candidate]) -> pa.Table:
    columns = {
        "generation": pa.array([c.generation for c in generation], pa.int32()),
        "arch": pa.array([list(c.arch) for c in generation], pa.list_(pa.int8())),
        "fitness": pa.array([c.fitness for c in generation], pa.float64()),
        "seconds": pa.array([c.seconds for c in generation], pa.float64()),
    }
    for cost in generation[0].costs:
        columns[cost] = pa.array([c.costs[cost] for c in generation], pa.float64())
    table = pa.table(columns)
    return table.replace_schema_metadata({"costs": json.dumps(list(generation[0].costs))})


def _read_generation(path: str) -> list[Candidate]:
    try:
        table = pq.read_table(io.BytesIO(storage.read(path)))
        costs = json.loads(table.schema.metadata[b"costs"])
        return [
            Candidate(
                arch=tuple(row["arch"]),
                fitness=row["fitness"],
                costs={cost: row[cost] for cost in costs},
                generation=row["generation"],
                seconds=row["seconds"],
            )
            for row in table.to_pylist()
        ]
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable generation ({error}); remove it and the later ones, which "
            "are then searched again"
        ) from None
