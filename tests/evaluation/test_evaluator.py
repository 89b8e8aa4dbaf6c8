"""Fitness does not depend on how many evaluators there are, nor on their lives."""

import os
import signal
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from nasray.checkpoint import digest, load_supernet, save_supernet
from nasray.config import Job
from nasray.data.splits import JobImages
from nasray.errors import EvaluationError, UserError
from nasray.evaluation.evaluate import evaluate
from nasray.evaluation.evaluator import EvaluationTask, Evaluator, EvaluatorPool, Request
from nasray.search.candidate import Candidate, Evaluation, pack, unpack
from nasray.search.racing import EarlyStopping
from nasray.spaces.population import as_architectures, random_population
from nasray.spaces.space import Architecture
from nasray.spaces.tiny import Tiny
from tests.conftest import MakeJob, ray_processes, seeded_chance, wait_for

pytestmark = pytest.mark.ray

SPACE = Tiny(num_classes=4)
ARCHS = as_architectures(random_population(SPACE.genes, 10, np.random.default_rng(0)))


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("supernet") / "supernet.pt")
    network = SPACE.supernet()
    SPACE.initialize(network, torch.Generator().manual_seed(0))
    save_supernet(path, network)
    return path


@pytest.fixture
def make_task(supernet: str, make_job: MakeJob, ray_cluster: None):
    def make(job: Job | None = None, supernet: str = supernet) -> EvaluationTask:
        job = job or make_job()
        return EvaluationTask(
            supernet=supernet, digest=digest(supernet), data_path=job.data.path, job=job
        )

    return make


@pytest.fixture(scope="module")
def plain(supernet: str, make_job: MakeJob) -> list[float]:
    """What the fitnesses of ARCHS are without Ray, on one thread as evaluators have."""
    job = make_job()
    images = JobImages(job, job.data.path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [evaluate_plainly(load_supernet(supernet), job, images, arch) for arch in ARCHS]
    finally:
        torch.set_num_threads(threads)


def evaluate_plainly(supernet, job: Job, images: JobImages, arch: Architecture) -> float:
    calibration = images.calibration(job.search.calibration_images)
    batch_size = job.search.batch_size
    correct = evaluate(supernet.extract(arch), calibration, *images.holdout, batch_size=batch_size)
    return float(correct.mean())


def evaluate_all(pool: EvaluatorPool, archs) -> list[Evaluation]:
    return pool.evaluate([Request(arch=arch) for arch in archs])


def fitnesses(evaluations) -> list[float]:
    return [evaluation.fitness for evaluation in evaluations]


@pytest.mark.parametrize("num_evaluators", [1, 2])
def test_fitness_is_that_of_plain_evaluation(make_task, make_job, plain, num_evaluators):
    job = make_job(compute={"num_evaluators": num_evaluators})
    with EvaluatorPool(make_task(job)) as pool:
        found = evaluate_all(pool, ARCHS)
        assert len(pool.workers) == num_evaluators
    assert len(set(plain)) > 2  # else their order would not show
    assert fitnesses(found) == plain
    for evaluation in found:
        correct = unpack(evaluation.correct, evaluation.images)
        assert correct.mean() == evaluation.fitness
        assert np.mean(evaluation.slices) == pytest.approx(evaluation.fitness)  # equal slices
        assert (evaluation.images, evaluation.attempt, evaluation.error) == (32, 1, "")
        assert evaluation.evaluator and evaluation.node and evaluation.seconds > 0


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_lost_evaluator_is_replaced_and_its_candidate_evaluated_again(make_task, plain, end):
    chance = seeded_chance()  # the moment of the kill is any
    with EvaluatorPool(make_task()) as pool:
        evaluate_all(pool, ARCHS[:2])
        worker = next(worker for worker in pool.workers if worker.node)
        pid = ray.get(worker.actor.__ray_call__.remote(lambda self: os.getpid()))
        kill = threading.Timer(chance.uniform(0, 0.2), os.kill, (pid, end))
        kill.start()
        found = evaluate_all(pool, ARCHS)
        attempts = [each.attempt for each in found]

        def is_lost() -> bool:  # an evaluator may end between two evaluations
            again = evaluate_all(pool, ARCHS)
            attempts.extend(each.attempt for each in again)
            assert fitnesses(again) == plain
            return pool.num_lost > 0

        wait_for(is_lost, "an evaluator is lost", timeout_s=60)
        kill.join()
        assert pool.num_lost == 1 and worker not in pool.workers
    assert fitnesses(found) == plain
    assert sorted(attempts)[-2:] == [1, 2]


def test_a_supernet_that_changed_is_a_users_mistake(make_task, tmp_path: Path):
    path = str(tmp_path / "supernet.pt")
    save_supernet(path, SPACE.supernet())
    task = make_task(supernet=path)
    save_supernet(path, SPACE.supernet())
    with EvaluatorPool(task) as pool:
        with pytest.raises(UserError, match=f"^{path} is not the file that it was"):
            evaluate_all(pool, ARCHS[:1])


def test_a_supernet_of_another_space_is_a_users_mistake(make_task, tmp_path: Path):
    other = str(tmp_path / "supernet.pt")
    save_supernet(other, Tiny(num_classes=5).supernet())
    with EvaluatorPool(make_task(supernet=other)) as pool:
        with pytest.raises(UserError, match=f"^{other} is a supernet of .*'num_classes': 5"):
            evaluate_all(pool, ARCHS[:2])


def test_leaving_the_pool_ends_its_evaluators(make_task):
    with EvaluatorPool(make_task()) as pool:
        evaluate_all(pool, ARCHS[:2])
        assert ray_processes("Evaluator")  # a second one may still be starting
    wait_for(lambda: not ray_processes("Evaluator"), "evaluators are gone", timeout_s=20)


class Hungry:
    """evaluate() that runs out of memory with batches above `most`."""

    def __init__(self, most: int, words: str) -> None:
        self.most, self.words, self.sizes = most, words, []
        self.computed = lambda: None  # by the last try, as long as anything holds it

    def __call__(self, subnet, calibration, images, labels, *, batch_size, **options):
        self.sizes.append(batch_size)
        assert self.computed() is None
        features = torch.empty(1)
        self.computed = weakref.ref(features)
        if batch_size > self.most:
            raise RuntimeError(self.words)
        return evaluate(subnet, calibration, images, labels, batch_size=batch_size, **options)


@pytest.fixture
def evaluator(make_task, monkeypatch: pytest.MonkeyPatch):
    """An evaluator in this process, on one thread."""
    threads = torch.get_num_threads()
    made = Evaluator.__ray_metadata__.modified_class(make_task())
    made.ready()
    yield made
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "words",
    [
        "DefaultCPUAllocator: can't allocate memory: 4096 bytes",
        "CUDA out of memory. Tried to allocate 4.00 KiB",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_memory_that_runs_out_halves_the_batch_once(evaluator, monkeypatch, words):
    hungry = Hungry(10, words)
    monkeypatch.setattr("nasray.evaluation.evaluator.evaluate", hungry)
    found = evaluator.evaluate(1, Request(arch=ARCHS[0]))
    assert hungry.sizes == [20, 10] and found.batch_size == 10 and not found.failed
    hungry.most = 5
    with pytest.raises(EvaluationError, match=f"batch_size = 20, and with 10: {words}; lower"):
        evaluator.evaluate(1, Request(arch=ARCHS[0]))


def test_balanced_fitness_is_the_mean_over_the_classes_and_top1_stays_known(evaluator, make_job):
    pixels, labels = evaluator.images.holdout
    rows = np.argsort(labels, kind="stable")[:19]  # 8, 8 and 3 of three classes
    evaluator.images.__dict__["holdout"] = pixels[rows], labels[rows]
    plain = evaluator.evaluate(1, Request(arch=ARCHS[0]))
    evaluator.task = replace(evaluator.task, job=make_job(search={"fitness": "balanced"}))
    found = evaluator.evaluate(1, Request(arch=ARCHS[0]))
    correct = unpack(found.correct, 19)
    assert found.correct == plain.correct and 0 < correct.mean() < 1
    by_class = [correct[:8].mean(), correct[8:16].mean(), correct[16:].mean()]
    assert found.fitness == pytest.approx(np.mean(by_class)) != plain.fitness
    assert found.top1 == plain.top1 == plain.fitness == correct.mean()


def test_log_likelihood_is_the_mean_of_what_is_kept_of_each_image(evaluator, make_job):
    plain = evaluator.evaluate(1, Request(arch=ARCHS[0]))
    evaluator.task = replace(evaluator.task, job=make_job(search={"fitness": "log_likelihood"}))
    found = evaluator.evaluate(1, Request(arch=ARCHS[0]))
    kept = np.frombuffer(found.log_likelihoods, np.float16)
    assert len(kept) == found.images == len(evaluator.images.holdout_labels)
    assert found.fitness == kept.mean(dtype=np.float64) < 0
    assert found.correct == plain.correct and found.top1 == plain.fitness
    assert plain.log_likelihoods == b""


def test_a_race_that_is_lost_judges_fewer_images_and_stays_below_the_bar(make_task, make_job):
    """Of 80 hold-out images: no untrained subnet comes near those that are always right."""
    right = pack(np.ones(80, dtype=bool))
    best = Candidate(arch=ARCHS[1], fitness=1.0, costs={}, images=80, correct=right)
    stopping = EarlyStopping(SPACE, num_incumbents=1, refit_after=1, confidence=0.99)
    stopping.tell([best] * 20)
    found = {}
    for racing in (True, False):
        job = make_job(data={"holdout_per_class": 20}, search={"racing": racing})
        with EvaluatorPool(make_task(job)) as pool:
            pool.submit(7, ARCHS[0], stopping.rule(ARCHS[0]) if racing else None)
            key, found[racing] = pool.next()
            assert key == 7
    assert found[False].images == 80 and found[True].images == 40
    judged, correct = (unpack(bits, 80) for bits in (found[True].judged, found[True].correct))
    assert judged.sum() == 40 and not found[False].judged
    np.testing.assert_array_equal(correct, unpack(found[False].correct, 80) & judged)
    assert found[True].fitness < 0.9


def test_all_evaluators_compute_in_one_precision(make_task):
    """The first one's, which is recorded; a node whose GPU lacks it is left out."""
    recorded, told = [], []

    class Actor:
        class use:  # noqa: N801
            remote = told.append

    pool = EvaluatorPool(make_task(), recorded.append)
    pool.admit(Actor, ["float16", "float32"])
    pool.admit(Actor, ["bfloat16", "float16", "float32"])
    assert recorded == ["float16"] and told == ["float16", "float16"]
    pool = EvaluatorPool(replace(make_task(), precision="bfloat16"), recorded.append)
    with pytest.raises(
        UserError, match="are computed in bfloat16, of which its GPU is not capable"
    ):
        pool.admit(Actor, ["float16", "float32"])
    with EvaluatorPool(replace(make_task(), precision="bfloat16")) as pool:
        with pytest.raises(UserError, match="are computed in bfloat16, of which its CPU is not"):
            evaluate_all(pool, ARCHS[:1])
