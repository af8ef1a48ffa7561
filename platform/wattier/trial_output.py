"""The last mebibyte of what a trial prints, in a file of its folder, whatever and however much it prints.

Everything that the process and its libraries write to standard output and standard error goes through a pipe to a small
process, which is this file run as a script. A thread could not do it: native code that prints while it holds the
interpreter's lock would wait for a thread that waits for the lock. Neither memory nor disk grows, and what a process
said before it was killed is kept.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

KEPT_BYTES = 1 << 20
FLUSH_SECONDS = 0.5
READ_BYTES = 1 << 18
PIPE_BYTES = 1 << 20  # what may be printed before a writer waits for the reader
F_SETPIPE_SZ = 1031
CLOSE_SECONDS = 5.0
OUTPUT_NAME = "output.txt"
OUT_OF_MEMORY_NOTE = "[wattier: the kernel killed a process of this machine for memory while this trial ran]"


def output_name(rank: int) -> str:
    """The file's name in the trial's folder."""
    return OUTPUT_NAME if rank == 0 else f"output-rank{rank}.txt"


def being_written(output: Path) -> Path:
    """A file that is there until all is written that the process has printed; it names the keeper who writes."""
    return output.with_name(f".{output.name}.open")


@contextlib.contextmanager
def kept_output(path: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2 of this process into a file that keeps their last `KEPT_BYTES`."""
    _LINGERING[:] = [other for other in _LINGERING if other.poll() is None]
    name = os.urandom(8).hex()
    with contextlib.suppress(OSError):  # a full disk loses output, not the trial
        being_written(path).write_text(name)
    # In a session of its own: Ray kills the process group of a worker that is gone, and with it what it printed last.
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(path), name], stdin=subprocess.PIPE, start_new_session=True
    )
    if keeper.stdin is None:
        raise RuntimeError("the pipe of the output's keeper was not made")
    _widen(keeper.stdin.fileno())
    targets = sorted({1, 2, *_descriptors()})
    _flush()
    saved = {target: os.dup(target) for target in targets}
    try:
        for target in targets:
            os.dup2(keeper.stdin.fileno(), target)
        keeper.stdin.close()
        yield
    finally:
        _flush()
        for target, descriptor in saved.items():
            os.dup2(descriptor, target)
            os.close(descriptor)
        try:
            keeper.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:  # a grandchild holds the pipe open, and prints on
            _LINGERING.append(keeper)


_LINGERING: list[subprocess.Popen[bytes]] = []  # until they are found ended


def _widen(descriptor: int) -> None:
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):  # the system allows each user so many
            fcntl.fcntl(descriptor, F_SETPIPE_SZ, PIPE_BYTES)


def _descriptors() -> Iterator[int]:
    """Where Python's own streams write: somewhere else, where something has replaced them."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            yield stream.fileno()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


class Tail:
    """The last bytes of a stream, in memory and in a file."""

    def __init__(self, path: Path, kept_bytes: int = KEPT_BYTES) -> None:
        self._path, self._kept = path, kept_bytes
        self._text = bytearray(_last_bytes(path, kept_bytes))
        self._is_new = False
        if self._text:
            self.add(b"\n[wattier: another attempt begins here]\n")

    def add(self, more: bytes) -> None:
        """Take some bytes; more than twice what is kept is never held."""
        self._text += more
        self._is_new = True
        if len(self._text) > 2 * self._kept:
            del self._text[: -self._kept]

    def flush(self) -> None:
        """Put the file into the state of now, whole or not at all; a full disk loses output, not the trial."""
        if not self._is_new:
            return
        del self._text[: -self._kept]
        self._is_new = False
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(self._text)
            temporary.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _last_bytes(path: Path, count: int) -> bytes:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - count))
        return file.read()
    return b""


def _kills_for_memory() -> int:
    """How often the kernel has killed a process for memory since this machine started, as far as it tells."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def keep(source: int, tail: Tail) -> None:
    """Read a descriptor to its end."""
    kills, flush_at = _kills_for_memory(), 0.0
    while True:
        if select.select([source], [], [], FLUSH_SECONDS)[0]:
            more = os.read(source, READ_BYTES)
            if not more:
                break
            tail.add(more)
        if time.monotonic() >= flush_at:
            tail.flush()
            flush_at = time.monotonic() + FLUSH_SECONDS
    if _kills_for_memory() > kills:
        tail.add(f"\n{OUT_OF_MEMORY_NOTE}\n".encode())
    tail.flush()


if __name__ == "__main__":
    import signal

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # it ends with the last writer
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    output = Path(sys.argv[1])
    keep(0, Tail(output))
    with contextlib.suppress(OSError):  # the trial's folder may be gone
        if being_written(output).read_text() == sys.argv[2]:  # not that of a later attempt
            being_written(output).unlink()
