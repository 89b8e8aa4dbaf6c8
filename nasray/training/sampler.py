"""Which subnets a training step uses: a pure function of (space, config, seed, epoch, step).

Data-parallel workers call it with the same arguments, so they train the same subnets at every
step without communication. Imports neither torch nor Ray.
"""

import numpy as np

from nasray.config import SupernetConfig
from nasray.errors import UserError
from nasray.spaces.population import as_architectures, random_population
from nasray.spaces.space import Architecture, Gene, Space, largest

# Channel-selection warm-up: epochs since its start -> index of the lowest scale drawn.
# The published table (docs/spec.md, OneShot 2.1): scale 1.8 first, 0.2 from the 19th epoch on.
WARMUP_TABLE = (8, 7, 6, 5, *2 * (4,), *3 * (3,), *4 * (2,), *5 * (1,), 0)
WARMUP_EPOCHS = 24  # length of the published table, whose last row lasts six epochs

# Progressive shrinking (Cai et al. 2020): in which third of the same warm-up genes of these
# kinds begin to be drawn; before that they stay at their largest choice.
SHRINKING = {"kernel": 0, "depth": 1, "expand": 2, "width": 2}


def sample(
    space: Space, config: SupernetConfig, *, seed: int, epoch: int, step: int
) -> list[Architecture]:
    """Draw the architectures of one training step among the choices of the warm-up.

    One, uniformly; or by the sandwich rule (Yu et al. 2020, section 3.2) the largest, the
    smallest and some random ones, each once; or largest() alone. Operations have no order, so
    they are random in the largest and the smallest of a sandwich, too.
    """
    if config.sampling == "largest":
        return [largest(space)]
    rng = np.random.default_rng((seed, epoch, step))
    lowest = [_lowest_drawn(gene, config, epoch) for gene in space.genes]
    shared = epoch < config.shared_start_epochs
    sizes = [1 if shared and gene.kind == "op" else len(gene.choices) for gene in space.genes]
    if config.sampling == "uniform":
        return [tuple(rng.integers(lowest, sizes).tolist())]
    drawn = rng.integers(lowest, sizes, (2 + config.sandwich_random, len(sizes)))
    ordered = [gene.kind != "op" for gene in space.genes]
    drawn[0, ordered] = np.array(sizes)[ordered] - 1
    drawn[1, ordered] = np.array(lowest)[ordered]
    return list(dict.fromkeys(as_architectures(drawn)))


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
