"""Answers a file of instructions or prompts in batches, so that a run that was killed goes on where it stopped."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hf_model import journal
from hf_model.errors import UserError, memory_for
from hf_model.generation import Sampling, continue_prompts, encode
from hf_model.journal import exists_already
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.output_dir import disk_errors
from hf_model.processes import Processes
from hf_model.records import Record, check_records
from hf_model.tokenizer import prompt_text, takes_instructions


def answer_file(
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: list[Record],
    output_file: str | Path,
    batch_size: int,
    sampling: Sampling,
    *,
    parse_special_tokens: bool = False,
    processes: Processes | None = None,
    on_kept: Callable[[int], None] = lambda kept: None,
) -> int:
    """Write each record with its `response` to a JSON Lines file, in the records' order.

    Batches are made of prompts of like length, left-padded. Each finished batch is appended to a journal beside the
    output file, which takes its place only when it is complete; the same call after a killed run goes on from there.

    Greedy answers are those of one record at a time. Sampled ones depend on what else is in their batch too: so on
    `batch_size`, on how many processes there are, and on where an earlier run was stopped.

    Args:
        batch_size: how many records a process answers at a time.
        processes: those that share the work, each of which makes the same call; the main one writes. None: no others.
        on_kept: called in the main process with how many answers the journal holds, at first and after each batch.

    Returns:
        The number of records answered now, those of an earlier run left out.

    Raises:
        UserError: `batch_size` is less than 1, the output file exists already, another run is writing it, a file that
            is no journal stands where its journal goes, it cannot be written, a record is not of the model's kind or
            holds a character that the model does not know, or another process has ended.
    """
    processes, output_file = processes or Processes(), Path(output_file)
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    with disk_errors(output_file):
        if os.path.lexists(output_file):
            raise exists_already(output_file)
    # Before there is a journal: a record that cannot be encoded leaves nothing behind.
    check_records(records, raw=not takes_instructions(tokenizer))
    prompts = [_encoded(tokenizer, record, index, parse_special_tokens) for index, record in enumerate(records)]
    with ExitStack() as stack:
        book = None
        if processes.is_main:
            run = _name_of_run(model, tokenizer, records, sampling, parse_special_tokens)
            book = stack.enter_context(journal.opened(output_file, run, len(records)))
            on_kept(len(book.responses))
        done = processes.from_main(set(book.responses) if book else set())
        by_length = sorted(  # memory runs out early or never
            (index for index in range(len(records)) if index not in done),
            key=lambda index: prompts[index].shape[1],
            reverse=True,
        )
        progress = stack.enter_context(
            tqdm(total=len(records), initial=len(done), unit="record", disable=None if book else True)
        )
        for round in _chunks(by_length, batch_size * processes.count):
            batch = processes.share(round)
            mine = [prompts[index] for index in batch]
            with memory_for("to generate", "choose a smaller --batch_size"):
                answers = continue_prompts(model, tokenizer, mine, sampling) if mine else []
            gathered = processes.gather(list(zip(batch, answers, strict=True)))
            if book:
                book.append(dict(gathered))
                on_kept(len(book.responses))
            progress.update(len(round))
        if book:
            book.finish(_content(records, book.responses))
    return len(by_length)


def _content(records: list[Record], responses: dict[int, str]) -> bytes:
    lines = (
        json.dumps({**record, "response": responses[index]}, ensure_ascii=False) + "\n"
        for index, record in enumerate(records)
    )
    # "backslashreplace" makes of an unpaired surrogate its JSON escape.
    return "".join(lines).encode("utf-8", "backslashreplace")


def _name_of_run(
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: list[Record],
    sampling: Sampling,
    parse_special_tokens: bool,
) -> str:
    """A hash of all that greedy answers depend on; of sampled ones, of all but the batches that they come in."""
    # Without the options that are not used, so that a new one leaves the journals of before as they are.
    how = {name: value for name, value in asdict(sampling).items() if value is not None}
    identity = [
        *(records, how, parse_special_tokens, model.config.to_dict(), tokenizer.get_vocab()),
        *(_checksums(model), takes_instructions(tokenizer)),
    ]
    return hashlib.sha256(json.dumps(identity, default=str, sort_keys=True).encode()).hexdigest()


def _encoded(
    tokenizer: PreTrainedTokenizerFast, record: Record, index: int, parse_special_tokens: bool
) -> torch.Tensor:
    prompt = record["instruction" if takes_instructions(tokenizer) else "prompt"]
    try:
        return encode(tokenizer, prompt_text(tokenizer, prompt, record.get("input") or ""), parse_special_tokens)
    except UserError as error:
        raise UserError(f"record {index + 1}: {error}") from None


def _checksums(model: CustomGPTForCausalLM) -> list[int]:
    """Of the weights as they are used: a model keeps its identity in another folder, and in no other dtype."""
    return [zlib.crc32(tensor.cpu().reshape(-1).view(torch.uint8).numpy()) for tensor in model.state_dict().values()]


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
