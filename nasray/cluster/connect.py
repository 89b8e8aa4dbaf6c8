"""Connects to a running Ray cluster, or starts one on this machine."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nasray.errors import UserError
from nasray.storage.cpus import usable_cpus

logger = logging.getLogger(__name__)

# The longest name of a socket below Ray's temporary folder, and what systems take.
SOCKET = f"ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
LONGEST_SOCKET = 107


@contextmanager
def ray_cluster(address: str | None, compute: Any, *, verbose: bool) -> Iterator[None]:
    """Connect to the cluster at `address`, or start one on this machine, until the block ends.

    Without `address`, a process that has called ray.init keeps its connection. `compute` is a
    job's ComputeConfig. Ray's progress output is off unless `verbose`; its errors are shown.

    Raises:
        UserError: no cluster answers at `address`, or it lacks what `compute` insists on.
    """
    # Let waiting OpenMP threads sleep: on a shared machine, spinning threads make two threads
    # up to 20 times slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # At the end of an epoch, training waits for the next of these checks.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # On Ctrl-C, Tune would end its trials and report half-trained networks as results.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    if not address or address == "local":
        # With "0", Ray listens on 127.0.0.1 only, so that other machines cannot reach it. On macOS
        # and Windows that is Ray's default.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if not verbose:
        os.environ.setdefault(
            "RAY_AIR_NEW_OUTPUT", "0"
        )  # turns off Tune's tables, which its `verbose` does not

    import ray

    from nasray.cluster.placement import check_labels

    check_labels(compute)
    if not address and ray.is_initialized():  # by the program that calls this
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    # Ray makes and uses the token of a local cluster itself; its messages on it are not needed.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.WARNING,
    }
    if address and address != "local":
        _check_reachable(address)
        try:
            with _interrupts_deferred():
                ray.init(address=address, **options)
        except (
            ConnectionError,
            RuntimeError,  # the cluster runs another version of Ray or Python
            ValueError,
            ray.exceptions.AuthenticationError,
        ) as error:
            raise UserError(
                f"{_named(address)}: {error}; a cluster with token authentication needs "
                "RAY_AUTH_MODE=token and its token here, too"
            ) from None
        if compute.device == "auto" and not ray.cluster_resources().get("GPU"):
            logger.warning(
                "the cluster has no GPU now, so CPUs are used; if GPU nodes are started on demand, "
                'set device = "gpu"'
            )
        has, needs = ray.cluster_resources().get("CPU", 0), _needed_cpus(compute)
        if has < needs:
            logger.warning(
                "the cluster has %g CPUs and [compute] asks for %d: work that does not fit waits "
                "for more nodes; lower num_workers or num_evaluators if none will join",
                has,
                needs,
            )
    else:
        _check_temporary_folder()
        num_cpus = max(usable_cpus(), _needed_cpus(compute))
        with _interrupts_deferred():
            ray.init(address="local", num_cpus=num_cpus, **options)
        keep_token_private()
        if compute.device == "gpu" and not ray.cluster_resources().get("GPU"):
            ray.shutdown()
            raise UserError('compute.device = "gpu", but this machine has none; set "auto"')
    # Ray's own handler of this signal prints twenty lines of addresses.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        ray.shutdown()
        if in_main_thread and handler is not None:  # None: C code's, which Python cannot restore
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Delay KeyboardInterrupt to the end of the block, in which Ray starts its processes.

    Raised inside the hook that logging runs after a fork, it would be lost and its lock stay held.
    Not by a signal mask, which the processes would inherit. SIGTERM counts as an interrupt; Ray
    installs a handler for it meanwhile that exits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: pending.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    except SystemExit:
        pending.append(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: C code's, which Python cannot restore
                signal.signal(number, handler)
    if pending:
        import ray

        ray.shutdown()
        raise KeyboardInterrupt


def keep_token_private() -> None:
    """Make the token file that Ray created readable for its owner only."""
    token = Path("~/.ray/auth_token").expanduser()
    with suppress(OSError):  # there is none, or another user owns it
        if token.stat().st_mode & 0o077:
            token.chmod(0o600)


def _named(address: str) -> str:
    """`address` as the user gave it: the variable that has it, or the option."""
    is_variable = os.environ.get("RAY_ADDRESS") == address
    return f"{'RAY_ADDRESS = ' if is_variable else '--address '}{address}"


def _check_reachable(address: str) -> None:
    """Refuse a HOST:PORT where nothing listens; Ray would try for a quarter of an hour."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{_named(address)} is a dashboard, where `nasray submit` sends jobs; here give "
            "HOST:PORT of the cluster's head (its port is 6379 unless told), or auto on a node of "
            "it, or local for this machine"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(
                f"{_named(address)}: no Ray cluster answers there ({error}); give HOST:PORT of a "
                "cluster's head that runs, or local for this machine"
            ) from None


def _check_temporary_folder() -> None:
    """Refuse a folder for Ray's session in which it cannot make its sockets.

    Raises:
        UserError: names the variable that has it.
    """
    name = next((each for each in ("RAY_TMPDIR", "TMPDIR") if each in os.environ), None)
    if name is None or (name == "TMPDIR" and not sys.platform.startswith("linux")):
        return
    folder = os.environ[name]
    if len(os.fsencode(os.path.join(folder, SOCKET))) > LONGEST_SOCKET:
        raise UserError(
            f"{name} = {folder} is {len(os.fsencode(folder))} bytes long, too long for the names "
            f"of Ray's sockets, at most {LONGEST_SOCKET - len(SOCKET) - 1}: set RAY_TMPDIR to a "
            "shorter folder, such as /tmp"
        )
    try:
        os.makedirs(os.path.join(folder, "ray"), exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{name} = {folder}: Ray cannot keep its session there ({error.strerror}): set "
            "RAY_TMPDIR to a folder that can be written, such as /tmp"
        ) from None


def _needed_cpus(compute: Any) -> int:
    """The most CPUs that any stage of a job asks for at once."""
    return max(
        compute.num_workers * compute.cpus_per_worker,
        compute.num_evaluators * compute.cpus_per_evaluator,
        compute.concurrent_trials * compute.workers_per_trial * compute.cpus_per_trial,
    )
