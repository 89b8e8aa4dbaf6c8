"""Reaches a cluster's dashboard, which listens on the head's loopback only, from its file.

Does not import Ray, which reads RAY_AUTH_MODE when it is imported.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from nasray.errors import UserError

HERE = "http://127.0.0.1:8265"  # the dashboard of a cluster on this machine
TUNNEL_S = 60.0


@contextmanager
def reached(address: str | None, cluster: str | None) -> Iterator[str]:
    """Yield the URL of a cluster's dashboard: `address`, or a tunnel to the head of `cluster`.

    Raises:
        UserError: the head cannot be reached.
    """
    if address or cluster is None or is_on_this_machine(cluster):
        yield address or HERE
        return
    with _tunnel(cluster) as port:
        yield f"http://127.0.0.1:{port}"


def is_on_this_machine(cluster: str) -> bool:
    """Whether the nodes of a cluster file are processes on this machine.

    Such nodes share one copy of the uploaded files, and each node that joins replaces it.
    """
    try:
        provider = yaml.safe_load(Path(cluster).read_text())["provider"]
        return str(provider.get("module", "")).endswith("FakeMultiNodeProvider")
    except OSError as error:
        raise UserError(f"--cluster {cluster}: {error.strerror}; clusters/ has some") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise UserError(
            f"--cluster {cluster}: not a file of Ray's cluster launcher; clusters/ has some"
        ) from None


@contextmanager
def _tunnel(cluster: str) -> Iterator[int]:
    """Forward a local port to the dashboard of a launched cluster, by `ray dashboard`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    process = subprocess.Popen(
        [ray, "dashboard", cluster, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # ssh ends with it, not on Ctrl-C
    )
    try:
        end = time.monotonic() + TUNNEL_S
        while not _listens(port):
            if process.poll() is not None:
                said = process.stdout.read().strip() if process.stdout else ""
                shown = " | ".join(said.splitlines()[-3:])
                raise UserError(
                    f"--cluster {cluster}: cannot reach its head ({shown}); has `ray up {cluster}` "
                    "been run?"
                )
            if time.monotonic() > end:
                raise UserError(f"--cluster {cluster}: no tunnel within {TUNNEL_S:g} s")
            time.sleep(0.2)
        yield port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.communicate()


def _listens(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0
