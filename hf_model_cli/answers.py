"""Answers to one prompt, as text or JSON, and to a file of prompts."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from hf_model import scoring
from hf_model.batch import answer_file
from hf_model.errors import UserError
from hf_model.generation import Generation, Sampling, encode, generate
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.records import check_records, journal_path
from hf_model.scoring import ScoredToken
from hf_model.tokenizer import prompt_text, takes_instructions
from hf_model_cli.common import MOST_PROMPT_BYTES, show
from hf_model_cli.generate import SAMPLING

FROM_FILE = "FILE:"  # in front of a path, nanoGPT's way to give a prompt
SAMPLING_ARGUMENTS = (*SAMPLING, "num_return_sequences", "seed_like_original", "cache_implementation")


def sampling_of(args: argparse.Namespace, seed: int) -> Sampling:
    return Sampling(**{name: getattr(args, name) for name in SAMPLING_ARGUMENTS}, stop=tuple(args.stop), seed=seed)


def content_of(tokenizer: PreTrainedTokenizerFast, prompt: str, input_text: str) -> str:
    """The text that is encoded: an instruction in its format, or raw text as it is.

    Raises:
        UserError: an instruction of nothing but spaces, or an input for raw text.
    """
    if takes_instructions(tokenizer) and not prompt.strip():
        raise UserError("argument --prompt: must not be empty")
    if input_text and not takes_instructions(tokenizer):
        raise UserError("argument --input_text: this model's prompts are raw text, which has no place for it")
    return prompt_text(tokenizer, prompt, input_text)


def given_prompt(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> str:
    """The prompt of the command line, or what was piped in; of raw text, what stands in a file that `FILE:path` names.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    prompt: str = args.prompt
    if args.is_piped or takes_instructions(tokenizer) or not prompt.startswith(FROM_FILE):
        return prompt
    path = Path(prompt.removeprefix(FROM_FILE))
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_PROMPT_BYTES + 1)
        text = "" if len(raw) > MOST_PROMPT_BYTES else raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError) as error:  # a NUL in the name, bytes that are no UTF-8
        raise UserError(f"argument --prompt: {path} cannot be read ({getattr(error, 'strerror', error)})") from None
    if len(raw) > MOST_PROMPT_BYTES:
        raise UserError(f"argument --prompt: {path} is more than {MOST_PROMPT_BYTES // 2**20} MiB long")
    if not text:
        raise UserError(f"argument --prompt: {path} is empty")
    return text


def answer_prompt(
    args: argparse.Namespace,
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    note: Callable[[str], None],
) -> None:
    try:
        input_ids = encode(tokenizer, args.content, args.parse_special_tokens)
    except UserError as error:
        raise UserError(f"argument --prompt: {error}") from None
    # Of raw text, spaces and new lines at the ends matter, and would not be seen.
    is_plain = takes_instructions(tokenizer) or args.content == args.content.strip()
    note(f"content     {args.content if is_plain else repr(args.content)}\n")
    tokens, seconds = 0, 0.0
    for seed in args.seeds:
        sampling = sampling_of(args, seed)
        if args.json:
            output = generate(model, tokenizer, input_ids, sampling)
            scored = [candidates(args, model, tokenizer, input_ids, ids) for ids in output.ids]
            for line in json_lines(args, output, seed, scored):
                show(line)
        else:
            output = show_answer(args, model, tokenizer, input_ids, sampling)
            for ids in output.ids if args.top_candidates else []:
                note(f"\n{token_table(candidates(args, model, tokenizer, input_ids, ids))}")
        tokens, seconds = tokens + output.new_tokens, seconds + output.seconds
    note(f"\n{count(tokens, 'token')} in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s")


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


def candidates(
    args: argparse.Namespace,
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    input_ids: torch.Tensor,
    response: list[int],
) -> tuple[ScoredToken, ...]:
    """What else the model could have said at each place, before --temperature and its like; () if nobody asked."""
    if not args.top_candidates:
        return ()
    prompt = input_ids[0].tolist()
    return tuple(scoring.score(model, tokenizer, prompt + response, len(prompt), args.top_candidates))


def token_table(tokens: Sequence[ScoredToken]) -> str:
    """A line for each token: its probability, itself, and the likeliest tokens at its place."""
    width = max(len(repr(token.text)) for token in tokens)
    return "\n".join(
        f"{math.exp(token.log_probability):8.2%}  {token.text!r:<{width}}"
        + "".join(f"  {text!r} {math.exp(p):.2%}" for text, p in token.candidates)
        for token in tokens
    )


def score_text(args: argparse.Namespace, model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    score = scoring.score_text(
        model,
        tokenizer,
        args.score,
        prompt=None if args.prompt is None else given_prompt(args, tokenizer),
        input_text=args.input_text,
        parse_special_tokens=args.parse_special_tokens,
        n_candidates=args.top_candidates,
    )
    if args.json:
        show(json.dumps(score.as_dict(), indent=2, allow_nan=False))
        return
    if args.top_candidates:
        show(f"\n{token_table(score.tokens)}\n")
    show(f"tokens      {len(score.tokens)}")
    show(f"log-prob.   {score.log_probability:.4f} (natural logarithm)")
    show(f"perplexity  {score.perplexity:,.2f}")


def label(sampling: Sampling, index: int) -> str:
    of = f", answer {index + 1} of {sampling.num_return_sequences}" if sampling.num_return_sequences > 1 else ""
    return f"--- seed {sampling.seed}{of}"


def json_lines(
    args: argparse.Namespace, output: Generation, seed: int, scored: Sequence[Sequence[ScoredToken]]
) -> list[str]:
    """A JSON object for each answer; with what else could have come at each place, if that was asked for."""
    lines = []
    answers = zip(output.texts, output.responses, output.ids, output.finish_reasons, scored, strict=True)
    for text, response, ids, finish_reason, tokens in answers:
        fields = {
            "prompt": args.prompt,
            **({"input": args.input_text} if args.input_text else {}),
            "text": text,
            "response": response,
            "tokens": len(ids),
            "seconds": round(output.seconds, 3),
            "finish_reason": finish_reason,
            "seed": seed,
            **({"top_candidates": [token.as_dict() for token in tokens]} if args.top_candidates else {}),
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
    check_records(args.records, not takes_instructions(tokenizer), args.prompts_file)
    kept = 0

    def keep(n_answers: int) -> None:
        nonlocal kept
        kept = n_answers

    start = time.perf_counter()
    try:
        answered = answer_file(
            model,
            tokenizer,
            args.records,
            args.output_file,
            args.batch_size,
            sampling_of(args, args.seed),
            parse_special_tokens=args.parse_special_tokens,
            processes=args.processes,
            on_kept=keep,
        )
    except BaseException:  # Ctrl-C and SIGTERM too
        if kept:
            of, place = count(len(args.records), "record"), journal_path(args.output_file)
            show(f"\n{kept} of {of} answered and kept in {place}: the same command goes on from there", file=sys.stderr)
        raise
    seconds = time.perf_counter() - start
    note(f"written     {args.output_file} ({count(len(args.records), 'record')}, {answered} of them answered now)")
    note(f"\n{count(answered, 'record')} in {seconds:.2f} s, {answered / seconds:.1f} records/s")


def count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
