"""Shows a run's curves in MLflow, TensorBoard or Weights & Biases while it works.

A thread of the driver's process reads what the run directory holds, and publishes what has not
been. So curves have no gap and no step twice, however often the run is killed and resumed;
workers know nothing of it; and what a server missed while it was away is published later.
"""

import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

from nasray.config import Job, Limit, limited_cost
from nasray.errors import first_line
from nasray.pipeline.answers import limits_of
from nasray.pipeline.run import FREE_KEYS, Run
from nasray.pipeline.trackers import TRACKERS, Points, Tracker
from nasray.search.candidate import FAILED, Candidate
from nasray.search.history import Follower
from nasray.storage import files as storage
from nasray.storage import layout

logger = logging.getLogger(__name__)

LOOK_EVERY_S, LOOK_FAR_EVERY_S = 2.0, 10.0  # on a disk, and in a bucket
RETRY_S = 60.0  # after a failure
LONGEST_REASON = 200  # characters of it that are shown
JOIN_S = 30.0  # for what is left to publish when the run ends
ANSWER = ("val_top1", "val_balanced_top1", "supernet_top1")  # of result.json


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Publish the curves of `run` during the block, wherever its job says.

    Nothing that fails there ends the run or keeps it waiting, except for the last of it, for
    JOIN_S seconds at most.

    Raises:
        UserError: a package or a setting of a tracker is missing.
    """
    if not run.job.tracking.to:
        yield
        return
    record = Record(run.folder, run.job)
    identity = Identity(run.folder, groups_of(record.points()))
    trackers = [TRACKERS[each](run, identity.name) for each in run.job.tracking.to]
    for tracker in trackers:
        logger.info("tracking: %s", tracker.where)
    ended, outcome = threading.Event(), ["FAILED"]

    def follow() -> None:
        publishers = list(map(Publisher, trackers))
        pause_s = LOOK_FAR_EVERY_S if storage.is_uri(run.folder) else LOOK_EVERY_S
        is_last = False
        while not is_last:
            is_last = ended.wait(pause_s)
            # A storage is away, or a file has just been removed; the next look may succeed.
            with suppress(OSError, ValueError):
                # Raises if another process has taken over the folder, and publishes there now.
                storage.guards.get(run.folder, lambda: None)()
                points = record.points()
                identity.note(groups_of(points))
                settings = settings_of(run.job, identity.groups)
                for each in publishers:
                    each.publish(points, settings, is_last=is_last)
        for each in publishers:
            each.close(outcome[0])

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
        outcome[0] = "FINISHED"
    except KeyboardInterrupt:
        outcome[0] = "KILLED"
        raise
    finally:
        ended.set()
        thread.join(JOIN_S)
        if thread.is_alive():
            logger.warning(
                "tracking: the last of it takes more than %.0f s and is given up; the same command "
                "again publishes it",
                JOIN_S,
            )


class Publisher:
    """Publishes to one tracker what is new there; connects again some time after a failure."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.published: dict[str, set[int]] | None = None  # steps by curve; None: not connected
        self.retry_at, self.is_warned = 0.0, False

    def publish(self, points: Points, settings: dict[str, str], *, is_last: bool = False) -> None:
        """Publish what is new of `points`; after a failure only if RETRY_S have passed."""
        if is_last or time.monotonic() >= self.retry_at:
            self._try(lambda: self._publish(points, settings))

    def close(self, outcome: str) -> None:
        """Say how the run has ended."""
        if self.published is not None:
            self._try(lambda: self.tracker.close(outcome))

    def _publish(self, points: Points, settings: dict[str, str]) -> None:
        if self.published is None:
            self.published = self.tracker.connect()
        new = {}
        for key, curve in points.items():
            known = self.published.get(key, set())
            if steps := {step: value for step, value in curve.items() if step not in known}:
                new[key] = steps
        self.tracker.write(new, settings)
        for key, curve in new.items():
            self.published.setdefault(key, set()).update(curve)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of whatever client: a run does not end for its curves
            # A part may be published; what it has is asked again.
            self.published, self.retry_at = None, time.monotonic() + RETRY_S
            if not self.is_warned:
                logger.warning(
                    "tracking by %s failed (%s); the run goes on, and what is missing there is "
                    "published once it works",
                    self.tracker.title,
                    first_line(error)[:LONGEST_REASON],
                )
            self.is_warned = True


class Record:
    """What a run directory holds to be shown; what cannot change any more is not read again."""

    def __init__(self, folder: str, job: Job) -> None:
        self.folder, self.job = folder, job
        self.evaluations = Follower(storage.join(folder, layout.HISTORY))
        self.retrained: dict[str, Points] = {}  # of networks that are done

    def points(self) -> Points:
        """All curves so far; steps are epochs or evaluations that are done, or 0 of an answer."""
        teacher = storage.join(layout.TEACHER_RUN, layout.SUPERNET_CURVES)
        return (
            self._curve("teacher", teacher)
            | self._curve("supernet", layout.SUPERNET_CURVES)
            | self._search()
            | self._retrain()
        )

    def _curve(self, name: str, path: str) -> Points:
        found: Points = {}
        path = storage.join(self.folder, path)
        for row in storage.read_rows(path, "epoch") if storage.exists(path) else ():
            for key, value in row.items():
                is_number = isinstance(value, int | float) and math.isfinite(value)
                if key != "epoch" and is_number:
                    found.setdefault(f"{name}/{key}", {})[row["epoch"] + 1] = float(value)
        return found

    def _search(self) -> Points:
        """The best fitness by evaluations; where limits have answers of their own, of each one."""
        self.evaluations.look()
        every, config = list(self.evaluations.in_order), self.job.search
        best = _best_so_far(every)
        found = {"search/best_fitness": best, "search/evaluations": {k: float(k) for k in best}}
        # Those that have costs.
        complete = list(takewhile(lambda each: isinstance(each, Candidate), every))
        own = [each for each in config.limits if each.cost == limited_cost(config.limits)]
        for limit in own if config.one_by_one and len(own) > 1 else ():
            name = f"{limit.cost}-{limit.max:.12g}".replace("+", "")  # no sign that MLflow refuses
            curve = _best_so_far(complete, limits_of(self.job, limit))
            found[f"search/best_within/{name}"] = curve
        return {key: curve for key, curve in found.items() if curve}

    def _retrain(self) -> Points:
        found: Points = {}
        for name in storage.list_numbered(storage.join(self.folder, layout.RETRAIN)):
            found |= self.retrained.get(name) or self._read_retrained(name)
        return found

    def _read_retrained(self, name: str) -> Points:
        """The curves of the trials of one network and, once it is done, its answer."""
        folder = layout.retrained(name)
        path = storage.join(self.folder, folder, layout.RESULT)
        result = storage.read_json(path) if storage.exists(path) else {}  # before its last curves
        found: Points = {}
        for trial in storage.list_names(storage.join(self.folder, folder)):
            if trial.startswith(layout.TRIAL):
                found |= self._curve(f"{folder}/{trial}", f"{folder}/{trial}/{layout.CURVES}")
        if "costs" in result:  # they are added last
            costs = {"params", "macs", *(limit.cost for limit in self.job.search.limits)}
            answer = {key: result[key] for key in ANSWER if key in result}
            answer |= {key: value for key, value in result["costs"].items() if key in costs}
            found |= {f"{folder}/{key}": {0: float(value)} for key, value in answer.items()}
            self.retrained[name] = found
        return found


def _best_so_far(evaluations: Sequence[Any], limits: Sequence[Limit] = ()) -> dict[int, float]:
    """The highest fitness within `limits` by the number of evaluations, from the first one on."""
    best, found = FAILED, {}
    for number, each in enumerate(evaluations, 1):
        is_estimate = bool(each.judged)  # it was stopped early
        if not is_estimate and all(limit.holds(each.costs[limit.cost]) for limit in limits):
            best = max(best, each.fitness)
        if best > FAILED:
            found[number] = float(best)
    return found


def settings_of(job: Job, groups: set[str]) -> dict[str, str]:
    """The job's settings by dotted names, once there are curves of what they may not change in.

    Without those that may always change, for what is published of them cannot be.
    """
    if not groups:
        return {}
    left_out = {"seed", "tracking"} | {"search", "retrain"} - groups
    return {"seed": str(job.seed)} | {
        f"{section}.{key}": value if isinstance(value, str) else json.dumps(value)
        for section, values in job.model_dump(mode="json", exclude=left_out).items()
        for key, value in values.items()
        if (section, key) not in FREE_KEYS
    }


def groups_of(points: Points) -> set[str]:
    """What there are curves of: teacher, supernet, search, retrain."""
    return {key.partition("/")[0] for key in points}


class Identity:
    """The name under which a run is tracked, in RUN/tracking.json, and what has been so far.

    Where a part is no longer there at all, as in a copy that is searched again, or after `nasray
    retrain --again`, the run is tracked under another name, lest two of them make one curve.
    """

    def __init__(self, folder: str, groups: set[str]) -> None:
        self.path = storage.join(folder, layout.TRACKED)
        self.groups: set[str] = set()
        if storage.exists(self.path):
            known = storage.read_object(self.path, "name", "groups")
            self.name, self.groups = known["name"], set(known["groups"])
        if not storage.exists(self.path) or self.groups - groups:
            self.name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
            self.groups = set()
            self._write()

    def note(self, groups: set[str]) -> None:
        """Record of what there are curves, before they are published."""
        if groups - self.groups:
            self.groups |= groups
            self._write()

    def _write(self) -> None:
        storage.write_json(self.path, {"name": self.name, "groups": sorted(self.groups)})
