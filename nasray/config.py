"""What a job may say. One TOML file describes one run: `nasray run JOB RUN_DIR`.

Frozen models, composed, never inherited from one another. An unknown key is an error.
Knows no space, no network and no cluster.
"""

import json
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nasray.errors import UserError, did_you_mean
from nasray.storage import files as storage

# Keys that hold paths: a job file may be relative to where nasray is called, a run is not.
PATHS = (
    ("data", "path"),
    ("supernet", "init"),
    ("supernet", "teacher"),
    ("search", "latency_table"),
    ("search", "predictor"),
)


class Section(BaseModel):
    """A section of a job: frozen, refuses unknown keys and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SpaceConfig(BaseModel):
    """The design space. Keys beyond these two are options of that space's own file."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = "shufflenet"
    resolution: int = Field(224, ge=32)  # input side, pixels; spaces may ask for more

    @property
    def options(self) -> dict[str, Any]:
        """The keys beyond those two, as they stand in the job."""
        return dict(self.model_extra or {})


class DataConfig(Section):
    """The data set, and how training images are augmented."""

    source: str  # a name in data.SOURCES, or "parquet": imported already
    path: str = ""  # folder or file of the source; not needed for one in data.GENERATED
    # Of "csv", "table" and "huggingface"; empty: "path" or "image", "label", and "split" if there.
    image_column: str = ""
    label_column: str = ""
    split_column: str = ""
    background: str = "white"  # under transparent pixels, a colour as Pillow names it
    # Training images set aside to evaluate subnets on: so many of each class, or a share of each.
    # 0 and 0: a fifth, but of a large set the larger of 500 and 50 per class.
    holdout_per_class: int = Field(0, ge=0)
    holdout_share: float = Field(0.0, ge=0, lt=1)
    # The share of all images to report on. 0: those in val/, or without it the default share above.
    val_share: float = Field(0.0, ge=0, lt=1)
    # Of training, where classes have unlike numbers of images: each class is drawn as often, or
    # the loss of an image is weighted by how rare its class is.
    balance: Literal["none", "sampling", "weights"] = "none"
    min_crop_area: float = Field(0.08, gt=0, le=1)  # of the image, random resized crop
    flip: bool = True
    color_jitter: float = Field(0.4, ge=0)  # brightness, contrast, saturation
    lighting: float = Field(0.1, ge=0)  # PCA lighting (AlexNet), standard deviation
    # Of JPEGs. torchcodec is quicker, must be installed, and gives slightly other pixels.
    decoder: Literal["pillow", "torchcodec"] = "pillow"
    loader_workers: int = Field(0, ge=0)  # decoding processes per training worker
    # The generator of "synthetic":
    num_classes: int = Field(10, ge=2, le=10)
    train_per_class: int = Field(200, ge=1)
    val_per_class: int = Field(50, ge=1)
    image_side: int = Field(64, ge=16)

    @model_validator(mode="after")
    def _one_holdout(self) -> "DataConfig":
        if self.holdout_per_class and self.holdout_share:
            raise ValueError(
                f"holdout_per_class = {self.holdout_per_class} and holdout_share = "
                f"{self.holdout_share} both say what is held out; leave one of them out"
            )
        return self

    @field_validator("background")
    @classmethod
    def _is_opaque_colour(cls, name: str) -> str:
        from PIL import ImageColor

        try:
            opaque = len(ImageColor.getrgb(name)) == 3
        except ValueError:
            opaque = False
        if not opaque:
            raise ValueError(
                f'{name!r} is no opaque colour; give a name such as "white", or "#rrggbb"'
            )
        return name


class ComputeConfig(Section):
    """What each role asks of the cluster."""

    device: Literal["auto", "cpu", "gpu"] = "auto"  # auto: the GPUs the cluster has, else CPUs
    num_workers: int = Field(1, ge=1)  # data-parallel training workers
    cpus_per_worker: int = Field(1, ge=1)  # also its number of threads
    num_evaluators: int = Field(1, ge=1)
    cpus_per_evaluator: int = Field(1, ge=1)  # also its number of threads
    gpus_per_evaluator: float = Field(1.0, gt=0)
    cpus_per_trial: int = Field(1, ge=1)  # of each training worker of a retraining trial
    workers_per_trial: int = Field(1, ge=1)
    concurrent_trials: int = Field(1, ge=1)  # above 1, what ASHA stops depends on timing
    # Answers of the search that are retrained at the same time. 0: as many as the cluster has room
    # for when retraining begins; one that grows by itself needs a number.
    concurrent_winners: int = Field(0, ge=0)
    # On GPUs: the same run again gives the same weights. false: cuDNN times its kernels and takes
    # the quickest, which differ from run to run.
    deterministic: bool = True
    max_failures: int = Field(3, ge=0)  # lost training workers, or losses of one candidate
    # Seconds after which an evaluator that loads, and the first evaluations, are taken to hang;
    # once five are known, it is 20 times the longest, and at least 10 minutes or this.
    time_limit_s: float = Field(1800.0, gt=0)
    accelerator_type: str = ""  # of the GPUs, as Ray names it: "T4", "A100"; empty: any
    # Labels of the nodes to run on, e.g. { "ray.io/market-type" = "spot" }. Unless they say
    # otherwise, training and retraining stay off spot nodes, and evaluators prefer them.
    worker_labels: dict[str, str] = {}
    evaluator_labels: dict[str, str] = {}


# The defaults of [supernet] where training begins with trained weights, `init`.
FROM_INIT: dict[str, Any] = {
    "epochs": 12,
    "batch_size": 32,
    "learning_rate": 0.05,
    "warmup_epochs": 1,
    "weight_decay": 4e-5,
    "channel_warmup_start": 0,
    "channel_warmup_epochs": 0,
    "sampling": "sandwich",
    "distillation": 1.0,
}


class SupernetConfig(Section):
    """Supernet training. Defaults are the published recipe (batch over all workers).

    With `init`, they are those of FROM_INIT.
    """

    init: str = ""  # path or URL of trained weights to begin with; empty: random ones
    init_sha256: str = ""  # that the file must have
    epochs: int = Field(120, ge=0)  # 0: the supernet that `init` names, as it is
    batch_size: int = Field(1024, ge=2)
    learning_rate: float = Field(1.3, gt=0)  # peak
    warmup_epochs: float = Field(5, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(3e-5, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    # Shared start: train the first operation of every block alone before this epoch, then
    # copy it into its siblings and sample. 0 is the published way, which needs some ten
    # thousand steps before random paths agree on anything; small data sets lack them.
    shared_start_epochs: int = Field(0, ge=0)
    # Channel-selection warm-up: full width before this epoch (0-based), then the published
    # table of ever smaller scales, stretched or squeezed to `channel_warmup_epochs`; 0: all at
    # once.
    channel_warmup_start: int = Field(60, ge=0)
    channel_warmup_epochs: int = Field(24, ge=0)
    smallest_scale: float = Field(0.2, gt=0)  # nothing narrower is ever trained
    num_val_archs: int = Field(4, ge=1)  # fixed architectures, the mean of whose top-1 is shown
    val_calibration_images: int = Field(2000, ge=2)
    val_every: int = Field(1, ge=1)  # epochs
    # The subnets of a step (training/sampler.py): one, drawn uniformly; the sandwich rule (BigNAS,
    # Yu et al. 2020), the largest, the smallest and `sandwich_random` random ones, whose gradients
    # are summed; each operation of a block once, summed (FairNAS); one within search.limits; one
    # of what the warm-up has opened, channels sorted by importance whenever narrower ones open
    # (Once-for-All); or the largest alone, the way to a teacher.
    sampling: Literal["uniform", "sandwich", "fair", "banded", "progressive", "largest"] = "uniform"
    sandwich_random: int = Field(2, ge=0)
    # Draw the random ones of a sandwich as "banded" does, rather than from the whole space.
    sandwich_within_limits: bool = False
    # The share of soft labels in the loss: those of `teacher`, for all subnets; without one,
    # those of the step's largest subnet, for the others (in-place distillation, ibid.).
    distillation: float = Field(0.0, ge=0, le=1)
    # How far a subnet is from soft labels: by KL divergence, or AlphaNet's alpha-divergence.
    distillation_loss: Literal["kl", "alpha"] = "kl"
    teacher: str = ""  # path of a supernet.pt, or of a model.pt of retraining
    # Before the supernet, train the largest subnet alone at space.resolution, to be the teacher.
    teacher_epochs: int = Field(0, ge=0)
    teacher_learning_rate: float = Field(0.05, gt=0)
    ema: float = Field(0.0, ge=0, lt=1)  # decay per step of the averaged weights kept; 0: none
    # How the learning rate falls: as a cosine, or the sooner the fewer parameters a subnet has
    # (DYNAS' complexity-aware learning rate).
    schedule: Literal["cosine", "complexity"] = "cosine"
    # Weight, at its highest, of the loss of a subnet that is worse than a smaller one of the step.
    rank_loss: float = Field(0.0, ge=0)
    clip_gradient_norm: float = Field(0.0, ge=0)  # L2, of a step's summed gradients; 0: not clipped

    @property
    def within_limits(self) -> bool:
        """Whether training draws within the limits of the search."""
        return self.sampling == "banded" or self.sandwich_within_limits

    @property
    def needs_sizes(self) -> bool:
        """Whether training depends on how large a step's subnets are."""
        return self.schedule == "complexity" or self.rank_loss > 0

    @property
    def has_teacher(self) -> bool:
        """Whether RUN/init/teacher.pt gives soft labels."""
        return bool(self.teacher or self.teacher_epochs)

    @model_validator(mode="before")
    @classmethod
    def _defaults_for_init(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("init"):
            return values
        filled = FROM_INIT | values
        has_teacher = values.get("teacher") or values.get("teacher_epochs")
        if filled["sampling"] != "sandwich" and not has_teacher:
            filled["distillation"] = values.get("distillation", 0.0)  # no soft labels
        return filled

    @model_validator(mode="after")
    def _begins_with_weights(self) -> "SupernetConfig":
        if self.epochs == 0 and not self.init:
            raise ValueError(
                "epochs = 0 takes a supernet as it is: name its file in `init`, or set epochs to "
                "1 or more"
            )
        if self.epochs == 0 and self.teacher_epochs:
            raise ValueError(
                f"teacher_epochs = {self.teacher_epochs} trains a teacher for the supernet, which "
                "epochs = 0 takes as it is; leave teacher_epochs out, or set epochs to 1 or more"
            )
        if self.init and self.shared_start_epochs:
            raise ValueError(
                f"shared_start_epochs = {self.shared_start_epochs} would copy the first operation "
                "of each block over the others that `init` holds; set it to 0"
            )
        if self.init_sha256 and not self.init:
            raise ValueError("init_sha256 is of the file `init`, which is not given; give both")
        return self

    @model_validator(mode="after")
    def _opens_step_by_step(self) -> "SupernetConfig":
        if self.sampling == "progressive" and self.epochs and not self.channel_warmup_epochs:
            raise ValueError(
                'sampling = "progressive" opens smaller choices step by step, and channel_warmup_'
                'epochs = 0 opens all at once; set that to 3 or more, or sampling to "uniform"'
            )
        return self

    @model_validator(mode="after")
    def _sandwich_has_random_ones(self) -> "SupernetConfig":
        if self.sandwich_within_limits and (
            self.sampling != "sandwich" or not self.sandwich_random
        ):
            raise ValueError(
                "sandwich_within_limits = true is of the random subnets of a sandwich, of which "
                f'sampling = "{self.sampling}" with sandwich_random = {self.sandwich_random} has '
                'none; set sampling to "sandwich" and sandwich_random to 2, or leave it out'
            )
        return self

    @model_validator(mode="after")
    def _ranks_several(self) -> "SupernetConfig":
        if self.rank_loss and self.sampling not in ("sandwich", "fair"):
            raise ValueError(
                f"rank_loss = {self.rank_loss} compares the subnets of a step, and sampling = "
                f'"{self.sampling}" has one; set that to "fair" or "sandwich", or rank_loss to 0'
            )
        if self.rank_loss and self.distillation and not self.has_teacher:
            raise ValueError(
                f"rank_loss = {self.rank_loss} begins a step with its smallest subnet, and "
                f"distillation = {self.distillation} with its largest, to teach the others; name a "
                "`teacher`, or set one of the two to 0"
            )
        return self

    @model_validator(mode="after")
    def _has_soft_labels(self) -> "SupernetConfig":
        if self.teacher and self.teacher_epochs:
            raise ValueError(
                f"teacher_epochs = {self.teacher_epochs} trains a teacher, but `teacher` names "
                "one; give one of the two"
            )
        if self.has_teacher and not self.distillation:
            raise ValueError("a teacher teaches nothing with distillation = 0; set it to 0.5, say")
        if self.distillation and not self.has_teacher and self.sampling != "sandwich":
            raise ValueError(
                f"distillation = {self.distillation} needs soft labels: set sampling to "
                '"sandwich", whose largest subnets give them, or name a `teacher`'
            )
        if self.distillation_loss != "kl" and not self.distillation:
            raise ValueError(
                f'distillation_loss = "{self.distillation_loss}" is of soft labels, and there are '
                "none with distillation = 0; set that to 1.0, say, or leave distillation_loss out"
            )
        return self

    @model_validator(mode="after")
    def _starts_in_order(self) -> "SupernetConfig":
        start, shared = self.channel_warmup_start, self.shared_start_epochs
        if self.epochs and not shared <= start < self.epochs:
            raise ValueError(
                f"channel_warmup_start = {start} must be at least shared_start_epochs = {shared} "
                f"and below epochs = {self.epochs}, or no width but the full one is trained"
            )
        return self


class Limit(Section):
    """Bounds on one cost, e.g. { cost = "macs", max = 330e6 }."""

    cost: str  # a column of `nasray profile --json`, or "score:<baseline>"
    max: float | None = None
    min: float | None = None

    def holds(self, value: float) -> bool:
        """Whether `value`, in units of the cost, is within both bounds; each is allowed itself."""
        return (self.max is None or value <= self.max) and (self.min is None or value >= self.min)

    @property
    def text(self) -> str:
        """The limit as an inequality, such as "macs <= 330000000"."""
        low = f"{self.min:.10g} <= " if self.min is not None else ""
        high = f" <= {self.max:.10g}" if self.max is not None else ""
        return f"{low}{self.cost}{high}"

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "Limit":
        if self.max is None and self.min is None:
            raise ValueError("a limit needs `max`, `min` or both")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


def limited_cost(limits: Sequence[Limit]) -> str:
    """The cost that a front is drawn over: the first limited one, else MACs."""
    return limits[0].cost if limits else "macs"


# Algorithms that answer each limit on the first limit's cost by an architecture of its own; to
# the others a candidate must be within all limits at once.
MULTI_LIMIT = ("front", "nsga2", "vanilla", "top-down", "bottom-up")


def paid_by(evaluations: int, values: dict[str, Any]) -> dict[str, Any]:
    """Defaults of [search] for a number of evaluations, beside the `values` that are given.

    Up to 500 a Gaussian process finds the best (docs/results.md); beyond, its time grows with the
    cube of their number. A search of few evaluations is better with a small population.
    """
    limits = values.get("limits", ())
    if isinstance(limits, list | tuple) and len(limits) > 1 and limits_on_one_cost(limits):
        if values.get("racing") and not (values.get("verify") or "algorithm" in values):
            raise ValueError(
                f"evaluations = {evaluations} chooses the front search, which answers several "
                'limits on one cost, and racing = true is for algorithm = "genetic" and "steady"; '
                "set racing to false, or name one of these, which search within all limits at once"
            )
        algorithm = "front"
    elif evaluations <= 500 and not values.get("racing"):
        algorithm = "bayesian"
    else:
        algorithm = "steady"
    population = values.get("population_size", min(evaluations, max(4, min(20, evaluations // 5))))
    parents = values.get("num_parents", max(2, min(10, population // 2)))
    if not 0 < parents < population:
        return {"population_size": population, "num_parents": parents}  # which is refused
    genetic = values.get("algorithm") == "genetic" and not values.get("verify")
    later = population - parents if genetic else population  # evaluated in a later generation
    return {
        "algorithm": algorithm,
        "population_size": population,
        "num_generations": 1 + max(0, evaluations - population) // later,
        "num_parents": parents,
        "lag": 4 if evaluations <= 200 else 8 if evaluations <= 500 else 16,
    }


def limits_on_one_cost(limits: Sequence[Any]) -> bool:
    """Whether several of `limits`, as a job has them, are on the first one's cost."""
    costs = [limit.get("cost") for limit in limits if isinstance(limit, dict)]
    return costs.count(costs[0]) > 1 if costs else False


# Of [search], numbers that others follow from: floats such as 1e3 are taken if they are whole.
COUNTS = ("evaluations", "population_size", "num_generations", "num_parents")
MIN_EVALUATIONS = 3  # two parents and a child


class SearchConfig(Section):
    """Search. Defaults are the published genetic search (population and rates).

    With `evaluations`, they are those of paid_by().
    """

    # 0: population and generations say.
    evaluations: int = Field(0, ge=0, strict=True)  # that the job can pay for
    algorithm: str = "genetic"  # a name in algorithms.ALGORITHMS
    # What is maximised on the hold-out, a name in search.scores.FITNESS: the share of all images
    # that is right, the mean of that share over the classes, or the mean log-probability of the
    # right class.
    fitness: Literal["top1", "balanced", "log_likelihood"] = "top1"
    # Of steady, evolution and bayesian: so many candidates are under way at once, on any number of
    # evaluators. More evaluators than that have nothing to do.
    lag: int = Field(16, ge=1)
    racing: bool = False  # drop a candidate once it is all but sure to stay below the parents
    racing_confidence: float = Field(0.99, gt=0.5, lt=1)
    latency_table: str = ""  # of a device; its path makes "latency_ms" a cost
    verify: bool = False  # a predictor proposes, the supernet verifies, the predictor is refitted
    predictor: str = ""  # path of a fitted one, for what `verify` proposes first
    proposals: int = Field(200_000, ge=1000)  # candidates predicted for each such generation
    population_size: int = Field(50, ge=2, strict=True)
    num_generations: int = Field(20, ge=1, strict=True)
    num_parents: int = Field(10, ge=2, strict=True)  # the best, kept every generation
    random_parent_prob: float = Field(0.1, ge=0, le=1)  # of each other member
    mutation_prob: float = Field(0.1, ge=0, le=1)  # per gene
    limits: tuple[Limit, ...] = ()
    calibration_images: int = Field(20_000, ge=2)  # or all there are
    batch_size: int = Field(250, ge=2)  # of recalibration and validation
    # The answer: the cheapest candidate that is not clearly worse than the best, or the best.
    prefer: Literal["cheapest", "best"] = "cheapest"
    top_k: int = Field(3, ge=1)
    num_baseline: int = Field(10, ge=0)  # random feasible subnets the winner is compared with

    @property
    def accuracy(self) -> str:
        """By which name in scores.FITNESS networks are compared that are trained, or reported."""
        return "balanced" if self.fitness == "balanced" else "top1"

    @property
    def one_by_one(self) -> bool:
        """Whether each limit on the first one's cost has an answer of its own."""
        return self.verify or self.algorithm in MULTI_LIMIT

    @property
    def most_evaluations(self) -> int:
        """How many candidates a search by this section evaluates at most."""
        kept = self.num_parents if self.algorithm == "genetic" and not self.verify else 0
        return self.population_size + (self.num_generations - 1) * (self.population_size - kept)

    @model_validator(mode="before")
    @classmethod
    def _defaults_for_evaluations(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        floats = {key: values[key] for key in COUNTS if isinstance(values.get(key), float)}
        whole = {key: int(value) for key, value in floats.items() if value.is_integer()}
        values = values | whole
        number = values.get("evaluations", 0)
        sizes = [values[key] for key in ("population_size", "num_parents") if key in values]
        if not all(type(each) is int for each in (number, *sizes)) or number < MIN_EVALUATIONS:
            return values
        return paid_by(number, values) | values

    @model_validator(mode="after")
    def _evaluations_are_enough(self) -> "SearchConfig":
        if 0 < self.evaluations < MIN_EVALUATIONS:
            raise ValueError(
                f"evaluations = {self.evaluations} must be at least {MIN_EVALUATIONS}, or 0: then "
                "population_size and num_generations say how many there are"
            )
        return self

    @model_validator(mode="after")
    def _parents_fit(self) -> "SearchConfig":
        if self.num_parents >= self.population_size:
            default = "" if "num_parents" in self.model_fields_set else ", its default"
            raise ValueError(
                f"num_parents must be below population_size = {self.population_size}, "
                f"got {self.num_parents}{default}; lower it, or raise population_size"
            )
        return self

    @model_validator(mode="after")
    def _evaluations_are_paid(self) -> "SearchConfig":
        if 0 < self.evaluations < self.population_size:
            raise ValueError(
                f"evaluations = {self.evaluations} do not pay for the first generation: "
                f"population_size = {self.population_size}; lower that, or raise evaluations"
            )
        if self.evaluations and self.most_evaluations > self.evaluations:
            raise ValueError(
                f"evaluations = {self.evaluations} do not pay for {self.most_evaluations}: "
                f"population_size = {self.population_size} and num_generations = "
                f"{self.num_generations}; leave num_generations out, or raise evaluations"
            )
        return self

    @model_validator(mode="after")
    def _limits_have_a_max(self) -> "SearchConfig":
        on_it = [limit for limit in self.limits if limit.cost == limited_cost(self.limits)]
        if self.one_by_one and len(on_it) > 1:
            for limit in on_it:
                if limit.max is None or limit.min is not None:
                    raise ValueError(
                        f"limits on {limit.cost}, the first limit's cost, are answered one by one: "
                        "several of them need a `max` and no `min` each"
                    )
        needed = len({limit.max for limit in on_it})
        if self.algorithm in ("vanilla", "top-down", "bottom-up") and self.num_generations < needed:
            raise ValueError(
                f"num_generations = {self.num_generations} must be at least {needed}, one for each "
                f"limit of the {self.algorithm} search"
            )
        return self

    @model_validator(mode="after")
    def _early_stopping_has_parents(self) -> "SearchConfig":
        if self.racing and (self.verify or self.algorithm not in ("genetic", "steady")):
            raise ValueError(
                'racing = true is for algorithm = "genetic" and "steady" without verify, got '
                f"algorithm = {self.algorithm!r}{' with verify' if self.verify else ''}: only they "
                "have parents that a candidate must beat; set it to false"
            )
        return self

    @model_validator(mode="after")
    def _early_stopping_counts_images(self) -> "SearchConfig":
        if self.racing and self.fitness != "top1":
            raise ValueError(
                "racing = true stops by the number of images that are right, which decides "
                f'fitness = "top1" alone, got fitness = {self.fitness!r}; set one of the two back'
            )
        return self


# The defaults of [retrain] where it begins with the supernet's weights.
FROM_SUPERNET: dict[str, Any] = {
    "num_winners": 0,
    "epochs": 0,
    "batch_size": 32,
    "learning_rate": 0.01,
    "weight_decay": 4e-5,
    "warmup_epochs": 0.5,
    "distillation": 0.5,
}

Way = Literal["supernet", "fine-tuned", "scratch"]
TUNED = ("learning_rate", "weight_decay", "label_smoothing")  # of [retrain], if given as a pair


class RetrainConfig(Section):
    """How networks get the weights that they are shipped with.

    From scratch, or from the supernet's on, with the defaults of FROM_SUPERNET. A pair
    [low, high] is tuned (log-uniformly for the rates).
    """

    init: Literal["scratch", "supernet"] = "scratch"  # in a job with supernet.init: "supernet"
    num_winners: int = Field(1, ge=0)  # 0: all answers of the search
    num_trials: int = Field(1, ge=1)  # recipes tried per winner
    epochs: int = Field(360, ge=0)  # 0: the supernet's weights, BN recalibrated
    batch_size: int = Field(1024, ge=2)
    learning_rate: float | tuple[float, float] = 1.3
    weight_decay: float | tuple[float, float] = 3e-5
    label_smoothing: float | tuple[float, float] = 0.1
    warmup_epochs: float = Field(5, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    # The share of soft labels in the loss: those of [supernet] teacher, or of the largest subnet.
    distillation: float = Field(0.0, ge=0, le=1)
    grace_epochs: int = Field(30, ge=1)  # ASHA stops nothing earlier
    reduction_factor: int = Field(3, ge=2)  # ASHA keeps one in this many
    compile: bool = False  # on GPUs, by torch.compile, where Triton and a C compiler are there
    also: tuple["RetrainConfig", ...] = ()  # other ways, for comparison

    @property
    def way(self) -> Way:
        """How the weights come about."""
        if self.init == "scratch":
            return "scratch"
        return "fine-tuned" if self.epochs else "supernet"

    @property
    def ways(self) -> tuple["RetrainConfig", ...]:
        """This way, the first, and the others."""
        return (self, *self.also)

    @model_validator(mode="before")
    @classmethod
    def _defaults_for_init(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("init") == "supernet":
            return FROM_SUPERNET | values
        return values

    @model_validator(mode="after")
    def _trains_from_scratch(self) -> "RetrainConfig":
        if self.init == "scratch" and self.epochs == 0:
            raise ValueError(
                'epochs = 0 ships the supernet\'s weights: set init to "supernet", or epochs to '
                "1 or more"
            )
        tuned = [key for key in TUNED if isinstance(getattr(self, key), tuple)]
        if self.epochs == 0 and (tuned or self.num_trials > 1):
            key = tuned[0] if tuned else "num_trials"
            raise ValueError(
                f"{key} = {getattr(self, key)} is for training, and epochs = 0 trains nothing: set "
                f"epochs to 1 or more, or leave {key} out"
            )
        return self

    @model_validator(mode="after")
    def _ways_differ(self) -> "RetrainConfig":
        if any(other.also for other in self.also):
            raise ValueError("`also` within `also`; list all other ways in [[retrain.also]] alone")
        found = [each.way for each in self.ways]
        for way in found:
            if found.count(way) > 1:
                raise ValueError(
                    f"two ways are {way!r}, by their init and epochs; each can be there once"
                )
        return self

    @model_validator(mode="after")
    def _ranges_in_order(self) -> "RetrainConfig":
        for key in TUNED:
            value = getattr(self, key)
            low, high = value if isinstance(value, tuple) else (value, value)
            if not 0 <= low <= high or (key == "learning_rate" and low <= 0):
                raise ValueError(f"{key} = {value} must be positive and in order, [low, high]")
            if key == "label_smoothing" and high >= 1:
                raise ValueError(f"label_smoothing = {value} must be below 1")
        return self


class ExportConfig(Section):
    """[export]: the precisions and formats that the networks of a run are written in."""

    # float32 is always written: the others are made of it.
    precisions: tuple[Literal["fp32", "fp16", "int8"], ...] = ("fp32",)
    # Points of top-1 that int8 may cost on the hold-out images; else blocks stay float.
    max_drop: float = Field(1.0, ge=0, le=100)
    # Beside ONNX, which is always written.
    formats: tuple[Literal["pt2", "weights", "openvino", "tflite", "executorch"], ...] = ()
    # By format: the Python of an environment that has its packages; otherwise nasray's own.
    pythons: dict[Literal["pt2", "openvino", "tflite", "executorch"], str] = {}


class TrackingConfig(Section):
    """Where the curves of a run are shown while it works. `tracking = "mlflow"` sets `to` alone."""

    to: tuple[Literal["mlflow", "tensorboard", "wandb"], ...] = ()
    # Of MLflow's server or store. Empty: MLFLOW_TRACKING_URI, or without it RUN/mlflow.db.
    uri: str = ""
    experiment: str = "nasray"  # MLflow's experiment, or the project of Weights & Biases

    @model_validator(mode="before")
    @classmethod
    def _to_alone(cls, values: Any) -> Any:
        return {"to": values} if isinstance(values, str | list | tuple) else values

    @field_validator("to", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] * bool(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _uri_is_used(self) -> "TrackingConfig":
        if self.uri and "mlflow" not in self.to:
            raise ValueError(
                f"uri = {self.uri!r} is of MLflow, which `to` does not name; add it there, or "
                "leave uri out"
            )
        return self


class Job(Section):
    """A whole run, as `nasray run` takes it."""

    seed: int = Field(0, ge=0, lt=2**32)
    space: SpaceConfig = SpaceConfig()
    data: DataConfig
    compute: ComputeConfig = ComputeConfig()
    supernet: SupernetConfig = SupernetConfig()
    search: SearchConfig = SearchConfig()
    retrain: RetrainConfig = RetrainConfig()
    export: ExportConfig = ExportConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _banded_has_limits(self) -> "Job":
        if self.supernet.within_limits and self.supernet.epochs and not self.search.limits:
            banded = self.supernet.sampling == "banded"
            key, other = ("sampling", "uniform") if banded else ("sandwich_within_limits", False)
            raise ValueError(
                f"supernet.{key} = {json.dumps(getattr(self.supernet, key))} draws within "
                "search.limits, and there are none; add one, such as "
                f'[{{ cost = "macs", max = 330e6 }}], or set {key} to {json.dumps(other)}'
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _goes_on_with_trained_weights(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        supernet, retrain = values.get("supernet"), values.get("retrain", {})
        if isinstance(supernet, SupernetConfig):
            supernet = supernet.model_dump()
        if isinstance(supernet, dict) and supernet.get("init") and isinstance(retrain, dict):
            return values | {"retrain": {"init": "supernet"} | retrain}
        return values


def load_job(path: str, data_path: str | None = None) -> Job:
    """Read the job file at `path`; `data_path` replaces its [data] path."""
    try:
        values = tomllib.loads(Path(path).read_text("utf-8-sig"))  # editors may add a BOM
    except OSError as error:
        raise UserError(f"job {path}: {error.strerror}; jobs/ has some to copy") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    job = parse_job(values, path)
    # A recorded job names an algorithm, which --verify leaves there; only a file says that it is
    # meant. The proposals are found by the front search.
    if job.search.verify and values["search"].get("algorithm", "front") != "front":
        raise UserError(
            f"{path}: search.algorithm = {job.search.algorithm!r} proposes nothing with verify = "
            "true, where a predictor does; leave one of the two out"
        )
    return with_absolute_paths(job, data_path)


def with_absolute_paths(job: Job, data_path: str | None = None) -> Job:
    """Return `job` with its paths absolute; `data_path` replaces its [data] path."""
    for section, key in PATHS:
        values = getattr(job, section)
        path = data_path if data_path and section == "data" else getattr(values, key)
        if path and not storage.is_url(path):
            values = values.model_copy(update={key: storage.absolute(path)})
            job = job.model_copy(update={section: values})
    # A bare name is looked up where programs are; links of virtual environments are kept.
    pythons = {
        name: os.path.abspath(os.path.expanduser(python)) if "/" in python else python
        for name, python in job.export.pythons.items()
    }
    export = job.export.model_copy(update={"pythons": pythons})
    return job.model_copy(update={"export": export})


def parse_job(values: dict[str, Any], origin: str) -> Job:
    """Validate `values`; what is wrong is said in one line that starts with `origin`."""
    try:
        return Job.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}: {_first_complaint(error)}") from None


def _first_complaint(error: ValidationError) -> str:
    # An unknown key comes first: a misspelt one also shows as a missing one.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    keys = [str(key) for key in first["loc"] if key not in ("float", "tuple[float, float]")]
    name = ".".join(keys) or "job"
    if first["type"] == "extra_forbidden":
        known = _known_keys(keys)
        hint = did_you_mean(keys[-1], known) or ";"
        return f"unknown key {name!r}{hint} {_section_name(keys)} has {', '.join(known)}"
    if first["type"] == "missing":
        return f"{name!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"]
    shown = "" if isinstance(value, dict) else f", got {value!r}"
    hint = ""
    if first["type"] == "literal_error":
        hint = did_you_mean(str(value), re.findall(r"'(.+?)'", first["ctx"]["expected"]))
    return f"{name}: {message[0].lower() + message[1:]}{shown}{hint}"


def _section_name(keys: list[str]) -> str:
    return f"[{keys[0]}]" if len(keys) > 1 else "a job"


def _known_keys(keys: list[str]) -> list[str]:
    model: type[BaseModel] = Job
    for key in keys[:-1]:
        field = model.model_fields.get(key)
        if field is not None and isinstance(field.annotation, type):
            model = field.annotation
        elif key == "limits":
            model = Limit
    return sorted(model.model_fields)
