"""The files of a batch run: the records with its prompts, its output, and the journal that keeps unfinished work."""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_model.errors import UserError
from hf_model.output_dir import MARK, WRITER
from hf_model.reading import parse_json, read_text
from hf_model.writing import disk_errors, locked, sync, write_file

Record = dict[str, Any]
MAX_BYTES = 2**29
MAX_OUTPUT_BYTES = 2**32


# Records.


def read_records(path: str | Path, raw: bool | None = False) -> list[Record]:
    """The records of a JSON Lines file, or of a file with one JSON array.

    A record is an object with an `instruction`, perhaps an `input`, and any other fields. Blank lines are skipped.

    Args:
        raw: whether the records are for a model of raw text and have a `prompt` instead of an `instruction`. None
            takes either kind, for a model that is not known yet; call `check_records` once the model is known.

    Raises:
        UserError: the file cannot be read, or holds something that is not such a record.
    """
    path = Path(path)
    text = read_text(path, MAX_BYTES, streams=True)
    if text.lstrip().startswith("["):
        placed = [(f"record {number}", record) for number, record in enumerate(_parse(path, text, raw), start=1)]
    else:
        lines = enumerate(text.split("\n"), start=1)  # str.splitlines would split at a U+2028 in a string too
        placed = [(f"line {number}", _parse(path, line, raw, number)) for number, line in lines if line.strip()]
    for place, record in placed:
        if problem := _problem(record, raw):
            raise UserError(f"{path}, {place}: {problem}")
    return [record for _, record in placed]


def check_records(records: list[Any], raw: bool | None, path: Path | None = None) -> None:
    """Check that each record is of the kind that `read_records` describes.

    Raises:
        UserError: a record is not; the message gives its number, and the file if `path` is given.
    """
    for number, record in enumerate(records, start=1):
        if problem := _problem(record, raw):
            raise UserError(f"{path}, record {number}: {problem}" if path else f"record {number}: {problem}")


def _parse(path: Path, text: str, raw: bool | None, line: int = 1) -> Any:
    """The value of a JSON text that begins at a line of a file."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line + error.lineno - 1}"
        raise UserError(f"{place}: {_no_record(raw)} ({error.msg})") from None
    except ValueError as error:
        raise UserError(f"{path}, line {line}: {error}") from None


def _problem(record: Any, raw: bool | None) -> str:
    """What is wrong with a record; "" if nothing is."""
    if not isinstance(record, dict):
        return _no_record(raw)
    if raw is None:  # either kind is right
        kinds = [is_raw for name, is_raw in (("instruction", False), ("prompt", True)) if name in record]
        problems = [_problem(record, kind) for kind in kinds] or [_no_record(raw)]
        return "" if "" in problems else problems[0]
    name = "prompt" if raw else "instruction"
    if raw and name not in record and "instruction" in record:
        return "has an 'instruction', but this model's prompts are raw text: it needs a 'prompt' instead"
    if name not in record:
        return _no_record(raw)
    text, input_text = record[name], record.get("input") or ""
    if not isinstance(text, str) or not isinstance(input_text, str):
        return f"{name!r} and 'input' must be strings"
    if raw and input_text:
        return "a raw prompt has no place for an 'input'"
    if raw and not text:
        return "the prompt is empty, and a model of raw text needs a beginning"
    return ""


def _no_record(raw: bool | None) -> str:
    wanted = {True: "a 'prompt'", False: "an 'instruction'", None: "a 'prompt' or an 'instruction'"}[raw]
    return f"is not a JSON object with {wanted}"


# The output: the records again, each with its `response`.


def is_complete(output_file: str | Path, records: list[Record], overwrite: bool = False) -> bool:
    """Whether the output file holds these records already, each with a response. With `overwrite`: never.

    Raises:
        UserError: the name is taken by answers to other records (without `overwrite`), or by anything else.
    """
    output = Path(output_file)
    with disk_errors(output):
        if not os.path.lexists(output):
            return False
        if output.is_symlink():
            raise UserError(f"{output}: is a symbolic link; name the file itself")
    try:
        text = read_text(output, MAX_OUTPUT_BYTES)
        found = [parse_json(line) for line in text.removesuffix("\n").split("\n")] if text else []
    except ValueError:  # also a UserError: not a file, not UTF-8, too large
        found = [None]
    if not all(isinstance(record, dict) and isinstance(record.get("response"), str) for record in found):
        raise UserError(
            f"{output}: exists already and holds no answers of an earlier run; choose another --output_file"
        )
    if overwrite:
        return False
    if [_without_response(record) for record in found] == [_without_response(record) for record in records]:
        return True
    raise UserError(
        f"{output}: exists already, with answers to other records; choose another --output_file or add --overwrite"
    )


def _without_response(record: Record) -> str:
    return json.dumps({name: value for name, value in record.items() if name != "response"})


def _output(records: list[Record], responses: dict[int, str]) -> bytes:
    lines = (
        json.dumps({**record, "response": responses[index]}, ensure_ascii=False) + "\n"
        for index, record in enumerate(records)
    )
    # JSON has an escape for an unpaired surrogate, UTF-8 has no form for it.
    return "".join(lines).encode("utf-8", "backslashreplace")


# The journal: beside `out.jsonl` the file `out.jsonl.partial`, locked by its run. Its first line holds the options that
# answers depend on, each further line an answer.


@dataclass(frozen=True)
class Journal:
    """An open journal. It knows a record by its key, a text that differs if the prompt differs."""

    output: Path
    descriptor: int
    answers: list[tuple[str, str]]
    """The key and the response of each answer of earlier runs."""

    def responses(self, keys: list[str]) -> dict[int, str]:
        """The responses that are known, by the index of the key. Equal keys get different answers."""
        left: dict[str, list[str]] = {}
        for key, response in self.answers:
            left.setdefault(key, []).append(response)
        return {index: left[key].pop(0) for index, key in enumerate(keys) if left.get(key)}

    def append(self, answers: list[tuple[str, str]]) -> None:
        """Write keys and responses. They are on the disk when this returns."""
        with disk_errors(self.output):
            _write_synced(self.descriptor, b"".join(_line(key, response) for key, response in answers))

    def finish(self, records: list[Record], responses: dict[int, str], overwrite: bool) -> None:
        """Write the output file, which appears whole, and delete the journal.

        Raises:
            UserError: the output file has appeared meanwhile (without `overwrite`), or it cannot be written.
        """
        private = self.output.with_name(f".{self.output.name}.{MARK}")
        with disk_errors(self.output):
            private.unlink(missing_ok=True)  # left by a run that was killed here
            try:
                write_file(self.output, _output(records, responses), overwrite=overwrite, private=private)
            except FileExistsError:
                raise UserError(f"{self.output}: exists already; choose another --output_file") from None
            journal_path(self.output).unlink(missing_ok=True)
            sync(self.output.parent)


def journal_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


@contextmanager
def open_journal(output: Path, options: dict[str, Any], overwrite: bool = False) -> Iterator[Journal]:
    """Open the journal of an output file, or start one.

    Args:
        options: everything except the prompt that an answer depends on, as values for JSON.
        overwrite: discard answers that were made with other options.

    Raises:
        UserError: the journal holds answers made with other options (without `overwrite`), another run is writing it,
            another file has its name, or it cannot be written.
    """
    path = journal_path(output)
    options = json.loads(json.dumps(options))  # as they are read back: lists for tuples
    with ExitStack() as stack:
        with disk_errors(output):
            if path.is_symlink():
                raise UserError(f"{path}: is a symbolic link where the journal of this run goes: {_MOVE}")
            descriptor = stack.enter_context(locked(path, os.O_CREAT | os.O_APPEND))
            if descriptor is None:
                raise UserError(f"{output}: another run is writing it")
            with os.fdopen(os.dup(descriptor), "rb") as file:
                made_with = _made_with(path, file.readline(MAX_HEADER))
                lines = file.readlines()
            answers = [answer for line in lines if (answer := _answer(line))]
            if made_with is not None and made_with != options and answers and not overwrite:
                raise UserError(_other_options(path, len(answers), made_with, options))
            if made_with != options:
                answers = []
                os.ftruncate(descriptor, 0)
                os.fsync(descriptor)  # first: no old answer may stand under the new options
                _write_synced(descriptor, _START + json.dumps(options).encode() + b"}\n")
                sync(path.parent)
            elif lines and not lines[-1].endswith(b"\n"):  # an incomplete line, from a killed run
                _write_synced(descriptor, b"\n")
        yield Journal(output, descriptor, answers)


_START = f'{{"written_by": "{WRITER}", "options": '.encode()
_MOVE = "move it away, or choose another --output_file"
MAX_HEADER = 2**20


def _made_with(path: Path, first: bytes) -> dict[str, Any] | None:
    """The options in the first line of a journal; None for a journal whose run was killed before it wrote that line.

    Raises:
        UserError: the file is not a journal.
    """
    if not first.endswith(b"\n") and (first.startswith(_START) or _START.startswith(first)):
        return None
    try:
        options = parse_json(first.decode())["options"]
        if first.startswith(_START) and isinstance(options, dict):
            return options
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path}: is not a journal of this program, but has the name of one: {_MOVE}")


def _other_options(path: Path, n_answers: int, made_with: dict[str, Any], options: dict[str, Any]) -> str:
    names = [name for name, value in options.items() if name in made_with and made_with[name] != value]
    differences = ["another model" if n == "model" else f"{n}={made_with[n]!r} (now {options[n]!r})" for n in names]
    return (
        f"{path}: holds {n_answers:,} answers of an unfinished run, made with "
        f"{', '.join(differences) or 'other options'}; run it with those again to continue, add --overwrite to discard "
        "these answers, or choose another --output_file"
    )


def _write_synced(descriptor: int, content: bytes) -> None:
    with os.fdopen(os.dup(descriptor), "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _line(key: str, response: str) -> bytes:
    checksum = zlib.crc32(json.dumps([key, response]).encode())
    return json.dumps({"record": key, "response": response, "crc32": checksum}).encode() + b"\n"


def _answer(line: bytes) -> tuple[str, str] | None:
    """The key and the response in a line of a journal; None if the line is damaged or incomplete."""
    try:
        answer = parse_json(line.decode())
        key, response = answer["record"], answer["response"]
    except (ValueError, TypeError, KeyError):
        return None
    is_text = isinstance(key, str) and isinstance(response, str)
    return (key, response) if is_text and line.rstrip(b"\n") + b"\n" == _line(key, response) else None
