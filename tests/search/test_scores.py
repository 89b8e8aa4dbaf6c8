"""Top-1, each class by itself, the mean over classes; the file of predictions."""

import numpy as np
import pytest

from nasray.errors import UserError
from nasray.search.scores import Predictions, balanced_top1, by_class, top1

LABELS = np.array([0, 0, 0, 0, 0, 0, 1, 1, 3])
PREDICTED = np.array([0, 0, 0, 0, 0, 1, 1, 0, -1])  # of class 2 there is no image


def predictions(**changes) -> Predictions:
    values = {"classes": ("ant", "bée", "cat", "dog"), "labels": LABELS, "predicted": PREDICTED}
    values |= {"names": [f"{row}.png" for row in range(9)], "thumbnails": [b"jpeg", *[None] * 8]}
    values["probability"] = np.linspace(0.5, 0.9, 9, dtype=np.float32)
    return Predictions(**(values | changes))


def test_the_mean_over_classes_leaves_out_those_without_images():
    correct = PREDICTED == LABELS
    assert top1(correct, LABELS) == 6 / 9
    assert balanced_top1(correct, LABELS) == pytest.approx((5 / 6 + 1 / 2 + 0) / 3)
    found, images = by_class(correct, LABELS, 4)
    assert images.tolist() == [6, 2, 0, 1]
    assert np.isnan(found).tolist() == [False, False, True, False]
    assert balanced_top1(np.ones(9, bool), LABELS) == 1.0


def test_confusions_and_the_errors_that_the_network_is_most_sure_of():
    said = predictions()
    everything = said.confusion(np.arange(4))
    assert everything.tolist() == [[5, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    assert said.confusion(np.array([1, 3])).tolist() == [[1, 0], [0, 0]]
    assert said.confused_pairs().tolist() == [[0, 1, 1], [1, 0, 1]]
    twice = predictions(predicted=np.array([1, 0, 0, 0, 0, 1, 1, 0, -1]))
    assert twice.confused_pairs()[0].tolist() == [0, 1, 2]
    assert said.most_confident_errors(9).tolist() == [7, 5]  # 8 has no prediction
    assert said.most_confident_errors(1).tolist() == [7]


def test_the_file_holds_all_of_it_and_a_damaged_one_is_named(tmp_path):
    said, path = predictions(), str(tmp_path / "validation.parquet")
    said.write(path)
    found = Predictions.read(path)
    for name in ("classes", "names", "thumbnails"):
        assert getattr(found, name) == getattr(said, name)
    for name in ("labels", "predicted", "probability"):
        assert np.array_equal(getattr(found, name), getattr(said, name))
    content = (tmp_path / "validation.parquet").read_bytes()
    for damaged in (b"", b"none", content[: len(content) // 2]):
        (tmp_path / "validation.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match="validation.parquet: damaged"):
            Predictions.read(path)
