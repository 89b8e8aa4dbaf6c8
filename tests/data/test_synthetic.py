"""The drawn pictures."""

import numpy as np
import pytest

from nasray.config import DataConfig
from nasray.data.decoding import decode
from nasray.data.importing import import_dataset
from nasray.data.shards import open_dataset
from nasray.data.synthetic import AREA, SHAPES, _shape_mask, draw, shapes
from nasray.errors import UserError

SMALL = DataConfig(source="synthetic", train_per_class=3, val_per_class=2, image_side=16)


def test_the_same_seed_draws_the_same_bytes():
    first, again = ([record.load() for record in shapes(SMALL, 4)] for _ in range(2))
    other = [record.load() for record in shapes(SMALL, 5)]
    assert first == again
    assert len(set(first)) == 50 and not set(first) & set(other)


@pytest.mark.parametrize("num_classes", [2, 7, 10])
def test_classes_are_balanced_named_and_sorted(tmp_path, num_classes):
    config = SMALL.model_copy(update={"num_classes": num_classes})
    import_dataset(config, str(tmp_path), seed=0)
    dataset = open_dataset(str(tmp_path))
    assert dataset.classes == tuple(sorted(list(SHAPES)[:num_classes]))
    assert np.bincount(dataset.labels("train")).tolist() == [3] * num_classes
    assert np.bincount(dataset.labels("val")).tolist() == [2] * num_classes
    assert decode(dataset.read("val", np.array([0]))[0]).size == (16, 16)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_covers_the_same_area_and_stays_in_the_picture(shape):
    rng = np.random.default_rng(0)
    masks = np.array([_shape_mask(shape, 64, rng) for _ in range(80)])
    assert masks.mean() == pytest.approx(np.mean(AREA), rel=0.15)
    border = np.concatenate([masks[:, [0, -1]].ravel(), masks[:, :, [0, -1]].ravel()])
    assert border.mean() < 0.08


def color_statistics(config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation of each picture's colours, and the labels."""
    rows, labels = [], []
    for record in shapes(config, 0):
        pixels = np.asarray(decode(record.load()), float).reshape(-1, 3)
        rows.append(np.concatenate([pixels.mean(0), pixels.std(0)]))
        labels.append(record.label)
    rows = (np.array(rows) - np.mean(rows, 0)) / np.std(rows, 0)
    return np.column_stack([rows, np.ones(len(rows))]), np.array(labels)


def test_color_statistics_do_not_tell_the_class():
    config = SMALL.model_copy(update={"train_per_class": 60, "val_per_class": 60, "image_side": 32})
    rows, labels = color_statistics(config)
    weights = np.linalg.lstsq(rows[:600], np.eye(10)[labels[:600]], rcond=None)[0]
    accuracy = np.mean((rows[600:] @ weights).argmax(1) == labels[600:])
    assert accuracy < 1.6 * 0.1  # chance is 0.1


def test_pictures_differ_by_shape_alone():
    # The same key draws the same scene: a different shape changes it, the side scales it.
    disc, star = (np.asarray(decode(draw(shape, 64, (1, 2, 3))), int) for shape in ("disc", "star"))
    changed = abs(disc - star).max(2) > 60
    assert 0.02 < changed.mean() < 0.4


def test_another_generator_setting_needs_another_folder(tmp_path):
    import_dataset(SMALL, str(tmp_path), seed=0)
    more = SMALL.model_copy(update={"train_per_class": 4})
    with pytest.raises(UserError, match="train_per_class = 3, the job says 4"):
        import_dataset(more, str(tmp_path), seed=0)
    with pytest.raises(UserError, match="seed = 0, the job says 1"):
        import_dataset(SMALL, str(tmp_path), seed=1)
