"""A host that times ONNX files: python3 there runs latency_board.py, at the other end of ssh.

One connection is kept for all files. ssh is the system's, so that ~/.ssh/config holds.
"""

import inspect
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, NoReturn

from nasray.costs import latency_board
from nasray.errors import UserError

# Double quotes around it and single ones in it are read alike by the shells that a host may have.
START = (
    'python3 -c "import sys; '
    "sys.version_info >= (3, 8) or sys.exit('python3 is older than 3.8; install a newer one'); "
    'exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"'
)
# A host that has lost its power or its network is noticed within a minute.
OPTIONS = ("-T", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
SSH_FAILED, NOT_FOUND = 255, 127  # exit statuses: of ssh itself, and of the host's shell
END_S = 10.0


class Host:
    """latency_board.Sessions on a host: the same methods, and the same mistakes as UserErrors.

    Raises:
        UserError: of any method, too: the host cannot be used, or the connection is lost.
    """

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
        self.name, self.process, self.log = name, process, log

    def missing(self, names: Sequence[str]) -> list[str]:
        """Which of the files `names` must be held before they are timed."""
        return self._ask("missing", names)

    def hold(self, name: str, content: bytes) -> None:
        """Send a file, in place of another one of this name."""
        self._ask("hold", name, content=content)

    def time(self, names: Sequence[str]) -> list[float]:
        """Run files that are held, each on the output of the one before: ms of each."""
        return self._ask("time", names)

    def machine(self) -> dict[str, str]:
        """What a table says of the host."""
        return self._ask("machine")

    def begin(self, *arguments: Any) -> None:
        """Send the program, and make its Sessions with `arguments`."""
        program = inspect.getsource(latency_board).encode()
        try:
            self._write(b"%d\n%s" % (len(program), program))
            # A login may print whatever it likes before.
            while (line := self._read()) != latency_board.HELLO:
                if not line:
                    self._fail_to_begin()
        except OSError:
            self._fail_to_begin()
        self._ask("", *arguments)

    def _ask(self, method: str, *arguments: Any, content: bytes = b"") -> Any:
        request = {"do": method, "arguments": arguments, "bytes": len(content)}
        line = b""
        with suppress(OSError):
            self._write(json.dumps(request).encode() + b"\n" + content)
            line = self._read()
        if not line.endswith(b"\n"):
            raise UserError(
                f"the connection to {self.name} was lost ({self._last_words()}); run the same "
                "command again to resume"
            )
        said = json.loads(line)
        if "mistake" in said:
            raise UserError(f"{self.name}: {said['mistake']}")
        return said["answer"]

    def _write(self, content: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(content)
        self.process.stdin.flush()

    def _read(self) -> bytes:
        assert self.process.stdout
        return self.process.stdout.readline()

    def _fail_to_begin(self) -> NoReturn:
        said, status = self._last_words(), self.process.poll()
        if status == SSH_FAILED:
            raise UserError(
                f"ssh does not reach {self.name} ({said}); `ssh {self.name} true` must work first"
            )
        if status == NOT_FOUND:
            raise UserError(f"{self.name} has no python3 ({said}); install it there")
        if lacking := re.search(r"No module named '(\w+)", said):
            raise UserError(
                f"{self.name} has no {lacking[1]}: python3 -m pip install onnxruntime there"
            )
        raise UserError(f"{self.name} cannot measure: {said}")

    def _last_words(self) -> str:
        """The last line that ssh or the host printed, or else the exit status."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"exit status {self.process.poll()}"


@contextmanager
def connected(name: str, *arguments: Any) -> Iterator[Host]:
    """Connect to the host `name`, e.g. "user@board", as ssh takes it.

    `arguments` are those of latency_board.Sessions.

    Raises:
        UserError: the host cannot be used.
    """
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                ["ssh", *OPTIONS, "--", name, START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,  # not a pipe, which could fill up
            )
        except FileNotFoundError:
            raise UserError(f"{name} is reached by ssh: install OpenSSH's client here") from None
        try:
            host = Host(name, process, log)
            host.begin(*arguments)
            yield host
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the connection: the host's program ends when its input does."""
    with suppress(OSError):
        assert process.stdin
        process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout
    process.stdout.close()
