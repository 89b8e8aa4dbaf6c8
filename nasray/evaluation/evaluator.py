"""Subnet evaluation on a cluster: the Ray actor around evaluate.py, and a pool of it.

Actors are built from paths and small values and load weights and images themselves. No result
depends on earlier calls, so a lost actor is replaced and its architecture evaluated again with the
same result.
"""

import gc
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import ray
import torch

from nasray.checkpoint import load_supernet
from nasray.cluster.placement import avoiding, evaluator_options, nodes_with_room
from nasray.cluster.worker import worker_device
from nasray.config import Job
from nasray.data.splits import JobImages
from nasray.devices import choose_kernels, precisions, use_precision
from nasray.errors import EvaluationError, UserError
from nasray.evaluation.batches import UInt8Images, release_graph_memory
from nasray.evaluation.evaluate import evaluate, outcomes
from nasray.evaluation.pool import Pool
from nasray.search.candidate import Evaluation
from nasray.search.racing import CorrectnessModel, StoppingRule, measured
from nasray.search.scores import FITNESS, LOG_LIKELIHOOD
from nasray.spaces import make_space
from nasray.spaces.space import Architecture

logger = logging.getLogger(__name__)

# Keep freed memory in the process: returning it to the kernel costs page faults (20 %).
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # glibc's highest
    "OMP_WAIT_POLICY": "PASSIVE",
}

# The share of an evaluator's GPU memory that decoded images may take, so that they are copied to
# the GPU once instead of for every architecture.
IMAGES_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """What an evaluator is built from; small, so that Ray can start it on any node."""

    supernet: str  # path
    digest: str  # of the supernet's file, which must not change during a search
    data_path: str
    job: Job
    fingerprint: str = ""  # of the data set, which must be the same on every node; empty: any
    precision: str = ""  # of the evaluations that are on record


@dataclass(frozen=True, kw_only=True)
class Request:
    """One evaluation. `calibration` None: as the job says; else as evaluate() takes it."""

    arch: Architecture
    rule: StoppingRule | None = None  # without its model; None: evaluate on all images
    model: ray.ObjectRef | None = None  # of the rule
    on_validation: bool = False  # evaluated on validation images instead of the hold-out
    calibration: int | Literal["inherited", "batch"] | None = None


@ray.remote
class Evaluator:
    """Evaluates architectures with one supernet's weights; its node's evaluators share images."""

    def __init__(self, task: EvaluationTask) -> None:
        self.task = task

    def node(self) -> str:
        """Return the id of the node."""
        return ray.get_runtime_context().get_node_id()

    def ready(self) -> list[str]:
        """Load weights and images; return the precisions that the device computes.

        Not in __init__, whose exceptions Ray turns into text.
        """
        task, job = self.task, self.task.job
        choose_kernels(deterministic=job.compute.deterministic)
        self.device = worker_device(job.compute.cpus_per_evaluator)
        self.images = JobImages(job, task.data_path, fingerprint=task.fingerprint)
        space = make_space(job.space, len(self.images.dataset.classes))
        # Of the latest rule, as it was sent and as it was received.
        self.model: tuple[ray.ObjectRef | None, CorrectnessModel | None] = None, None
        self.device_images: dict[int, torch.Tensor] = {}  # images by the id of their array
        self.spares_memory = False  # once it has run out: no images on the GPU, no graphs
        self.images.calibration(job.search.calibration_images)  # decoded before the first request
        self.supernet = load_supernet(task.supernet, space, self.device, digest=task.digest)
        context = ray.get_runtime_context()
        self.origin = {
            "evaluator": (context.get_actor_id() or "no actor")[:12],
            "node": ray.util.get_node_ip_address(),
        }
        return precisions(self.device)

    def use(self, precision: str) -> None:
        """Compute in this precision from now on."""
        use_precision(precision, self.device)

    def evaluate(self, attempt: int, request: Request) -> Evaluation:
        """Recalibrate BN for an architecture and measure its fitness.

        Raises:
            EvaluationError: memory ran out, with the job's batch size and with half of it.
        """
        size = self.task.job.search.batch_size
        sizes = [size, max(2, size // 2)]
        if self.device == "cuda" and not self.spares_memory:
            sizes = [size, *sizes]  # images and graphs make room before the batch is halved
        started = time.monotonic()
        for batch_size in sizes:
            outcome, reason = self._measure(request, batch_size)
            if outcome is not None:
                break
            # Here the error is gone, whose traceback held the tensors of the failed attempt.
            logger.warning("%s; trying again with less memory", reason)
            self._free_memory()
        else:
            raise EvaluationError(
                f"out of memory with search.batch_size = {size}, and with {sizes[-1]}: {reason}; "
                "lower it, or give evaluators more memory"
            )
        images, labels = self._images(request)
        correct = scores = outcome
        if self.is_likelihood:
            correct, scores = outcome[:, 0] == 1, outcome[:, 1].astype(np.float16)
        found = measured(correct, len(images), self._rule(request))
        if request.rule is None:
            found["fitness"] = FITNESS[self.task.job.search.fitness].of(scores, labels)
        if self.is_likelihood:
            found["log_likelihoods"] = scores.tobytes()
        return Evaluation(
            **found,
            seconds=time.monotonic() - started,
            batch_size=batch_size,
            attempt=attempt,
            **self.origin,
        )

    @property
    def is_likelihood(self) -> bool:
        """Whether the fitness is made of log-probabilities, for which nothing is stopped early."""
        return self.task.job.search.fitness == LOG_LIKELIHOOD

    def _measure(self, request: Request, batch_size: int) -> tuple[np.ndarray | None, str]:
        """What correct_mask() finds, or outcomes() for a fitness that is made of these; or None,
        and in which words memory ran out.
        """
        space, arch = self.supernet.space, request.arch
        try:
            images, labels = self._images(request)
            found = evaluate(
                self.supernet.extract(arch),
                self._calibration(request.calibration),
                self._on_device(images),
                labels,
                batch_size=batch_size,
                device=self.device,
                resolution=space.resolution_of(arch),
                rule=self._rule(request),
                graphs=not self.spares_memory,
                measure=outcomes if self.is_likelihood else None,
            )
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            return None, str(error)
        return found, ""

    def _free_memory(self) -> None:
        """Keep nothing on the GPU but the supernet, from now on."""
        gc.collect()
        if self.device == "cuda":
            self.spares_memory = True
            self.device_images.clear()
            release_graph_memory()

    def _images(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        return self.images.validation if request.on_validation else self.images.holdout

    def _rule(self, request: Request) -> StoppingRule | None:
        if request.rule is None:
            return None
        if request.model != self.model[0]:
            self.model = request.model, ray.get(request.model)
        return replace(request.rule, model=self.model[1])

    def _calibration(self, wanted: int | str | None) -> UInt8Images | str:
        if isinstance(wanted, str):
            return wanted
        images = self.images.calibration(wanted or self.task.job.search.calibration_images)
        return self._on_device(images)

    def _on_device(self, images: np.ndarray) -> UInt8Images:
        """`images` on the GPU if they fit beside those that are there, else unchanged."""
        if self.device == "cpu" or self.spares_memory:
            return images
        if id(images) not in self.device_images:
            share = min(1.0, self.task.job.compute.gpus_per_evaluator)
            free, total = torch.cuda.mem_get_info()
            taken = sum(each.nbytes for each in self.device_images.values())
            if images.nbytes > min(IMAGES_SHARE * share * total - taken, free / 2):
                return images
            with warnings.catch_warnings():  # that the array is read-only; this copies it
                warnings.simplefilter("ignore")
                self.device_images[id(images)] = torch.from_numpy(images).to(self.device)
        return self.device_images[id(images)]


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the host or of the GPU.

    For CPU memory, pinned memory, cuDNN and cuBLAS torch raises a RuntimeError like any other.
    """
    words = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        each in str(error) for each in words
    )


class EvaluatorPool(Pool):
    """A pool that evaluates architectures of one supernet, for a search or a list of requests.

    All evaluators compute in one precision, the task's, or the best of the first one: `record` is
    called with that. A node without it is left out.
    """

    def __init__(
        self, task: EvaluationTask, record: Callable[[str], None] = lambda precision: None
    ) -> None:
        self.precision, self.record = task.precision, record
        self.batch_size = task.job.search.batch_size
        compute = task.job.compute
        options = evaluator_options(compute) | {"runtime_env": {"env_vars": ENVIRONMENT}}
        super().__init__(
            lambda left_out: Evaluator.options(**avoiding(options, left_out)).remote(task),
            number=compute.num_evaluators,
            max_failures=compute.max_failures,
            limit_s=compute.time_limit_s,
            nodes=lambda: nodes_with_room(options["num_cpus"], options["num_gpus"]),
            run=task.supernet.rsplit("/", 2)[-2],
        )
        self.sent: tuple[CorrectnessModel | None, ray.ObjectRef | None] = None, None  # latest

    def admit(self, actor: ray.actor.ActorHandle, found: list[str]) -> None:
        """Have an evaluator compute in the precision of all, one of those it has `found`.

        Raises:
            UserError: it cannot.
        """
        if not self.precision:
            self.precision = found[0]
            self.record(self.precision)
        if self.precision not in found:
            raise UserError(
                f"the evaluations of this run are computed in {self.precision}, of which its "
                f"{'CPU' if found == ['float32'] else 'GPU'} is not capable: evaluate on nodes "
                "that are (compute.accelerator_type, compute.evaluator_labels), or use another run "
                "directory"
            )
        actor.use.remote(self.precision)

    def next(self) -> tuple[int, Evaluation]:
        """Return as Pool.next() does; warn if a smaller batch than the job's was evaluated."""
        key, evaluation = super().next()
        if evaluation.batch_size not in (0, self.batch_size):
            logger.warning(
                "node %s evaluated with batches of %d, as memory ran out with search.batch_size = "
                "%d: BN statistics differ in the last digits from those of other nodes",
                evaluation.node,
                evaluation.batch_size,
                self.batch_size,
            )
            self.batch_size = evaluation.batch_size  # said once
        return key, evaluation

    def submit(self, key: int, arch: Architecture, rule: StoppingRule | None = None) -> None:
        """Ask for the hold-out top-1 of `arch`; stop early where `rule` says so."""
        if rule is None:
            super().submit(key, Request(arch=arch))
            return
        if rule.model is not self.sent[0]:  # sent once for all candidates
            self.sent = rule.model, ray.put(rule.model)
        request = Request(arch=arch, rule=replace(rule, model=None), model=self.sent[1])
        super().submit(key, request)

    def evaluate(
        self,
        requests: Sequence[Request],
        show: Callable[[int, str], None] = lambda done, text: None,
    ) -> list[Evaluation]:
        """Run all `requests` and return their results in the same order."""
        for key, request in enumerate(requests):
            super().submit(key, request)
        found: dict[int, Evaluation] = {}
        while len(found) < len(requests):
            key, evaluation = self.next()
            found[key] = evaluation
            show(len(found), "")
        return [found[key] for key in range(len(requests))]
