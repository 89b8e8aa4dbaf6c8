"""The stages of a run, in order. Each reads what the earlier ones wrote to the run directory,
and does nothing if its own result is there.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nasray.config import DataConfig
from nasray.costs.micronet import scores
from nasray.costs.operations import OpCount
from nasray.costs.profile import profile, total
from nasray.data import IMPORTED
from nasray.data.changes import difference, is_imported
from nasray.data.importing import import_dataset
from nasray.data.shards import DatasetInfo, read_info
from nasray.data.splits import JobImages
from nasray.data.survey import sentences, standard_error, survey
from nasray.errors import UserError
from nasray.pipeline.run import Run
from nasray.pipeline.search import answered, given_predictor, is_finished
from nasray.progress import Show, progress
from nasray.storage import files as storage
from nasray.storage import layout
from nasray.training.sampler import bands_of, check_sampling, check_trained_widths

logger = logging.getLogger(__name__)


def prepare_data(run: Run) -> None:
    """Import the data set into RUN/data, unless the job names an imported one.

    Raises:
        UserError: as import_dataset() raises, or the images are not those of this run.
    """
    if run.job.data.source == "parquet":
        run.dataset  # noqa: B018  opened to be checked
        return
    if is_imported(run.data_path):
        info = read_info(run.data_path)
        logger.info(
            "data: %d images of %d classes", info.num_train + info.num_val, len(info.classes)
        )
        return
    import_shown(run.job.data, run.data_path, seed=run.job.seed)
    imported = run.job.data.model_copy(update={"source": IMPORTED, "path": run.data_path})
    facts, problems = sentences(survey(imported, run.job.seed))
    found = {"facts": facts, "problems": problems}
    storage.write_json(run.path(layout.DATA_CHECK), found)
    for fact in facts:
        logger.info("data: %s", fact)
    for problem in problems:
        logger.warning("data: %s", problem)


def check_data(run: Run) -> None:
    """Compare the images that RUN/data was imported from with those that the job names now.

    If they differ and nothing has been computed, the import is removed, to be made again.

    Raises:
        UserError: they differ, and results depend on them.
    """
    config = run.job.data
    if config.source == "parquet" and run.begun:
        run.dataset  # noqa: B018  opened to be checked
    if config.source == "parquet" or not is_imported(run.data_path):
        return
    info, recorded = read_info(run.data_path), run.path(layout.FINGERPRINT)
    # An import that was made since then, in the place of one that was removed.
    is_other = storage.exists(recorded) and storage.read_json(recorded) != info.fingerprint
    found = None if is_other else difference(config, run.data_path, seed=run.job.seed)
    if found and run.begun:
        raise UserError(
            f"{run.folder} was begun with other images than data.path = {config.path!r} holds now: "
            f"{found}; restore them, name the former ones (data.path, --data), or use another run "
            "directory"
        )
    if not run.begun and info.seed != run.job.seed:
        found = found or f"they were stored in the order of seed = {info.seed}"
    if is_other:
        found = "they are not those of this run"
    if found:
        logger.info("data: the images differ from those imported (%s): importing again", found)
        storage.remove(storage.join(run.data_path, layout.DATASET))
        for made in (layout.FINGERPRINT, layout.START) if not run.begun else ():
            storage.remove(run.path(made))


def survey_shown(config: DataConfig, *, seed: int) -> dict[str, Any]:
    """Survey the images that `config` names behind a progress bar."""
    with progress("check", 100) as show:
        return survey(config, seed, _in_percent(show))


def import_shown(config: DataConfig, destination: str, *, seed: int) -> DatasetInfo:
    """Import a data set behind a progress bar."""
    with progress("data", 100) as show:
        return import_dataset(config, destination, seed=seed, show=_in_percent(show))


def _in_percent(show: Show) -> Callable[[int, int], None]:
    return lambda done, total: show(100 * done // max(total, 1), f"{done} images")


def check(run: Run) -> None:
    """Refuse, before hours of training, what search would, and a sampling that the space lacks.

    Says how exact the hold-out images let a fitness be.
    """
    images = JobImages(run.job, run.data_path)
    if run.job.supernet.epochs and not storage.exists(run.supernet_path):
        images.check_batches()  # before Ray starts
    number = len(images.holdout_labels)
    logger.info(
        "hold-out: %d images, which let a top-1 of 50 %% have a standard error of %.1f points; "
        "%d images (data.holdout_share, data.holdout_per_class) would halve it",
        number,
        100 * standard_error(0.5, number),
        4 * number,
    )
    run.limits.draw(1, np.random.default_rng(0), set())
    check_sampling(run.space, run.job.supernet)
    check_trained_widths(run.space, run.job.supernet)
    given_predictor(run)


def train(run: Run) -> None:
    """Train the supernet into RUN/supernet.pt."""
    from nasray.training.supernet import train_supernet

    bands = bands_of(run.limits, run.job.search) if run.job.supernet.within_limits else ()
    train_supernet(run.job, run.folder, run.data_path, bands)


def retrain(run: Run) -> list[dict[str, Any]]:
    """Give the answers of the search weights to be shipped with, and profile each.

    In every way that the job names; the folders of the first are numbers, 0 and up, and those of
    another way end in its name: 0-scratch.
    """
    from nasray.training.retrain import retrain as tune

    if not is_finished(run):
        raise UserError(f"{run.folder} has no finished search; run `nasray search` first")
    if storage.exists(run.supernet_path):
        run.supernet_digest  # noqa: B018  asked for to be checked
    results = []
    archs = answered(run)
    for position, config in enumerate(run.job.retrain.ways):
        job = run.job.model_copy(update={"retrain": config})
        of_way = f"-{config.way}" if position else ""
        chosen = enumerate(archs[: config.num_winners or None])
        named = {f"{index}{of_way}": arch for index, arch in chosen}
        found = {}
        for name, result in tune(job, run.folder, run.data_path, named):
            ops = profile(run.space, named[name])
            storage.write_json(run.path(layout.retrained(name, layout.PROFILE)), profile_json(ops))
            found[name] = result | {"costs": total(ops)}
            storage.write_json(run.path(layout.retrained(name, layout.RESULT)), found[name])
        results += [found[name] for name in named]
    return results


def profile_json(ops: Sequence[OpCount]) -> dict[str, Any]:
    """A profile as RUN/retrain/<k>/profile.json keeps it."""
    keys = ("op_name", "inp_size", "kernel_size", "cin", "cout", "params", "macs")
    return {
        "rows": [
            {key: getattr(op, key) for key in (*keys, "micronet_params", "mults", "adds")}
            for op in ops
            if op.listed
        ],
        "totals": total(ops),
        "micronet": [row.to_json() for row in scores(ops)],
    }
