"""Generate text from a prompt with transformers' own `model.generate`."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError, memory_for, one_line
from hf_model.folder import CONVERTED_FROM
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import (
    Message,
    check_characters,
    end_ids,
    end_text,
    is_of_characters,
    prompt_format,
    takes_instructions,
    user_message,
)
from hf_model.tokenizer.prompt import beginning_apart, parts

# A text that is longer than both is encoded from its end only: 30 MB of text take a minute and 6 GB of memory.
LONG_TEXT = 2**18  # characters
LONG_TOKENS = 64  # characters for each token of the context


@dataclass(frozen=True)
class Sampling:
    """How to sample. The defaults are those of the original script."""

    max_new_tokens: int = 150
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 50  # sample from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens whose probabilities add up to this
    min_p: float = 0.0  # leave out tokens less likely than this share of the likeliest one
    repetition_penalty: float = 1.0
    num_beams: int = 1  # 1: no beam search
    num_return_sequences: int = 1
    stop: tuple[str, ...] = ()  # texts that end an answer; they are not part of it
    cache_implementation: str | None = None  # "static": on a GPU, transformers compiles the step
    seed: int = 1337
    seed_like_original: bool = False  # seed before building the model, as the trainers' scripts do

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        texts = not isinstance(self.stop, str) and all(isinstance(text, str) and text for text in self.stop)
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "at least 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "num_return_sequences": (self.num_return_sequences >= 1, "at least 1"),
            "stop": (texts, "a tuple of texts that are not empty"),
        }
        for name, (is_right, limit) in limits.items():
            if not is_right:
                raise UserError(f"{name}={getattr(self, name)!r} must be {limit}")

    def kwargs(self) -> dict[str, Any]:
        """Arguments of `model.generate`."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "num_return_sequences": self.num_return_sequences,
            "do_sample": self.temperature > 0,
            "temperature": None,
            "top_k": None,
            "top_p": None,
        }
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        if self.temperature > 0 and self.min_p > 0:
            options["min_p"] = self.min_p
        if self.num_beams > 1:
            options["num_beams"] = self.num_beams
        if self.cache_implementation is not None:
            options["cache_implementation"] = self.cache_implementation
        return options

    def cut(self, response: str) -> tuple[str, bool]:
        """The response up to the first stop text, and whether there is one."""
        ends = [response.index(stop) for stop in self.stop if stop in response]
        return (response[: min(ends)], True) if ends else (response, False)

    def held_back(self, response: str) -> int:
        """The number of characters at the response's end that may be the beginning of a stop text."""
        return max(
            (n for stop in self.stop for n in range(1, len(stop)) if response.endswith(stop[:n])),
            default=0,
        )


def encode(
    tokenizer: PreTrainedTokenizerFast,
    content: str,
    parse_special_tokens: bool = False,
    *,
    add_special_tokens: bool = True,
) -> torch.Tensor:
    """The token ids of a text, of shape (1, T).

    Args:
        parse_special_tokens: read "[EOS]" in the text as the special token, as the original does. Raw text is always
            read so, as in nanoGPT.
        add_special_tokens: put `[BOS]` in front if the tokenizer has it.

    Raises:
        UserError: the tokenizer does not know a character or a word, and has no token for the unknown.
    """
    # Bytes of a command line that are not UTF-8 arrive as unpaired surrogates. Tokenizers take no surrogates.
    content = content.encode("utf-8", "replace").decode("utf-8")
    if is_of_characters(tokenizer):
        check_characters(tokenizer, content)
    parses = parse_special_tokens or not takes_instructions(tokenizer)
    how = {"split_special_tokens": not parses, "add_special_tokens": add_special_tokens}
    try:
        return tokenizer(content, return_tensors="pt", verbose=False, **how).input_ids
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise UserError(f"the tokenizer cannot encode the text ({one_line(error, 200)})") from None


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    input_text: str = "",
    parse_special_tokens: bool = False,
    *,
    turns: Sequence[Message] = (),
) -> torch.Tensor:
    """The token ids of a prompt as the tokenizer's chat template writes it, or of raw text; of shape (1, T).

    Args:
        parse_special_tokens: read "[EOS]" in an instruction as the special token.
        turns: the messages before it, if the format has turns.

    Raises:
        UserError: as `encode`, or the chat template refuses the prompt.
    """
    if not takes_instructions(tokenizer):
        return encode(tokenizer, prompt)
    messages = [*turns, user_message(prompt, input_text)]
    return _encode_parts(tokenizer, parts(tokenizer, messages, parse_special_tokens))


def encode_example(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """The token ids of a text to train on, as `tokenizer.example_texts` writes it, of shape (1, T).

    Raises:
        UserError: as `encode`.
    """
    return _encode_parts(tokenizer, beginning_apart(tokenizer, text))


def encode_end(
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    input_text: str = "",
    parse_special_tokens: bool = False,
    *,
    block_size: int,
    turns: Sequence[Message] = (),
) -> tuple[torch.Tensor, bool]:
    """The token ids of a prompt as `encode_prompt` gives them, and whether they are those of the whole text.

    A model with the context `block_size` sees the last tokens only. Of a very long text, only the end is encoded; it is
    long enough to give the same last tokens.

    Raises:
        UserError: as `encode_prompt`.
    """
    pieces = [(prompt, True)]
    if takes_instructions(tokenizer):
        pieces = list(parts(tokenizer, [*turns, user_message(prompt, input_text)], parse_special_tokens))
    length = max(LONG_TEXT, LONG_TOKENS * block_size)
    while length < sum(len(text) for text, _ in pieces):
        input_ids = _encode_parts(tokenizer, _last_characters(pieces, length))
        if input_ids.shape[1] > 2 * block_size:  # the cut can change the tokens near it, but not half of them
            return input_ids, False
        length *= 4
    return encode_prompt(tokenizer, prompt, input_text, parse_special_tokens, turns=turns), True


def _last_characters(pieces: Sequence[tuple[str, bool]], length: int) -> list[tuple[str, bool]]:
    kept: list[tuple[str, bool]] = []
    for text, parses in reversed(pieces):
        if length > 0:
            kept.insert(0, (text[-length:], parses))
            length -= len(text)
    return kept


def _encode_parts(tokenizer: PreTrainedTokenizerFast, parts: Iterable[tuple[str, bool]]) -> torch.Tensor:
    ids = [encode(tokenizer, text, parses, add_special_tokens=False) for text, parses in parts if text]
    return torch.cat(ids, dim=1).long()  # without tokens, the library gives floats


@dataclass(frozen=True)
class Generation:
    """The answers of one call. Each list has an entry for each sequence."""

    texts: list[str]
    """With the prompt and special tokens; with `response_only`, the responses."""
    responses: list[str]
    ids: list[list[int]]
    """The tokens of each response, with the end token."""
    finish_reasons: list[str]
    """`"stop"` at the end token or a stop text, `"length"` after `max_new_tokens`."""
    seconds: float

    @property
    def new_tokens(self) -> int:
        return sum(map(len, self.ids))


# What `model.generate` calls at each step


class StopTexts(StoppingCriteria):
    """Ends a sequence whose new text contains a stop text.

    transformers' own criterion reads the prompt too, and fails with a character-level tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...], start: int):
        """`start` is the length of the prompt, in tokens."""
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        # The last tokens that can hold a stop text: a token has at least one byte. 4 more for a
        # first character that may be cut.
        self.tail = max(len(text.encode("utf-8", "surrogatepass")) for text in stop) + 4

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        new = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :]  # (B, N)
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=input_ids.device)


class OnlyNumbers(LogitsProcessor):
    """Raises UserError for logits that are NaN or infinite. Without it, the tokens would be arbitrary."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not scores.amax(dim=-1).isfinite().all():  # tokens that may not be sampled are at minus infinity
            raise UserError(
                "the model's logits are NaN or infinite: its weights hold such values, they overflow in this --dtype, "
                "or --temperature or --repetition_penalty is too near to 0"
            )
        return scores


class ResponseStream:
    """Passes on the text of a response while it grows, up to the first stop text."""

    def __init__(self, on_text: Callable[[str], None], sampling: Sampling, strips: bool = False):
        """`strips`: leave out the space at the beginning."""
        self.on_text, self.sampling, self.strips = on_text, sampling, strips
        self.response = ""
        self.n_shown = 0

    def add(self, piece: str, is_last: bool = False) -> None:
        self.response += piece
        if self.strips:
            self.response = self.response.lstrip()
        text, has_ended = self.sampling.cut(self.response)
        if not has_ended and not is_last:
            text = text[: len(text) - self.sampling.held_back(text)]
        if len(text) > self.n_shown:
            self.on_text(text[self.n_shown :])
            self.n_shown = len(text)


class TokenStream(BaseStreamer):
    """Takes tokens while they are generated. Passes on the text of a single sequence; keeps the tokens of several.

    transformers' own TextStreamer decodes a long text again for each token, and knows no stop texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        on_text: Callable[[str], None],
        prompt_text: bool,
        sampling: Sampling = Sampling(),
    ):
        """`prompt_text`: the text begins with the prompt and has special tokens."""
        self.tokenizer, self.on_text, self.prompt_text = tokenizer, on_text, prompt_text
        strips = not prompt_text and begins_with_space(tokenizer)
        self.response = ResponseStream(on_text, sampling, strips)
        self.hidden = set() if prompt_text else set(end_ids(tokenizer))
        self.decoder = DecodeStream(skip_special_tokens=not prompt_text)
        self.awaits_prompt = True
        self.ids: list[int] = []  # of a single sequence: the tokens of its text
        self.n_decoded = 0  # characters
        self.rows: list[list[int]] = []  # of several sequences: the new tokens of each

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, of shape (B, T), and then the tokens of each step, of shape (B,)."""
        is_prompt, self.awaits_prompt = self.awaits_prompt, False
        if value.shape[0] > 1 and is_prompt:
            self.rows = [[] for _ in value]
        elif value.shape[0] > 1:
            for row, token_id in zip(self.rows, value.tolist(), strict=True):
                row.append(token_id)
        elif self.prompt_text or not is_prompt:
            for token_id in value.flatten().tolist():
                if token_id in self.hidden:
                    continue
                self.ids.append(token_id)
                piece = self.decoder.step(self.tokenizer.backend_tokenizer, token_id) or ""
                self.n_decoded += len(piece)
                if not is_prompt:
                    self.response.add(piece)
                elif piece:
                    self.on_text(piece)

    def end(self) -> None:
        """Pass on what is left: bytes that are not a whole character, and the beginning of a stop text."""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=not self.prompt_text)
        self.response.add(text[self.n_decoded :], is_last=True)


# Generation


@memory_for("to generate")
def generate(
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    input_ids: torch.Tensor,
    sampling: Sampling,
    *,
    response_only: bool = False,
    on_text: Callable[[str], None] = lambda piece: None,
) -> Generation:
    """Continue a prompt. The random generator of the process is seeded anew.

    Args:
        model, tokenizer: as `load` gives them.
        input_ids: the prompt, token ids of shape (1, T), in int64, on any device; `encode` makes them.
        sampling: how to sample, and how long.
        response_only: leave the prompt and special tokens out of the texts.
        on_text: called with each piece of the text of a single sequence. After an interrupt of several sequences, it is
            called once, with a line for each.

    Raises:
        UserError: the model's logits are NaN or infinite, or the sampling options make them so.
        KeyboardInterrupt: passed on, after `on_text` was called with all the text there is.
    """
    sampling = _with_end(tokenizer, sampling)
    stream = TokenStream(tokenizer, on_text, prompt_text=not response_only, sampling=sampling)
    input_ids = input_ids.to(model.device)
    prompt = input_ids[0].tolist()

    def response(ids: list[int]) -> str:
        return sampling.cut(bare_response(tokenizer, ids))[0]

    def text(ids: list[int]) -> str:
        if response_only:
            return response(ids)
        whole, start = str(tokenizer.decode(prompt + ids)), len(tokenizer.decode(prompt))
        return whole[:start] + sampling.cut(whole[start:])[0]

    streamer = stream if sampling.num_beams == 1 else None  # only the end shows which beam is the answer
    try:
        new, seconds = _generate(model, tokenizer, input_ids, torch.ones_like(input_ids), sampling, streamer)
    except KeyboardInterrupt:
        stream.end()
        if stream.rows:
            on_text("\n".join(text(_ended(model, tokenizer, row, sampling)[0]) for row in stream.rows))
        raise
    ended = [_ended(model, tokenizer, row, sampling) for row in new]
    return Generation(
        texts=[text(ids) for ids, _ in ended],
        responses=[response(ids) for ids, _ in ended],
        ids=[ids for ids, _ in ended],
        finish_reasons=["stop" if has_ended else "length" for _, has_ended in ended],
        seconds=seconds,
    )


def continue_prompts(
    model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[torch.Tensor], sampling: Sampling
) -> list[str]:
    """The bare responses to several prompts, each of shape (1, T), in one left-padded batch.

    Raises:
        UserError: as `generate`.
    """
    sampling = _with_end(tokenizer, sampling)
    width = max(prompt.shape[1] for prompt in prompts)
    input_ids = torch.empty(len(prompts), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        # The model does not see the padding, but before transformers 5.23 the repetition penalty does. A row's first
        # token as its padding changes nothing: a token is penalised once.
        input_ids[row] = prompt[0, 0]
        input_ids[row, width - prompt.shape[1] :] = prompt[0]
        attention_mask[row, width - prompt.shape[1] :] = 1
    new, _ = _generate(model, tokenizer, input_ids.to(model.device), attention_mask.to(model.device), sampling)
    return [sampling.cut(bare_response(tokenizer, _ended(model, tokenizer, row, sampling)[0]))[0] for row in new]


def _generate(
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    sampling: Sampling,
    streamer: TokenStream | None = None,
) -> tuple[list[list[int]], float]:
    """The new tokens of each sequence, padded, for prompts of shape (B, T); and the seconds that they took."""
    start = input_ids.shape[1]
    stopping = [StopTexts(tokenizer, sampling.stop, start)] if sampling.stop else []
    with _seeded(sampling, model), _drawing_errors():
        began = time.perf_counter()
        sequences = model.generate(
            input_ids,
            attention_mask=attention_mask,
            streamer=streamer,
            logits_processor=LogitsProcessorList([OnlyNumbers()]),
            stopping_criteria=StoppingCriteriaList(stopping),
            **sampling.kwargs(),
        )  # (B * num_return_sequences, T + new)
        seconds = time.perf_counter() - began
    return sequences[:, start:].tolist(), seconds


def _with_end(tokenizer: PreTrainedTokenizerFast, sampling: Sampling) -> Sampling:
    """The sampling that also stops at the text that the chat template puts behind an answer in place of a token."""
    end = end_text(tokenizer)
    return replace(sampling, stop=(*sampling.stop, end)) if end else sampling


def begins_with_space(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the prompt's format puts a space in front of the answer, as after "Response:"."""
    return prompt_format(tokenizer).before_answer.isspace()


def bare_response(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of new tokens, without the end token and the space that the prompt's format puts around the answer."""
    ends = end_ids(tokenizer)
    text = tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=True)
    return text.lstrip() if begins_with_space(tokenizer) else text


def _ended(
    model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int], sampling: Sampling
) -> tuple[list[int], bool]:
    """The tokens up to an end token or the first stop text, and whether there is one of these.

    A sequence that ends before the others of its batch is padded; without a padding token, transformers pads with -1.
    """
    ids = [token for token in ids if token >= 0]
    own = model.generation_config.eos_token_id
    ends = {*end_ids(tokenizer), *(own if isinstance(own, list) else [own])}
    end = next((n for n, token in enumerate(ids, start=1) if token in ends), None)
    ids, has_ended = ids[:end], end is not None

    def has_stop(n: int) -> bool:
        return sampling.cut(tokenizer.decode(ids[:n], skip_special_tokens=True))[1]

    if sampling.stop and has_stop(len(ids)):
        return ids[: next(n for n in range(1, len(ids) + 1) if has_stop(n))], True
    return ids, has_ended


@contextmanager
def _drawing_errors() -> Iterator[None]:
    """Turn torch's errors about drawing a token into errors that name our options."""
    try:
        yield
    except RuntimeError as error:
        if "n_sample" in str(error):
            raise UserError("--num_beams is larger than the number of tokens in the vocabulary") from None
        if "probability tensor" not in str(error):
            raise
        raise UserError("no token can be drawn: --temperature or --repetition_penalty is too near to 0") from None


# The random generator

# torch has one random generator for all threads. Threads take turns, so that each draws the numbers that it
# would draw alone.
DRAWING = threading.RLock()


def _draw_in_a_child() -> None:
    """Give the child of a fork a lock of its own: a thread that holds the parent's lock does not exist there."""
    global DRAWING
    DRAWING = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_draw_in_a_child)


@contextmanager
def _seeded(sampling: Sampling, model: CustomGPTForCausalLM) -> Iterator[None]:
    with DRAWING:
        torch.manual_seed(sampling.seed)
        if sampling.seed_like_original:
            config = model.config
            trainer = getattr(config, CONVERTED_FROM, None)
            if trainer or config.n_inner or config.head_bias:
                raise UserError(
                    f"--seed_like_original: the random numbers that {trainer or 'this fork of nanoGPT'} draws are not "
                    "known; leave the option out"
                )
            replay_initialisation(config)
        yield


def replay_initialisation(config: CustomGPTConfig) -> None:
    """Draw from the CPU's generator what building the trainer's model draws: the same kinds, sizes and order."""
    C, V, T = config.n_embd, config.vocab_size, config.block_size
    layer = ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))  # c_attn, c_proj, c_fc, c_proj
    linear = [*layer * config.n_layer, (V, C)]
    for shape in ((V, C), (T, C)):  # nn.Embedding and nn.Linear draw values that the trainer overwrites
        torch.empty(shape).normal_()
    for index, shape in enumerate(linear):
        torch.empty(shape).uniform_()
        if config.bias and index < len(linear) - 1:  # the head never has a bias
            torch.empty(shape[0]).uniform_()
    for shape in ((V, C), (T, C), *linear, *((C, C), (C, 4 * C)) * config.n_layer):  # then each c_proj once more
        torch.empty(shape).normal_()
