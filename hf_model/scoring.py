"""How likely a text is to the model, token by token, and which tokens are likelier."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from hf_model.errors import UserError, memory_for
from hf_model.generation import encode, encode_end
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import prompt_format, prompt_text, takes_instructions


@dataclass(frozen=True)
class ScoredToken:
    """A token, its natural log-probability after the tokens before it, and the likeliest tokens at its place."""

    id: int
    text: str
    log_probability: float
    candidates: tuple[tuple[str, float], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None stands for infinity."""
        return {
            "id": self.id,
            "text": self.text,
            "log_probability": _finite(self.log_probability),
            "candidates": [{"text": text, "log_probability": _finite(p)} for text, p in self.candidates],
        }


@dataclass(frozen=True)
class Score:
    """The tokens of a text, their joint log-probability, and the perplexity."""

    text: str
    tokens: tuple[ScoredToken, ...]
    content: str | None = None
    """The prompt in its format; None for a text by itself."""

    @property
    def log_probability(self) -> float:
        return math.fsum(token.log_probability for token in self.tokens)

    @property
    def perplexity(self) -> float:
        """Infinite if a token is impossible, or nearly so."""
        mean = -self.log_probability / len(self.tokens)
        return math.exp(mean) if mean < 700 else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None stands for infinity."""
        return {
            **({} if self.content is None else {"content": self.content}),
            "text": self.text,
            "log_probability": _finite(self.log_probability),
            "perplexity": _finite(self.perplexity),
            "tokens": [token.as_dict() for token in self.tokens],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def score_text(
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    *,
    prompt: str | None = None,
    input_text: str = "",
    parse_special_tokens: bool = False,
    n_candidates: int = 0,
) -> Score:
    """Score a text from the beginning, or as the answer to a prompt.

    Args:
        prompt: the prompt that the text answers. None scores the text by itself, after `[BOS]` if there is one.
        input_text: the input of an instruction.
        parse_special_tokens: read "[EOS]" in the texts as the special token.
        n_candidates: number of the likeliest tokens to return at each place.

    Raises:
        UserError: the text has no token that follows another one, raw text has an input, or the model's logits are
            NaN or infinite.
    """
    if prompt is None:
        ids = encode(tokenizer, text, parse_special_tokens)[0].tolist()
        start = len(ids) - len(_plain(tokenizer, text, parse_special_tokens))
    else:
        if input_text and not takes_instructions(tokenizer):
            raise UserError("argument --input_text: this model's prompts are raw text, which has no place for it")
        context = model.config.block_size
        ids = encode_end(tokenizer, prompt, input_text, parse_special_tokens, block_size=context)[0][0].tolist()
        start = len(ids)
        ids += _plain(tokenizer, prompt_format(tokenizer).before_answer + text, parse_special_tokens)
    start = max(start, 1)  # nothing predicts the first token
    if len(ids) <= start:
        raise UserError("--score: there must be a token with another one before it")
    content = None if prompt is None else prompt_text(tokenizer, prompt, input_text)
    return Score(text, tuple(score(model, tokenizer, ids, start, n_candidates)), content)


def _plain(tokenizer: PreTrainedTokenizerFast, text: str, parse_special_tokens: bool) -> list[int]:
    """The tokens of a text alone."""
    return encode(tokenizer, text, parse_special_tokens, add_special_tokens=False)[0].tolist()


@memory_for("to score the text")
@torch.inference_mode()
def score(
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: Sequence[int],
    start: int,
    n_candidates: int = 0,
) -> list[ScoredToken]:
    """Score the tokens `ids[start:]`, each given all tokens before it.

    Past the context, each is given at least half a context of tokens before it.

    Raises:
        UserError: the model's logits are NaN or infinite.
    """
    window = model.config.block_size
    scored: list[ScoredToken] = []
    while start < len(ids):
        end = min(len(ids), window + 1 if start <= window else start + max(1, window // 2))
        seen = torch.tensor([list(ids[max(0, end - 1 - window) : end - 1])], device=model.device)  # (1, T)
        logits = model(seen, use_cache=False, logits_to_keep=end - start).logits[0].float().cpu()  # (N, V)
        if not logits.isfinite().all():
            raise UserError("the model's logits are NaN or infinite: its weights hold such values, or they overflow")
        scored += _scored(tokenizer, logits.log_softmax(dim=-1), list(ids[start:end]), n_candidates)
        start = end
    return scored


def _scored(
    tokenizer: PreTrainedTokenizerFast, log_probabilities: torch.Tensor, ids: list[int], n_candidates: int
) -> Iterator[ScoredToken]:
    """The N tokens `ids`, scored by the log-probabilities at their places, of shape (N, V)."""
    chosen = log_probabilities.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    top = log_probabilities[:, : len(tokenizer)].topk(min(n_candidates, len(tokenizer)))  # (N, K)
    for token, value, others, values in zip(ids, chosen, top.indices.tolist(), top.values.tolist(), strict=True):
        candidates = tuple((str(tokenizer.decode([other])), p) for other, p in zip(others, values, strict=True))
        yield ScoredToken(token, str(tokenizer.decode([token])), value, candidates)
