"""Recomputes what tests/recorded/*.json hold: `python compute.py histories|numbers`.

README.md says at which commit the files were made.
"""

import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nasray.algorithms import ALGORITHMS, make_algorithm, make_schedule
from nasray.config import Limit, SearchConfig
from nasray.costs.latency import LatencyTable, blocks_of
from nasray.costs.latency_files import block_key, write_lines
from nasray.predictors.predictor import AccuracyPredictor
from nasray.search.candidate import FAILED, Evaluation
from nasray.search.driver import Direct, run_search
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.search.racing import EarlyStopping, StoppingRule, measured
from nasray.spaces import SPACES, space_class
from nasray.spaces.population import as_architectures, random_population

# The middle of the range of MACs that both spaces below leave to a search.
MAXIMA = {"tiny": (0.6e6, 0.9e6, 1.2e6), "shufflenet": (230e6, 270e6, 310e6)}
SMALL = {"population_size": 12, "num_generations": 5, "num_parents": 4}
LARGE = {"population_size": 20, "num_generations": 6, "num_parents": 6}
MULTI_LIMIT = ("front", "nsga2", "vanilla", "top-down", "bottom-up")
RACING = ("genetic", "steady")
NUM_IMAGES = 512  # that early stopping may evaluate on


def histories() -> dict[str, str]:
    """{"space/algorithm/limits/seed": the hash of what the search evaluated, in order}."""
    return dict(_histories())


def _histories() -> Iterator[tuple[str, str]]:
    for name, sizes in (("tiny", SMALL), ("shufflenet", LARGE)):
        space = space_class(name)()
        free = Limits(space, ())
        maxima = MAXIMA[name]
        many = _with(free, [Limit(cost="macs", max=each) for each in maxima])
        one = _with(free, [Limit(cost="macs", min=maxima[0], max=maxima[2])])
        for algorithm in ALGORITHMS:
            choices = {"free": free, "one": one}
            if algorithm in MULTI_LIMIT:
                choices["ladder"] = many
            for which, limits in choices.items():
                for seed in (0, 1):
                    found = _search(limits, Direct(_evaluate), seed, algorithm=algorithm, **sizes)
                    yield f"{name}/{algorithm}/{which}/{seed}", _hash_history(found)
    space = space_class("shufflenet")()
    for algorithm in RACING:
        for seed in (0, 1):
            pool = RacingPool()
            found = _search(_with(free, []), pool, seed, algorithm=algorithm, racing=True, **LARGE)
            assert any(candidate.judged for candidate in found), "no candidate was stopped early"
            yield f"shufflenet/{algorithm}/racing/{seed}", _hash_history(found)


def _with(free: Limits, limits: list[Limit]) -> Limits:
    """Limits over the same space, with the cost table that is compiled already."""
    found = Limits(free.space, ())
    found.table = free.table
    found.limits = tuple(limits)
    return found


def _search(limits: Limits, pool: Any, seed: int, **config: Any) -> list:
    search = SearchConfig(**config)
    algorithm = make_algorithm(limits.space, search, limits, seed)
    schedule = make_schedule(search)
    stopping = EarlyStopping.of(limits.space, search, schedule)
    with tempfile.TemporaryDirectory() as folder:
        history = History(folder)
        return run_search(algorithm, schedule, limits, pool, history, early_stopping=stopping)


def _evaluate(arch: tuple[int, ...]) -> Evaluation:
    """A fitness with one optimum; one architecture in 17 cannot be evaluated."""
    if sum((index + 1) * gene for index, gene in enumerate(arch)) % 17 == 3:
        return Evaluation(fitness=FAILED, error="no fitness for this one")
    target = (1, 6) * (len(arch) // 2)
    distance = sum(abs(gene - wanted) for gene, wanted in zip(arch, target, strict=True))
    return Evaluation(fitness=1.0 - distance / 256, images=NUM_IMAGES)


def _hash_history(candidates: list) -> str:
    rows = [[candidate.arch, float(candidate.fitness).hex()] for candidate in candidates]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class RacingPool:
    """Evaluates made-up networks as an evaluator does, stopping early."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, tuple[int, ...], StoppingRule | None]] = []
        self.difficulty = np.random.default_rng(5).normal(size=NUM_IMAGES)

    def submit(self, position: int, arch: tuple[int, ...], rule: StoppingRule | None) -> None:
        self.waiting.append((position, arch, rule))

    def next(self) -> tuple[int, Evaluation]:
        position, arch, rule = self.waiting.pop(0)
        ability = 4 * _closeness(arch) - 2
        chance = 1 / (1 + np.exp(-4 * (ability - self.difficulty)))
        correct = np.random.default_rng([*arch, 7]).random(NUM_IMAGES) < chance
        if rule is not None:
            everything = correct
            correct = rule.apply(lambda rows: everything[rows])
            if len(correct) == NUM_IMAGES:  # evaluators do not: the recorded pool left it there
                correct = correct[rule.order]
        return position, Evaluation(**measured(correct, NUM_IMAGES, rule))


def _closeness(arch: tuple[int, ...]) -> float:
    target = (1, 6) * (len(arch) // 2)
    return 1.0 - sum(abs(a - b) for a, b in zip(arch, target, strict=True)) / 200


def numbers() -> dict[str, Any]:
    """For each space: costs, latencies, predictions, extracted weights and their logits."""
    torch.set_num_threads(1)
    numbers_of = {name: _numbers_of(space_class(name)(num_classes=10)) for name in SPACES}
    return {"cpu": cpu(), **numbers_of}


def cpu() -> list[str]:
    """What the last bits of sums depend on."""
    return [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.__version__]


def _numbers_of(space: Any) -> dict[str, Any]:
    population = random_population(space.genes, 32, np.random.default_rng(0))
    population = space.canonical(population)
    costs = Limits(space, ()).costs_of(population)
    predictor = _predictor(space)
    found = {
        "archs": _hash(np.ascontiguousarray(population)),
        "costs": {name: _hash(values) for name, values in costs.items()},
        "latency": _hash(_latency(space)(population)),
        "predicted": [float(value) for value in predictor(population)],
        "predicted_exactly": [float(value) for value in predictor.exact(population)],
    }
    supernet = space.supernet()
    generator = torch.Generator().manual_seed(0)
    space.initialize(supernet, generator)
    for name, value in supernet.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5, generator=generator)
    supernet.eval()
    extracted, logits = hashlib.sha256(), []
    for index, arch in enumerate(as_architectures(population)):
        subnet = supernet.extract(arch).eval()
        for name, value in subnet.state_dict().items():
            extracted.update(name.encode())
            extracted.update(value.contiguous().numpy().tobytes())
        if index < 4:
            side = space.resolution_of(arch)
            image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(index))
            with torch.no_grad():
                logits += subnet.double()(image.double())[0].tolist()
    return found | {"extracted": extracted.hexdigest(), "logits": logits}


def _predictor(space: Any) -> AccuracyPredictor:
    generator = torch.Generator().manual_seed(0)
    widths = [sum(len(gene.choices) for gene in space.genes), 12, 16, 8, 1]
    layers = [
        (torch.randn(n, m, generator=generator) / 4, torch.randn(n, generator=generator))
        for m, n in zip(widths, widths[1:], strict=False)
    ]
    return AccuracyPredictor(space, layers)


def _latency(space: Any) -> LatencyTable:
    """A table of made-up latencies; what names a block in the file is part of the number."""
    keys = sorted({block_key(block) for block in blocks_of(space)})
    lines = [
        {
            "block": key,
            "ms": str(0.01 + sum(map(ord, key)) % 977 / 100),
            "space": space.name,
            "device": "none",
        }
        for key in keys
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "table.csv")
        write_lines(path, lines)
        return LatencyTable.load(path, space)


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


if __name__ == "__main__":
    print(json.dumps({"histories": histories, "numbers": numbers}[sys.argv[1]](), indent=1))
