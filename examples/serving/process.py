"""Runs a server in a process of its own for the length of a `with` block."""

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running(command: Sequence[str], address: str, log: Path, seconds: float, cwd: Path | None = None) -> Iterator[None]:
    """Start a server, wait until it answers at `address`/health, and stop it when the block ends.

    Args:
        log: the file that receives what the server prints.
        seconds: how long to wait for the first answer.

    Raises:
        RuntimeError: the server ended, or did not answer in time.
    """
    with log.open("w") as output, subprocess.Popen(command, cwd=cwd, stdout=output, stderr=output) as server:
        try:
            deadline = time.monotonic() + seconds
            while not _answers(f"{address}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start: see {log}")
                time.sleep(0.2)
            yield
        finally:
            server.terminate()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
