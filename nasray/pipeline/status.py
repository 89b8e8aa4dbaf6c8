"""How far a run is, read from its directory alone; nothing is written."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nasray.config import Job, parse_job
from nasray.errors import UserError
from nasray.search.history import SINGLE, SOURCE
from nasray.search.scores import FITNESS
from nasray.storage import files as storage
from nasray.storage import layout


@dataclass(frozen=True)
class Stage:
    """One stage of a run: "done", "begun" or "to do", and a word on it."""

    name: str
    state: str
    text: str = ""


def stages(folder: str) -> list[Stage]:
    """The stages of the run at `folder`, in order."""
    path = storage.join(folder, layout.JOB)
    if not storage.exists(path):
        raise UserError(f"{folder} is not a run directory: it has no job.json")
    job = parse_job(_read(path, "job"), path)
    return [_data(folder, job), _supernet(folder, job), _search(folder, job), *_retrain(folder)]


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
    text = (
        f"epoch {len(epochs)} of {job.supernet.epochs}" if job.supernet.epochs else "taken as it is"
    )
    if shown := [epoch["val_top1"] for epoch in epochs if epoch.get("val_top1") is not None]:
        text += f", validation {shown[-1]:.1%}"
    if storage.exists(storage.join(folder, layout.SUPERNET)):
        return Stage("supernet", "done", text)
    taught = _curves(storage.join(folder, layout.TEACHER_RUN, layout.SUPERNET_CURVES))
    if taught and not epochs:
        text = f"its teacher, epoch {len(taught)} of {job.supernet.teacher_epochs}"
    return Stage("supernet", "begun", text) if epochs or taught else Stage("supernet", "to do")


def _search(folder: str, job: Job) -> Stage:
    done = storage.join(folder, layout.SEARCH)
    if storage.exists(done):
        number, best = _read(done, "num_evaluations"), _read(done, "winner", "fitness")
        return Stage(
            "search", "done", f"{number} evaluations, best {FITNESS[job.search.fitness].text(best)}"
        )
    number = _num_evaluations(storage.join(folder, layout.HISTORY))
    if not number:
        return Stage("search", "to do")
    config = job.search
    total = config.population_size * config.num_generations
    return Stage("search", "begun", f"{number} evaluations, {total} at most")


def _num_evaluations(folder: str) -> int:
    """Evaluations on record: those in files of generations, and the single ones beyond them."""
    in_files = 0
    for name in storage.list_names(folder):
        if name.startswith(f"{SOURCE}-") and name.endswith(".parquet"):
            try:
                content = storage.read(storage.join(folder, name))
                in_files += pq.read_metadata(io.BytesIO(content)).num_rows
            except (pa.ArrowInvalid, OSError):  # damaged; the run itself mends it
                continue
    names = storage.list_names(storage.join(folder, SINGLE, SOURCE))
    positions = [int(name[:-5]) for name in names if name[:-5].isdigit()]
    return in_files + sum(position >= in_files for position in positions)


def _retrain(folder: str) -> Iterator[Stage]:
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
        epochs = [len(_curves(storage.join(place, each, layout.CURVES))) for each in trials]
        yield Stage(f"retrain {name}", "begun", f"{len(trials)} trials, {sum(epochs)} epochs")
    if not winners:
        yield Stage("retrain", "to do")
    models = [
        n for n in storage.list_names(storage.join(folder, layout.EXPORT)) if n.endswith(".onnx")
    ]
    yield Stage("export", "done" if models else "to do", ", ".join(models))
    page = storage.join(folder, layout.REPORT)
    yield Stage("report", *(("done", page) if storage.exists(page) else ("to do",)))


def _curves(path: str) -> list[dict]:
    return storage.read_rows(path) if storage.exists(path) else []
