"""What a run directory holds so far, read and checked for the report."""

from dataclasses import dataclass
from typing import Any

from nasray.search.candidate import Candidate
from nasray.search.history import History
from nasray.search.scores import FITNESS, LOG_LIKELIHOOD, Fitness, Predictions
from nasray.storage import files as storage
from nasray.storage import layout

Entry = dict[str, Any]  # one object of a JSON file


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """One network of RUN/retrain/; what is not there yet is None or empty."""

    name: str  # of the folder, RUN/retrain/<name>
    result: Entry | None
    curves: list[Entry]
    profile: Entry | None
    predictions: Predictions | None  # for the validation images

    @property
    def number(self) -> str:
        """Of the network, the same whichever way it got its weights: "0" of "0-scratch"."""
        return self.name.partition("-")[0]

    @property
    def way(self) -> str:
        """How the network got its weights: a key of tables.WAYS."""
        return str((self.result or {}).get("shipped", "scratch"))


@dataclass(frozen=True, kw_only=True)
class RunContents:
    """The files of a run directory; those that are not there yet are None or empty."""

    name: str
    job: Entry | None
    data: Entry | None  # what the import found in the images, in sentences
    curve: list[Entry]  # of supernet training, one object per epoch
    generations: list[list[Candidate]]  # without candidates that could not be evaluated
    num_failed: int
    num_images: list[int]  # per candidate; fewer where early stopping ended its evaluation
    search: Entry | None
    front: list[Entry]
    top: list[Entry]
    retrained: list[Retrained]
    exports: list[Entry]
    predictor: Entry | None
    study: Entry | None
    rank: Entry | None  # of architectures whose truth is known

    @property
    def answers(self) -> list[Entry]:
        """The best for each limit, of a search that answers them one by one."""
        answers = (self.search or {}).get("answers") or []
        return answers if any(entry.get("limit") for entry in answers) else []

    @property
    def candidates(self) -> list[Candidate]:
        """The candidates of all generations, in order."""
        return [candidate for generation in self.generations for candidate in generation]

    @property
    def networks(self) -> list[Retrained]:
        """The networks of RUN/retrain/, each in the first of the ways that it got weights."""
        first: dict[str, Retrained] = {}
        for each in self.retrained:
            first.setdefault(each.number, each)
        return list(first.values())

    @property
    def results(self) -> list[Entry]:
        """The results of the networks whose retraining has ended."""
        return [each.result for each in self.retrained if each.result]

    @property
    def winner(self) -> Entry | None:
        """The winner of the search, or the first retrained network."""
        if self.search:
            return self.search["winner"]
        return next(iter([*self.top, *self.results]), None)

    @property
    def retrained_winner(self) -> Entry | None:
        """The result of the winner's retraining, or of another network's if it has none."""
        genes = self.winner["genes"] if self.winner else None
        same = [result for result in self.results if result["genes"] == genes]
        return next(iter([*same, *self.results]), None)

    @property
    def fitness(self) -> Fitness:
        """What the search maximised."""
        config = self.job["job"].get("search", {}) if self.job else {}
        return FITNESS[config.get("fitness", "top1")]

    @property
    def accuracy(self) -> Fitness:
        """By what the winner is compared with random architectures, on validation images."""
        return FITNESS["top1"] if self.fitness is FITNESS[LOG_LIKELIHOOD] else self.fitness

    @property
    def paired(self) -> bool:
        """Whether genes alternate between the operation and the channel scale of a block."""
        arch = self.winner["arch"] if self.winner else {}
        return set(arch) == {"block", "channel"} or (
            self.job is not None and self.job["job"]["space"]["name"] == "shufflenet"
        )


def read_contents(run_dir: str) -> RunContents:
    """Read RUN_DIR.

    Raises:
        UserError: a file is not JSON, or lacks what the report needs.
    """
    history = History(storage.join(run_dir, layout.HISTORY))
    images = [candidate.images for candidate in history.candidates if not candidate.failed]
    generations = [
        [c for c in generation if not c.failed and c.images == max(images)]
        for generation in history
    ]
    retrain = storage.join(run_dir, layout.RETRAIN)
    export = storage.join(run_dir, layout.EXPORT)
    exports = [name for name in storage.list_numbered(export) if name.endswith(".json")]
    candidate = ("arch", "genes", "fitness")
    return RunContents(
        name=storage.absolute(run_dir).rsplit("/", 1)[-1],
        job=_load(run_dir, layout.JOB, "job", "versions", "started"),
        data=_load(run_dir, layout.DATA_CHECK, "facts", "problems"),
        curve=_load_rows(
            run_dir,
            layout.SUPERNET_CURVES,
            *("epoch", "loss", "train_top1", "val_top1", "lowest_scale", "seconds"),
        ),
        generations=[generation for generation in generations if generation],
        num_failed=len(history.candidates) - len(images),
        num_images=images,
        search=_load(run_dir, layout.SEARCH, "num_evaluations", "seconds", "limits", "winner"),
        front=_load_rows(run_dir, layout.FRONT, *candidate),
        top=_load_rows(run_dir, layout.TOP, *candidate),
        retrained=[_read_retrained(retrain, name) for name in storage.list_numbered(retrain)],
        exports=[
            (said := _load(export, name, "bytes", "file"))
            | {"file": storage.join(layout.EXPORT, said["file"].rsplit("/", 1)[-1])}
            for name in exports
        ],
        predictor=_load(
            run_dir,
            layout.PREDICTOR_FIT,
            *("num_fitted", "num_held_out", "measured", "predicted", "rmse", "kendall_tau"),
        ),
        rank=_load(run_dir, layout.RANK, "truth", "num_archs", "rankers", "true", "supernet"),
        study=_load(run_dir, layout.CALIBRATION_STUDY, "num_images", "num_archs", "rows"),
    )


def _read_retrained(folder: str, name: str) -> Retrained:
    said = storage.join(folder, name, layout.PREDICTIONS)
    return Retrained(
        name=name,
        result=_load(folder, f"{name}/{layout.RESULT}", "arch", "genes", "val_top1"),
        curves=_load_rows(
            folder, f"{name}/{layout.CURVES}", "trial", "recipe", "stopped", "epochs"
        ),
        profile=_load(folder, f"{name}/{layout.PROFILE}", "rows", "totals", "micronet"),
        predictions=Predictions.read(said) if storage.exists(said) else None,
    )


def _load(folder: str, name: str, *keys: str) -> Any:
    """Read a JSON object that must have `keys`; None if the file is absent."""
    path = storage.join(folder, name)
    return storage.read_object(path, *keys) if storage.exists(path) else None


def _load_rows(folder: str, name: str, *keys: str) -> list[Entry]:
    """Read a JSON list of objects that must have `keys`; empty if the file is absent."""
    path = storage.join(folder, name)
    return storage.read_rows(path, *keys) if storage.exists(path) else []
