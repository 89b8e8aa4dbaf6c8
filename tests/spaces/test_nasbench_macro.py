"""NAS-Bench-Macro's networks, against the authors' table of all of them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nasray.costs.table import CostTable
from nasray.errors import UserError
from nasray.spaces import space_by_name
from nasray.spaces.nasbench_macro import NasBenchMacro
from nasray.spaces.population import as_architectures, as_population

TABLE = Path(__file__).parents[3] / "shared/data/nasbench_macro/nas-bench-macro_cifar10.json"
SPACE = NasBenchMacro()
ALL = as_population(list(itertools.product(range(3), repeat=8)))
# The table leaves out pooling and the classifier's bias, which nasray's MACs count.
POOLING_AND_BIAS = 1280 * 4 * 4 + 10


def table() -> dict:
    if not TABLE.exists():
        pytest.skip(f"no table at {TABLE}")
    return json.loads(TABLE.read_text())


def test_parameters_and_macs_of_all_networks_are_the_tables():
    rows, costs = table(), CostTable(SPACE)(ALL)
    assert len(rows) == len(ALL) == 6561
    for arch, params, macs in zip(
        as_architectures(ALL), costs["params"], costs["macs"], strict=True
    ):
        row = rows[SPACE.to_json(arch)["arch"]]
        assert (params, macs - POOLING_AND_BIAS) == (row["params"], row["flops"]), arch


def test_architectures_of_one_canonical_form_are_one_network_to_the_authors_too():
    forms = as_architectures(SPACE.canonical(ALL))
    assert len(set(forms)) == 3969
    assert SPACE.canonical(as_population([(0, 0, 1, 0, 2, 2, 0, 1)])).tolist() == [
        [0, 0, 1, 2, 0, 2, 1, 0]
    ]
    rows = table()
    for arch, form in zip(as_architectures(ALL), forms, strict=True):
        mine, its = (rows[SPACE.to_json(each)["arch"]]["mean_acc"] for each in (arch, form))
        assert mine == its
    best = max(rows, key=lambda digits: rows[digits]["mean_acc"])
    assert SPACE.named["best"] == SPACE.from_json({"arch": best})


def test_a_network_under_two_names_has_one_set_of_weights():
    supernet = SPACE.supernet().eval()
    SPACE.initialize(supernet, torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    twins = [(1, 1, 0, 0, 2, 1, 2, 0), (1, 1, 0, 2, 0, 1, 0, 2)]
    one, other = (supernet(images, arch) for arch in twins)
    assert torch.equal(one, other)
    forms = [SPACE.from_json(SPACE.to_json(arch)) for arch in twins]
    assert forms == 2 * [(1, 1, 0, 2, 0, 1, 2, 0)]


def test_operations_of_one_layer_share_nothing_and_layers_neither():
    supernet = SPACE.supernet()
    used = [{id(param) for param, _ in supernet.slices_of((op,) * 8)} for op in (1, 2)]
    fixed = {
        id(param) for position in (0, 7) for param in supernet.positions[position].parameters()
    }
    assert used[0] & used[1] == fixed
    projections = {id(param) for param, _ in supernet.slices_of((0,) * 8)} - fixed
    assert set.union(*used, projections) == {id(param) for param in supernet.parameters()}


@pytest.mark.parametrize(
    "values",
    [{"arch": "2221222"}, {"arch": "22212223"}, {"arch": 22212220}, {"op": [0] * 8}, {}]
    + [{"arch": "22212220", "op": 1}, {"arch": "٢٢٢١٢٢٢٠"}],
)
def test_what_is_no_architecture_is_refused_with_one_that_is(values):
    with pytest.raises(UserError, match=r'is \{"arch": "22212220"\}, a string of 8'):
        SPACE.from_json(values)


def test_a_resolution_that_cannot_be_halved_three_times_is_refused():
    with pytest.raises(UserError, match=r"space.resolution = 36 must be a multiple of 8"):
        space_by_name("nasbench_macro", resolution=36)
    assert np.shape(SPACE.supernet()(torch.zeros(2, 3, 40, 40), (1,) * 8).detach()) == (2, 10)
