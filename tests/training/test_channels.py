"""Sorting channels changes no subnet that was trained, and leaves the best to narrow ones."""

from functools import partial

import numpy as np
import pytest
import torch

from nasray.config import SupernetConfig
from nasray.errors import UserError
from nasray.spaces import space_by_name
from nasray.spaces.nasbench_macro import NasBenchMacro
from nasray.spaces.population import as_architectures, random_population
from nasray.spaces.space import largest
from nasray.spaces.tiny import Tiny
from nasray.training.channels import sorting
from nasray.training.loop import Recipe, fit
from nasray.training.sampler import check_sampling, open_choices
from tests.spaces.test_spaces import RESOLUTIONS, trained_like

# Each with the number of epochs in which narrower blocks open, below.
SPACES = {
    Tiny(): 1,
    space_by_name("shufflenet", num_classes=5, resolution=32): 4,
    space_by_name("mbconv", num_classes=5, base="mobilenet_v3_small", **RESOLUTIONS): 1,
    space_by_name("ofa_mobilenetv3", num_classes=5, width=0.4, **RESOLUTIONS): 1,
    space_by_name("ofa_resnet50d", num_classes=5, width=0.6, **RESOLUTIONS): 1,
}
CONFIG = SupernetConfig(
    epochs=6, channel_warmup_start=1, channel_warmup_epochs=3, sampling="progressive"
)


def with_choices(space, lowest, seed):
    """A random architecture of the choices in `lowest`, one for each gene, and larger ones."""
    rng = np.random.default_rng(seed)
    [arch] = as_architectures(random_population(space.genes, 1, rng))
    return tuple(max(choice, low) for choice, low in zip(arch, lowest, strict=True))


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_sorting_changes_no_subnet_of_the_widths_that_were_trained(space):
    supernet = trained_like(space).double().eval()
    side, sorted_in = space.resolution, []
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
    for epoch in range(CONFIG.epochs):
        before = open_choices(space, CONFIG, epoch - 1)[0] if epoch else largest(space)
        if (reorder := sorting(supernet, CONFIG, epoch)) is None:
            continue
        archs = [largest(space), with_choices(space, before, epoch)]
        outputs = [supernet(images, arch).detach() for arch in archs]
        weights = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
        reorder(supernet.state_dict())
        sorted_in.append(epoch)
        moved = any(not torch.equal(weights[key], at) for key, at in supernet.state_dict().items())
        assert moved is (len(sorted_in) == 1)  # without training in between, all stay in order
        for arch, output in zip(archs, outputs, strict=True):
            torch.testing.assert_close(supernet(images, arch), output)
    assert sorted_in[0] >= CONFIG.channel_warmup_start
    assert len(sorted_in) == SPACES[space]


def test_the_channels_whose_readers_weigh_most_come_first():
    config = CONFIG.model_copy(update={"channel_warmup_epochs": 0})
    supernet = trained_like(Tiny())
    reorder = sorting(supernet, config, 1)
    reorder(supernet.state_dict())
    for position in supernet.positions[:-1]:
        for block in position:
            assert (block.conv1.weight.abs().sum((0, 2, 3)).diff() <= 1e-6).all()
    assert sorting(supernet, config, 2) is None
    assert sorting(supernet, config.model_copy(update={"sampling": "uniform"}), 1) is None


def test_momenta_and_averages_move_with_their_channels():
    """Trained on at full width, the sorted network computes what the unsorted one does."""
    space = Tiny(num_classes=4)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    config = CONFIG.model_copy(update={"channel_warmup_epochs": 0})
    recipe = Recipe(
        epochs=2,
        learning_rate=0.05,
        warmup_epochs=0,
        momentum=0.9,
        weight_decay=1e-3,
        label_smoothing=0.1,
        ema=0.5,
    )

    def trained(sorts):
        supernet = trained_like(space)
        fit(
            supernet,
            lambda epoch, step: [partial(supernet, arch=largest(space))],
            recipe,
            batches=lambda epoch: [(batch, torch.arange(8) % 4) for batch in images],
            validate=lambda epoch: {},
            report=lambda curves, state: None,
            resume=None,
            device="cpu",
            seed=0,
            begin_epoch=lambda epoch: sorting(supernet, config, epoch) if sorts else None,
        )
        return supernet.eval()

    one, other = trained(True), trained(False)
    name = "positions.1.0.conv1.weight"
    assert not torch.allclose(one.state_dict()[name], other.state_dict()[name], atol=1e-2)
    outputs = [network(images[0] / 255, largest(space)) for network in (one, other)]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


def test_progressive_needs_something_that_becomes_smaller():
    with pytest.raises(UserError, match=r"kernels, depths and widths, of which nasbench_macro has"):
        check_sampling(NasBenchMacro(), CONFIG)
    for space in SPACES:
        check_sampling(space, CONFIG)
