"""Which images play which part."""

import numpy as np
import pytest

from nasray.config import DataConfig, parse_job
from nasray.data.loader import default_share, share_split
from nasray.data.splits import Parts
from nasray.errors import UserError

LABELS = np.repeat(np.arange(4), [100, 20, 2, 1]).astype(np.int32)
CLASSES = ("ant", "bee", "cat", "dog")


def parts(labels=LABELS, pictures=None, num_val=0, seed=0, **keys):
    config = DataConfig(source="imagefolder", path="mine", **keys)
    pictures = np.arange(len(labels)) if pictures is None else pictures
    return Parts.of(labels, pictures, num_val, config, seed, CLASSES)


def per_class(positions):
    return np.bincount(LABELS[positions], minlength=4).tolist()


def test_a_share_is_of_each_class_and_the_seed_decides_which():
    kept, aside = share_split(LABELS, np.arange(123), 0.2, np.random.default_rng(3))
    assert sorted([*kept, *aside]) == list(range(123))
    assert per_class(aside) == [20, 4, 1, 0]
    again = share_split(LABELS, np.arange(123), 0.2, np.random.default_rng(3))[1]
    other = share_split(LABELS, np.arange(123), 0.2, np.random.default_rng(4))[1]
    assert np.array_equal(aside, again) and not np.array_equal(aside, other)


@pytest.mark.parametrize("seed", range(5))
def test_equal_pictures_are_on_one_side_even_if_their_classes_differ(seed):
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 60, 123)
    found = parts(pictures=pictures, seed=seed)
    sides = [set(pictures[side]) for side in (found.training, found.holdout, found.validation)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == len(set(pictures))


def test_a_large_group_of_equal_pictures_stays_in_training():
    labels, pictures = np.zeros(20, np.int32), np.array([0] * 15 + [1, 2, 3, 4, 5])
    for seed in range(5):
        _, aside = share_split(labels, pictures, 0.2, np.random.default_rng(seed))
        assert len(aside) == 4 and 0 not in pictures[aside]


def test_without_val_every_image_plays_one_part_and_a_class_of_one_is_trained_on():
    found = parts()
    assert found.validation_split == "train"
    every = np.concatenate([found.training, found.holdout, found.validation])
    assert sorted(every) == list(range(123))
    assert per_class(found.validation) == [20, 4, 1, 0]
    assert per_class(found.holdout) == [16, 3, 0, 0]
    assert per_class(found.training) == [64, 13, 1, 1]
    assert per_class(parts(val_share=0.5).validation) == [50, 10, 1, 0]
    assert per_class(parts(holdout_share=0.5).holdout) == [40, 8, 0, 0]


def test_with_val_all_of_it_is_to_report_on():
    found = parts(num_val=7)
    assert found.validation_split == "val" and found.validation.tolist() == list(range(7))
    assert per_class(found.holdout) == [20, 4, 1, 0]
    with pytest.raises(UserError, match=r"data\.val_share = 0\.2: mine was imported with 7"):
        parts(num_val=7, val_share=0.2)


@pytest.mark.parametrize(
    ("num_images", "num_classes", "held"),
    [(100, 2, 20), (2500, 10, 500), (30_000, 2, 500), (100_000, 100, 5000), (1_281_167, 1000, 5e4)],
)
def test_the_default_share_is_a_fifth_or_500_images_and_50_per_class(num_images, num_classes, held):
    assert num_images * default_share(num_images, num_classes) == pytest.approx(held)


def test_a_class_too_small_for_holdout_per_class_is_told_the_ways_out():
    with pytest.raises(UserError, match=r"'dog' has only 1 .*leave it out, or give data\.holdout"):
        parts(num_val=7, holdout_per_class=1)
    both = {"data": {"source": "tar", "holdout_per_class": 3, "holdout_share": 0.1}}
    with pytest.raises(UserError, match="both say what is held out; leave one of them out"):
        parse_job(both, "job")


def test_images_that_cannot_be_divided_are_refused():
    labels = np.array([0, 1, 2, 3], np.int32)
    with pytest.raises(UserError, match="'mine': no class has enough different images"):
        parts(labels, num_val=3)
