"""From a cluster file to the URL of its dashboard, which listens on the head's loopback only.

Imports no Ray: that must not happen before the environment says how to show the token.
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
    """The URL of a cluster's dashboard: as given, else that of a cluster file's head, through
    a tunnel if that is another machine.
    """
    if address or cluster is None or is_on_this_machine(cluster):
        yield address or HERE
        return
    with _tunnel(cluster) as port:
        yield f"http://127.0.0.1:{port}"


def is_on_this_machine(cluster: str) -> bool:
    """Whether the nodes of a cluster file are processes of this machine.

    They share one copy of what a job sends, and each that joins replaces it.
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
    """Forward a port of this machine to the dashboard of a launched cluster, by Ray's own verb."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    process = subprocess.Popen(
        [ray, "dashboard", cluster, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that ssh ends with it, and not by our Ctrl-C
    )
    try:
        end = time.monotonic() + TUNNEL_S
        while not _listens(port):
            if process.poll() is not None:
                said = process.stdout.read().strip() if process.stdout else ""
                shown = " | ".join(said.splitlines()[-3:])
                raise UserError(
                    f"--cluster {cluster}: no way to its head ({shown}); has `ray up {cluster}` "
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
