"""How many workers the nodes of a cluster have room for. No Ray is started."""

import pytest
import ray

from nasray.cluster.placement import MARKET, num_places

SPOT = {"Labels": {MARKET: "spot"}, "Resources": {"CPU": 8.0, "GPU": 4.0}}
TRAINER = {"Labels": {MARKET: "on-demand", "a": "x"}, "Resources": {"CPU": 8.0, "GPU": 4.0}}
LAPTOP = {"Labels": {}, "Resources": {"CPU": 3.0}}


@pytest.mark.parametrize(
    "labels, cpus, gpus, number",
    [
        ({}, 1, 0, 8 + 8 + 3),
        ({}, 2, 0, 4 + 4 + 1),
        ({}, 1, 1, 4 + 4),
        ({}, 4, 1, 2 + 2),
        ({MARKET: "!spot"}, 1, 0, 8 + 3),
        ({MARKET: "spot"}, 1, 0, 8),
        ({"a": "in(x, y)"}, 1, 0, 8),
        ({"a": "!in(x,y)"}, 1, 0, 8 + 3),
        ({MARKET: "!spot", "a": "y"}, 1, 0, 0),
    ],
)
def test_nodes_with_other_labels_have_no_room(labels, cpus, gpus, number, monkeypatch):
    lost = TRAINER | {"Alive": False}
    nodes = [each | {"Alive": True} for each in (SPOT, TRAINER, LAPTOP)] + [lost]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert num_places(labels, cpus, gpus) == number
