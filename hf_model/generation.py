"""Text from a prompt, on the stock `model.generate`: what `generate.py` does between its arguments and its output."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from hf_model.errors import UserError, memory_for
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM


@dataclass(frozen=True)
class Sampling:
    """How to sample; the defaults are the original script's."""

    max_new_tokens: int = 150
    temperature: float = 0.8
    """0 means greedy decoding."""
    top_k: int = 50
    """0 means all tokens."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    seed: int = 1337

    def kwargs(self) -> dict[str, Any]:
        """Arguments of `model.generate`."""
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if self.temperature > 0:
            how = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {
            **how,
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "num_return_sequences": self.num_return_sequences,
        }


class TokenStream(BaseStreamer):
    """Gathers the tokens of a generation as they come, and gives each new piece of text to a function.

    The pieces of a single sequence add up to its text in `Generation`. (The library's `TextStreamer` decodes everything
    anew for each token, which is slow in long texts.) Of several sequences, the tokens are only kept.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], None], prompt_text: bool):
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.prompt_text = prompt_text
        """Whether the prompt and special tokens belong to the text."""
        self.awaits_prompt = True
        self.ids: list[int] = []
        """The tokens that the text is made of, as integers: thousands of little tensors would scatter the heap."""
        self.rows: list[list[int]] = []
        """Of several sequences, the new tokens of each."""
        self.decoder = DecodeStream(skip_special_tokens=not prompt_text)
        self.length = 0
        self.has_begun = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, of shape (B, T), and then the token of each step, of shape (B,)."""
        is_prompt, self.awaits_prompt = self.awaits_prompt, False
        if value.shape[0] > 1 and is_prompt:
            self.rows = [[] for _ in value]
        elif value.shape[0] > 1:
            for row, token_id in zip(self.rows, value.tolist(), strict=True):
                row.append(token_id)
        elif self.prompt_text or not is_prompt:
            for token_id in value.flatten().tolist():
                self.ids.append(token_id)
                self._emit(self.decoder.step(self.tokenizer.backend_tokenizer, token_id) or "")

    def end(self) -> None:
        """Give what the decoder still holds: bytes that never became a character."""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=not self.prompt_text)
        self._emit(text[self.length :])

    def _emit(self, piece: str) -> None:
        # The space between "Response:" and the response belongs to the format.
        shown = piece if self.prompt_text or self.has_begun else piece.lstrip()
        self.length += len(piece)
        self.has_begun = self.has_begun or bool(shown)
        if shown:
            self.on_text(shown)


class OnlyNumbers(LogitsProcessor):
    """Stops a generation whose logits are NaN or infinite, which would otherwise go on with arbitrary tokens."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # Tokens that may not be sampled stand at minus infinity.
        if not scores.amax(dim=-1).isfinite().all():
            raise UserError(
                "the model's logits are NaN or infinite: its weights hold such values, they overflow in this --dtype, "
                "or --temperature or --repetition_penalty is too near to 0"
            )
        return scores


@dataclass(frozen=True)
class Generation:
    """What came out of one call."""

    texts: list[str]
    """Each sequence with its prompt and special tokens, or the bare response."""
    new_tokens: int
    """Over all sequences, [EOS] included."""
    seconds: float
    ids: list[list[int]]
    """The tokens of each response, [EOS] included."""


def encode(tokenizer: PreTrainedTokenizerFast, content: str, parse_special_tokens: bool = False) -> torch.Tensor:
    """Token ids of shape (1, T): `[BOS]` and the content.

    `parse_special_tokens` says whether "[EOS]" typed by a user is the special token (as in the original) or text.
    """
    # A command line's bytes that are no UTF-8 arrive as unpaired surrogates, which no tokenizer takes.
    content = content.encode("utf-8", "replace").decode("utf-8")
    return tokenizer(content, return_tensors="pt", split_special_tokens=not parse_special_tokens).input_ids


DRAWING = threading.RLock()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Threads take turns: torch has one random generator for all of them, and each must draw what it would alone."""
    with DRAWING:
        torch.manual_seed(seed)
        yield


@contextmanager
def _no_distribution() -> Iterator[None]:
    """Turn torch's refusal to draw from probabilities that are not numbers into the user's error."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError("no token can be drawn: --temperature or --repetition_penalty is too near to 0") from None


@memory_for("to generate")
@_no_distribution()
def generate(
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    input_ids: torch.Tensor,
    sampling: Sampling,
    *,
    response_only: bool = False,
    on_text: Callable[[str], None] = lambda piece: None,
) -> Generation:
    """Continue a prompt with the stock `model.generate`.

    Args:
        input_ids: the prompt, of shape (1, T).
        response_only: leave the prompt and special tokens out of the texts.
        on_text: called with each piece of text as it comes, where there is one sequence; of several, after an
            interrupt, with the lines that they have come to.

    Raises:
        UserError: the model's logits are NaN or infinite, or the sampling options make them so.
        KeyboardInterrupt: passed on, after `on_text` has had everything there is.
    """
    stream = TokenStream(tokenizer, on_text, prompt_text=not response_only)
    input_ids = input_ids.to(model.device)
    prompt = input_ids[0].tolist()

    def text(ids: list[int]) -> str:
        if response_only:
            return tokenizer.decode(ids, skip_special_tokens=True).lstrip()
        return tokenizer.decode(prompt + ids)

    try:
        with _seeded(sampling.seed):
            start = time.perf_counter()
            sequences = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                streamer=stream,
                logits_processor=LogitsProcessorList([OnlyNumbers()]),
                **sampling.kwargs(),
            )  # (num_return_sequences, T + new)
            seconds = time.perf_counter() - start
    except KeyboardInterrupt:
        stream.end()
        on_text("\n".join(text(_up_to(tokenizer.eos_token_id, row)) for row in stream.rows))
        raise
    responses = [_up_to(tokenizer.eos_token_id, row) for row in sequences[:, len(prompt) :].tolist()]
    return Generation([text(ids) for ids in responses], sum(map(len, responses)), seconds, responses)


@memory_for("to generate")
@_no_distribution()
def continue_prompts(
    model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[torch.Tensor], sampling: Sampling
) -> list[str]:
    """The bare responses to several prompts, each of shape (1, T), in one left-padded batch.

    Raises:
        UserError: the model's logits are NaN or infinite.
    """
    batch = tokenizer.pad({"input_ids": [prompt[0].tolist() for prompt in prompts]}, return_tensors="pt")
    with _seeded(sampling.seed):
        sequences = model.generate(
            **batch.to(model.device), logits_processor=LogitsProcessorList([OnlyNumbers()]), **sampling.kwargs()
        )  # (B, T + new)
    responses = sequences[:, batch.input_ids.shape[1] :].tolist()
    return [
        tokenizer.decode(_up_to(tokenizer.eos_token_id, ids), skip_special_tokens=True).lstrip() for ids in responses
    ]


def _up_to(eos_token_id: int, ids: list[int]) -> list[int]:
    """The ids up to and including the first [EOS]; a sequence that ends before its neighbours is padded after it."""
    return ids[: ids.index(eos_token_id) + 1] if eos_token_id in ids else ids
