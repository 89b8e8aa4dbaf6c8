"""When a training that lost too many workers goes on, and when it has failed."""

import pytest
from ray.train import ControllerError, TrainingFailedError

from nasray.errors import UserError
from nasray.training.workers import resumed


class Training:
    """Fails after so many epochs, each time it is run, and returns once `epochs` are recorded."""

    def __init__(self, epochs: int, until: list[int], error: Exception | None = None) -> None:
        self.epochs, self.until = epochs, until
        self.error = error or TrainingFailedError("a worker died")
        self.recorded = self.runs = 0

    def train(self) -> str:
        self.runs += 1
        self.recorded = self.until.pop(0)
        if self.recorded < self.epochs:
            raise self.error
        return "trained"


def test_a_training_that_completes_epochs_is_resumed_however_often_it_loses_workers():
    training = Training(9, [1, 2, 4, 5, 8, 9])
    assert resumed(training.train, lambda: training.recorded) == "trained"
    assert training.runs == 6


def test_a_training_that_crashes_in_the_same_epoch_again_has_failed():
    training = Training(9, [3, 3, 9])
    with pytest.raises(TrainingFailedError, match="a worker died"):
        resumed(training.train, lambda: training.recorded)
    assert training.runs == 2


def test_what_a_user_must_mend_is_not_tried_again():
    training = Training(9, [3, 9], ControllerError(UserError("loss: set learning_rate")))
    with pytest.raises(UserError, match="set learning_rate"):
        resumed(training.train, lambda: training.recorded)
    assert training.runs == 1
