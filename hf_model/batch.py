"""Answers a file of instructions or prompts in batches, so that a run that was killed goes on where it stopped."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hf_model import journal
from hf_model.disk import disk_errors
from hf_model.errors import UserError
from hf_model.generation import Sampling, continue_prompts, encode
from hf_model.journal import exists_already
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.strict_json import parse_json
from hf_model.vocabulary import format_prompt, takes_instructions

Record = dict[str, Any]
MAX_LINE = 2**26


def read_records(path: Path, raw: bool = False) -> list[Record]:
    """The records of a JSON Lines file: objects with an `instruction`, perhaps an `input`, and fields of their own.

    Records of raw text have a `prompt`; an `instruction` is taken as one too, but there is no place for an `input`.

    Raises:
        UserError: no such file, or a line that is not such a record.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(_lines(file))  # str.splitlines would end a line at a U+2028 within a string too
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    wanted = "a 'prompt'" if raw else "an 'instruction'"
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            text, input_text = _text(record, raw), record.get("input") or ""
        except json.JSONDecodeError:
            raise UserError(f"{path}, line {number}: is not a JSON object with {wanted}") from None
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        except (TypeError, KeyError, AttributeError):
            raise UserError(f"{path}, line {number}: is not a JSON object with {wanted}") from None
        if not isinstance(text, str) or not isinstance(input_text, str):
            name = "'prompt'" if raw and "prompt" in record else "'instruction'"
            raise UserError(f"{path}, line {number}: {name} and 'input' must be strings")
        if raw and input_text:
            raise UserError(f"{path}, line {number}: a raw prompt has no place for an 'input'")
        if raw and not text:
            raise UserError(f"{path}, line {number}: the prompt is empty, and a model of raw text needs a beginning")
        records.append(record)
    return records


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"it has a line of more than {MAX_LINE} characters")
        yield line


def _text(record: Record, raw: bool) -> Any:
    return record["prompt"] if raw and "prompt" in record else record["instruction"]


def answer_file(
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: list[Record],
    output_file: Path,
    batch_size: int,
    sampling: Sampling,
    *,
    parse_special_tokens: bool = False,
) -> int:
    """Write each record with its `response` to a JSON Lines file, in the records' order.

    Batches are made of prompts of like length, left-padded. Each finished batch is appended to a journal beside the
    output file, which takes its place only when it is complete; the same call after a killed run goes on from there.

    Returns:
        The number of records answered now, those of an earlier run left out.

    Raises:
        UserError: the output file exists already, another run is writing it, a file that is no journal stands where
            its journal goes, it cannot be written, or a record holds a character that the model does not know.
    """
    with disk_errors(output_file):
        if os.path.lexists(output_file):
            raise exists_already(output_file)
    run = _name_of_run(model, tokenizer, records, sampling, parse_special_tokens)
    # Before there is a journal: a record that cannot be encoded leaves nothing behind.
    prompts = [_encoded(tokenizer, record, index, parse_special_tokens) for index, record in enumerate(records)]
    with journal.opened(output_file, run, len(records)) as answered:
        by_length = sorted(  # memory runs out early or never
            (index for index in range(len(records)) if index not in answered.responses),
            key=lambda index: prompts[index].shape[1],
            reverse=True,
        )
        with tqdm(total=len(records), initial=len(answered.responses), unit="record", disable=None) as progress:
            for batch in _chunks(by_length, batch_size):
                answers = continue_prompts(model, tokenizer, [prompts[index] for index in batch], sampling)
                answered.append(dict(zip(batch, answers, strict=True)))
                progress.update(len(batch))
        lines = (
            json.dumps({**record, "response": answered.responses[index]}, ensure_ascii=False) + "\n"
            for index, record in enumerate(records)
        )
        # "backslashreplace" makes of an unpaired surrogate its JSON escape.
        answered.finish("".join(lines).encode("utf-8", "backslashreplace"))
    return len(by_length)


def _name_of_run(
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: list[Record],
    sampling: Sampling,
    parse_special_tokens: bool,
) -> str:
    """A hash of all that the answers depend on."""
    identity = [
        *(records, asdict(sampling), parse_special_tokens, model.config.to_dict(), tokenizer.get_vocab()),
        *(_checksums(model), takes_instructions(tokenizer)),
    ]
    return hashlib.sha256(json.dumps(identity, default=str, sort_keys=True).encode()).hexdigest()


def _encoded(
    tokenizer: PreTrainedTokenizerFast, record: Record, index: int, parse_special_tokens: bool
) -> torch.Tensor:
    raw = not takes_instructions(tokenizer)
    content = _text(record, raw) if raw else format_prompt(record["instruction"], record.get("input") or "")
    try:
        return encode(tokenizer, content, parse_special_tokens)
    except UserError as error:
        raise UserError(f"record {index + 1}: {error}") from None


def _checksums(model: CustomGPTForCausalLM) -> list[int]:
    """Of the weights as they are used: a model keeps its identity in another folder, and in no other dtype."""
    return [zlib.crc32(tensor.cpu().reshape(-1).view(torch.uint8).numpy()) for tensor in model.state_dict().values()]


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
