"""Subnet evaluation on a cluster: Ray actors around evaluate.py, and the pool of them.

Actors are built from paths and small values, load weights and images themselves, and keep
nothing between calls, so a lost one is replaced and its candidate evaluated again with the
same result.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from nasray.checkpoint import load_supernet
from nasray.config import Job
from nasray.errors import EvaluationError
from nasray.evaluate import evaluate
from nasray.images import Images, JobImages
from nasray.spaces import make_space
from nasray.spaces.elastic import Supernet
from nasray.spaces.space import Architecture
from nasray.trainer import on_gpu, raise_user_error, worker_device

logger = logging.getLogger(__name__)

# Memory once got stays with an evaluator. Given back and got again at every layer, its pages
# are cleared by the kernel again, which slowed two evaluators on one machine by a fifth.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # glibc's highest
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """All an evaluator needs to know; small, so that Ray can restart it anywhere."""

    supernet: str  # path
    data_path: str
    job: Job


@dataclass(frozen=True)
class Evaluation:
    fitness: float  # top-1, a fraction
    seconds: float


@ray.remote
class Evaluator:
    """Evaluates architectures with one supernet's weights on images that its node shares."""

    def __init__(self, task: EvaluationTask) -> None:
        self.task = task
        self.supernet: Supernet | None = None

    def evaluate(self, arch: Architecture, on_validation: bool) -> Evaluation:
        """Recalibrate BN for `arch` and measure its top-1 on hold-out or validation images."""
        if self.supernet is None:
            self._load()
        started = time.monotonic()
        images, labels = self._judged_on(on_validation)
        fitness = evaluate(
            self.supernet.extract(arch),
            self.calibration,
            images,
            labels,
            batch_size=self.batch_size,
            device=self.device,
            side=self.supernet.space.side(arch),
        )
        return Evaluation(fitness, time.monotonic() - started)

    def _load(self) -> None:
        """Load weights and images. Not done in __init__, whose errors Ray turns into text."""
        task, job = self.task, self.task.job
        self.device = worker_device(job.compute.cpus_per_evaluator)
        self.batch_size = job.search.batch_size
        self.images = JobImages(job, task.data_path)
        space = make_space(job.space, len(self.images.dataset.classes))
        self.calibration = self.images.calibration(job.search.calibration_images)
        self.opened: dict[bool, Images] = {}
        self.supernet = load_supernet(task.supernet, space, self.device)

    def _judged_on(self, on_validation: bool) -> Images:
        if on_validation not in self.opened:
            images = self.images.validation() if on_validation else self.images.holdout()
            self.opened[on_validation] = images
        return self.opened[on_validation]


class EvaluatorPool:
    """Calls like a function: architectures in, one Evaluation each out, in the order asked.

    The order in which evaluations finish differs from run to run, so it must never reach a
    search algorithm. Use as a context manager: leaving it ends the actors.
    """

    def __init__(self, task: EvaluationTask) -> None:
        self.task = task
        compute = task.job.compute
        self.max_failures = compute.max_failures
        gpus = compute.gpus_per_evaluator
        self.options = {
            "num_cpus": compute.cpus_per_evaluator,
            "num_gpus": gpus if on_gpu(compute, gpus * compute.num_evaluators) else 0,
            "runtime_env": {"env_vars": ENVIRONMENT},
        }
        self.evaluators = [self._start() for _ in range(compute.num_evaluators)]

    def __enter__(self) -> "EvaluatorPool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for evaluator in self.evaluators:
            ray.kill(evaluator)

    def __call__(
        self,
        archs: Sequence[Architecture],
        finished: Callable[[int, Evaluation], None] = lambda index, evaluation: None,
        *,
        on_validation: bool = False,
    ) -> list[Evaluation]:
        """Evaluate `archs`; `finished(index, evaluation)` is told of each one as it ends.

        On the hold-out images, or for a final comparison on the validation folder's.
        """
        waiting = list(range(len(archs)))[::-1]
        idle, running = list(self.evaluators), {}
        results: dict[int, Evaluation] = {}
        losses = [0] * len(archs)
        while waiting or running:
            while waiting and idle:
                index, evaluator = waiting.pop(), idle.pop()
                running[evaluator.evaluate.remote(archs[index], on_validation)] = index, evaluator
            [done], _ = ray.wait(list(running), num_returns=1)
            index, evaluator = running.pop(done)
            try:
                results[index] = ray.get(done)
                finished(index, results[index])
            except (RayActorError, OutOfMemoryError) as error:  # the process or its node is gone
                losses[index] += 1
                if losses[index] > self.max_failures:
                    raise EvaluationError(
                        f"{losses[index]} evaluators in a row died evaluating "
                        f"{archs[index]}: {error}"
                    ) from error
                logger.warning("an evaluator was lost; its candidate goes to a new one")
                evaluator = self._replace(evaluator)
                waiting.append(index)
            except RayTaskError as error:  # the evaluation itself raised
                raise_user_error(error)
                raise EvaluationError(f"evaluating {archs[index]} failed: {error}") from error
            idle.append(evaluator)
        return [results[index] for index in range(len(archs))]

    def _start(self) -> ray.actor.ActorHandle:
        return Evaluator.options(**self.options).remote(self.task)

    def _replace(self, lost: ray.actor.ActorHandle) -> ray.actor.ActorHandle:
        fresh = self._start()
        self.evaluators[self.evaluators.index(lost)] = fresh
        return fresh
