"""Fitness does not depend on how many evaluators there are, nor on their lives."""

import os
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from conftest import MakeJob, ray_processes, wait_for

from nasray.checkpoint import load_supernet, save_supernet
from nasray.config import Job
from nasray.errors import EvaluationError, UserError
from nasray.evaluate import evaluate
from nasray.evaluator import EvaluationTask, EvaluatorPool
from nasray.images import JobImages
from nasray.spaces.space import Architecture, as_architectures, random_population
from nasray.spaces.tiny import Tiny

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
        return EvaluationTask(supernet=supernet, data_path=job.data.path, job=job)

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
    return evaluate(supernet.extract(arch), calibration, *images.holdout(), batch_size=batch_size)


@pytest.mark.parametrize("num_evaluators", [1, 2])
def test_fitness_is_that_of_plain_evaluation(make_task, make_job, plain, num_evaluators):
    order = []
    with EvaluatorPool(make_task(make_job(compute={"num_evaluators": num_evaluators}))) as pool:
        found = pool(ARCHS, lambda index, evaluation: order.append((index, evaluation)))
    assert len(set(plain)) > 2  # else their order would not show
    assert [evaluation.fitness for evaluation in found] == plain
    assert sorted(index for index, _ in order) == list(range(len(ARCHS)))
    assert all(found[index] == evaluation for index, evaluation in order)


def test_a_killed_evaluator_is_replaced_and_its_candidate_evaluated_again(make_task, plain):
    chance = random.Random()  # the moment of the kill is any
    with EvaluatorPool(make_task()) as pool:
        pool(ARCHS[:2])  # they are up
        victims = list(pool.evaluators)
        pid = ray.get(victims[0].__ray_call__.remote(lambda self: os.getpid()))
        kill = threading.Timer(chance.uniform(0, 0.2), os.kill, (pid, signal.SIGKILL))
        kill.start()
        found = pool(ARCHS)
        kill.join()
        found_after = pool(ARCHS)  # where the kill came too late for the first
        assert [pool.evaluators.count(victim) for victim in victims] == [0, 1]
    assert [evaluation.fitness for evaluation in found] == plain
    assert [evaluation.fitness for evaluation in found_after] == plain


def test_a_candidate_that_kills_every_evaluator_is_given_up(make_task, make_job):
    task = make_task(make_job(compute={"num_evaluators": 1, "max_failures": 2}))
    killed = []
    with EvaluatorPool(task) as pool:
        stop = threading.Event()

        def kill_all() -> None:
            while not stop.wait(0.01):
                for pid in ray_processes("Evaluator"):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

        killer = threading.Thread(target=kill_all)
        killer.start()
        try:
            with pytest.raises(EvaluationError, match="^3 evaluators in a row died evaluating"):
                pool(ARCHS[:1])
        finally:
            stop.set()
            killer.join()
    assert len(set(killed)) >= 3


def test_a_supernet_of_another_space_is_a_users_mistake(make_task, tmp_path: Path):
    other = str(tmp_path / "supernet.pt")
    save_supernet(other, Tiny(num_classes=5).supernet())
    with EvaluatorPool(make_task(supernet=other)) as pool:
        with pytest.raises(UserError, match=f"^{other} is a supernet of .*'num_classes': 5"):
            pool(ARCHS[:2])


def test_leaving_the_pool_ends_its_evaluators(make_task):
    with EvaluatorPool(make_task()) as pool:
        pool(ARCHS[:2])
        assert len(ray_processes("Evaluator")) == 2
    wait_for(lambda: not ray_processes("Evaluator"), "evaluators are gone", timeout_s=20)
