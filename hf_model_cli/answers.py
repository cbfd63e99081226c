"""Print answers to a prompt, as text or JSON; how likely a text is; and answer a file of prompts."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from hf_model import scoring
from hf_model.batch import answer_file
from hf_model.errors import UserError, one_line
from hf_model.generation import LONG_TEXT, Generation, Sampling, encode_end, generate
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.processes import Processes
from hf_model.records import Record, check_records, journal_path
from hf_model.scoring import ScoredToken
from hf_model.tokenizer import Message, prompt_format, prompt_text, takes_instructions
from hf_model_cli.options import SAMPLING
from hf_model_cli.run import is_terminal, show

MANY_REPEATS = 16  # of one token, at the end of an answer
A_MINUTE = 60.0  # seconds between two lines about a batch run


@dataclass(frozen=True)
class Question:
    prompt: str
    input_text: str
    content: str
    """The text that is encoded: an instruction in its format, or raw text as it is."""
    input_ids: torch.Tensor
    """(1, T)"""
    is_whole: bool
    """Whether these are the tokens of the whole text, not only of the end of a very long one."""


class Answers:
    """Answers questions with one model, in the form that the command line's arguments ask for."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: CustomGPTForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        note: Callable[[str], None],
    ):
        """`note` prints a line beside the answers, where and if the arguments want it."""
        self.args, self.model, self.tokenizer, self.note = args, model, tokenizer, note
        self.takes_instructions = takes_instructions(tokenizer)
        self.format = prompt_format(tokenizer)
        self.sampling = Sampling(
            **{name: getattr(args, name) for name in SAMPLING},
            num_return_sequences=args.num_return_sequences,
            stop=tuple(args.stop),
            cache_implementation=args.cache_implementation,
            seed=args.seed[0],
            seed_like_original=args.seed_like_original,
        )

    def question(self, prompt: str, input_text: str, turns: Sequence[Message] = ()) -> Question:
        """Encode a prompt, after the messages before it.

        Raises:
            UserError: an instruction is blank, the model does not know a character, or the chat template refuses it.
        """
        if self.takes_instructions and not prompt.strip():
            raise UserError("must not be empty")
        content = prompt_text(self.tokenizer, prompt, input_text, turns)
        input_ids, is_whole = self._encoded(prompt, input_text, turns)
        question = Question(prompt, input_text, content, input_ids, is_whole)
        if (n_tokens := input_ids.shape[1]) > (n_seen := self._seen(question)):
            length = f"{n_tokens:,} tokens" if is_whole else f"{len(content):,} characters"
            unit = "of them" if is_whole else "tokens of it"
            self.warn(f"the prompt is {length} long; the model sees the last {n_seen:,} {unit}")
        return question

    def length(self, prompt: str, input_text: str, turns: Sequence[Message]) -> int:
        """The number of tokens of a prompt and the messages before it; of a very long text, of its end.

        Raises:
            UserError: as `question`.
        """
        return self._encoded(prompt, input_text, turns)[0].shape[1]

    def _encoded(self, prompt: str, input_text: str, turns: Sequence[Message]) -> tuple[torch.Tensor, bool]:
        parses, context = self.args.parse_special_tokens, self.model.config.block_size
        return encode_end(self.tokenizer, prompt, input_text, parses, block_size=context, turns=turns)

    def _seen(self, question: Question) -> int:
        """How many tokens of a prompt the model sees."""
        return min(question.input_ids.shape[1], self.model.config.block_size)

    def warn(self, line: str) -> None:
        """Print a line about something unusual on standard error."""
        if not self.args.quiet:
            show(f"note: {line}", file=sys.stderr)

    def warn_of_unknown_tokens(self) -> None:
        known, size = len(self.tokenizer), self.model.config.vocab_size
        if known < size / 2:
            self.warn(
                f"the tokenizer has {known:,} tokens and the model {size:,}: it is probably not the tokenizer of the "
                "training; convert_checkpoint.py --inspect shows more"
            )

    def _warn_of_repeats(self, output: Generation) -> None:
        for ids in output.ids:
            if len(ids) >= MANY_REPEATS and len(set(ids[-MANY_REPEATS:])) == 1:
                self.warn(
                    f"the answer repeats the token {self.tokenizer.decode(ids[-1:])!r} to its end: perhaps the "
                    "training did not shift the labels; convert_checkpoint.py --inspect tells"
                )
                return

    def answer(self, question: Question) -> None:
        """Print the answers of all seeds, with the speed."""
        self.note(f"content     {visible(question.content)}\n")
        tokens, seconds = 0, 0.0
        for seed in self.args.seed:
            output = self.answer_once(question, replace(self.sampling, seed=seed), self.args.response_only)
            tokens, seconds = tokens + output.new_tokens, seconds + output.seconds
        self.note(f"\n{count(tokens, 'token')} in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s")

    def answer_once(self, question: Question, sampling: Sampling, response_only: bool) -> Generation:
        """Print the answers of one seed."""
        if self.args.json:
            output = generate(self.model, self.tokenizer, question.input_ids, sampling)
            for fields in self._objects(question, sampling, output):
                show(json_line(fields))
            self._warn_of_repeats(output)
            return output
        output = self._print_text(question, sampling, response_only)
        self._warn_of_repeats(output)
        for ids in output.ids if self.args.top_candidates else []:
            self.note(f"\n{token_table(self._scored(question, ids))}")
        return output

    def _print_text(self, question: Question, sampling: Sampling, response_only: bool) -> Generation:
        """Print one answer while it is generated, or several when they are complete, each under its label."""
        streams = sampling.num_return_sequences == sampling.num_beams == 1 and not self.args.no_stream
        n_answers = len(self.args.seed) * sampling.num_return_sequences
        is_labelled = n_answers > 1 and not response_only and not self.args.quiet
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            if streams:
                show(piece, end="")

        if is_labelled and streams:
            show(label(sampling, 0))
        try:
            output = generate(
                self.model, self.tokenizer, question.input_ids, sampling, response_only=response_only, on_text=take
            )
        except KeyboardInterrupt:
            show("" if streams else "".join(pieces))
            raise
        if streams:
            show("")
        else:
            for index, text in enumerate(output.texts):
                show(f"{label(sampling, index)}\n{text}" if is_labelled else text)
        return output

    def _objects(self, question: Question, sampling: Sampling, output: Generation) -> list[dict[str, Any]]:
        """The JSON object of each answer."""
        return [
            {
                "prompt": question.prompt,
                **({"input": question.input_text} if question.input_text else {}),
                "prompt_tokens": question.input_ids.shape[1] if question.is_whole else None,
                "prompt_tokens_seen": self._seen(question),
                "text": text,
                "response": response,
                "tokens": len(ids),
                "seconds": round(output.seconds, 3),
                "finish_reason": finish_reason,
                "seed": sampling.seed,
                **(
                    {"top_candidates": [token.as_dict() for token in self._scored(question, ids)]}
                    if self.args.top_candidates
                    else {}
                ),
            }
            for text, response, ids, finish_reason in zip(
                output.texts, output.responses, output.ids, output.finish_reasons, strict=True
            )
        ]

    def _scored(self, question: Question, response: list[int]) -> list[ScoredToken]:
        """The tokens of a response, with the likeliest ones at each place, before --temperature and its like."""
        prompt = question.input_ids[0].tolist()
        return scoring.score(self.model, self.tokenizer, prompt + response, len(prompt), self.args.top_candidates)

    def score(self, text: str) -> None:
        """Print how likely a text is, as the answer to the prompt if there is one."""
        args = self.args
        if args.prompt is not None and self.length(args.prompt, args.input_text, ()) > self.model.config.block_size:
            self.warn("the prompt is longer than the context: each token is scored by what fits before it")
        score = scoring.score_text(
            self.model,
            self.tokenizer,
            text,
            prompt=args.prompt,
            input_text=args.input_text,
            parse_special_tokens=args.parse_special_tokens,
            n_candidates=args.top_candidates,
        )
        if args.json:
            show(json.dumps(score.as_dict(), indent=2, allow_nan=False))
            return
        if score.content is not None:
            self.note(f"content     {visible(score.content)}")
        if args.top_candidates:
            show(f"\n{token_table(score.tokens)}\n")
        show(f"tokens      {len(score.tokens)}")
        show(f"log-prob.   {score.log_probability:.4f} (natural logarithm)")
        show(f"perplexity  {score.perplexity:,.2f}")

    def answer_records(self, records: list[Record], processes: Processes) -> None:
        """Answer a file of records. If the run ends early, say how many answers are kept."""
        args = self.args
        check_records(records, not self.takes_instructions, args.prompts_file)
        kept, said, has_bar = 0, time.monotonic(), is_terminal(sys.stderr)

        def keep(n_answers: int) -> None:
            nonlocal kept, said
            kept = n_answers
            if not (has_bar or args.quiet) and time.monotonic() - said >= A_MINUTE:
                show(f"{kept} of {count(len(records), 'record')} answered", file=sys.stderr)
                said = time.monotonic()

        start = time.perf_counter()
        try:
            answered = answer_file(
                self.model,
                self.tokenizer,
                records,
                args.output_file,
                args.batch_size,
                self.sampling,
                parse_special_tokens=args.parse_special_tokens,
                processes=processes,
                overwrite=args.overwrite,
                on_kept=keep,
                warn=self.warn,
            )
        except BaseException:  # Ctrl-C and SIGTERM too
            if kept:
                of, place = count(len(records), "record"), journal_path(args.output_file)
                line = f"\n{kept} of {of} answered and kept in {place}: the same command goes on from there"
                show(line, file=sys.stderr)
            raise
        seconds = time.perf_counter() - start
        self.note(f"written     {args.output_file} ({count(len(records), 'record')}, {answered} of them answered now)")
        self.note(f"\n{count(answered, 'record')} in {seconds:.2f} s, {answered / seconds:.1f} records/s")


def visible(content: str) -> str:
    """A prompt as it is; quoted if it begins or ends with spaces or newlines; shortened if it is very long."""
    if len(content) > LONG_TEXT:
        return one_line(content)
    return content if content == content.strip() else repr(content)


def token_table(tokens: Sequence[ScoredToken]) -> str:
    """A line for each token: its probability, its text, and the likeliest tokens at its place."""
    width = max(len(repr(token.text)) for token in tokens)
    return "\n".join(
        f"{math.exp(token.log_probability):8.2%}  {token.text!r:<{width}}"
        + "".join(f"  {text!r} {math.exp(p):.2%}" for text, p in token.candidates)
        for token in tokens
    )


def json_line(fields: dict[str, Any]) -> str:
    """One line of JSON. Escapes stand for all characters beyond ASCII if standard output cannot hold them."""
    line = json.dumps(fields, ensure_ascii=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # another encoding, or an unpaired surrogate, which stands for a byte that is not UTF-8
        return json.dumps(fields)
    return line


def label(sampling: Sampling, index: int) -> str:
    of = f", answer {index + 1} of {sampling.num_return_sequences}" if sampling.num_return_sequences > 1 else ""
    return f"--- seed {sampling.seed}{of}"


def count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
