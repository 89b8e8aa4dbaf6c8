"""What every benchmark shares: interleaved timing, the printed table, the JSON file."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One figure. `aim` is a bound such as "<= 1.05"; `holds` says whether it is met."""

    name: str
    value: float
    unit: str
    aim: str | None = None

    @property
    def holds(self) -> bool | None:
        if self.aim is None:
            return None
        sign, bound = self.aim.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


def interleaved(
    calls: dict[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time each call `repeats` times in turn, after one untimed turn: seconds by name."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = clock()
            call()
            if turn:
                times[name].append(clock() - started)
    return times


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios of neighbours in time."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def show(rows: Sequence[Row], json_path: str | None) -> None:
    """Print `rows` as a table, and write them to `json_path` if one is given."""
    print(machine())
    for row in rows:
        verdict = {None: "", True: "holds", False: "MISSED"}[row.holds]
        print(f"{row.name:<66}{row.value:>10.4g} {row.unit:<12}{row.aim or '':<9}{verdict}")
    if json_path:
        content = {
            "machine": machine(),
            "command": " ".join(["python", *sys.argv]),
            "rows": [{**asdict(row), "holds": row.holds} for row in rows],
        }
        with open(json_path, "w") as file:
            json.dump(content, file, indent=1)


def machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return (
        f"{platform.machine()}, {os.cpu_count()} cores{gpu}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
