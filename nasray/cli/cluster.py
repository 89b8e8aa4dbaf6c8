"""The verbs that work on a cluster from elsewhere: submit, status, stop."""

import json
import logging
import os
import shlex
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from nasray.cluster.connect import keep_token_private
from nasray.errors import UserError

run_argument = click.argument("run_dir", metavar="URI")


def cluster_options(verb: Callable) -> Callable:
    """--cluster FILE, or --address URL of its dashboard."""
    verb = click.option(
        "--cluster", metavar="FILE", help="Cluster launched by `ray up FILE`; by a tunnel."
    )(verb)
    return click.option(
        "--address",
        metavar="URL",
        help="Dashboard of the cluster, e.g. http://127.0.0.1:8265; or RAY_API_SERVER_ADDRESS.",
    )(verb)


@click.command()
@click.argument("job")
@run_argument
@cluster_options
@click.option("--data", "data_path", help="Where the data set lies, as the cluster sees it.")
@click.option("--follow/--no-follow", default=True, help="Show what it prints, until it ends.")
def submit(
    job: str,
    run_dir: str,
    cluster: str | None,
    address: str | None,
    data_path: str | None,
    follow: bool,
) -> None:
    """Run the whole of JOB on a cluster, with its results at URI.

    Sends the working directory but for run directories, data sets and what git ignores. URI is
    s3://bucket/run, gs://, az://, or an absolute path that all nodes share. Ctrl-C only stops
    looking: the job goes on.
    """
    from nasray.cluster.tunnel import is_on_this_machine
    from nasray.cluster.upload import sent_path
    from nasray.config import load_job
    from nasray.pipeline import run
    from nasray.storage import files as storage

    in_place = cluster is not None and is_on_this_machine(cluster)
    job_file = job if in_place else sent_path(job)
    loaded = load_job(job, data_path)
    run.check_names(loaded, job)
    _check_seen_by_cluster(job, data_path)
    run_dir, data_path = _shared(run_dir), data_path and storage.absolute(data_path)
    with _jobs(cluster, address) as jobs:
        if alive := jobs.alive(run_dir):
            raise UserError(f"{run_dir}: job {alive[0]} works on it; `nasray stop` ends that")
        job_id = jobs.submit(job_file, run_dir, data_path, in_place=in_place)
        options = _same(cluster, address)
        click.echo(f"Submitted as {job_id}.", err=True)
        shown = shlex.quote(run_dir)
        click.echo(f"  how far:    nasray status {shown}{options}", err=True)
        click.echo(f"  to follow:  nasray status {shown}{options} --follow", err=True)
        click.echo(f"  to stop:    nasray stop {shown}{options}", err=True)
        click.echo("  to go on after a stop or a loss: the same submit again", err=True)
        if follow:
            _follow(jobs, job_id)


@click.command()
@run_argument
@cluster_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@click.option("--follow", is_flag=True, help="Show what its job prints, until that ends.")
def status(
    run_dir: str, cluster: str | None, address: str | None, as_json: bool, follow: bool
) -> None:
    """Say how far the run at URI is and, of a cluster, which jobs work on it."""
    from nasray.pipeline.status import stages
    from nasray.storage import files as storage
    from nasray.storage import locks

    folder = storage.absolute(run_dir)
    on_cluster = bool(cluster or _address(address, cluster))
    found: dict[str, Any] = {"run": folder, "stages": [], "holder": "", "jobs": []}
    try:
        found["stages"] = [vars(stage) for stage in stages(folder)]
        found["holder"] = locks.holder(folder)
    except (UserError, OSError):  # a path or a bucket of the cluster's own
        if not on_cluster:
            raise
    if not as_json:
        for stage in found["stages"]:
            click.echo(f"{stage['name']:<12}{stage['state']:<8}{stage['text']}")
        if not found["stages"]:
            click.echo(f"{folder} cannot be seen from here, or nothing is there yet")
        elif found["holder"]:
            click.echo(f"in use by {found['holder']}")
    if not on_cluster and (as_json or not follow):
        if as_json:
            click.echo(json.dumps(found))
        return
    with _jobs(cluster, address) as jobs:
        found["jobs"] = [
            {"id": job.submission_id, "status": str(job.status.value), "message": job.message}
            for job in jobs.of_run(folder)
        ]
        if as_json:
            click.echo(json.dumps(found))
            return
        for job in found["jobs"]:
            said = f" ({_last_line(job['message'])})" if job["status"] == "FAILED" else ""
            click.echo(f"job {job['id']}: {job['status'].lower()}{said}")
        if not found["jobs"]:
            click.echo("no job of this cluster has worked on it")
        if follow:
            for job_id in jobs.alive(folder):
                _follow(jobs, job_id)


@click.command()
@run_argument
@cluster_options
def stop(run_dir: str, cluster: str | None, address: str | None) -> None:
    """Stop the cluster's jobs that work on the run at URI; the same submit goes on with it."""
    from nasray.storage import files as storage

    folder = storage.absolute(run_dir)
    with _jobs(cluster, address) as jobs:
        alive = jobs.alive(folder)
        for job_id in alive:
            jobs.stop(job_id)
            click.echo(f"job {job_id} has ended; the same submit goes on with {folder}")
    if not alive:
        raise UserError(f"no job works on {folder}; where `nasray run` was typed, Ctrl-C stops it")


def _follow(jobs: Any, job_id: str) -> None:
    """Show what a job prints until it ends; anything but success is an error."""
    try:
        ended = jobs.follow(job_id, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        click.echo(f"\njob {job_id} goes on; only looking stopped", err=True)
        return
    if ended.status != "SUCCEEDED":
        raise UserError(
            f"job {job_id} has {ended.status.lower()} ({_last_line(ended.message)}); what it had "
            "done is kept, and the same submit goes on from there"
        )


def _check_seen_by_cluster(job: str, data_path: str | None) -> None:
    """Refuse paths that mean nothing on another machine."""
    from nasray.config import PATHS
    from nasray.storage import files as storage

    values = tomllib.loads(Path(job).read_text("utf-8-sig"))
    for section, key in PATHS:
        path = values.get(section, {}).get(key, "")
        if (section, key) == ("data", "path") and data_path:
            path, name = data_path, "--data"
        else:
            name = f"{job}: {section}.{key} ="
        if path and not storage.is_uri(path) and not os.path.isabs(path):
            raise UserError(
                f"{name} {path!r} is relative; a cluster needs a URI such as s3://bucket/data, or "
                "an absolute path that all its nodes share"
            )


def _shared(run_dir: str) -> str:
    from nasray.storage import files as storage

    if not storage.is_uri(run_dir) and not os.path.isabs(run_dir):
        raise UserError(
            f"{run_dir}: a cluster needs a URI such as s3://bucket/run, or an absolute path that "
            "all its nodes share"
        )
    return storage.absolute(run_dir)


@contextmanager
def _jobs(cluster: str | None, address: str | None) -> Iterator[Any]:
    """The cluster's jobs. The token is used if there is one and RAY_AUTH_MODE says nothing."""
    address = _address(address, cluster)
    if not cluster and not address:
        raise UserError("which cluster? --cluster FILE, or --address http://127.0.0.1:8265")
    keep_token_private()
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from nasray.cluster.jobs import Jobs
    from nasray.cluster.tunnel import reached

    if not click.get_current_context().find_root().params["verbose"]:
        for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    with reached(address, cluster) as url:
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray would prefer them to `url`
            os.environ.pop(name, None)
        yield Jobs(url)


def _address(address: str | None, cluster: str | None) -> str | None:
    """The one given, or that of the environment, unless a cluster file is given instead."""
    address = address or (None if cluster else os.environ.get("RAY_API_SERVER_ADDRESS"))
    return f"http://{address}" if address and "://" not in address else address


def _last_line(text: str | None) -> str:
    return (text or "").strip().rsplit("\n", 1)[-1]


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or Path("~/.ray/auth_token").expanduser().exists()


def _same(cluster: str | None, address: str | None) -> str:
    """The same options again, for another verb."""
    named = (("address", address), ("cluster", cluster))
    return "".join(f" --{key} {shlex.quote(value)}" for key, value in named if value)
