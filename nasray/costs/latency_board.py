"""Time ONNX files on the machine that runs this: this one, or a host that is sent this file.

Imports nothing of nasray's, and only what is in Python 3.8: a host that is reached over ssh
(latency_host.py) has no more than that, numpy and onnxruntime.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

WARMUP_RUNS, RUNS = 2, 15  # of a network, each time it is drawn
# Of the runs of one network: what is slower shared its processor with something else. On a
# machine with six times more work than cores this quantile still repeated within 2.6 %, the
# median within 12 %.
RUN_QUANTILE = 0.1
# Files of sessions that are kept: a session takes about three times its file. The blocks of
# the Once-for-All spaces are 250 MB.
MOST_BYTES, SHARE_OF_MEMORY = 2**29, 1 / 8
HELLO = b"nasray latency board\n"  # before the first answer, after what a login prints
UNKNOWN = "unknown"
CPU = "/sys/devices/system/cpu"


class Sessions:
    """ONNX files as sessions of onnxruntime, by name; those used longest ago are dropped.

    `cpus`: the cores to run on, as "4-7"; "" for whatever this process may use. `batch_size`
    is that of files whose first dimension is free.

    Raises:
        ValueError: this machine has no such cores.
    """

    def __init__(
        self, threads: int, cpus: str = "", batch_size: int = 1, most_bytes: int = 0
    ) -> None:
        self.threads, self.cpus, self.batch_size = threads, cpus, batch_size
        self.most_bytes = most_bytes or min(MOST_BYTES, int(_free_memory() * SHARE_OF_MEMORY))
        self.held: OrderedDict[str, tuple[Any, int]] = OrderedDict()  # session, bytes of its file
        with pinned(cpus):
            pass

    def missing(self, names: Sequence[str]) -> list[str]:
        """Which of the files `names` must be held before they are timed; makes room for them."""
        for name in names:
            if name in self.held:
                self.held.move_to_end(name)
        wanted = set(names)
        while self.held and sum(size for _, size in self.held.values()) > self.most_bytes:
            if next(iter(self.held)) in wanted:
                break
            self.held.popitem(last=False)
        return [name for name in OrderedDict.fromkeys(names) if name not in self.held]

    def hold(self, name: str, content: bytes) -> None:
        """Make a session of a file, in place of another one of this name.

        Raises:
            ValueError: onnxruntime cannot read it, or it has not one input of floats.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # errors: boards without /sys are warned of otherwise
        try:
            with pinned(self.cpus):  # for its threads
                session = onnxruntime.InferenceSession(
                    content, options, providers=["CPUExecutionProvider"]
                )
        except Exception as error:  # onnxruntime has a class for each of its error codes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            too_old = "opset" in reason.lower() or "ir version" in reason.lower()
            fix = "update it: python3 -m pip install -U onnxruntime" if too_old else "check it"
            raise ValueError(
                f"onnxruntime {onnxruntime.__version__} refuses the ONNX file ({reason}); {fix}"
            ) from None
        types = [each.type for each in session.get_inputs()]
        if types != ["tensor(float)"]:
            raise ValueError(f"the ONNX file has the inputs {types}, not one tensor(float)")
        self.held[name] = session, len(content)

    def time(self, names: Sequence[str]) -> list[float]:
        """Run files that are held, each on the output of the one before: ms of each.

        Raises:
            ValueError: of the first one's input, more than the batch is left open.
        """
        sessions = [self.held[name][0] for name in names]
        first, *others = sessions[0].get_inputs()[0].shape
        shape = [first if isinstance(first, int) else self.batch_size, *others]
        if not all(isinstance(size, int) for size in others):
            raise ValueError(f"the ONNX file has an input of {shape}; only the first may be open")
        images = np.random.default_rng(0).random(shape, dtype=np.float32)
        with pinned(self.cpus):
            return undisturbed([_step(session) for session in sessions], images)

    def machine(self) -> dict[str, str]:
        """What a table says of the machine: machine(), and the version of onnxruntime."""
        import onnxruntime

        return {**machine(self.cpus), "version": onnxruntime.__version__}


def _step(session: Any) -> Callable[[Any], Any]:
    name = session.get_inputs()[0].name
    return lambda features: session.run(None, {name: features})[0]


def run_in_order(steps: Iterable[Callable[[Any], Any]], features: Any) -> list[float]:
    """Run `steps`, each on the output of the one before, with a clock between them: ms of each."""
    taken = []
    before = time.perf_counter_ns()
    for step in steps:
        features = step(features)
        after = time.perf_counter_ns()
        taken.append((after - before) / 1e6)
        before = after
    return taken


def undisturbed(
    steps: Sequence[Callable[[Any], Any]],
    features: Any,
    run: Callable[[Any, Any], list[float]] = run_in_order,
) -> list[float]:
    """Run `steps` one after the other, several times: the undisturbed time of each, ms."""
    times = [run(steps, features) for _ in range(WARMUP_RUNS + RUNS)]
    found: list[float] = np.quantile(times[WARMUP_RUNS:], RUN_QUANTILE, axis=0).tolist()
    return found


@contextmanager
def pinned(cpus: str) -> Iterator[None]:
    """Run this thread, and those that it starts, on the cores `cpus` only; "" for no change.

    Raises:
        ValueError: this machine has no such cores, or cannot choose.
    """
    if not cpus:
        yield
        return
    wanted = numbers_of(cpus)
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"cpus = {cpus!r}: cores can be chosen on Linux only; leave it out")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, wanted)
        # Where some of the cores exist and some do not, the kernel takes those that do.
        if os.sched_getaffinity(0) != wanted:
            os.sched_setaffinity(0, before)
            raise OSError
    except OSError:
        there = ranges_of(before)
        raise ValueError(f"cpus = {cpus!r}: the cores that can be used are {there}") from None
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def numbers_of(cpus: str) -> set[int]:
    """The cores that a text as "0,4-7" names.

    Raises:
        ValueError: it is no such text.
    """
    found: set[int] = set()
    for part in cpus.split(","):
        first, dash, last = part.strip().partition("-")
        named = first.isdigit() and (last.isdigit() if dash else True)
        if not named or int(last or first) < int(first):
            raise ValueError(f"cpus = {cpus!r} must be numbers of cores, e.g. 0,4-7")
        found.update(range(int(first), int(last or first) + 1))
    return found


def ranges_of(numbers: Iterable[int]) -> str:
    """The opposite of numbers_of()."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in ranges)


def machine(cpus: str = "") -> dict[str, str]:
    """This machine as a process on the cores `cpus` meets it.

    "processor"; "affinity", the cores that the process may use; "governor", what sets their
    clock rate ("unknown" where the system does not say).
    """
    with pinned(cpus):
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    cores = range(os.cpu_count() or 1) if usable is None else sorted(usable)
    governors = {_text(f"{CPU}/cpu{core}/cpufreq/scaling_governor") for core in cores}
    return {
        "processor": _processor(),
        "affinity": f"{len(cores)} of {os.cpu_count()} cores: {ranges_of(cores)}",
        "governor": ", ".join(sorted(governors - {""})) or UNKNOWN,
    }


def _processor() -> str:
    """The name of this machine's CPU; of a single-board computer, the board's."""
    for line in _text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    board = _text("/proc/device-tree/model").strip("\0")
    return board or platform.processor() or platform.machine()


def _free_memory() -> int:
    """Memory that is free for use, bytes; 2 GB where the system does not say."""
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 2**31


def _text(path: str) -> str:
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read().strip()
    return ""


def serve() -> None:
    """Answer latency_host.py's requests on stdin until it is closed.

    A request is a line of JSON, {"do": a method of Sessions, "arguments", "bytes"}, and then as
    many bytes as it says; the first makes the Sessions. An answer is a line of JSON, with the
    "answer" or, of a ValueError, the "mistake".
    """
    import onnxruntime  # noqa: F401 - its absence is to be noticed before the first answer

    # What libraries print on stdout must not come between the answers.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        answers.write(HELLO)
        answers.flush()
        sessions: Any = None
        said: dict[str, Any]
        for line in iter(sys.stdin.buffer.readline, b""):
            request = json.loads(line)
            arguments = request["arguments"]
            if request["bytes"]:
                arguments = [*arguments, sys.stdin.buffer.read(request["bytes"])]
            try:
                if sessions is None:
                    sessions = Sessions(*arguments)
                    said = {"answer": None}
                else:
                    said = {"answer": getattr(sessions, request["do"])(*arguments)}
            except ValueError as error:
                said = {"mistake": str(error)}
            answers.write(json.dumps(said).encode() + b"\n")
            answers.flush()


if __name__ == "__main__":
    serve()
