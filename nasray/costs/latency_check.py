"""Check a latency table against whole networks that are measured here, or on a host."""

from dataclasses import dataclass

import numpy as np

from nasray.costs.latency import LatencyTable
from nasray.costs.latency_files import BEFORE, differing
from nasray.costs.latency_timing import Place, Setup, describe, place_at, time_network
from nasray.errors import UserError
from nasray.spaces.population import as_architectures, random_population
from nasray.spaces.space import Architecture, Space

CHECK_PASSES = 3  # over all networks, each time in another order


@dataclass(frozen=True)
class Agreement:
    """How well a table predicts whole networks."""

    rows: tuple[tuple[Architecture, float, float], ...]  # arch, predicted ms, measured ms
    median_relative_error: float  # of |predicted - measured| / measured
    median_bias: float  # of (predicted - measured) / measured
    median_scatter: float  # of (slowest - fastest) / median of a network's measurements
    rank_correlation: float  # Spearman's


def check(
    space: Space, table: LatencyTable, *, host: str = "", num_archs: int = 50, seed: int = 0
) -> Agreement:
    """Compare `table` with whole random networks, measured as the table was: here or on `host`.

    Raises:
        UserError: the table was measured on another machine, or does not say how.
    """
    setup = _setup_of(table)
    with place_at(host, setup) as place:
        now = describe(space, setup, place=place)
        if differing(table.provenance, now):
            raise UserError(
                f"{table.path} was measured on {dict(table.provenance)}, this is {now}; check it "
                "there, or from here with --host"
            )
        archs, samples = _measure(space, setup, place, num_archs, seed)
    return compare(archs, table(archs), samples)


def _measure(
    space: Space, setup: Setup, place: Place | None, num_archs: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random architectures (n, genes), and what each took (n, CHECK_PASSES), ms."""
    archs = random_population(space.genes, num_archs, np.random.default_rng(seed))
    rng = np.random.default_rng((seed, 1))
    samples: list[list[float]] = [[] for _ in archs]
    for _ in range(CHECK_PASSES):
        for index in rng.permutation(num_archs):
            arch = tuple(archs[index].tolist())
            samples[index].append(time_network(space, arch, setup, seed=seed, place=place))
    return archs, np.array(samples)


def compare(archs: np.ndarray, predicted: np.ndarray, samples: np.ndarray) -> Agreement:
    """Compare latencies `predicted` (n,) with measured ones, `samples` (n, times), all in ms."""
    measured = np.median(samples, axis=1)
    relative = (predicted - measured) / measured
    rows = zip(as_architectures(archs), predicted.tolist(), measured.tolist(), strict=True)
    ranks = [values.argsort().argsort() for values in (predicted, measured)]
    num = len(measured)
    correlation = 1 - 6 * np.sum((ranks[0] - ranks[1]) ** 2) / (num * (num**2 - 1))
    return Agreement(
        tuple(rows),
        median_relative_error=float(np.median(np.abs(relative))),
        median_bias=float(np.median(relative)),
        median_scatter=float(np.median(np.ptp(samples, axis=1) / measured)),
        rank_correlation=float(correlation),
    )


def _setup_of(table: LatencyTable) -> Setup:
    """Read from its provenance how `table` was measured."""
    values = BEFORE | table.provenance
    try:
        return Setup(
            device=values["device"],
            runtime=values["runtime"],
            threads=int(values["threads"]),
            batch_size=int(values["batch_size"]),
            precision=values["precision"],
            cpus=values["cpus"],
        )
    except (ValueError, UserError) as error:
        raise UserError(f"{table.path}: {error}") from None
    except KeyError as error:
        raise UserError(
            f"{table.path} does not say {error}, as tables of `nasray measure-latency` do; check "
            "one of those"
        ) from None
