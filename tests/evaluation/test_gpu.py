"""What a GPU must do as a CPU does: results, repetition, resuming, running out of memory.

Each test runs on the CPU by default, as far as it goes there, and on a GPU with `-m gpu`.
"""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from nasray import devices
from nasray.checkpoint import digest, save_supernet
from nasray.config import SpaceConfig, SupernetConfig
from nasray.costs.latency_timing import Setup, time_blocks
from nasray.errors import EvaluationError
from nasray.evaluation import batches as evaluation_batches
from nasray.evaluation import evaluate
from nasray.evaluation.evaluate import correct_mask, fold_bn, recalibrate_bn
from nasray.evaluation.evaluator import EvaluationTask, Evaluator, EvaluatorPool, Request
from nasray.spaces import SPACES, make_space
from nasray.spaces.population import as_architectures, random_population
from nasray.training import loop as train
from nasray.training.gradients import GradientAverager
from nasray.training.loop import Recipe, fit
from nasray.training.sampler import sample

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RECIPE = Recipe(
    epochs=4,
    learning_rate=0.05,
    warmup_epochs=1,
    momentum=0.9,
    weight_decay=1e-4,
    label_smoothing=0.1,
)
evaluate_normalize = evaluate.normalize
SHUFFLENET = make_space(SpaceConfig(name="shufflenet", resolution=64), 10)
# Where any network will do: cuDNN takes 0.2 s for every depthwise shape that it meets first.
TINY = make_space(SpaceConfig(name="tiny", resolution=64), 10)


@pytest.fixture(autouse=True)
def settled(request):
    """Repeatable kernels, one thread; skips what asks for a GPU where there is none."""
    if "cuda" in request.node.name and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    devices.choose_kernels(deterministic=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def supernet_of(space=SHUFFLENET):
    supernet = space.supernet()
    space.initialize(supernet, torch.Generator().manual_seed(0))
    return supernet


def architectures(space, number, seed=0):
    return as_architectures(random_population(space.genes, number, np.random.default_rng(seed)))


def pictures(number, side=64, seed=0):
    """Images whose brightness and colour tell their class, of 10."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % 10
    colours = np.random.default_rng(1).uniform(30, 225, (10, 3))
    noise = rng.normal(0, 20, (number, 3, side, side))
    images = (colours[labels][:, :, None, None] + noise).clip(0, 255).astype(np.uint8)
    return images, labels


@pytest.mark.parametrize("name", SPACES)
def test_activations_stay_channels_last_on_a_gpu(name):
    """In the other format, training takes twice as long there. No GPU is needed to tell."""
    space = make_space(SpaceConfig(name=name, resolution=256), 10)
    side = space.resolution
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            supernet = space.supernet().train()
            images = torch.empty(2, 3, side, side).to(memory_format=torch.channels_last)
        found = []

        def look(module, inputs, output):
            if output.dim() == 4 and output.shape[2] > 1:
                found.append(output.is_contiguous(memory_format=torch.channels_last))

        handle = torch.nn.modules.module.register_module_forward_hook(look)
        try:
            for arch in architectures(space, 4):
                supernet(images, arch)
        finally:
            handle.remove()
    assert len(found) > 20 and all(found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_evaluation_is_that_of_double_precision_on_a_cpu(monkeypatch, device, dtype):
    """Statistics are exact means whatever the type of the activations is."""
    if device == "cpu" and dtype is torch.float16:
        pytest.skip("torch's float16 convolutions are for GPUs")
    monkeypatch.setattr(devices, "amp_dtype", lambda device: dtype)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images, labels = pictures(230)  # batches of 46
    [arch] = architectures(SHUFFLENET, 1)
    exact = supernet_of().extract(arch).double()
    monkeypatch.setattr(evaluate, "normalize", lambda batch: evaluate_normalize(batch).double())
    monkeypatch.setattr(devices, "amp_dtype", lambda device: None)
    recalibrate_bn(exact, images, batch_size=50)
    expected = correct_mask(exact, images, labels, batch_size=50)
    monkeypatch.setattr(evaluate, "normalize", evaluate_normalize)
    monkeypatch.setattr(devices, "amp_dtype", lambda device: dtype)

    subnet = supernet_of().extract(arch).to(device)
    recalibrate_bn(subnet, images, batch_size=50, device=device)
    pairs = zip(evaluate.bn_layers(subnet), evaluate.bn_layers(exact), strict=True)
    error = 0.0
    for norm, reference in pairs:
        assert norm.running_var.dtype == torch.float32
        deviation = reference.running_var.sqrt().clamp(min=1e-6)
        shift = (norm.running_mean.double().cpu() - reference.running_mean) / deviation
        spread = norm.running_var.double().cpu().sqrt() / deviation
        error = max(error, shift.abs().max().item(), (spread - 1).abs().max().item())
    assert error < (2e-3 if dtype is None else 0.3)
    fold_bn(subnet)
    found = correct_mask(subnet, images, labels, batch_size=50, device=device)
    assert (found == expected).mean() >= (0.99 if dtype is None else 0.85)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "space, number", [(SHUFFLENET, 240), (TINY, 243)], ids=["equal batches", "two sizes"]
)
def test_a_cuda_graph_computes_what_its_kernels_do_one_by_one(monkeypatch, space, number):
    images, labels = pictures(number)
    [arch] = architectures(space, 1)
    graphs = []
    capture = evaluation_batches._capture
    monkeypatch.setattr(
        evaluation_batches, "_capture", lambda *a: graphs.append(capture(*a)) or graphs[-1]
    )

    def statistics_and_verdicts():
        subnet = supernet_of(space).extract(arch).to("cuda")
        recalibrate_bn(subnet, images, batch_size=40, device="cuda", graphs=True)
        kept = [norm.running_var.clone() for norm in evaluate.bn_layers(subnet)]
        fold_bn(subnet)
        outputs = []
        subnet.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        return kept, correct_mask(subnet, images, labels, batch_size=40, device="cuda", graphs=True)

    with_graphs = statistics_and_verdicts()
    assert graphs and all(graphs)
    monkeypatch.setattr(evaluation_batches, "GRAPH_PIXELS", 0)
    number_of_graphs = len(graphs)
    eager = statistics_and_verdicts()
    assert len(graphs) == number_of_graphs
    assert all(map(torch.equal, with_graphs[0], eager[0]))
    np.testing.assert_array_equal(with_graphs[1], eager[1])


@pytest.mark.gpu
def test_evaluation_goes_on_where_no_graph_can_be_captured_on_cuda():
    # In a process of its own: after it, torch's CUDA generator refuses to draw in that process.
    torch.multiprocessing.spawn(evaluate_without_a_graph)


def evaluate_without_a_graph(rank):
    images, labels = pictures(200)
    [arch] = architectures(TINY, 1)
    subnet = supernet_of(TINY).extract(arch).to("cuda").eval()
    options = {"batch_size": 20, "device": "cuda", "graphs": True}
    plain = correct_mask(subnet, images, labels, **options)
    assert evaluation_batches._Graph.possible
    subnet.register_forward_hook(lambda module, inputs, output: print(output.sum()))  # waits
    np.testing.assert_array_equal(plain, correct_mask(subnet, images, labels, **options))
    assert not evaluation_batches._Graph.possible


@pytest.mark.gpu
def test_images_kept_on_the_gpu_give_what_images_of_the_host_do():
    images, labels = pictures(200)
    [arch] = architectures(TINY, 1)
    found = []
    for where in (images, torch.from_numpy(images).to("cuda")):
        subnet = supernet_of(TINY).extract(arch).to("cuda")
        options = {"batch_size": 40, "device": "cuda", "graphs": True}
        found.append(evaluate.evaluate(subnet, where, where, labels, **options))
    np.testing.assert_array_equal(*found)


def batches(epoch, number=6):
    generator = torch.Generator().manual_seed(epoch)
    return [
        (
            torch.randint(0, 256, (8, 3, 64, 64), generator=generator, dtype=torch.uint8),
            torch.randint(0, 10, (8,), generator=generator),
        )
        for _ in range(number)
    ]


def train_supernet(device, *, epochs=2, resume=None):
    """Train two epochs; return the last state, on the CPU."""
    supernet = supernet_of(TINY).to(device)
    states = []
    config = SupernetConfig(channel_warmup_start=0, channel_warmup_epochs=2)
    fit(
        supernet,
        lambda epoch, step: [
            lambda images, arch=arch: F.dropout(supernet(images, arch), 0.5)
            for arch in sample(TINY, config, seed=0, epoch=epoch, step=step)
        ],
        Recipe(**{**RECIPE.__dict__, "epochs": epochs}),
        batches=batches,
        validate=lambda epoch: {},
        report=lambda curves, state: states.append(copy.deepcopy(state())),
        resume=resume,
        device=device,
        seed=0,
    )
    return states


def assert_same_state(one, other):
    for name, tensor in one["state"].items():
        assert torch.equal(tensor, other["state"][name]), name
    for index, kept in one["optimizer"]["state"].items():
        momentum = other["optimizer"]["state"][index]["momentum_buffer"]
        assert torch.equal(kept["momentum_buffer"], momentum)
    losses = [[epoch["loss"] for epoch in each["curves"]] for each in (one, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_and_a_resumed_one_are_equal_to_the_last_bit(device):
    first, second = train_supernet(device), train_supernet(device)
    assert_same_state(first[-1], second[-1])
    assert_same_state(first[-1], train_supernet(device, resume=first[0])[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_and_resumes(monkeypatch, dtype):
    for module in (devices, train):  # of the activations, and of the loss's scale
        monkeypatch.setattr(module, "amp_dtype", lambda device: dtype)
    states = train_supernet("cuda")
    assert bool(states[-1]["scaler"]) is (dtype is torch.float16)
    assert np.isfinite([epoch["loss"] for epoch in states[-1]["curves"]]).all()
    assert_same_state(states[-1], train_supernet("cuda", resume=states[0])[-1])


@pytest.mark.parametrize("device", DEVICES)
def test_batches_come_in_order_and_whole(device):
    expected = batches(0, number=20)
    found = [(images.cpu(), labels.cpu()) for images, labels in train.prefetched(expected, device)]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_loader_raises_arrives_and_an_early_end_leaves_no_thread(device):
    def broken():
        yield from batches(0, number=2)
        raise OSError("the shard is gone")

    with pytest.raises(OSError, match="the shard is gone"):
        list(train.prefetched(broken(), device))
    for _ in train.prefetched(batches(0, number=50), device):
        break


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_that_is_not_finite_ends_training_in_one_line(monkeypatch, device):
    monkeypatch.setattr(train, "FINITE_CHECK_STEPS", 2)
    steps = []

    def passes(epoch, step):
        steps.append(step)
        return [forward]

    def forward(images):
        return torch.full((len(images), 10), float("nan"), device=device, requires_grad=True)

    network = torch.nn.Linear(2, 2).to(device)
    with pytest.raises(train.LossNotFiniteError, match="the loss became nan in epoch 1"):
        fit(
            network,
            passes,
            RECIPE,
            batches=lambda epoch: batches(epoch, number=20),
            validate=lambda epoch: {},
            report=lambda curves, state: None,
            resume=None,
            device=device,
            seed=0,
        )
    assert len(steps) == 4  # the second update reads the sums of the first


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_are_timed(device):
    space = make_space(SpaceConfig(name="tiny", resolution=32), 4)
    [arch] = architectures(space, 1)
    times = dict(time_blocks(space, arch, Setup(device=device)))
    assert len(times) == len(space.decode(arch)) and all(0 < ms < 1000 for ms in times.values())


@pytest.fixture
def tiny_task(make_job, tmp_path):
    """make(**compute): an evaluation task of the tiny space on the small data set."""
    space = make_space(SpaceConfig(name="tiny", resolution=32), 4)
    path = str(tmp_path / "supernet.pt")
    save_supernet(path, supernet_of(space))

    def make(**compute):
        job = make_job(compute=compute)
        return EvaluationTask(supernet=path, digest=digest(path), data_path=job.data.path, job=job)

    return make


@pytest.mark.gpu
@pytest.mark.ray
def test_a_gpu_whose_memory_is_out_halves_the_batch_once_then_says_so(
    tiny_task, ray_cluster, monkeypatch
):
    monkeypatch.setattr(
        "nasray.evaluation.evaluator.worker_device", lambda *args, **options: "cuda"
    )
    made = Evaluator.__ray_metadata__.modified_class(tiny_task(device="gpu"))
    made.ready()
    arch = architectures(made.supernet.space, 1)[0]
    plain = made.evaluate(1, Request(arch=arch))
    assert (plain.batch_size, plain.error) == (20, "")
    allocations = []  # only batches of the smaller size find their memory
    network = type(made.supernet.extract(arch))
    forward = network.forward

    def hungry(self, batch):
        allocations.append(len(batch))
        if len(batch) > most:
            torch.empty(1 << 50, device="cuda")
        return forward(self, batch)

    monkeypatch.setattr(network, "forward", hungry)
    most = 10
    halved = made.evaluate(1, Request(arch=arch))
    assert halved.batch_size == 10 and allocations[:3] == [20, 20, 10]
    most = 0
    with pytest.raises(EvaluationError, match="search.batch_size = 20, and with 10: .*lower it"):
        made.evaluate(1, Request(arch=arch))


@pytest.mark.gpu
@pytest.mark.ray
def test_two_evaluators_on_one_gpu_find_what_one_does(tiny_task, ray_cluster):
    archs = architectures(make_space(SpaceConfig(name="tiny", resolution=32), 4), 8)
    found = []
    for number, share in ((1, 1.0), (2, 0.5)):
        task = tiny_task(device="gpu", num_evaluators=number, gpus_per_evaluator=share)
        with EvaluatorPool(task) as pool:
            evaluations = pool.evaluate([Request(arch=arch) for arch in archs * 2])
            assert len({each.evaluator for each in evaluations}) == number
            found.append([(each.fitness, each.correct) for each in evaluations])
    assert found[0] == found[1]


def average_on(rank, world_size, backend, path, results):
    dist.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=world_size)
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    network = torch.nn.Linear(3, 2).to(device)
    averager = GradientAverager(network)
    averager.begin(lambda: [(network.weight, torch.Size([2, 2]))])  # a step that uses a slice only
    F.linear(torch.full((1, 2), float(rank), device=device), network.weight[:, :2]).sum().backward()
    averager.finish()
    results[rank] = (network.weight.grad.cpu().tolist(), network.bias.grad)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu, id="nccl on cuda")]
)
def test_gradients_are_averaged_over_ranks(tmp_path, backend):
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU only: two ranks need two")
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        arguments = (2, backend, str(tmp_path / "rendezvous"), results)
        torch.multiprocessing.spawn(average_on, arguments, nprocs=2)
        found = dict(results)
    assert found == {rank: ([[0.5, 0.5, 0.0]] * 2, None) for rank in (0, 1)}
