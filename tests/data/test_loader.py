"""Splits of the training set, and the batches of an epoch."""

import sys

import numpy as np
import pytest
import torch

from nasray.config import DataConfig
from nasray.data import importing, loader
from nasray.data.importing import import_dataset
from nasray.data.loader import (
    balanced_draws,
    calibration_subset,
    class_weights,
    epoch_order,
    holdout_split,
    train_batches,
)
from nasray.data.shards import Dataset, open_dataset
from nasray.errors import UserError

CONFIG = DataConfig(source="synthetic", train_per_class=20, val_per_class=1, image_side=16)
INDICES = np.arange(10, 190)  # some are held out


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """200 images in 25 row groups of several shards."""
    folder = str(tmp_path_factory.mktemp("drawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing, "ROW_GROUP_IMAGES", (4, 8))
        patch.setattr(importing, "SHARD_BYTES", 20_000)
        import_dataset(CONFIG, folder, seed=0)
    opened = open_dataset(folder)
    assert opened.num_row_groups("train") == 25 and len(opened.info.shards["train"]) > 2
    return opened


def batches(dataset, indices=INDICES, config=CONFIG, **changes):
    options = dict(resolution=16, batch_size=32, rank=0, world_size=1, seed=3, epoch=0)
    return train_batches(dataset, indices, config, **(options | changes))


def indices_of(batch_list) -> list[list[int]]:
    """Return the indices of each batch; labels and images are not needed."""
    return [np.concatenate(share).tolist() for share in batch_list.shares]


def equal(first, second) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_the_holdout_has_as_many_images_of_each_class_and_no_training_image():
    labels = np.random.default_rng(0).integers(0, 5, 400).astype(np.int32)
    training, holdout = holdout_split(labels, 7, 1, "abcde")
    assert np.bincount(labels[holdout]).tolist() == [7] * 5
    assert sorted([*training, *holdout]) == list(range(400))
    assert training.tolist() == sorted(training) and holdout.tolist() == sorted(holdout)
    assert np.array_equal(holdout_split(labels, 7, 1, "abcde")[1], holdout)
    assert not np.array_equal(holdout_split(labels, 7, 2, "abcde")[1], holdout)


def test_a_holdout_that_takes_a_whole_class_is_refused():
    labels = np.array([0] * 9 + [1] * 5, np.int32)
    message = r"data\.holdout_per_class = 5: class 'bee' has only 5 training images; lower it to 4"
    with pytest.raises(UserError, match=message):
        holdout_split(labels, 5, 0, ("ant", "bee"))
    assert len(holdout_split(labels, 4, 0, ("ant", "bee"))[0]) == 6


def test_the_calibration_subset_is_drawn_once_from_the_indices_given():
    indices = np.arange(0, 300, 3)
    chosen = calibration_subset(indices, 20, 0)
    assert len(set(chosen.tolist())) == 20 and set(chosen) <= set(indices)
    assert chosen.tolist() == sorted(chosen)
    assert np.array_equal(chosen, calibration_subset(indices, 20, 0))
    assert not np.array_equal(chosen, calibration_subset(indices, 20, 1))
    assert np.array_equal(calibration_subset(indices, 1000, 0), indices)


def test_an_epoch_is_every_image_once_in_an_order_of_its_own(dataset):
    first, second = (epoch_order(dataset, INDICES, seed=3, epoch=epoch) for epoch in (0, 1))
    assert sorted(first) == INDICES.tolist() == sorted(second)
    assert np.mean(first == second) < 0.1
    other_seed = epoch_order(dataset, INDICES, seed=4, epoch=0)
    assert np.mean(first == other_seed) < 0.1


def test_one_window_is_shuffled_fully(dataset):
    # Neighbours in the order are as far apart as two images drawn at random: 180 / 3.
    order = epoch_order(dataset, INDICES, seed=3, epoch=0)
    assert abs(np.diff(order)).mean() == pytest.approx(60, abs=12)


def test_a_window_touches_few_row_groups_and_other_ones_every_epoch(dataset, monkeypatch):
    mean_bytes = dataset.image_bytes("train") / 25
    monkeypatch.setattr(loader, "WINDOW_BYTES", 5 * mean_bytes)
    firsts = []
    for epoch in range(2):
        order = epoch_order(dataset, np.arange(200), seed=3, epoch=epoch)
        windows = order.reshape(5, 40)  # 5 row groups of 8 images
        groups = [set(dataset.row_groups_of("train", window).tolist()) for window in windows]
        assert [len(found) for found in groups] == [5] * 5
        assert np.mean(np.diff(dataset.row_groups_of("train", windows[0])) == 0) < 0.5
        firsts.append(groups[0])
    assert firsts[0] != firsts[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_shares_of_all_ranks_are_disjoint_and_make_up_the_global_batch(dataset, world_size):
    alone = indices_of(batches(dataset))
    ranks = [
        indices_of(batches(dataset, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {len(alone)} == {5}
    for together, shares in zip(alone, zip(*ranks, strict=True), strict=True):
        assert sorted(sum(shares, [])) == sorted(together) and len(set(together)) == 32
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_read_different_row_groups(dataset):
    read = []
    for rank in range(2):
        seen = sum(indices_of(batches(dataset, rank=rank, world_size=2)), [])
        read.append(set(dataset.row_groups_of("train", np.array(seen)).tolist()))
    assert len(read[0] & read[1]) <= 8  # at the border of the shares; dealt at random, all 25


def test_one_process_reads_every_row_group_once_an_epoch(dataset, monkeypatch):
    # Batches of 32 straddle windows of 40; the cache holds one and a half windows.
    monkeypatch.setattr(loader, "WINDOW_BYTES", 5 * dataset.image_bytes("train") // 25)
    monkeypatch.setattr(loader, "MIN_CACHE_BYTES", 0)
    batch_list = batches(dataset, np.arange(200))
    opened, open_shard = [], Dataset._open
    monkeypatch.setattr(Dataset, "_open", lambda *args: opened.append(args) or open_shard(*args))
    list(batch_list)
    assert len(opened) == 25


def test_the_same_epoch_gives_the_same_tensors_and_another_one_others(dataset):
    first = list(batches(dataset))
    assert equal(first, batches(dataset))
    assert not equal(first, batches(dataset, epoch=1))
    assert not equal(first, batches(dataset, seed=4))
    images, labels = first[0]
    assert (images.dtype, images.shape) == (torch.uint8, (32, 3, 16, 16))
    assert (labels.dtype, labels.shape) == (torch.int64, (32,))


def by_index(batch_list) -> dict[int, tuple[torch.Tensor, int]]:
    return {
        index: (image, label)
        for share, (images, labels) in zip(indices_of(batch_list), batch_list, strict=True)
        for index, image, label in zip(share, images, labels.tolist(), strict=True)
    }


def test_labels_and_augmentation_belong_to_the_image_whatever_its_batch(dataset):
    large, small = by_index(batches(dataset)), by_index(batches(dataset, batch_size=20))
    assert len(set(large) & set(small)) > 150
    for index in set(large) & set(small):
        assert torch.equal(large[index][0], small[index][0])
        assert large[index][1] == small[index][1] == dataset.labels("train")[index]


def test_an_image_is_augmented_anew_every_epoch(dataset):
    first, second = by_index(batches(dataset)), by_index(batches(dataset, epoch=1))
    common = set(first) & set(second)
    assert len(common) > 100
    assert not any(torch.equal(first[index][0], second[index][0]) for index in common)


def test_two_loader_processes_yield_what_none_yields(dataset):
    config = CONFIG.model_copy(update={"loader_workers": 2})
    assert equal(batches(dataset), batches(dataset, config=config))


def test_a_loader_process_without_an_image_of_a_batch_adds_none(dataset):
    config = CONFIG.model_copy(update={"loader_workers": 3})
    found = batches(dataset, INDICES[:2], config=config)
    assert equal(found, batches(dataset, INDICES[:2]))
    assert [len(images) for images, _ in found] == [2]


def test_torchcodec_feeds_the_same_crops_but_for_rounding(dataset):
    pytest.importorskip("torchcodec")
    plain = CONFIG.model_copy(update={"color_jitter": 0.0, "decoder": "torchcodec"})
    found = batches(dataset, config=plain)
    assert equal(found, batches(dataset, config=plain.model_copy(update={"loader_workers": 2})))
    expected = batches(dataset, config=plain.model_copy(update={"decoder": "pillow"}))
    for (images, labels), (others, other_labels) in zip(found, expected, strict=True):
        assert torch.equal(labels, other_labels)
        assert (images.int() - others.int()).abs().max() <= 2  # torch scales with fewer bits


def test_a_decoder_that_is_not_installed_is_refused_before_loading(dataset, monkeypatch):
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"^data\.decoder = 'torchcodec'"):
        batches(dataset, config=CONFIG.model_copy(update={"decoder": "torchcodec"}))


def test_loading_leaves_the_global_generator_alone(dataset):
    state = torch.get_rng_state()
    list(batches(dataset))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_last_incomplete_batch_is_dropped_unless_it_is_the_only_one(dataset):
    assert [len(share) for share in indices_of(batches(dataset, batch_size=90))] == [90, 90]
    assert [len(share) for share in indices_of(batches(dataset, batch_size=100))] == [100]
    [(images, labels)] = batches(dataset, INDICES[:7])
    assert len(images) == len(labels) == 7


def test_shares_of_one_image_are_refused(dataset):
    assert len(batches(dataset, INDICES[:8], world_size=4, rank=3)) == 1
    with pytest.raises(UserError, match="3 images cannot feed 2 .* raise batch_size to 4$"):
        batches(dataset, batch_size=3, world_size=2)
    with pytest.raises(UserError, match="3 images cannot feed 4 training workers .*add images$"):
        batches(dataset, INDICES[:3], world_size=4)


def test_balanced_sampling_draws_every_class_as_often_and_large_ones_not_whole():
    labels = np.repeat(np.arange(4), [90, 7, 2, 1]).astype(np.int32)
    draws = balanced_draws(np.arange(1, 100), labels, seed=0, epoch=0)
    counts = np.bincount(labels[draws % 100])
    assert len(draws) == 99 and sorted(counts) == [24, 25, 25, 25]
    assert len(set(draws.tolist())) == 99 and 0 not in draws % 100
    repeats = np.bincount(draws[labels[draws % 100] == 1] % 100)[90:97]
    assert set(repeats.tolist()) == {3, 4}
    assert np.array_equal(draws, balanced_draws(np.arange(1, 100), labels, seed=0, epoch=0))
    assert not np.array_equal(draws, balanced_draws(np.arange(1, 100), labels, seed=0, epoch=1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_balanced_batches_are_the_same_on_any_number_of_workers(dataset, world_size):
    config = CONFIG.model_copy(update={"balance": "sampling"})
    indices = np.concatenate([np.flatnonzero(dataset.labels("train") == 3)[:2], INDICES])
    indices = np.unique(indices[(dataset.labels("train")[indices] != 3) | (indices < 60)])
    alone = indices_of(batches(dataset, indices, config))
    ranks = [
        indices_of(batches(dataset, indices, config, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(alone):
        assert sorted(batch) == sorted(index for rank in ranks for index in rank[step])
    assert max(map(max, alone)) >= 200  # an image that comes again


def test_an_image_that_is_drawn_again_in_an_epoch_is_augmented_anew(dataset):
    config = CONFIG.model_copy(update={"balance": "sampling"})
    labels = dataset.labels("train")
    few = np.concatenate([np.flatnonzero(labels == 0)[:1], np.flatnonzero(labels == 1)[:7]])
    [(images, drawn)] = batches(dataset, few, config)
    assert drawn.tolist().count(0) == 4
    assert len({image.numpy().tobytes() for image in images[drawn == 0]}) == 4


def test_class_weights_are_one_on_average_and_the_same_sum_for_each_class():
    labels = np.repeat([0, 1, 3], [60, 30, 10])
    weights = class_weights(labels, 5)
    assert weights.dtype == np.float32 and weights[[2, 4]].tolist() == [0, 0]
    assert weights[labels].mean() == pytest.approx(1)
    assert (weights[[0, 1, 3]] * [60, 30, 10]).tolist() == pytest.approx([100 / 3] * 3)
