"""What Ray tells Prometheus of a run, each name after "ray_"; clusters/grafana.json shows it.

Counters end in _total, which Ray would add. The figures of a process go when it ends.
"""

from ray.util.metrics import Counter, Gauge

EVALUATIONS = "nasray_evaluations_total"
REPEATED = "nasray_repeated_evaluations_total"
LOST = "nasray_lost_evaluators_total"
EVALUATORS = "nasray_evaluators"
BEST = "nasray_best_fitness"
TRAINING = "nasray_training_images_per_second"

WHAT = {  # with their tags
    EVALUATIONS: ("Evaluations that ended; state: succeeded or failed", ("run", "state")),
    REPEATED: ("Attempts that were lost or failed, and are made again", ("run",)),
    LOST: ("Evaluators that were lost", ("run",)),
    EVALUATORS: ("Evaluators by state: starting, idle or busy", ("run", "state")),
    BEST: ("The best fitness on the hold-out images", ("run",)),
    TRAINING: ("Images trained on in a second of the latest epoch, all in all", ("run", "network")),
}


class PoolMetrics:
    """The metrics of the evaluators of a run, told by its driver."""

    def __init__(self, run: str) -> None:
        self.evaluations, self.repeated = _counter(EVALUATIONS, run), _counter(REPEATED, run)
        self.lost, self.evaluators = _counter(LOST, run), _gauge(EVALUATORS, run)
        self.best = _gauge(BEST, run)

    def ended(self, state: str) -> None:
        """Count an evaluation that "succeeded" or "failed"."""
        self.evaluations.inc(tags={"state": state})

    def have(self, *, starting: int, idle: int, busy: int) -> None:
        """Tell how many evaluators there are."""
        for state, number in (("starting", starting), ("idle", idle), ("busy", busy)):
            self.evaluators.set(number, tags={"state": state})


def training(run: str, network: str, images_per_second: float) -> None:
    """Tell how quickly `network` of a run, such as "supernet" or "retrain/0/trial-0", trains."""
    _gauge(TRAINING, run).set(images_per_second, tags={"network": network})


def _counter(name: str, run: str) -> Counter:
    counter = Counter(name, *WHAT[name])
    counter.set_default_tags({"run": run})
    return counter


def _gauge(name: str, run: str) -> Gauge:
    gauge = Gauge(name, *WHAT[name])
    gauge.set_default_tags({"run": run})
    return gauge
