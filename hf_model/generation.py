"""Text from a prompt, on the stock `model.generate`: what `generate.py` does between its arguments and its output."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from hf_model.errors import UserError, memory_for
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import check_characters, is_of_characters, takes_instructions


@dataclass(frozen=True)
class Sampling:
    """How to sample; the defaults are the original script's."""

    max_new_tokens: int = 150
    temperature: float = 0.8
    """0 means greedy decoding."""
    top_k: int = 50
    """0 means all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one are left out; 0 leaves none out."""
    repetition_penalty: float = 1.0
    num_beams: int = 1
    """1 means no beam search."""
    num_return_sequences: int = 1
    stop: tuple[str, ...] = ()
    """Strings that end an answer; they are no part of it."""
    cache_implementation: str | None = None
    """The library's name of another cache: with "static" it compiles the step where that is on a GPU."""
    seed: int = 1337
    seed_like_original: bool = False
    """Whether the generator is left as the trainers' scripts leave it, which seed before they build the model."""

    def __post_init__(self) -> None:
        """Raises UserError for a value that means nothing."""
        right = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": 0 <= self.temperature < math.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "num_beams": self.num_beams >= 1,
            "num_return_sequences": self.num_return_sequences >= 1,
            "stop": not isinstance(self.stop, str) and all(isinstance(text, str) and text for text in self.stop),
        }
        if wrong := [name for name, is_right in right.items() if not is_right]:
            raise UserError(f"{wrong[0]}={getattr(self, wrong[0])!r} means nothing; see help(hf_model.Sampling)")

    def kwargs(self) -> dict[str, Any]:
        """Arguments of `model.generate`."""
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if self.temperature > 0:
            how = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        asked = {
            "min_p": self.min_p if self.temperature > 0 else 0.0,
            "num_beams": self.num_beams if self.num_beams > 1 else None,
            "cache_implementation": self.cache_implementation,
        }
        return {
            **how,
            **{name: value for name, value in asked.items() if value},
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "num_return_sequences": self.num_return_sequences,
        }

    def cut(self, response: str) -> tuple[str, bool]:
        """A response up to the first of the stop strings, and whether there was one."""
        ends = [response.index(stop) for stop in self.stop if stop in response]
        return (response[: min(ends)], True) if ends else (response, False)

    def held_back(self, response: str) -> int:
        """How many characters at a response's end may be the beginning of a stop string."""
        return max(
            (n for stop in self.stop for n in range(1, len(stop)) if response.endswith(stop[:n])),
            default=0,
        )


class StopTexts(StoppingCriteria):
    """Ends a row whose new text holds a stop string.

    The library's own criterion reads the prompt too, and cannot encode its test text with a vocabulary of characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...], start: int):
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        # A token has a byte at least, a character four at most. A command line's bytes may be no characters.
        self.tail = max(len(text.encode("utf-8", "surrogatepass")) for text in stop) + 4

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        new = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :]  # (B, N)
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=input_ids.device)


def stopping(tokenizer: PreTrainedTokenizerFast, sampling: Sampling, start: int) -> StoppingCriteriaList:
    return StoppingCriteriaList([StopTexts(tokenizer, sampling.stop, start)] if sampling.stop else [])


class TokenStream(BaseStreamer):
    """Gathers the tokens of a generation as they come, and gives each new piece of text to a function.

    The pieces of a single sequence add up to its text in `Generation`. (The library's `TextStreamer` decodes everything
    anew for each token, which is slow in long texts.) Of several sequences, the tokens are only kept.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        on_text: Callable[[str], None],
        prompt_text: bool,
        sampling: Sampling = Sampling(),
    ):
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.prompt_text = prompt_text
        """Whether the prompt and special tokens belong to the text."""
        self.sampling = sampling
        self.awaits_prompt = True
        self.ids: list[int] = []
        """The tokens that the text is made of, as integers: thousands of little tensors would scatter the heap."""
        self.rows: list[list[int]] = []
        """Of several sequences, the new tokens of each."""
        self.decoder = DecodeStream(skip_special_tokens=not prompt_text)
        self.length = 0
        self.strips = not prompt_text and takes_instructions(tokenizer)
        """Whether the response begins with a space that belongs to the format: the one behind "Response:"."""
        self.response = ""
        """What has been decoded of the response."""
        self.shown = 0
        """How many characters of it were given on."""

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
                piece = self.decoder.step(self.tokenizer.backend_tokenizer, token_id) or ""
                self.length += len(piece)
                if is_prompt:
                    self._emit(piece)
                else:
                    self._respond(piece)

    def end(self) -> None:
        """Give what is still held back: bytes that never became a character, the beginning of a stop string."""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=not self.prompt_text)
        self._respond(text[self.length :], is_last=True)

    def _respond(self, piece: str, is_last: bool = False) -> None:
        self.response += piece
        if self.strips:
            self.response = self.response.lstrip()
        shown, has_ended = self.sampling.cut(self.response)
        if not has_ended and not is_last:
            shown = shown[: len(shown) - self.sampling.held_back(shown)]
        self._emit(shown[self.shown :])
        self.shown = max(self.shown, len(shown))

    def _emit(self, piece: str) -> None:
        if piece:
            self.on_text(piece)


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
    """What came out of one call; each list has an entry for each sequence."""

    texts: list[str]
    """With the prompt and special tokens, or the bare response."""
    responses: list[str]
    """The bare responses."""
    ids: list[list[int]]
    """The tokens of each response, the end token included."""
    finish_reasons: list[str]
    """`"stop"` at the end token or a stop string, `"length"` after `max_new_tokens`."""
    seconds: float

    @property
    def new_tokens(self) -> int:
        return sum(map(len, self.ids))


def encode(
    tokenizer: PreTrainedTokenizerFast,
    content: str,
    parse_special_tokens: bool = False,
    *,
    add_special_tokens: bool = True,
) -> torch.Tensor:
    """Token ids of shape (1, T): `[BOS]`, where the vocabulary has it and `add_special_tokens` says so; the content.

    `parse_special_tokens` says whether "[EOS]" typed by a user is the special token (as in the original) or text. In
    raw text special tokens are always read as such, as in nanoGPT.

    Raises:
        UserError: a character that a model of characters does not know; the message names it.
    """
    # A command line's bytes that are no UTF-8 arrive as unpaired surrogates, which no tokenizer takes.
    content = content.encode("utf-8", "replace").decode("utf-8")
    if is_of_characters(tokenizer):
        check_characters(tokenizer, content)
    parses = parse_special_tokens or not takes_instructions(tokenizer)
    how = {"split_special_tokens": not parses, "add_special_tokens": add_special_tokens}
    return tokenizer(content, return_tensors="pt", **how).input_ids


DRAWING = threading.RLock()


@contextmanager
def _seeded(sampling: Sampling, model: CustomGPTForCausalLM) -> Iterator[None]:
    """Threads take turns: torch has one random generator for all of them, and each must draw what it would alone."""
    with DRAWING:
        torch.manual_seed(sampling.seed)
        if sampling.seed_like_original:
            replay_initialisation(model.config)
        yield


def replay_initialisation(config: CustomGPTConfig) -> None:
    """Use up the draws of the CPU's generator that building the trainer's model does: same kinds, sizes and order."""
    C, V, T = config.n_embd, config.vocab_size, config.block_size
    layer = ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))  # c_attn, c_proj, c_fc, c_proj
    linear = [*layer * config.n_layer, (V, C)]
    for shape in ((V, C), (T, C)):  # what nn.Embedding and nn.Linear draw, which is overwritten
        torch.empty(shape).normal_()
    for index, shape in enumerate(linear):
        torch.empty(shape).uniform_()
        if config.bias and index < len(linear) - 1:  # the head never has one
            torch.empty(shape[0]).uniform_()
    for shape in ((V, C), (T, C), *linear, *((C, C), (C, 4 * C)) * config.n_layer):  # at last, each c_proj once more
        torch.empty(shape).normal_()


@contextmanager
def _no_distribution() -> Iterator[None]:
    """Turn torch's refusal to draw from probabilities that are not numbers into the user's error."""
    try:
        yield
    except RuntimeError as error:
        if "n_sample" in str(error):
            raise UserError("--num_beams is more than the vocabulary has tokens for") from None
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

    try:
        with _seeded(sampling, model):
            start = time.perf_counter()
            sequences = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                streamer=stream if sampling.num_beams == 1 else None,  # which of the beams stays is known at the end
                logits_processor=LogitsProcessorList([OnlyNumbers()]),
                **sampling.kwargs(),
                stopping_criteria=stopping(tokenizer, sampling, len(prompt)),
            )  # (num_return_sequences, T + new)
            seconds = time.perf_counter() - start
    except KeyboardInterrupt:
        stream.end()
        on_text("\n".join(text(_up_to(tokenizer, row, sampling)) for row in stream.rows))
        raise
    rows = [_up_to(tokenizer, row, sampling) for row in sequences[:, len(prompt) :].tolist()]
    return Generation(
        texts=[text(ids) for ids in rows],
        responses=[response(ids) for ids in rows],
        ids=rows,
        finish_reasons=["length" if _is_unfinished(tokenizer, ids, sampling) else "stop" for ids in rows],
        seconds=seconds,
    )


@_no_distribution()
def continue_prompts(
    model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[torch.Tensor], sampling: Sampling
) -> list[str]:
    """The bare responses to several prompts, each of shape (1, T), in one left-padded batch.

    Raises:
        UserError: the model's logits are NaN or infinite.
    """
    width = max(prompt.shape[1] for prompt in prompts)
    # A vocabulary of characters has no padding token: under the mask any id will do.
    input_ids = torch.full((len(prompts), width), tokenizer.pad_token_id or 0)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - prompt.shape[1] :] = prompt[0]
        attention_mask[row, width - prompt.shape[1] :] = 1
    with _seeded(sampling, model):
        sequences = model.generate(
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            logits_processor=LogitsProcessorList([OnlyNumbers()]),
            **sampling.kwargs(),
            stopping_criteria=stopping(tokenizer, sampling, width),
        )  # (B, T + new)
    rows = [_up_to(tokenizer, row, sampling) for row in sequences[:, width:].tolist()]
    return [sampling.cut(bare_response(tokenizer, ids))[0] for ids in rows]


def bare_response(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of new tokens; the space in front of the answer to an instruction belongs to the format."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text.lstrip() if takes_instructions(tokenizer) else text


def _up_to(tokenizer: PreTrainedTokenizerFast, ids: list[int], sampling: Sampling) -> list[int]:
    """The ids up to the first end token or stop string; a sequence that ends before its neighbours is padded after it.

    The library pads with -1 where there is no padding token.
    """
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
    ids = [token for token in ids if token >= 0]
    if sampling.stop and sampling.cut(tokenizer.decode(ids, skip_special_tokens=True))[1]:
        lengths = range(1, len(ids) + 1)
        return ids[: next(n for n in lengths if sampling.cut(tokenizer.decode(ids[:n], skip_special_tokens=True))[1])]
    return ids


def _is_unfinished(tokenizer: PreTrainedTokenizerFast, ids: list[int], sampling: Sampling) -> bool:
    if ids and ids[-1] == tokenizer.eos_token_id:
        return False
    return not sampling.cut(tokenizer.decode(ids, skip_special_tokens=True))[1]
