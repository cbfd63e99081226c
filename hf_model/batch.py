"""Answers a file of instructions or prompts in batches, so that a run that was killed goes on where it stopped."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hf_model.disk import disk_errors
from hf_model.errors import UserError
from hf_model.generation import Sampling, continue_prompts, encode
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.vocabulary import format_prompt, takes_instructions

Record = dict[str, Any]


def read_records(path: Path, raw: bool = False) -> list[Record]:
    """The records of a JSON Lines file: objects with an `instruction`, perhaps an `input`, and fields of their own.

    Records of raw text have a `prompt`; an `instruction` is taken as one too, but there is no place for an `input`.

    Raises:
        UserError: no such file, or a line that is not such a record.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = file.readlines()  # str.splitlines would end a line at a U+2028 within a string too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    wanted = "a 'prompt'" if raw else "an 'instruction'"
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            text, input_text = _text(record, raw), record.get("input") or ""
        except (ValueError, TypeError, KeyError, AttributeError):
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
        UserError: the output file exists already or cannot be written, or a record holds a character that the model
            does not know.
    """
    if output_file.exists():
        raise UserError(f"{output_file}: exists already; choose another --output_file or delete it")
    journal = output_file.with_name(f"{output_file.name}.partial")
    identity = [
        *(records, asdict(sampling), parse_special_tokens, model.config.to_dict(), tokenizer.get_vocab()),
        *(_checksums(model), takes_instructions(tokenizer)),
    ]
    run = hashlib.sha256(json.dumps(identity, default=str, sort_keys=True).encode()).hexdigest()
    responses = _read_journal(journal, run)
    prompts = {
        index: _encoded(tokenizer, record, index, parse_special_tokens)
        for index, record in enumerate(records)
        if index not in responses
    }
    by_length = sorted(
        prompts, key=lambda index: prompts[index].shape[1], reverse=True
    )  # memory runs out early or never
    with disk_errors(output_file), journal.open("a" if responses else "w", encoding="utf-8") as file:
        if not responses:  # a journal of another run starts anew
            file.write(json.dumps({"run": run}))
    with tqdm(total=len(records), initial=len(responses), unit="record", disable=None) as progress:
        for batch in _chunks(by_length, batch_size):
            answers = continue_prompts(model, tokenizer, [prompts[index] for index in batch], sampling)
            with disk_errors(output_file), journal.open("a", encoding="utf-8") as file:
                for index, answer in zip(batch, answers, strict=True):
                    responses[index] = answer
                    file.write("\n" + json.dumps({"index": index, "response": answer}))
            progress.update(len(batch))
    with disk_errors(output_file):
        complete = journal.with_name(f"{output_file.name}.complete")
        complete.write_text(
            "".join(
                json.dumps({**record, "response": responses[index]}, ensure_ascii=False) + "\n"
                for index, record in enumerate(records)
            ),
            encoding="utf-8",
            errors="backslashreplace",  # of an unpaired surrogate, that is its JSON escape
        )
        complete.rename(output_file)
        journal.unlink()
    return len(prompts)


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


def _read_journal(journal: Path, run: str) -> dict[int, str]:
    """Index to response of what an earlier run of the same call has answered."""
    try:
        lines = journal.read_text(encoding="utf-8").splitlines()
        if json.loads(lines[0]) != {"run": run}:
            return {}
    except (OSError, ValueError, IndexError):
        return {}
    responses = {}
    for line in lines[1:]:
        with suppress(ValueError):  # a line that was half-written when the run was killed
            entry = json.loads(line)
            responses[entry["index"]] = entry["response"]
    return responses


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
