"""The answers that a batch run has so far, beside its output file, so that a run that was killed can go on.

The journal of `out.jsonl` is `out.jsonl.partial`: a header that names the run, and a line with a checksum for each
answer. The run holds it locked. Nothing else of this name is written to, and a link is not followed.
"""

import errno
import hashlib
import hmac
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hf_model.errors import UserError
from hf_model.output_dir import WRITER, create_file, disk_errors, lock, publish, sync, write_synced
from hf_model.reading import parse_json

HEADER = re.compile(rf'\{{"written_by": "{WRITER}", "run": "([0-9a-f]{{64}})"\}}\n'.encode())
HEADER_BYTES = 128


@dataclass
class Journal:
    """An open journal: `responses` is what it holds, by the index of the record."""

    output: Path
    run: str
    descriptor: int
    responses: dict[int, str] = field(default_factory=dict)

    def append(self, responses: dict[int, str]) -> None:
        """Add answers; they are on the disk when this returns."""
        with disk_errors(self.output):
            lines = b"".join(_line(self.run, index, response) for index, response in responses.items())
            write_synced(self.descriptor, lines)
            self.responses |= responses

    def finish(self, content: bytes) -> None:
        """Write the output file, which appears whole, and delete the journal."""
        with disk_errors(self.output):
            private = _private(self.output, _name(self.run))
            _create(private, content)
            try:
                publish(private, self.output)
            except FileExistsError:
                private.unlink()
                raise exists_already(self.output) from None
            path_of(self.output).unlink(missing_ok=True)
            sync(self.output.parent)


@contextmanager
def opened(output: Path, run: str, n_records: int) -> Iterator[Journal]:
    """Open the journal of an output file, locked, with what an earlier run of the same name has answered.

    Args:
        run: a text that differs if anything differs that the answers depend on; the key of the checksums.

    Raises:
        UserError: a file of the journal's name is not one, another run has it, or it cannot be written.
    """
    with disk_errors(output):
        descriptor = _open(output, run)
    try:
        with disk_errors(output):
            content = _read(descriptor)
            responses, length = _answers(content, run, n_records)
            os.ftruncate(descriptor, length)  # a line that was half-written when the run was killed
        yield Journal(output, run, descriptor, responses)
    finally:
        os.close(descriptor)


def path_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def exists_already(output: Path) -> UserError:
    return UserError(f"{output}: exists already; choose another --output_file or delete it")


def _open(output: Path, run: str) -> int:
    """The descriptor of this run's journal, locked; made if there is none, or one of another run."""
    path = path_of(output)
    for attempt in range(10):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            if attempt == 9:
                raise
            _start(output, run)
            continue
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UserError(f"{path}: is a symbolic link where the journal of this run goes: {_MOVE}") from None
            raise
        try:
            found = HEADER.fullmatch(_read(descriptor, HEADER_BYTES).partition(b"\n")[0] + b"\n")
            if found is None or not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{path}: is not a journal of this program, but in the place of one: {_MOVE}")
            if not lock(descriptor, path):
                raise UserError(f"{output}: another run is writing it")
        except BaseException:
            os.close(descriptor)
            raise
        name = found[1].decode()
        if name == _name(run):
            return descriptor
        _create(_private(output, _name(run)), _header(run))
        _private(output, _name(run)).replace(path)
        _private(output, name).unlink(missing_ok=True)  # what that run left
        os.close(descriptor)
    raise UserError(f"{output}: another run is writing it")


_MOVE = "move it away, or choose another --output_file"


def _start(output: Path, run: str) -> None:
    """Make a journal that has a header from its first moment on, if nobody else does at the same time."""
    try:
        _create(_private(output, _name(run)), _header(run))
        publish(_private(output, _name(run)), path_of(output))
    except (FileExistsError, FileNotFoundError):
        pass


def _private(output: Path, name: str) -> Path:
    """A name for what this run is writing, which nobody else's file has; the same run finds and clears it again."""
    return output.with_name(f".{output.name}.{name[:16]}.new")


def _create(path: Path, content: bytes) -> None:
    """Write a new file of this run's, in the place of one that it left when it was killed."""
    path.unlink(missing_ok=True)
    create_file(path, content)


def _read(descriptor: int, size: int = -1) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return file.read(size)


def _header(run: str) -> bytes:
    return f'{{"written_by": "{WRITER}", "run": "{_name(run)}"}}\n'.encode()


def _name(run: str) -> str:
    """What the journal calls a run: not the key of its checksums, or anybody could write answers into it."""
    return hashlib.sha256(run.encode()).hexdigest()


def _line(run: str, index: int, response: str) -> bytes:
    """The answer, behind a checksum that only who knows the run's key can make."""
    body = json.dumps({"index": index, "response": response}).encode()
    return _checksum(run, body) + b" " + body + b"\n"


def _checksum(run: str, body: bytes) -> bytes:
    return hmac.new(run.encode(), body, hashlib.sha256).hexdigest().encode()


def _answers(content: bytes, run: str, n_records: int) -> tuple[dict[int, str], int]:
    """The answers of the lines that are whole, and where the last of them ends."""
    responses: dict[int, str] = {}
    end = place = len(_header(run))
    for line in content[place:].splitlines(keepends=True):
        place += len(line)
        checksum, _, body = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != _checksum(run, body):
            continue
        try:
            answer = parse_json(body.decode())
            index, response = answer["index"], answer["response"]
        except (ValueError, TypeError, KeyError):
            continue
        if type(index) is int and 0 <= index < n_records and isinstance(response, str):
            responses[index], end = response, place
    return responses, end
