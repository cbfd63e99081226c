"""Files of instructions or prompts: JSON Lines, each line a record with fields of its own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from hf_model.errors import UserError
from hf_model.reading import parse_json

Record = dict[str, Any]
MAX_LINE = 2**26  # characters
MAX_FILE = 2**29


def read_records(path: str | Path, raw: bool | None = False) -> list[Record]:
    """The records of a JSON Lines file: objects with an `instruction`, perhaps an `input`, and fields of their own.

    Args:
        raw: whether they are for a model of raw text, whose records have a `prompt` instead; None where the model is
            not known yet: records of either kind are taken, and `check_records` is to follow.

    Raises:
        UserError: no such file, or a line that is not such a record.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(_lines(file))  # str.splitlines would end a line at a U+2028 within a string too
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(parse_json(line))
        except json.JSONDecodeError:
            raise UserError(f"{path}, line {number}: {_no_record(raw)}") from None
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    check_records(records, raw, path)
    return records


def _lines(file: TextIO) -> Iterator[str]:
    length = 0
    while line := file.readline(MAX_LINE + 1):
        length += len(line)
        if len(line) > MAX_LINE:
            raise ValueError(f"it has a line of more than {MAX_LINE} characters")
        if length > MAX_FILE:
            raise ValueError(f"it has more than {MAX_FILE} characters; divide it")
        yield line


def check_records(records: list[Any], raw: bool | None, path: Path | None = None) -> None:
    """Check that each record is one of the wanted kind, as in `read_records`.

    Raises:
        UserError: one is not; it is named by its line of the file at `path`, or by its place.
    """
    for number, record in enumerate(records, start=1):
        if problem := _problem(record, raw):
            raise UserError(f"{path}, line {number}: {problem}" if path else f"record {number}: {problem}")


def _problem(record: Any, raw: bool | None) -> str:
    """What is wrong with a record; "" if nothing is."""
    if raw is None and isinstance(record, dict) and record.keys() & {"instruction", "prompt"}:
        problems = [_problem(record, kind) for kind in (False, True)]
        return "" if "" in problems else problems["instruction" not in record]
    name = "prompt" if raw else "instruction"
    if raw and isinstance(record, dict) and name not in record and "instruction" in record:
        return "has an 'instruction', but this model's prompts are raw text: it needs a 'prompt' instead"
    if not isinstance(record, dict) or name not in record:
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
