"""Ray jobs that work on run directories: submit, find, follow and stop them.

A job belongs to a run if its command contains the run's path, however it was submitted.
"""

import asyncio
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from nasray.cluster.upload import excludes
from nasray.errors import UserError
from nasray.storage import files as storage

GRACE_S = 30  # between SIGTERM and SIGKILL when a job is stopped
NAME = 40  # at most so many characters of a run's name in its jobs' ids


class Jobs:
    """The Ray jobs of the cluster whose dashboard is at `address`."""

    def __init__(self, address: str) -> None:
        self.address = address
        with _one_line(address):
            self.client = JobSubmissionClient(address)

    def submit(
        self, job_file: str, run_dir: str, data_path: str | None, *, in_place: bool = False
    ) -> str:
        """Upload the working directory, start `nasray run` on the head, and return the job's id.

        `in_place`: the cluster is this machine and uses the working directory itself.
        """
        environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S)}}
        if in_place:
            job_file = os.path.abspath(job_file)
            environment["env_vars"]["PYTHONPATH"] = os.getcwd()
        else:
            environment |= {"working_dir": ".", "excludes": excludes(".")}
        if job_file.startswith("-"):
            job_file = f"./{job_file}"
        command = ["python", "-m", "nasray", "run", job_file, run_dir]
        if data_path:
            command += ["--data", data_path]
        name = "".join(c if c.isalnum() else "-" for c in run_dir.rsplit("/", 1)[-1][:NAME])
        with _one_line(self.address):
            return self.client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=f"nasray-{name}-{time.strftime('%Y%m%d-%H%M%S')}",
                runtime_env=environment,
            )

    def of_run(self, run_dir: str) -> list[JobDetails]:
        """All jobs of a run, running or ended, the oldest first."""
        with _one_line(self.address):
            found = self.client.list_jobs()
        jobs = [job for job in found if job.submission_id and run_dir in _paths(job.entrypoint)]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def alive(self, run_dir: str) -> list[str]:
        """Ids of the jobs of a run that are running or waiting to start."""
        return [
            str(job.submission_id)
            for job in self.of_run(run_dir)
            if not JobStatus(job.status).is_terminal()
        ]

    def follow(self, job_id: str, show: Callable[[str], None]) -> JobDetails:
        """Pass a job's output to `show` until it ends; return its final details."""
        asyncio.run(self._follow(job_id, show))
        with _one_line(self.address):
            while not (job := self.client.get_job_info(job_id)).status.is_terminal():
                time.sleep(0.5)
        return job

    async def _follow(self, job_id: str, show: Callable[[str], None]) -> None:
        try:
            async for text in self.client.tail_job_logs(job_id):
                show(text)
        except (
            RuntimeError,
            OSError,
            aiohttp.ClientError,
        ) as error:
            # Only the connection is lost; the job may be running.
            raise UserError(
                f"{self.address}: lost the connection to job {job_id} ({error}); see `nasray "
                "status`; if the cluster is lost, the same submit to another one resumes the run"
            ) from None

    def stop(self, job_id: str) -> None:
        """Stop a job, and wait until it has ended."""
        with _one_line(self.address):
            self.client.stop_job(job_id)
            end = time.monotonic() + 2 * GRACE_S
            while not self.client.get_job_status(job_id).is_terminal():
                if time.monotonic() > end:
                    raise UserError(f"job {job_id} has not ended in {2 * GRACE_S} s; try again")
                time.sleep(0.2)


def _paths(command: str | None) -> list[str]:
    """Words of a job's command that may be paths, as absolute paths or URIs."""
    try:
        words = shlex.split(command or "")
        return [storage.absolute(word) for word in words if "/" in word]
    except ValueError:  # another program's job with an unclosed quotation mark
        return []


@contextmanager
def _one_line(address: str) -> Iterator[None]:
    """Turn errors of the connection to a cluster into a UserError."""
    try:
        yield
    except UserError:
        raise
    except AuthenticationError as error:
        raise UserError(
            f"{address}: {str(error).strip().splitlines()[0]}; the token of the cluster must be in "
            "~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN, and RAY_AUTH_MODE, if it is "
            "set, must be token (docs/security.md)"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        if "status code 413" in str(error):
            raise UserError(
                f"{address}: the working directory is too large to upload; add to .gitignore what "
                "the job does not need"
            ) from None
        raise UserError(f"{address}: {error}") from None
