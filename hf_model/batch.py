"""Answers a file of instructions or prompts in batches. A run that was killed continues where it stopped."""

import hashlib
import json
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hf_model.errors import UserError, memory_for
from hf_model.generation import Sampling, continue_prompts, encode_end
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.processes import Processes
from hf_model.records import Record, check_records, is_complete, open_journal
from hf_model.tokenizer import chat_template, takes_instructions

UNUSED_WHEN_GREEDY = ("top_k", "top_p", "min_p", "seed", "seed_like_original")


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
    overwrite: bool = False,
    on_kept: Callable[[int], None] = lambda kept: None,
    warn: Callable[[str], None] = lambda line: None,
) -> int:
    """Write each record with its `response` to a JSON Lines file, in the order of the records.

    Prompts of similar length are answered together, left-padded. Each finished batch is added to a journal beside the
    output file. The next call uses the journal's answers to all records whose prompt is the same. If the output file
    already holds these records with responses, nothing is done.

    Greedy answers are those of one record at a time. Sampled ones also depend on the other records in their batch: on
    `batch_size`, on the number of processes, and on where an earlier run was stopped.

    Args:
        batch_size: how many records a process answers at a time.
        processes: this process and the others that share the work. Each makes the same call; the main one writes.
        overwrite: replace the output file of an earlier run, and discard answers in the journal that were made with
            other options.
        on_kept: called in the main process with the number of records that have an answer in the journal: at the start
            and after each batch.
        warn: called in the main process with a line about prompts that are longer than the context.

    Returns:
        The number of records answered by this call, without those that had an answer.

    Raises:
        UserError: `batch_size` is less than 1, the output file's name is taken (see `records.is_complete`), the journal
            holds answers made with other options (see `records.open_journal`), another run is writing them, they cannot
            be written, a record does not fit the model, or another process has ended.
    """
    processes, output_file = processes or Processes(), Path(output_file)
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    # Checked before there is a journal, so that a wrong record leaves no files behind.
    check_records(records, raw=not takes_instructions(tokenizer))
    if is_complete(output_file, records, overwrite):
        return 0
    context = model.config.block_size
    prompts = [
        _encoded(tokenizer, record, index, context, parse_special_tokens) for index, record in enumerate(records)
    ]
    n_longer = sum(prompt.shape[1] > context for prompt in prompts)
    if n_longer and processes.is_main:
        told = f"{n_longer:,} of {len(prompts):,} prompts"
        warn(f"longer than the context: {told}; the model sees their last {context:,} tokens")
    with ExitStack() as stack:
        journal, responses, keys = None, {}, []
        if processes.is_main:
            options = _options(model, tokenizer, sampling, parse_special_tokens)
            keys = [hashlib.sha256(str(prompt.tolist()).encode()).hexdigest() for prompt in prompts]
            journal = stack.enter_context(open_journal(output_file, options, overwrite))
            responses = journal.responses(keys)
            on_kept(len(responses))
        done = processes.from_main(set(responses))
        left = [index for index in range(len(records)) if index not in done]
        # The longest first: if memory runs out, it runs out at once.
        left.sort(key=lambda index: prompts[index].shape[1], reverse=True)
        progress = stack.enter_context(
            tqdm(total=len(records), initial=len(done), unit="record", disable=None if journal else True)
        )
        for start in range(0, len(left), batch_size * processes.count):
            batch = processes.share(left[start : start + batch_size * processes.count])
            with memory_for("to generate", "choose a smaller --batch_size"):
                answers = continue_prompts(model, tokenizer, [prompts[i] for i in batch], sampling) if batch else []
            gathered = processes.gather(list(zip(batch, answers, strict=True)))
            if journal:
                journal.append([(keys[index], response) for index, response in gathered])
                responses |= dict(gathered)
                on_kept(len(responses))
            progress.update(len(gathered))
        if journal:
            journal.finish(records, responses, overwrite)
    return len(left)


def _encoded(
    tokenizer: PreTrainedTokenizerFast, record: Record, index: int, block_size: int, parse_special_tokens: bool
) -> torch.Tensor:
    prompt = record["instruction" if takes_instructions(tokenizer) else "prompt"]
    try:
        input_text = record.get("input") or ""
        return encode_end(tokenizer, prompt, input_text, parse_special_tokens, block_size=block_size)[0]
    except UserError as error:
        raise UserError(f"record {index + 1}: {error}") from None


def _options(
    model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, sampling: Sampling, parse_special_tokens: bool
) -> dict[str, Any]:
    """Everything except the prompt that an answer depends on. Sampled answers also depend on their batch."""
    unused = ("cache_implementation", *(UNUSED_WHEN_GREEDY if sampling.temperature == 0 else ()))
    # Checksums of the weights as they are used: two folders with equal weights are one model, two dtypes are not.
    weights = [zlib.crc32(w.cpu().reshape(-1).view(torch.uint8).numpy()) for w in model.state_dict().values()]
    identity = [weights, model.config.to_dict(), tokenizer.get_vocab(), chat_template(tokenizer)]
    return {
        **{name: value for name, value in asdict(sampling).items() if name not in unused},
        "parse_special_tokens": parse_special_tokens,
        "model": hashlib.sha256(json.dumps(identity, default=str, sort_keys=True).encode()).hexdigest(),
    }
