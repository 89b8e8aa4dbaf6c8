"""Which subnets a training step uses: a pure function of (space, config, seed, epoch, step).

Data-parallel workers call it with the same arguments, so they train the same subnets at every
step without communication. Imports neither torch nor Ray.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from nasray.config import Limit, SearchConfig, SupernetConfig, limited_cost
from nasray.errors import UserError
from nasray.search.limits import FeasibleSampler, Limits
from nasray.spaces.population import as_architectures, as_population, random_population
from nasray.spaces.space import Architecture, Gene, Space, largest

Choices = list[int]  # an index for each gene

# Channel-selection warm-up: epochs since its start -> index of the lowest scale drawn.
# The published table (docs/spec.md, OneShot 2.1): scale 1.8 first, 0.2 from the 19th epoch on.
WARMUP_TABLE = (8, 7, 6, 5, *2 * (4,), *3 * (3,), *4 * (2,), *5 * (1,), 0)
WARMUP_EPOCHS = 24  # length of the published table, whose last row lasts six epochs

# Progressive shrinking (Cai et al. 2020): in which third of the same warm-up genes of these
# kinds begin to be drawn; before that they stay at their largest choice.
SHRINKING = {"kernel": 0, "depth": 1, "expand": 2, "width": 2}

# Of "banded": how many different architectures it draws from in how many epochs, and into how many
# intervals a band is cut.
BAND_DRAWS, BAND_EPOCHS, NUM_INTERVALS = 1024, 5, 7


def sample(
    space: Space,
    config: SupernetConfig,
    *,
    seed: int,
    epoch: int,
    step: int,
    bands: Sequence[Limits] = (),
) -> list[Architecture]:
    """Draw the architectures of one training step among the choices of the warm-up.

    With `config.rank_loss`, those of fewer MACs come first.

    Args:
        space: the design space.
        config: says by which strategy; each is a function below.
        seed: the job's.
        epoch: from 0.
        step: in its epoch, from 0.
        bands: what "banded" draws within, as bands_of() makes it, and with
            `config.sandwich_within_limits` the random ones of "sandwich".
    """
    if config.sampling == "largest":
        return [largest(space)]
    rng = np.random.default_rng((seed, epoch, step))
    archs = _drawn(space, config, seed, epoch, rng, bands)
    if config.rank_loss:
        macs = [size[1] for size in sizes_of(space, archs)]
        archs = [archs[index] for index in np.argsort(macs, kind="stable")]
    return archs


def _drawn(
    space: Space,
    config: SupernetConfig,
    seed: int,
    epoch: int,
    rng: np.random.Generator,
    bands: Sequence[Limits],
) -> list[Architecture]:
    lowest, sizes = open_choices(space, config, epoch)
    if config.sampling == "fair":
        return _fair(lowest, sizes, rng)
    if config.sampling == "sandwich":
        ends = _ends(space, lowest, sizes, rng)
        number = config.sandwich_random
        if config.sandwich_within_limits and _is_open(space, config, epoch):
            random = [_banded(bands, seed, epoch, rng) for _ in range(number)]
        else:
            random = as_architectures(rng.integers(lowest, sizes, (number, len(sizes))))
        return list(dict.fromkeys((*ends, *random)))
    if config.sampling == "banded" and _is_open(space, config, epoch):
        return [_banded(bands, seed, epoch, rng)]
    # "uniform" and "progressive", which sorts channels besides (channels.py).
    return [tuple(rng.integers(lowest, sizes).tolist())]


def _ends(
    space: Space, lowest: Choices, sizes: Choices, rng: np.random.Generator
) -> list[Architecture]:
    """The largest and the smallest of a sandwich (Yu et al. 2020, section 3.2).

    Operations have no order, so they are random in these, too.
    """
    drawn = rng.integers(lowest, sizes, (2, len(sizes)))
    ordered = [gene.kind != "op" for gene in space.genes]
    drawn[0, ordered] = np.array(sizes)[ordered] - 1
    drawn[1, ordered] = np.array(lowest)[ordered]
    return as_architectures(drawn)


def _fair(lowest: Choices, sizes: Choices, rng: np.random.Generator) -> list[Architecture]:
    """As many as a block has operations: each operation of each block in exactly one of them.

    Strict fairness (FairNAS, Chu et al. 2021, arXiv 1907.01845): every block's operations are
    shuffled anew, and the k-th architecture takes the k-th of each.
    """
    ranges = map(np.arange, lowest, sizes)
    orders = [rng.permutation(choices) for choices in ranges]
    number = max(map(len, orders))  # others have one choice
    return as_architectures(np.stack([np.resize(order, number) for order in orders], axis=1))


def _banded(
    bands: Sequence[Limits], seed: int, epoch: int, rng: np.random.Generator
) -> Architecture:
    """One within the limits of the search; where it answers several one by one, within any of them.

    As the published code of Single Path One-Shot does (Guo et al. 2020, arXiv 1904.00420), the band
    of a first limit with min and max is cut into intervals that are drawn equally often. So the
    mean cost is near the middle, however many more architectures there are near one end.
    """
    band = int(rng.integers(len(bands)))
    intervals = _intervals(bands[band], (seed, epoch // BAND_EPOCHS, band))
    interval = intervals[rng.integers(len(intervals))]
    return interval[rng.integers(len(interval))]


@lru_cache(maxsize=16)
def _intervals(limits: Limits, seed: tuple[int, ...]) -> list[list[Architecture]]:
    """What some epochs draw from within `limits`, by interval of the first limit's cost."""
    rng, cost = np.random.default_rng(seed), limits.limits[0].cost
    on_it = [limit for limit in limits.limits if limit.cost == cost]
    others = [limit for limit in limits.limits if limit.cost != cost]
    mins = [limit.min for limit in on_it if limit.min is not None]
    maxs = [limit.max for limit in on_it if limit.max is not None]
    if not mins or not maxs:
        return [limits.draw(BAND_DRAWS, rng, set())]
    least, most = limits.bounds(cost)
    low, high = max(mins), min(maxs)
    edges = np.linspace(max(least, low), min(most, high), NUM_INTERVALS + 1)[1:-1].tolist()
    found, seen = [], set[Architecture]()
    for start, end in pairwise((low, *edges, high)):
        interval = Limit(cost=cost, min=start, max=end)
        within = Limits(limits.space, (interval, *others), limits.latency)
        sampler = FeasibleSampler(limits.space, within.violation)
        found.append(sampler.draw_unseen(BAND_DRAWS // NUM_INTERVALS, 0.0, rng, seen))
    return [archs for archs in found if archs] or [limits.draw(BAND_DRAWS, rng, set())]


def sizes_of(space: Space, archs: Sequence[Architecture]) -> list[tuple[float, float]]:
    """Of each architecture, where the logarithm of its parameters is in the space, and its MACs.

    0 is the smallest that search may draw, 1 the largest.
    """
    limits = _limits_of(space)  # type: ignore[arg-type]  # spaces are frozen
    low, high = np.log(limits.bounds("params"))
    population = as_population(archs)
    places = (np.log(limits.cost_of("params", population)) - low) / max(high - low, 1e-9)
    macs = limits.cost_of("macs", population)
    return list(zip(places.clip(0, 1).tolist(), macs.tolist(), strict=True))


@lru_cache(maxsize=4)
def _limits_of(space: Space) -> Limits:
    return Limits(space, ())


def bands_of(limits: Limits, search: SearchConfig) -> list[Limits]:
    """What "banded" draws within: all `limits` at once, or one by one as the search does."""
    cost = limited_cost(limits.limits)
    answered = [limit for limit in limits.limits if limit.cost == cost]
    if not search.one_by_one or len(answered) == 1:
        return [limits]
    others = [limit for limit in limits.limits if limit.cost != cost]
    return [Limits(limits.space, (limit, *others), limits.latency) for limit in answered]


def open_choices(space: Space, config: SupernetConfig, epoch: int) -> tuple[Choices, Choices]:
    """For each gene, the index of the lowest choice that `epoch` draws, and that after the last."""
    shared = epoch < config.shared_start_epochs
    return (
        [_lowest_drawn(gene, config, epoch) for gene in space.genes],
        [1 if shared and gene.kind == "op" else len(gene.choices) for gene in space.genes],
    )


def _is_open(space: Space, config: SupernetConfig, epoch: int) -> bool:
    """Whether `epoch` draws all that the last epoch does."""
    return open_choices(space, config, epoch) == open_choices(space, config, config.epochs - 1)


def lowest_scale(space: Space, config: SupernetConfig, epoch: int) -> float | None:
    """The narrowest scale drawn in `epoch`, for the curves; None in a space without scales."""
    scales = [gene.choices for gene in space.genes if gene.kind == "scale"]
    return scales[0][_lowest(scales[0], config, epoch)] if scales else None


def check_trained_widths(space: Space, config: SupernetConfig) -> None:
    """Check that training draws every width that the search may use.

    Raises:
        UserError: the search range begins below the narrowest width that is trained.
    """
    if config.epochs and config.sampling == "largest":
        raise UserError(
            'supernet.sampling = "largest" trains one subnet, and search evaluates others; set it '
            'to "sandwich" or "uniform" (teacher_epochs trains the largest as their teacher)'
        )
    for gene in space.genes if config.epochs else ():
        lowest = _lowest_drawn(gene, config, config.epochs - 1)
        if lowest > gene.first:
            raise UserError(
                f"supernet: {gene.kind}s below {gene.choices[lowest]} are never trained, but "
                f"search draws from {gene.choices[gene.first]} on; lower supernet.smallest_scale "
                f"= {config.smallest_scale}, let channel_warmup_start = "
                f"{config.channel_warmup_start} + channel_warmup_epochs = "
                f"{config.channel_warmup_epochs} end before epochs = {config.epochs}, or search "
                "fewer scales"
            )


def check_sampling(space: Space, config: SupernetConfig) -> None:
    """Check that the space has what the way of training needs.

    Raises:
        UserError: it does not; names the key.
    """
    if not config.epochs:
        return
    ops = [gene for gene in space.genes if gene.kind == "op"]
    copied = [gene for gene in ops if gene.choices[0] != "identity"]
    if config.shared_start_epochs and not copied:
        raise UserError(
            f"supernet.shared_start_epochs = {config.shared_start_epochs} trains the first "
            f"operation of each block alone, and {space.name} has none whose weights could be "
            "copied to the others; set it to 0"
        )
    if config.sampling == "fair":
        _check_fair(space, config)
    shrunk = [gene for gene in space.genes if gene.kind in (*SHRINKING, "scale")]
    if config.sampling == "progressive" and not shrunk:
        raise UserError(
            f'supernet.sampling = "progressive" opens smaller kernels, depths and widths, of which '
            f'{space.name} has none; set it to "uniform" or "fair"'
        )


def _check_fair(space: Space, config: SupernetConfig) -> None:
    lowest, sizes = open_choices(space, config, config.epochs - 1)
    for gene, low, size in zip(space.genes, lowest, sizes, strict=True):
        if gene.kind != "op" and size - low > 1:
            raise UserError(
                f'supernet.sampling = "fair" is fair to operations only, and {space.name} draws '
                f"{gene.kind}s, too, from {gene.choices[low]} to {gene.choices[-1]}; set it to "
                '"uniform" or "sandwich"'
            )
    numbers = sorted({len(gene.choices) for gene in space.genes if gene.kind == "op"})
    if len(numbers) != 1:
        raise UserError(
            f'supernet.sampling = "fair" needs as many operations in every block, and {space.name} '
            f'has {" or ".join(map(str, numbers))}; set it to "uniform"'
        )


def lowest_scale_index(num_scales: int, config: SupernetConfig, epoch: int) -> int:
    """The index of the narrowest of `num_scales` scales that `epoch` (0-based) draws.

    Full width before `channel_warmup_start`, then the published table, stretched to
    `channel_warmup_epochs` and to the number of scales.
    """
    since = epoch - config.channel_warmup_start
    if since < 0:
        return num_scales - 1
    if since >= config.channel_warmup_epochs:
        return 0
    row = since * WARMUP_EPOCHS // config.channel_warmup_epochs
    return WARMUP_TABLE[min(row, len(WARMUP_TABLE) - 1)] * num_scales // 10


def fixed_architectures(space: Space, config: SupernetConfig, seed: int) -> list[Architecture]:
    """The architectures whose mean top-1 is a supernet's validation accuracy."""
    if config.sampling == "largest":
        return [largest(space)]
    rng = np.random.default_rng((seed, 0x5EED))
    return as_architectures(random_population(space.genes, config.num_val_archs, rng))


def _lowest_drawn(gene: Gene, config: SupernetConfig, epoch: int) -> int:
    """The index of the smallest choice of `gene` that `epoch` draws."""
    if gene.kind == "scale":
        return _lowest(gene.choices, config, epoch)
    if gene.kind in SHRINKING:
        third = SHRINKING[gene.kind] * config.channel_warmup_epochs // 3
        return 0 if epoch >= config.channel_warmup_start + third else len(gene.choices) - 1
    return 0


def _lowest(choices: tuple[float, ...], config: SupernetConfig, epoch: int) -> int:
    narrowest = sum(scale < config.smallest_scale for scale in choices)
    lowest = max(lowest_scale_index(len(choices), config, epoch), narrowest)
    return min(lowest, len(choices) - 1)
