"""Answers to one prompt, as text or JSON, and to a file of prompts."""

import argparse
import json
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerFast

from hf_model.batch import answer_file, read_records
from hf_model.generation import Generation, Sampling, encode, generate
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.vocabulary import format_prompt
from hf_model_cli.common import show

SAMPLING_ARGUMENTS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams"),
    "num_return_sequences",
)


def sampling_of(args: argparse.Namespace, seed: int) -> Sampling:
    return Sampling(**{name: getattr(args, name) for name in SAMPLING_ARGUMENTS}, stop=tuple(args.stop), seed=seed)


def answer_prompt(
    args: argparse.Namespace,
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    note: Callable[[str], None],
) -> None:
    content = format_prompt(args.prompt, args.input_text)
    note(f"content     {content}\n")
    input_ids = encode(tokenizer, content, args.parse_special_tokens)
    tokens, seconds = 0, 0.0
    for seed in args.seeds:
        sampling = sampling_of(args, seed)
        if args.json:
            output = generate(model, tokenizer, input_ids, sampling)
            for line in json_lines(args, output, seed):
                show(line)
        else:
            output = show_answer(args, model, tokenizer, input_ids, sampling)
        tokens, seconds = tokens + output.new_tokens, seconds + output.seconds
    note(f"\n{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s")


def show_answer(
    args: argparse.Namespace,
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    input_ids: torch.Tensor,
    sampling: Sampling,
) -> Generation:
    """Print one answer as it comes, or several when they are complete, each under a line that says which it is."""
    streams = sampling.num_return_sequences == sampling.num_beams == 1 and not args.no_stream
    n_answers = len(args.seeds) * sampling.num_return_sequences
    is_labelled = n_answers > 1 and not args.response_only and not args.quiet
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        if streams:
            show(piece, end="")

    if is_labelled and streams:
        show(label(sampling, 0))
    try:
        output = generate(model, tokenizer, input_ids, sampling, response_only=args.response_only, on_text=take)
    except KeyboardInterrupt:
        show("" if streams else "".join(pieces))
        raise
    if streams:
        show("")
    else:
        for index, text in enumerate(output.texts):
            show(f"{label(sampling, index)}\n{text}" if is_labelled else text)
    return output


def label(sampling: Sampling, index: int) -> str:
    of = f", answer {index + 1} of {sampling.num_return_sequences}" if sampling.num_return_sequences > 1 else ""
    return f"--- seed {sampling.seed}{of}"


def json_lines(args: argparse.Namespace, output: Generation, seed: int) -> list[str]:
    """A JSON object for each answer."""
    lines = []
    answers = zip(output.texts, output.responses, output.tokens, output.finish_reasons, strict=True)
    for text, response, tokens, finish_reason in answers:
        fields = {
            "prompt": args.prompt,
            **({"input": args.input_text} if args.input_text else {}),
            "text": text,
            "response": response,
            "tokens": tokens,
            "seconds": round(output.seconds, 3),
            "finish_reason": finish_reason,
            "seed": seed,
        }
        # An unpaired surrogate, which is what a byte that is no UTF-8 arrives as, has no other form than its escape.
        lines.append(json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8"))
    return lines


def answer_records(
    args: argparse.Namespace,
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    note: Callable[[str], None],
) -> None:
    records = read_records(args.prompts_file)
    start = time.perf_counter()
    answered = answer_file(
        model,
        tokenizer,
        records,
        args.output_file,
        args.batch_size,
        sampling_of(args, args.seed),
        parse_special_tokens=args.parse_special_tokens,
    )
    seconds = time.perf_counter() - start
    note(f"written     {args.output_file} ({len(records)} records, {answered} of them answered now)")
    note(f"\n{answered} records in {seconds:.2f} s, {answered / seconds:.1f} records/s")
