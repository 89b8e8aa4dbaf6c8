"""Everything that needs a GPU, checked and measured by one command within eight minutes.

    python benchmarks/on_gpu.py [--out FOLDER] [--parts tests,run,...] [--minutes 8]
    python benchmarks/on_gpu.py --device cpu --quick     # the same, small, without a GPU

Runs on a bare machine: Python, torch, and what nasray imports on the PYTHONPATH. Parts come in
order of importance. Each is a process of its own with a time limit; what it has measured when it
ends, fails or is ended counts. The table and the JSON file are written anew after every part.

    tests        pytest -m gpu: the same results as on a CPU, twice the same, resumed the same
    run          a whole `nasray run` through Ray with device = "gpu"
    training     a supernet step beside its extracted subnet's, bare passes, and the limits
    evaluation   recalibration and top-1 beside bare folded passes; first evaluations of a process
    evaluators   1, 2 and 4 evaluators on the card
    compile      training a fixed subnet, eager and compiled
    input        JPEGs decoded and augmented by one core and by all
    determinism  what repeatable kernels cost
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table import Row, machine
from torch import nn
from torch.nn import functional as F

from nasray import checkpoint
from nasray.config import parse_job
from nasray.data.importing import import_dataset
from nasray.data.loader import train_batches
from nasray.data.transforms import normalize
from nasray.devices import autocast, choose_kernels
from nasray.evaluation.evaluate import correct_mask, evaluate, fold_bn, recalibrate_bn
from nasray.spaces import make_space
from nasray.spaces.population import as_architectures, random_population
from nasray.spaces.space import Architecture
from nasray.training.loop import Recipe, clear_gradients, make_optimizer, make_scaler, train_epoch

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Recipe(
    epochs=100,
    learning_rate=0.01,
    warmup_epochs=0,
    momentum=0.9,
    weight_decay=3e-5,
    label_smoothing=0.1,
)
SPACES = ("shufflenet", "ofa_mobilenetv3")


class Settings:
    """Sizes of what is measured."""

    def __init__(self, device: str, *, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.side = 64 if quick else 224
        self.training_batches = (4,) if quick else (256, 1024, 512)
        self.evaluation_batches = (8,) if quick else (250, 50, 1000)
        self.images = 16 if quick else 4000  # of each kind: to recalibrate on, to evaluate on
        self.steps = 2 if quick else 10
        self.jpegs = 40 if quick else 2000
        self.num_evaluators = (1, 2) if quick else (1, 2, 4)
        self.candidates = 4 if quick else 12


Report = Callable[[str, float, str], None]  # (name, value, unit), as soon as it is known


# Parts: each measures what its name says and reports rows as it goes.


def tests(settings: Settings, report: Report) -> None:
    """Run the tests marked gpu; without one, those of the same file that need none."""
    chosen = "gpu" if settings.device == "cuda" else "not gpu and not slow and not ray"
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", chosen]
    command += ["-p", "no:cacheprovider", "--durations=6"]
    lines = []
    process = subprocess.Popen(
        [*command, "tests/evaluation/test_gpu.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    numbers = {word: int(count) for count, word in _pairs(lines[-1])}
    for word in ("passed", "failed", "skipped"):
        report(f"tests {word}", numbers.get(word, 0), "")
    if process.wait():
        raise SystemExit(1)


def _pairs(line: str) -> list[tuple[str, str]]:
    words = line.replace(",", "").replace("=", "").split()
    return [(a, b) for a, b in zip(words, words[1:], strict=False) if a.isdigit()]


def run(settings: Settings, report: Report) -> None:
    """Search, train and retrain by the command line, in a folder that is thrown away."""
    job = (ROOT / "jobs/demo.toml").read_text()
    changes = {"epochs = 18": "epochs = 4", "epochs = 12": "epochs = 3"}
    changes |= {"shared_start_epochs = 6": "shared_start_epochs = 1"}
    changes |= {"channel_warmup_start = 8": "channel_warmup_start = 2"}
    changes |= {"channel_warmup_epochs = 6": "channel_warmup_epochs = 1"}
    changes |= {
        "num_generations = 6": "num_generations = 2",
        "grace_epochs = 4": "grace_epochs = 1",
    }
    changes |= {"train_per_class = 230": "train_per_class = 116"}
    if settings.device == "cuda":
        gpu = 'device = "gpu"\ngpus_per_evaluator = 0.5\n'
        changes |= {"num_workers = 2": f"num_workers = 1\n{gpu}"}
    # cuDNN takes 0.2 s for every depthwise shape that it meets first; this space has none.
    changes |= {'name = "shufflenet"': 'name = "tiny"', "resolution = 64": "resolution = 32"}
    changes |= {"smallest_scale = 0.6": "smallest_scale = 0.5"}
    changes |= {"limits = [{": "limits = [] # [{"}
    for old, new in changes.items():
        if old not in job:
            raise ValueError(f"jobs/demo.toml has no {old!r} to shorten")
        job = job.replace(old, new)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.toml").write_text(job)
        started = time.monotonic()
        command = [sys.executable, "-m", "nasray", "run", f"{folder}/job.toml", f"{folder}/run"]
        subprocess.run(command, cwd=ROOT, check=True)
        report(
            "a shortened demo through Ray, from nothing to report", time.monotonic() - started, "s"
        )
        [result] = Path(folder, "run/retrain").glob("*/result.json")
        report("the same: validation top-1", 100 * json.loads(result.read_text())["val_top1"], "%")


def training(settings: Settings, report: Report) -> None:
    """Images a second of one architecture: ours, its subnet's, bare passes; and the limits."""
    limits = _limits(settings, report)
    for batch_size in settings.training_batches:
        for name in SPACES:
            _training_of(name, batch_size, limits, settings, report)


def _training_of(
    name: str, batch_size: int, limits: tuple[float, float], settings: Settings, report: Report
) -> None:
    device, (bandwidth, launch) = settings.device, limits
    _, supernet, arch = _supernet(name, settings)
    images, labels = _images(batch_size, settings)
    batches = [(images, labels)] * settings.steps
    ready = normalize(images.to(device)), labels.to(device)
    subnet = supernet.extract(arch).train()
    what = f"{name}, {settings.side} px, batch {batch_size}"
    first = _seconds(settings, lambda: _bare_step(subnet, *ready))
    report(f"{what}: first step of an architecture", first, "s")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ours = _epoch_seconds(supernet, lambda images: supernet(images, arch), batches, device)
    report(f"{what}: supernet step", batch_size / ours, "images/s")
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / batch_size / 1e6
        report(f"{what}: memory of an image at the peak", memory, "MB")
    its = _epoch_seconds(subnet, subnet, batches, device)
    report(f"{what}: extracted subnet's step", batch_size / its, "images/s")
    report(f"{what}: supernet step / extracted subnet's", ours / its, "ratio")
    bare = _median_seconds(settings, lambda: _bare_step(subnet, *ready))
    report(f"{what}: bare forward and backward", batch_size / bare, "images/s")
    report(f"{what}: bare / supernet step", bare / ours, "share")
    moved = _bytes_moved(subnet, ready[0])
    report(f"{what}: limit by bandwidth", batch_size / (moved / bandwidth), "images/s")
    kernels, busy = _kernels(settings, lambda: _bare_step(subnet, *ready))
    if kernels:
        report(f"{what}: kernels of a bare step", kernels, "")
        report(f"{what}: limit by launches", batch_size / (kernels * launch), "images/s")
        report(f"{what}: GPU busy in a bare step", busy / bare, "share")


def evaluation(settings: Settings, report: Report) -> None:
    """Images a second of evaluations, beside folded forward passes on images that are ready."""
    for name in SPACES:
        _first_evaluations(name, settings, report)
        for batch_size in settings.evaluation_batches:
            _evaluation_of(name, batch_size, settings, report)


def _first_evaluations(name: str, settings: Settings, report: Report) -> None:
    """Each architecture brings shapes that cuDNN has not met in this process."""
    space, supernet, _ = _supernet(name, settings)
    drawn = random_population(space.genes, settings.candidates, np.random.default_rng(1))
    size = settings.evaluation_batches[0]
    images, labels = _images(size, settings)
    images, labels = images.to(settings.device), labels.numpy()

    def evaluate_one(arch) -> None:
        subnet = supernet.extract(arch)
        options = {"batch_size": size, "device": settings.device, "graphs": True}
        evaluate(subnet, images, images, labels, **options)

    seconds = [_seconds(settings, partial(evaluate_one, arch)) for arch in as_architectures(drawn)]
    what = f"{name}, {settings.side} px, batch {size}"
    report(f"{what}: a batch of each of the first {len(seconds)} architectures", sum(seconds), "s")
    last = seconds[-max(1, len(seconds) // 4) :]
    report(f"{what}: the same, mean of the last quarter", sum(last) / len(last), "s")
    again = _seconds(settings, lambda: [evaluate_one(arch) for arch in as_architectures(drawn)])
    report(f"{what}: the same, all met before, mean", again / len(seconds), "s")


def _evaluation_of(name: str, batch_size: int, settings: Settings, report: Report) -> None:
    device, number = settings.device, settings.images
    _, supernet, arch = _supernet(name, settings)
    options = {"batch_size": batch_size, "device": device, "graphs": True}
    pixels, labels = _images(number, settings)
    there, labels = pixels.to(device), labels.numpy()
    subnet = supernet.extract(arch).eval()
    recalibrated = _second(settings, lambda: recalibrate_bn(subnet, there, **options))
    fold_bn(subnet)
    evaluated = _second(settings, lambda: correct_mask(subnet, there, labels, **options))
    copied = _second(settings, lambda: correct_mask(subnet, pixels.numpy(), labels, **options))
    ready = [normalize(part) for part in there.split(batch_size)]
    bare = _second(settings, lambda: _forward_all(subnet, ready, device))
    what = f"{name}, {settings.side} px, batch {batch_size}"
    report(f"{what}: recalibration", number / recalibrated, "images/s")
    report(f"{what}: top-1", number / evaluated, "images/s")
    report(f"{what}: top-1, images of the host", number / copied, "images/s")
    report(f"{what}: bare folded passes", number / bare, "images/s")
    report(f"{what}: top-1 / bare folded passes", evaluated / bare, "ratio")
    report(
        f"{what}: recalibration and top-1 / 2 x bare",
        (recalibrated + evaluated) / 2 / bare,
        "ratio",
    )


def evaluators(settings: Settings, report: Report) -> None:
    """Candidates a second of a pool of evaluators that share the card."""
    import ray

    from nasray.evaluation.evaluator import EvaluationTask, EvaluatorPool, Request

    most = max(settings.num_evaluators)
    num_gpus = 1 if settings.device == "cuda" else 0
    ray.init(address="local", num_cpus=most + 1, num_gpus=num_gpus, include_dashboard=False)
    per_class = max(2, settings.images // 20)
    values = {
        "space": {"name": "shufflenet", "resolution": settings.side},
        "data": {
            "source": "synthetic",
            "image_side": settings.side,
            "train_per_class": 2 * per_class,
            "val_per_class": 1,
            "holdout_per_class": per_class,
        },
        "search": {"calibration_images": 10 * per_class, "batch_size": 250},
        "compute": {
            "device": "gpu" if settings.device == "cuda" else "cpu",
            "gpus_per_evaluator": 1 / most,
        },
    }
    job = parse_job(values, "on_gpu")
    with tempfile.TemporaryDirectory() as folder:
        import_dataset(job.data, folder, seed=0)
        space = make_space(job.space, 10)
        supernet = space.supernet()
        space.initialize(supernet, torch.Generator().manual_seed(0))
        path = f"{folder}/supernet.pt"
        checkpoint.save_supernet(path, supernet)
        drawn = random_population(space.genes, settings.candidates, np.random.default_rng(2))
        requests = [Request(arch=arch) for arch in as_architectures(drawn)]
        seen: dict[int, list[float]] = {}
        for number in settings.num_evaluators:
            compute = job.compute.model_copy(update={"num_evaluators": number})
            task = EvaluationTask(
                supernet=path,
                digest=checkpoint.digest(path),
                data_path=folder,
                job=job.model_copy(update={"compute": compute}),
            )
            with EvaluatorPool(task) as pool:
                for _ in range(number):  # until each has met most of the shapes
                    pool.evaluate(requests)
                started = time.monotonic()
                found = pool.evaluate(requests)
                rate = len(requests) / (time.monotonic() - started)
            seen[number] = [each.fitness for each in found]
            images = f"{10 * per_class:,} + {10 * per_class:,} images"
            report(
                f"shufflenet, {settings.side} px, {images}: {number} evaluators",
                rate,
                "candidates/s",
            )
        same = all(each == seen[1] for each in seen.values())
        report("the same fitness on any number of evaluators", float(same), "")
    ray.shutdown()


def compile(settings: Settings, report: Report) -> None:
    """Training steps of a fixed subnet, eager and by torch.compile."""
    for name in ("tiny",) if settings.quick else SPACES[::-1]:
        _compile_of(name, settings.training_batches[-1], settings, report)


def _compile_of(name: str, batch_size: int, settings: Settings, report: Report) -> None:
    device = settings.device
    _, supernet, arch = _supernet(name, settings)
    images, labels = _images(batch_size, settings)
    batches = [(images, labels)] * settings.steps
    subnet = supernet.extract(arch).train()
    what = f"{name}, {settings.side} px, batch {batch_size}: fixed subnet"
    eager = _epoch_seconds(subnet, subnet, batches, device)
    report(f"{what}, eager", batch_size / eager, "images/s")
    compiled = torch.compile(subnet)
    ready = normalize(images.to(device)), labels.to(device)
    report(f"{what}, compiling it", _seconds(settings, lambda: _bare_step(compiled, *ready)), "s")
    its = _epoch_seconds(subnet, compiled, batches, device)
    report(f"{what}, compiled", batch_size / its, "images/s")
    report(f"{what}, eager / compiled", eager / its, "ratio")


def input(settings: Settings, report: Report) -> None:
    """Augmented JPEGs a second, by one loading process and by one on each core."""
    from scale import draw_picture

    from nasray.data.importing import write_shards
    from nasray.data.shards import open_dataset
    from nasray.data.source import Pictures, Record

    number, cores = settings.jpegs, len(os.sched_getaffinity(0))
    job = parse_job({"data": {"source": "synthetic", "image_side": 64}}, "on_gpu")
    records = (Record("train", 0, f"{i}.jpg", partial(draw_picture, i)) for i in range(number))
    about = {"source": "noise", "seed": 0, "options": {}, "show": lambda done, total: None}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, Pictures(("noise",), number, records), **about)
        dataset = open_dataset(folder)
        for workers in sorted({1, cores}):
            config = job.data.model_copy(update={"loader_workers": workers})
            batches = train_batches(
                dataset,
                np.arange(number),
                config,
                resolution=224,
                batch_size=max(workers, min(256, number // 8)),
                rank=0,
                world_size=1,
                seed=0,
                epoch=0,
            )
            clock = []
            for images, _ in batches:
                clock.append((time.monotonic(), len(images)))
            spent, done = clock[-1][0] - clock[0][0], sum(size for _, size in clock[1:])
            if spent > 0:
                report(
                    f"JPEGs of 500 x 375 to 224 px, {workers} loading processes",
                    done / spent,
                    "images/s",
                )


def determinism(settings: Settings, report: Report) -> None:
    """A training step with kernels that repeat their results, and with the quickest."""
    batch_size = settings.training_batches[0]
    for name in SPACES[: 1 if settings.quick else 2]:
        _, supernet, arch = _supernet(name, settings)
        subnet = supernet.extract(arch).train()
        images, labels = _images(batch_size, settings)
        ready = normalize(images.to(settings.device)), labels.to(settings.device)
        seconds = {}
        for deterministic in (True, False):
            choose_kernels(deterministic=deterministic)
            seconds[deterministic] = _median_seconds(settings, partial(_bare_step, subnet, *ready))
        choose_kernels(deterministic=True)
        ratio = seconds[True] / seconds[False]
        report(f"{name}, batch {batch_size}: repeatable / quickest kernels", ratio, "ratio")


# What parts share.


def _supernet(name: str, settings: Settings) -> tuple[Any, Any, Architecture]:
    """A space, its supernet on the device, and one architecture."""
    values: dict[str, Any] = {"name": name, "resolution": settings.side}
    if name.startswith("ofa"):
        values["resolutions"] = [settings.side]
    job = parse_job({"space": values, "data": {"source": "synthetic"}}, name)
    space = make_space(job.space, 1000)
    supernet = space.supernet()
    space.initialize(supernet, torch.Generator().manual_seed(0))
    [arch] = as_architectures(random_population(space.genes, 1, np.random.default_rng(0)))
    return space, supernet.to(settings.device).train(), arch


def _images(number: int, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, on the host: uint8 (number, 3, side, side), and labels (number,)."""
    generator = torch.Generator().manual_seed(0)
    shape = (number, 3, settings.side, settings.side)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 1000, (number,), generator=generator)


def _epoch_seconds(network: nn.Module, forward, batches, device: str) -> float:
    """Seconds a step of train_epoch(), after as many untimed ones."""
    optimizer, scaler = make_optimizer(network, RECIPE), make_scaler(device)
    for _ in range(2):
        started = time.monotonic()
        train_epoch(
            lambda step: [forward],
            batches,
            optimizer,
            scaler,
            RECIPE,
            epoch=0,
            num_steps=len(batches),
            device=device,
        )
        _wait(device)
        seconds = (time.monotonic() - started) / len(batches)
    clear_gradients(optimizer)
    return seconds


def _bare_step(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    device = images.device.type
    for param in network.parameters():
        param.grad = None
    with autocast(device):
        loss = F.cross_entropy(network(images), labels)
    loss.backward()


@torch.inference_mode()
def _forward_all(network: nn.Module, batches: list[torch.Tensor], device: str) -> None:
    with autocast(device):
        for batch in batches:
            network(batch)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(settings: Settings, call: Callable[[], object]) -> float:
    _wait(settings.device)
    started = time.monotonic()
    call()
    _wait(settings.device)
    return time.monotonic() - started


def _second(settings: Settings, call: Callable[[], object]) -> float:
    """Seconds of the second of two calls."""
    _seconds(settings, call)
    return _seconds(settings, call)


def _median_seconds(settings: Settings, call: Callable[[], object]) -> float:
    _seconds(settings, call)
    return statistics.median(_seconds(settings, call) for _ in range(settings.steps))


def _limits(settings: Settings, report: Report) -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and seconds to launch a kernel."""
    number = 1 << (24 if settings.quick else 30)
    source = torch.ones(number, dtype=torch.uint8, device=settings.device)
    target, one = torch.empty_like(source), torch.ones(1, device=settings.device)

    def launches() -> None:
        for _ in range(1000):
            one.add_(1)

    bandwidth = 2 * number / _median_seconds(settings, lambda: target.copy_(source))
    launch = _median_seconds(settings, launches) / 1000
    report("memory bandwidth, a copy's bytes read and written", bandwidth / 1e12, "TB/s")
    report("launch of a small kernel", launch * 1e6, "us")
    return bandwidth, launch


def _kernels(settings: Settings, call: Callable[[], object]) -> tuple[int, float]:
    """How many kernels `call` runs, and the seconds that the GPU is busy with them."""
    if settings.device != "cuda":
        return 0, 0.0
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        _seconds(settings, call)
    events = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    for event in sorted(events, key=lambda each: -each.self_device_time_total)[:8]:
        print(f"  {event.self_device_time_total / 1e3:8.2f} ms x{event.count:4} {event.key[:100]}")
    return sum(e.count for e in events), sum(e.self_device_time_total for e in events) / 1e6


@torch.no_grad()
def _bytes_moved(network: nn.Module, images: torch.Tensor) -> float:
    """Bytes of a training step if every layer reads and writes each tensor just once.

    Forward: its input and output. Backward: the gradient of its output and its kept input, and
    the gradient of its input written. Two bytes each, as under autocast.
    """
    values = [0]

    def count(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        values[0] += 3 * inputs[0].numel() + 2 * output.numel()

    leaves = [module for module in network.modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(count) for leaf in leaves]
    network(images[:2])
    for handle in handles:
        handle.remove()
    return 2 * values[0] / 2 * len(images)


# Name -> (what it does, its time limit in seconds), the most important first.
PARTS = {
    "tests": (tests, 160),
    "run": (run, 170),
    "training": (training, 150),
    "evaluation": (evaluation, 90),
    "evaluators": (evaluators, 90),
    "compile": (compile, 120),
    "input": (input, 40),
    "determinism": (determinism, 40),
}
TOGETHER = ("tests", "run")  # which measure nothing that the other would disturb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="on_gpu", help="folder of the table and the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, three minutes on CPUs")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what a part's own process does
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu --quick does the same on CPUs")
    if options.part:
        run_part(options)
        return
    names = options.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    os.makedirs(options.out, exist_ok=True)
    raise SystemExit(run_all(names, options))


def run_part(options: argparse.Namespace) -> None:
    """Run one part here; every row is in its file as soon as it is known."""
    settings = Settings(options.device, quick=options.quick)
    choose_kernels(deterministic=True)
    if options.device == "cpu":
        torch.set_num_threads(1)

    def report(name: str, value: float, unit: str) -> None:
        with open(f"{options.out}/{options.part}.rows", "a") as file:
            file.write(json.dumps(asdict(Row(name, float(value), unit))) + "\n")
        print(f"{name:<80}{value:>12.5g} {unit}", flush=True)

    PARTS[options.part][0](settings, report)


def run_all(names: list[str], options: argparse.Namespace) -> int:
    """Run the parts, each in a process; write what is known after each. 1 if any failed."""
    ends = time.monotonic() + 60 * options.minutes
    verdicts: dict[str, str] = {}
    groups = [[name for name in names if name in TOGETHER]]
    groups += [[name] for name in names if name not in TOGETHER]
    if options.device == "cpu":  # too few cores for two at once
        groups = [[name] for name in names]
    for group in filter(None, groups):
        processes = {name: start_part(name, options) for name in group}
        started = time.monotonic()
        for name, process in processes.items():
            limit = min(started + PARTS[name][1] * (1 if options.device == "cuda" else 3), ends)
            verdicts[name] = end_of(process, max(1.0, limit - time.monotonic()))
            print(f"{name}: {verdicts[name]}", flush=True)
            write(names, verdicts, options)
    return int(any(verdict != "done" for verdict in verdicts.values()))


def start_part(name: str, options: argparse.Namespace) -> subprocess.Popen:
    Path(options.out, f"{name}.rows").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", name, "--out", options.out]
    command += ["--device", options.device, *(["--quick"] if options.quick else [])]
    log = open(f"{options.out}/{name}.log", "w")  # noqa: SIM115 - the process writes to it
    return subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": python_path()},
    )


def python_path() -> str:
    """Where parts find nasray when it is not installed, beside what is there already."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def end_of(process: subprocess.Popen, seconds: float) -> str:
    """Wait for a part, or end it and what it has started."""
    try:
        code = process.wait(seconds)
        return "done" if code == 0 else f"failed (exit code {code})"
    except subprocess.TimeoutExpired:
        for end in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, end)
            time.sleep(1)
        process.wait()
        return f"ended after {seconds:.0f} s, its time limit"


def write(names: list[str], verdicts: dict[str, str], options: argparse.Namespace) -> None:
    """Write the table and the JSON file of all that is known."""
    found = []
    lines = [machine(), " ".join(["python", *sys.argv]), ""]
    for name in names:
        if name not in verdicts:
            continue
        lines.append(f"{name}: {verdicts[name]}")
        path = Path(options.out, f"{name}.rows")
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for row in rows:
            lines.append(f"  {row['name']:<84}{row['value']:>12.5g} {row['unit']}")
        found.append({"part": name, "verdict": verdicts[name], "rows": rows})
    Path(options.out, "on_gpu.txt").write_text("\n".join(lines) + "\n")
    content = {"machine": machine(), "command": " ".join(["python", *sys.argv]), "parts": found}
    Path(options.out, "on_gpu.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
