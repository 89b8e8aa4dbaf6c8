"""Weights come back, from the right space only, and nothing in a file is ever executed."""

import io
import pickle

import pytest
import torch

from nasray import checkpoint
from nasray.errors import UserError
from nasray.spaces.supernet import build_subnet
from nasray.spaces.tiny import Tiny
from nasray.storage import files as storage

SPACE = Tiny(num_classes=4, resolution=32)


def saved(tmp_path, space=SPACE):
    supernet = space.supernet()
    path = str(tmp_path / "supernet.pt")
    checkpoint.save_supernet(path, supernet)
    return path, supernet


def test_a_supernet_comes_back(tmp_path):
    path, supernet = saved(tmp_path)
    loaded = checkpoint.load_supernet(path, SPACE)
    assert not loaded.training
    for name, tensor in supernet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_subnet_comes_back_with_its_architecture(tmp_path):
    arch = SPACE.named["largest"]
    subnet = build_subnet(SPACE.decode(arch))
    path = str(tmp_path / "model.pt")
    checkpoint.save_subnet(path, SPACE, arch, subnet, classes=["a", "b", "c", "d"])
    space, found, loaded, extra = checkpoint.load_subnet(path)
    assert (space, found, extra) == (SPACE, arch, {"classes": ["a", "b", "c", "d"]})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), subnet.eval()(images))


def test_a_supernet_of_another_space_is_refused(tmp_path):
    path, _ = saved(tmp_path)
    with pytest.raises(UserError, match="num_classes.*4.*job's.*5"):
        checkpoint.load_supernet(path, Tiny(num_classes=5, resolution=32))


def test_a_supernet_whose_training_diverged_is_refused(tmp_path):
    path, supernet = str(tmp_path / "supernet.pt"), SPACE.supernet()
    next(supernet.parameters()).data[0] = float("nan")
    checkpoint.save_supernet(path, supernet)
    with pytest.raises(UserError, match=r"supernet.pt holds weights that are not finite"):
        checkpoint.load_supernet(path, SPACE)


def test_a_supernet_is_no_subnet(tmp_path):
    path, _ = saved(tmp_path)
    with pytest.raises(UserError, match="not one subnet"):
        checkpoint.load_subnet(path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, keep):
    path, _ = saved(tmp_path)
    content = storage.read(path)
    size = keep if isinstance(keep, int) else int(len(content) * keep)
    storage.write(path, content[:size])
    with pytest.raises(UserError, match="supernet.pt is not a readable checkpoint"):
        checkpoint.load_supernet(path, SPACE)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing.pt does not exist"):
        checkpoint.load_supernet(str(tmp_path / "nothing.pt"))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    buffer = io.BytesIO()
    torch.save({"space": Evil(), "state": {}}, buffer)
    path = str(tmp_path / "evil.pt")
    for content in (buffer.getvalue(), pickle.dumps(Evil())):
        storage.write(path, content)
        with pytest.raises(UserError, match="not a readable checkpoint"):
            checkpoint.load_supernet(path)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_shape_are_refused(tmp_path):
    path, supernet = saved(tmp_path)
    content = checkpoint.load(path)
    content["state"].popitem()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    storage.write(path, buffer.getvalue())
    with pytest.raises(UserError, match="do not fit the space"):
        checkpoint.load_supernet(path)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("space", "tiny", "is not a nasray checkpoint: its space is no table"),
        ("space", {"name": "tiny", "depth": 3}, "unknown key 'space.depth'"),
        ("state", [1, 2], "weights do not fit the space"),
    ],
)
def test_content_of_another_kind_is_refused(tmp_path, key, value, complaint):
    path, _ = saved(tmp_path)
    buffer = io.BytesIO()
    torch.save(checkpoint.load(path) | {key: value}, buffer)
    storage.write(path, buffer.getvalue())
    with pytest.raises(UserError, match=complaint):
        checkpoint.load_supernet(path)
