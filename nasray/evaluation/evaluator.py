"""Subnet evaluation on a cluster: the Ray actor around evaluate.py, and a pool of it.

Actors are built from paths and small values, load weights and images themselves, and keep
nothing between calls, so a lost one is replaced and its candidate evaluated again with the
same result.
"""

import gc
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import ray
import torch

from nasray.checkpoint import load_supernet
from nasray.cluster.placement import evaluator_options
from nasray.cluster.worker import worker_device
from nasray.config import Job
from nasray.data.splits import JobImages
from nasray.errors import EvaluationError
from nasray.evaluation.batches import UInt8Images
from nasray.evaluation.evaluate import evaluate
from nasray.evaluation.pool import Pool
from nasray.search.candidate import Evaluation
from nasray.search.racing import CorrectnessModel, StoppingRule, measured
from nasray.spaces import make_space
from nasray.spaces.space import Architecture

logger = logging.getLogger(__name__)

# Memory once got stays with an evaluator. Given back and got again at every layer, its pages
# are cleared by the kernel again, which slowed two evaluators on one machine by a fifth.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # glibc's highest
    "OMP_WAIT_POLICY": "PASSIVE",
}

# Of an evaluator's share of its GPU's memory: what decoded images may take, so that they are
# copied there once and not again for every candidate.
IMAGES_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """All an evaluator needs to know; small, so that Ray can restart it anywhere."""

    supernet: str  # path
    digest: str  # of the supernet's file, which must not change meanwhile
    data_path: str
    job: Job


@dataclass(frozen=True, kw_only=True)
class Request:
    """One evaluation. `calibration`: None, as the job says; else as in a calibration study."""

    arch: Architecture
    rule: StoppingRule | None = None  # without its model; None: evaluate on all images
    model: ray.ObjectRef | None = None  # of the rule
    on_validation: bool = False  # images to judge on, instead of those held out
    calibration: int | Literal["inherited", "batch"] | None = None


@ray.remote
class Evaluator:
    """Evaluates architectures with one supernet's weights on images that its node shares."""

    def __init__(self, task: EvaluationTask) -> None:
        self.task = task

    def ready(self) -> str:
        """Load weights and images, and return the id of the node.

        Not done in __init__, whose errors Ray turns into text.
        """
        task, job = self.task, self.task.job
        self.device = worker_device(
            job.compute.cpus_per_evaluator, deterministic=job.compute.deterministic
        )
        self.images = JobImages(job, task.data_path)
        space = make_space(job.space, len(self.images.dataset.classes))
        # Of the latest rule, as it was sent and as it was received.
        self.model: tuple[ray.ObjectRef | None, CorrectnessModel | None] = None, None
        self.on_device: dict[int, torch.Tensor] = {}  # images by the id of their array
        self.images_bytes = self._bytes_for_images()
        self._calibration(None)
        self.supernet = load_supernet(task.supernet, space, self.device, digest=task.digest)
        context = ray.get_runtime_context()
        self.whereabouts = {
            "evaluator": (context.get_actor_id() or "no actor")[:12],
            "node": ray.util.get_node_ip_address(),
        }
        return context.get_node_id()

    def evaluate(self, attempt: int, request: Request) -> Evaluation:
        """Recalibrate BN for an architecture and measure its top-1."""
        images = self.images.validation if request.on_validation else self.images.holdout
        images = self._placed(images[0]), images[1]
        calibration = self._calibration(request.calibration)
        rule = self._rule(request)
        batch_size = self.task.job.search.batch_size
        started = time.monotonic()
        correct = None
        try:
            correct = self._judge(request.arch, calibration, images, rule, batch_size)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            # As text: a record that is kept would keep the error, and so what was computed.
            logger.warning("%s; trying again with batches of half the size", str(error))
        if correct is None:  # and the error gone, which held what the first try had computed
            batch_size = max(2, batch_size // 2)
            correct = self._judge_in_less(request.arch, calibration, images, rule, batch_size)
        return Evaluation(
            **measured(correct, len(images[0]), rule),
            seconds=time.monotonic() - started,
            batch_size=batch_size,
            attempt=attempt,
            **self.whereabouts,
        )

    def _judge(
        self,
        arch: Architecture,
        calibration: Any,
        images: tuple[UInt8Images, np.ndarray],
        rule: StoppingRule | None,
        batch_size: int,
    ) -> np.ndarray:
        return evaluate(
            self.supernet.extract(arch),
            calibration,
            *images,
            batch_size=batch_size,
            device=self.device,
            resolution=self.supernet.space.resolution_of(arch),
            rule=rule,
        )

    def _judge_in_less(self, *arguments: Any) -> np.ndarray:
        """_judge() after memory ran out once."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            self.images_bytes = 0  # nothing more of them goes there
        try:
            return self._judge(*arguments)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            raise EvaluationError(
                f"out of memory with search.batch_size = {self.task.job.search.batch_size}, and "
                f"with {arguments[-1]}: {error}; lower it, or give evaluators more memory"
            ) from None

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
        return self._placed(images)

    def _bytes_for_images(self) -> float:
        """How many bytes of images this evaluator may keep on its GPU."""
        if self.device != "cuda":
            return 0
        share = min(1.0, self.task.job.compute.gpus_per_evaluator)
        return IMAGES_SHARE * share * torch.cuda.get_device_properties(0).total_memory

    def _placed(self, images: np.ndarray) -> UInt8Images:
        """`images` on the GPU, if they fit there beside those that are there; else as they are."""
        if id(images) not in self.on_device and images.nbytes <= self.images_bytes:
            self.images_bytes -= images.nbytes
            with warnings.catch_warnings():  # they are a read-only map, of which this is a copy
                warnings.simplefilter("ignore")
                self.on_device[id(images)] = torch.from_numpy(images).to(self.device)
        return self.on_device.get(id(images), images)


def _out_of_memory(error: Exception) -> bool:
    """Whether torch or numpy found no memory.

    Of CPUs, pinned memory and what cuDNN and cuBLAS need, torch says so only in words.
    """
    words = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        each in str(error) for each in words
    )


class EvaluatorPool(Pool):
    """Evaluates architectures of one supernet on a cluster; a pool for the search loop."""

    def __init__(self, task: EvaluationTask) -> None:
        compute = task.job.compute
        options = evaluator_options(compute) | {"runtime_env": {"env_vars": ENVIRONMENT}}
        super().__init__(
            lambda: Evaluator.options(**options).remote(task),
            number=compute.num_evaluators,
            max_failures=compute.max_failures,
        )
        self.sent: tuple[CorrectnessModel | None, ray.ObjectRef | None] = None, None  # latest

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
        """Do all `requests`; their results are in the same order."""
        for key, request in enumerate(requests):
            super().submit(key, request)
        found: dict[int, Evaluation] = {}
        while len(found) < len(requests):
            key, evaluation = self.next()
            found[key] = evaluation
            show(len(found), "")
        return [found[key] for key in range(len(requests))]
