"""Accuracy predictor: one-hot genes -> three hidden layers -> top-1, a fraction.

Fitted to evaluations of one space, or read from the files that Once-for-All published
(docs/spec.md, OFA 3.1, 3.2). Called with a population it returns top-1 as float32, a few
microseconds of one core each: the first layer is a sum of rows of a table, since its input is
one-hot.
"""

import functools
import io
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pickle import UnpicklingError
from struct import error as StructError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasray.devices import computing_with
from nasray.errors import UserError
from nasray.predictors.ofa_files import published_layers
from nasray.progress import Show
from nasray.spaces import describe
from nasray.spaces.active import Activity
from nasray.spaces.population import random_population
from nasray.spaces.space import Population, Space
from nasray.storage import files as storage

HIDDEN = (400, 400, 400)
FORMAT = "nasray accuracy predictor 1"
CHUNK = 512  # architectures at once: their hidden units stay in cache, and on the heap
MAX_ROWS = 256  # of one table of the first layer
STEPS = 2000
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 512, 1e-3, 1e-4  # once-for-all issue 30

# What torch.load raises for files that it did not write.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    StructError,
    UnpicklingError,
)

# oneDNN's matrix product with a fused ReLU runs at twice the speed of MKL's on AMD CPUs.
FUSED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True)
class Group:
    """Genes whose joint choices index one table of the first layer."""

    columns: tuple[int, ...]
    members: tuple[int, ...]  # of the columns: genes whose weights the table sums


class AccuracyPredictor:
    """Predicts the top-1 of populations of one space: `predictor(population)`.

    `layers`: weight (out, in) and bias (out,) of each layer, ReLU between. The input has one
    column per choice of each gene, in their order; those of genes without effect are 0.
    """

    def __init__(self, space: Space, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.space, self.activity = space, Activity(space)
        self.layers = [(weight.float(), bias.float()) for weight, bias in layers]
        sizes = [len(gene.choices) for gene in space.genes]
        self.starts = np.cumsum([0, *sizes])  # first input column of each gene
        self._compile_first_layer(sizes)
        # Where genes that have an effect may trade places, not only those without one are changed.
        some = random_population(space.genes, 64, np.random.default_rng(0))
        self.reorders = bool(((space.canonical(some) != some) & self.activity(some)).any())

    def __call__(self, population: Population) -> np.ndarray:
        """Predict the top-1 of each row of `population` (n, genes): float32 (n,)."""
        return self.begin(population)()

    def begin(self, population: Population) -> Callable[[], np.ndarray]:
        """Start to predict in other threads; the returned function waits for the top-1 (n,)."""
        population = self._ordered(population)
        # Of the same size for any number of threads: the last bits may depend on it.
        chunks = [population[start : start + CHUNK] for start in range(0, len(population), CHUNK)]
        started = [single_threads().submit(self._predict, chunk) for chunk in chunks]

        def top1() -> np.ndarray:
            found = [future.result() for future in started]
            return np.concatenate([np.empty(0, dtype=np.float32), *found])

        return top1

    def exact(self, population: Population) -> np.ndarray:
        """Predict (n,) in double precision, rounded to float32: the published programs' digits."""
        hidden = self.features(population).astype(np.float64)
        for index, (weight, bias) in enumerate(self.layers):
            hidden = hidden @ weight.double().numpy().T + bias.double().numpy()
            if index < len(self.layers) - 1:
                hidden = np.maximum(hidden, 0)
        return hidden[:, 0].astype(np.float32)

    def features(self, population: Population) -> np.ndarray:
        """The one-hot input: float32 (n, choices of all genes)."""
        return self._one_hot(self._ordered(population))

    def _one_hot(self, population: Population) -> np.ndarray:
        places = self.starts[:-1] + population
        features = np.zeros((len(population), self.starts[-1]), dtype=np.float32)
        np.put_along_axis(features, places, self.activity(population).astype(np.float32), axis=1)
        return features

    def _ordered(self, population: Population) -> Population:
        """The same networks, equal ones as equal rows."""
        return self.space.canonical(population) if self.reorders else population

    @classmethod
    def fit(
        cls,
        space: Space,
        population: Population,
        top1: Sequence[float] | np.ndarray,
        *,
        seed: int,
        steps: int = STEPS,
        show: Show = lambda done, text: None,
    ) -> "AccuracyPredictor":
        """Fit to the `top1` (n,) of `population` (n, genes), a fraction each.

        `show` is called with the number of steps done.
        """
        targets = np.asarray(top1, dtype=np.float32)
        untrained = cls(space, _fresh_layers(space, float(targets.mean()), seed))
        inputs = torch.from_numpy(untrained.features(population))
        with computing_with(1):  # the order of float sums must not depend on the machine's cores
            layers = _train(untrained.layers, inputs, torch.from_numpy(targets), seed, steps, show)
        return cls(space, layers)

    def save(self, path: str) -> None:
        """Write the layers and what describes the space to `path`, which load() reads."""
        buffer = io.BytesIO()
        layers = [[weight, bias] for weight, bias in self.layers]
        torch.save({"format": FORMAT, "space": describe(self.space), "layers": layers}, buffer)
        storage.write(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str, space: Space) -> "AccuracyPredictor":
        """Read what save() wrote, or a predictor that Once-for-All published, for `space`.

        Raises:
            UserError: the file is absent, damaged, or of another space.
        """
        content = _read(path)
        layers: Any
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            layers = published_layers(content, space, path)
        else:
            _check_same_space(content.get("space"), describe(space), path)
            layers = content.get("layers")
        return cls(space, _checked(layers, sum(len(gene.choices) for gene in space.genes), path))

    @torch.inference_mode()
    def _predict(self, chunk: Population) -> np.ndarray:
        population = torch.from_numpy(np.ascontiguousarray(chunk))
        places = (population.float() @ self.strides).int() + self.offsets
        hidden = F.embedding_bag(places, self.table, mode="sum").relu_()
        for weight, bias in self.layers[1:-1]:
            if FUSED:
                hidden = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "relu", [], "")
            else:
                hidden = F.linear(hidden, weight, bias).relu_()
        return (torch.mv(hidden, self.layers[-1][0][0]) + self.layers[-1][1]).numpy()

    def _compile_first_layer(self, sizes: list[int]) -> None:
        """Sum the first layer's weights over groups of genes, whose choices index the sums."""
        groups = _group(sizes, self.activity)
        strides = np.zeros((len(sizes), len(groups)), dtype=np.float32)
        tables: list[Tensor] = []
        offsets: list[int] = []
        for index, group in enumerate(groups):
            shape = [sizes[column] for column in group.columns]
            offsets.append(sum(len(table) for table in tables))
            tables.append(self._sums(group, shape))
            strides[list(group.columns), index] = np.append(np.cumprod(shape[:0:-1])[::-1], 1)
        tables[0] = tables[0] + self.layers[0][1]
        self.table = torch.cat(tables)  # float32 (rows of all groups, hidden)
        self.strides = torch.from_numpy(strides)  # exact: whole numbers below 2**24
        self.offsets = torch.tensor(offsets, dtype=torch.int32)

    def _sums(self, group: Group, shape: list[int]) -> Tensor:
        """The table of `group`: the first layer's sum over its members for all choices."""
        choices = np.indices(shape).reshape(len(shape), -1).T
        population = np.zeros((len(choices), len(self.starts) - 1), dtype=np.int8)
        population[:, list(group.columns)] = choices
        features = self._one_hot(population)
        for gene in range(population.shape[1]):
            if gene not in group.members:
                features[:, self.starts[gene] : self.starts[gene + 1]] = 0
        return (torch.from_numpy(features).double() @ self.layers[0][0].double().T).float()


@functools.cache
def single_threads() -> ThreadPoolExecutor:
    """As many threads as torch computes with at the first call; each of them computes alone.

    They compute chunks side by side: one product that is split among the cores waits for the
    slowest of them.
    """
    number = torch.get_num_threads()
    all_started = threading.Barrier(number)

    def compute_alone() -> None:
        torch.get_num_threads()  # a thread's first call takes over the number that was set last
        torch.set_num_threads(1)

    threads = ThreadPoolExecutor(number, "predict", initializer=compute_alone)
    list(threads.map(lambda _: all_started.wait(), range(number)))
    torch.set_num_threads(number)  # what threads that start from now on take over
    return threads


def _group(sizes: list[int], activity: Activity) -> list[Group]:
    """Group genes with those that switch them on: at most MAX_ROWS joint choices per group.

    Each gene joins the group that shares most of its genes and has room, or starts one.
    """
    scopes: list[set[int]] = []
    members: list[list[int]] = []
    for gene in range(len(sizes)):
        scope = {gene, *activity.switches.get(gene, ())}
        fits = [
            index
            for index, old in enumerate(scopes)
            if np.prod([sizes[column] for column in old | scope]) <= MAX_ROWS
        ]
        if fits:
            index = max(fits, key=lambda index: (len(scopes[index] & scope), -index))
            scopes[index] |= scope
            members[index].append(gene)
        else:
            scopes.append(scope)
            members.append([gene])
    return [
        Group(tuple(sorted(scope)), tuple(genes))
        for scope, genes in zip(scopes, members, strict=True)
    ]


def _fresh_layers(space: Space, mean: float, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Layers with torch's usual initial weights, whose output starts near `mean`."""
    generator = torch.Generator().manual_seed(seed)
    widths = [sum(len(gene.choices) for gene in space.genes), *HIDDEN, 1]
    layers = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        bound = inputs**-0.5
        weight = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
        layers.append((weight, torch.zeros(outputs)))
    layers[-1][1].fill_(mean)
    return layers


def _train(
    layers: Sequence[tuple[Tensor, Tensor]],
    inputs: Tensor,
    targets: Tensor,
    seed: int,
    steps: int,
    show: Show,
) -> list[tuple[Tensor, Tensor]]:
    """Minimise the squared error by Adam with a cosine schedule that ends at 0."""
    network = nn.Sequential()
    for weight, bias in layers:
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data, linear.bias.data = weight.clone(), bias.clone()
        network.extend([linear, nn.ReLU()])
    network = network[:-1]
    optimizer = torch.optim.Adam(
        network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    size = min(BATCH_SIZE, len(targets))
    for step in range(steps):
        batch = torch.randperm(len(targets), generator=generator)[:size]
        optimizer.zero_grad()
        F.mse_loss(network(inputs[batch])[:, 0], targets[batch]).backward()
        optimizer.step()
        schedule.step()
        show(step + 1, "")
    linears = [module for module in network if isinstance(module, nn.Linear)]
    return [(linear.weight.detach(), linear.bias.detach()) for linear in linears]


def _read(path: str) -> Any:
    """Load what torch.save wrote to `path`, after a look at the checksums."""
    if not storage.exists(path):
        raise UserError(f"{path} does not exist; fit a predictor first, or correct the path")
    content = io.BytesIO(storage.read(path))
    try:
        if zipfile.is_zipfile(content) and zipfile.ZipFile(content).testzip():
            raise ValueError  # torch would not look at the checksums
        content.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice is to load it unsafely
            return torch.load(content, map_location="cpu", weights_only=True)
    except UNREADABLE:
        raise UserError(
            f"{path} is not a readable predictor: damaged, or not written by nasray or OFA; fit or "
            "fetch it again"
        ) from None


def _checked(layers: Any, num_inputs: int, path: str) -> list[tuple[Tensor, Tensor]]:
    """Refuse layers that do not fit to the space or to each other, or are not finite."""
    width = num_inputs
    try:
        for weight, bias in layers:
            if weight.shape != (len(bias), width) or bias.ndim != 1:
                raise ValueError
            for values in (weight, bias):
                if not (values.is_floating_point() and values.isfinite().all()):
                    raise ValueError
            width = len(bias)
        found = [(weight.float(), bias.float()) for weight, bias in layers]
        if width != 1 or len(found) < 2:
            raise ValueError
    except (TypeError, ValueError, AttributeError, RuntimeError):  # the last: odd kinds of tensors
        raise UserError(f"{path} is a damaged predictor; fit or fetch it again") from None
    return found


def _check_same_space(fitted: Any, asked: dict[str, Any], path: str) -> None:
    if not isinstance(fitted, dict) or "name" not in fitted:
        raise UserError(f"{path} is a damaged predictor; fit or fetch it again")
    for key in ("name", *sorted(fitted.keys() & asked.keys())):
        if fitted[key] != asked[key]:
            raise UserError(
                f"{path} was fitted to {fitted['name']} with {key} = {fitted[key]!r}, not "
                f"{asked[key]!r}; fit one to this space"
            )
