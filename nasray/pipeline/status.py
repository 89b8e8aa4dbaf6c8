"""How far a run is, read from its directory alone; nothing is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nasray.config import Job, parse_job
from nasray.errors import UserError
from nasray.search.history import Follower
from nasray.search.scores import FITNESS
from nasray.storage import files as storage
from nasray.storage import layout


@dataclass(frozen=True)
class Stage:
    """One stage of a run: "done", "begun" or "to do", and a word on it.

    Of one that is begun: `done` epochs or evaluations of `total` at most (0: unknown).
    """

    name: str
    state: str
    text: str = ""
    done: int = 0
    total: int = 0

    @property
    def line(self) -> str:
        """It as a line of a table."""
        return f"{self.name:<21} {self.state:<8}{self.text}"


def stages(folder: str, evaluations: Follower | None = None) -> list[Stage]:
    """The stages of the run at `folder`, in order.

    Who asks again and again keeps `evaluations`, of which only new ones are read.
    """
    path = storage.join(folder, layout.JOB)
    if not storage.exists(path):
        raise UserError(f"{folder} is not a run directory: it has no job.json")
    job = parse_job(_read(path, "job"), path)
    evaluations = evaluations or Follower(storage.join(folder, layout.HISTORY))
    search = _search(folder, job, evaluations)
    return [_data(folder, job), _supernet(folder, job), search, *_retrain(folder, job)]


def _read(path: str, *keys: str) -> Any:
    """What stands at `keys`, one below the other, in a file that nasray wrote."""
    found = storage.read_json(path)
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            raise UserError(
                f"{path}: not written by nasray, it lacks {key!r}; restore or remove it"
            )
        found = found[key]
    return found


def _data(folder: str, job: Job) -> Stage:
    path = storage.join(folder, layout.FINGERPRINT)
    source = f"{job.data.source} {job.data.path}".strip()
    return Stage("data", "done" if storage.exists(path) else "to do", source)


def _supernet(folder: str, job: Job) -> Stage:
    epochs = _curves(storage.join(folder, layout.SUPERNET_CURVES))
    total = job.supernet.epochs
    text = f"epoch {len(epochs)} of {total}" if total else "taken as it is"
    if shown := [epoch["val_top1"] for epoch in epochs if epoch.get("val_top1") is not None]:
        text += f", hold-out {shown[-1]:.1%}"
    if storage.exists(storage.join(folder, layout.SUPERNET)):
        return Stage("supernet", "done", text)
    taught = _curves(storage.join(folder, layout.TEACHER_RUN, layout.SUPERNET_CURVES))
    if taught and not epochs:
        epochs, total = taught, job.supernet.teacher_epochs
        text = f"its teacher, epoch {len(taught)} of {total}"
    begun = Stage("supernet", "begun", text, len(epochs), total)
    return begun if epochs else Stage("supernet", "to do")


def _search(folder: str, job: Job, evaluations: Follower) -> Stage:
    done, fitness = storage.join(folder, layout.SEARCH), FITNESS[job.search.fitness]
    if storage.exists(done):
        number, best = _read(done, "num_evaluations"), _read(done, "winner", "fitness")
        return Stage("search", "done", f"{number} evaluations, best {fitness.text(best)}")
    evaluations.look()
    found = evaluations.found.values()
    if not found:
        return Stage("search", "to do")
    total = job.search.population_size * job.search.num_generations
    text = f"{len(found)} evaluations, {total} at most"
    if shown := [each.fitness for each in found if not (each.failed or each.judged)]:
        text += f", best so far {fitness.text(max(shown))}"
    return Stage("search", "begun", text, len(found), total)


def _retrain(folder: str, job: Job) -> Iterator[Stage]:
    names = storage.list_numbered(storage.join(folder, layout.RETRAIN))
    winners = [name for name in names if name.partition("-")[0].isdigit()]
    for name in winners:
        place = storage.join(folder, layout.retrained(name))
        result = storage.join(place, layout.RESULT)
        if storage.exists(result):
            text = f"{_read(result, 'val_top1'):.1%} of the validation images"
            yield Stage(f"retrain {name}", "done", text)
            continue
        trials = [each for each in storage.list_names(place) if each.startswith(layout.TRIAL)]
        epochs = sum(len(_curves(storage.join(place, each, layout.CURVES))) for each in trials)
        text = f"{len(trials)} trials, {epochs} epochs"
        way = next((w for w in job.retrain.also if name.endswith(f"-{w.way}")), job.retrain)
        total = way.num_trials * way.epochs  # at most: ASHA stops some
        yield Stage(f"retrain {name}", "begun", text, epochs, total)
    if not winners:
        yield Stage("retrain", "to do")
    models = [
        n for n in storage.list_numbered(storage.join(folder, layout.EXPORT)) if n.endswith(".onnx")
    ]
    smaller = [f"-{each}" for each in job.export.precisions if each != "fp32"]
    wanted = [f"{name}{suffix}" for name in winners for suffix in ("", *smaller)]
    made = storage.list_names(storage.join(folder, layout.EXPORT))
    others = [f"{name}-{each}" for name in winners for each in job.export.formats]
    missing = [name for name in wanted if f"{name}.onnx" not in models]
    missing += [name for name in others if f"{name}.json" not in made]
    text = f"{', '.join(models)}; not yet {', '.join(missing)}" if missing and models else ""
    is_done = models and not missing
    done = [*models, *(each for each in others if f"{each}.json" in made)]
    yield Stage("export", "done" if is_done else "to do", text or ", ".join(done))
    page = storage.join(folder, layout.REPORT)
    yield Stage("report", *(("done", page) if storage.exists(page) else ("to do",)))


def _curves(path: str) -> list[dict]:
    return storage.read_rows(path) if storage.exists(path) else []
