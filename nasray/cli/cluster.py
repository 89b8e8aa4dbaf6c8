"""The verbs that work on a remote cluster: submit, status, stop."""

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

VARIABLE = "RAY_API_SERVER_ADDRESS"  # of the dashboard, for Ray's own commands as well


def cluster_options(verb: Callable) -> Callable:
    """Add the options that choose a cluster: --cluster FILE, or --address URL of its dashboard."""
    verb = click.option(
        "--cluster",
        metavar="FILE",
        help="Cluster launched by `ray up FILE`, reached through a tunnel.",
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
@click.option("--data", "data_path", help="Path of the data set, as the cluster sees it.")
@click.option("--follow/--no-follow", default=True, help="Show its output until it ends.")
def submit(
    job: str,
    run_dir: str,
    cluster: str | None,
    address: str | None,
    data_path: str | None,
    follow: bool,
) -> None:
    """Run the whole of JOB on a cluster, with its results at URI.

    Uploads the working directory without run directories, data sets and what git ignores. URI is
    s3://bucket/run, gs://, az://, or an absolute path that all nodes share. Ctrl-C ends only the
    display: the job keeps running.
    """
    from nasray.cluster.tunnel import is_on_this_machine
    from nasray.cluster.upload import uploaded_path
    from nasray.config import load_job
    from nasray.pipeline import run
    from nasray.storage import files as storage

    in_place = cluster is not None and is_on_this_machine(cluster)
    job_file = job if in_place else uploaded_path(job)
    loaded = load_job(job, data_path)
    run.check_names(loaded, job)
    _check_seen_by_cluster(job, data_path)
    run_dir, data_path = _shared(run_dir), data_path and storage.absolute(data_path)
    with _jobs(cluster, address) as jobs:
        if alive := jobs.alive(run_dir):
            raise UserError(
                f"{run_dir}: job {alive[0]} is running on it; `nasray stop` ends that job"
            )
        job_id = jobs.submit(job_file, run_dir, data_path, in_place=in_place)
        options = _as_text(cluster, address)
        click.echo(f"Submitted as {job_id}.", err=True)
        shown = shlex.quote(run_dir)
        click.echo(f"  progress:   nasray status {shown}{options}", err=True)
        click.echo(f"  follow:     nasray status {shown}{options} --follow", err=True)
        click.echo(f"  stop:       nasray stop {shown}{options}", err=True)
        click.echo("  resume:     the same submit again", err=True)
        if follow:
            _follow(jobs, job_id)


@click.command()
@run_argument
@cluster_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@click.option("--follow", is_flag=True, help="Show the output of its job until that ends.")
def status(
    run_dir: str, cluster: str | None, address: str | None, as_json: bool, follow: bool
) -> None:
    """Print the progress of the run at URI and, with a cluster, the jobs that work on it."""
    from nasray.pipeline.status import Stage, stages
    from nasray.storage import files as storage
    from nasray.storage import locks

    folder = storage.absolute(run_dir)
    on_cluster = bool(cluster or _address(address, cluster))
    found: dict[str, Any] = {"run": folder, "stages": [], "holder": "", "jobs": []}
    try:
        found["stages"] = [vars(stage) for stage in stages(folder)]
        found["holder"] = locks.holder(folder)
    except (UserError, OSError):  # only the cluster can see this path or bucket
        if not on_cluster:
            raise
    if not as_json:
        for stage in found["stages"]:
            click.echo(Stage(**stage).line)
        if not found["stages"]:
            click.echo(f"{folder} is not visible from this machine, or is still empty")
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
            click.echo("this cluster has had no job for it")
        if follow:
            for job_id in jobs.alive(folder):
                _follow(jobs, job_id)


@click.command()
@run_argument
@cluster_options
def stop(run_dir: str, cluster: str | None, address: str | None) -> None:
    """Stop the cluster's jobs that work on the run at URI; the same submit resumes it."""
    from nasray.storage import files as storage

    folder = storage.absolute(run_dir)
    with _jobs(cluster, address) as jobs:
        alive = jobs.alive(folder)
        for job_id in alive:
            jobs.stop(job_id)
            click.echo(f"job {job_id} has ended; the same submit resumes {folder}")
    if not alive:
        raise UserError(
            f"no job is running on {folder}; a `nasray run` is stopped by Ctrl-C where it runs"
        )


def _follow(jobs: Any, job_id: str) -> None:
    """Show a job's output until it ends.

    Raises:
        UserError: it did not succeed.
    """
    try:
        ended = jobs.follow(job_id, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        click.echo(f"\njob {job_id} keeps running", err=True)
        return
    if ended.status != "SUCCEEDED":
        raise UserError(
            f"job {job_id} has {ended.status.lower()} ({_last_line(ended.message)}); its results "
            "so far are kept; the same submit resumes it"
        )


def _check_seen_by_cluster(job: str, data_path: str | None) -> None:
    """Refuse relative paths, which mean nothing on another machine."""
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
    """Connect to the cluster's jobs, by token if there is one and RAY_AUTH_MODE is not set."""
    given, address = address, _address(address, cluster)
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
        for name in (VARIABLE, "RAY_ADDRESS"):  # Ray prefers them to `url`
            os.environ.pop(name, None)
        try:
            yield Jobs(url)
        except UserError as error:
            if given or cluster or not str(error).startswith(url):
                raise
            raise UserError(f"{VARIABLE} = {error}") from None


def _address(address: str | None, cluster: str | None) -> str | None:
    """The --address, or without --cluster RAY_API_SERVER_ADDRESS, as a URL."""
    address = address or (None if cluster else os.environ.get(VARIABLE))
    return f"http://{address}" if address and "://" not in address else address


def _last_line(text: str | None) -> str:
    return (text or "").strip().rsplit("\n", 1)[-1]


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or Path("~/.ray/auth_token").expanduser().exists()


def _as_text(cluster: str | None, address: str | None) -> str:
    """The cluster options as text, for the commands that are suggested."""
    named = (("address", address), ("cluster", cluster))
    return "".join(f" --{key} {shlex.quote(value)}" for key, value in named if value)
