"""What the page shows, as plain values: answers token by token, weights by layer, attention, what the data told."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from hf_model.learnt.diagnosis import Rows, own_prompts
from hf_model.learnt.inspection import Inspection
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM

ANSWER_STEPS = 24
N_ALTERNATIVES = 5
MOST_LAYERS = MOST_HEADS = 12  # whose attention is drawn
MOST_MAP_TOKENS = 32
UNLIKE = 16.0  # times smaller or larger than the same weight of the other layers: dead, exploded
N_BINS = 40


@dataclass(frozen=True)
class Token:
    """A token of an answer, the probability that it had, and what else was likely."""

    text: str
    probability: float
    alternatives: tuple[tuple[str, float], ...]
    is_copy: bool
    """Whether it is the token before once more."""


@dataclass(frozen=True)
class Candidate:
    """A token that the answer could begin with: how likely it is, and how likely it comes again once it is read."""

    text: str
    weight: float
    repeat: float


@dataclass(frozen=True)
class Answer:
    prompt: str
    tokens: tuple[Token, ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Weight:
    """A tensor of a layer: the root mean square of its values, the largest, and what is wrong with it, if anything."""

    kind: str
    layer: int
    rms: float
    largest: float
    fault: str
    ratio: float
    """Its root mean square, over the median of the other layers'."""


@dataclass(frozen=True)
class Embeddings:
    """The norms of the token embeddings: how many in each bin, and the tokens at both ends."""

    low: float
    high: float
    counts: tuple[int, ...]
    smallest: tuple[tuple[str, float], ...]
    largest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Head:
    """How much each token of a prompt (rows) looks at each (columns), and what that is in a word."""

    layer: int
    head: int
    weights: tuple[tuple[float, ...], ...]
    habit: str


@dataclass(frozen=True)
class Content:
    inspection: Inspection
    answers: tuple[Answer, ...]
    weights: tuple[Weight, ...]
    embeddings: Embeddings | None
    attention_tokens: tuple[str, ...]
    attention: tuple[Head, ...]


def gather(inspection: Inspection, model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Content:
    """Compute all that the page shows. Of a model whose weights are not finite, there are its weights only."""
    words = Words(tokenizer)
    works = inspection.diagnosis is not None and inspection.diagnosis.verdict != "no numbers"
    prompts = [ids for ids in own_prompts(tokenizer) if ids] if works and model.config.block_size > 1 else []
    attended = prompts[0][-min(MOST_MAP_TOKENS, model.config.block_size) :] if prompts else []
    return Content(
        inspection,
        answers=tuple(_answers(inspection, model, tokenizer, prompts, words)),
        weights=tuple(_weights(model)),
        embeddings=_embeddings(model, words),
        attention_tokens=tuple(map(words, attended)),
        attention=tuple(_attention(model, attended)) if attended else (),
    )


class Words:
    """Token ids as text; a token that is no text of its own, such as a part of a character, by its name."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer

    def __call__(self, token: int) -> str:
        text = str(self.tokenizer.decode([token]))
        return text if text and "�" not in text else str(self.tokenizer.convert_ids_to_tokens(token))


@torch.inference_mode()
def _answers(
    inspection: Inspection,
    model: CustomGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    words: Words,
) -> Iterator[Answer]:
    """The greedy answer to each prompt of the diagnosis, side by side, token by token."""
    if not prompts:
        return
    longest = max(1, model.config.block_size - ANSWER_STEPS, model.config.block_size // 2)
    whole, prompts = prompts, [ids[-longest:] for ids in prompts]
    steps = min(ANSWER_STEPS, model.config.block_size - max(map(len, prompts)))
    rows = Rows(model, prompts, len(tokenizer))
    answers: list[list[Token]] = [[] for _ in prompts]
    before = [ids[-1] for ids in prompts]
    is_open = [True] * len(prompts)
    for _ in range(steps):
        top = rows.next_logits.softmax(dim=-1).topk(min(N_ALTERNATIVES + 1, len(tokenizer)))  # (B, K)
        for i, (ids, probabilities) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True)):
            if is_open[i]:
                others = tuple((words(other), p) for other, p in zip(ids[1:], probabilities[1:], strict=True))
                answers[i].append(Token(words(ids[0]), probabilities[0], others, ids[0] == before[i]))
                is_open[i] = ids[0] != tokenizer.eos_token_id
            before[i] = ids[0]
        if not any(is_open):
            break
        rows.step(top.indices[:, 0])
    probes = inspection.diagnosis.probes if inspection.diagnosis is not None else ()
    for i, ids in enumerate(prompts):
        probe = probes[i] if i < len(probes) else None
        columns = zip(probe.candidates, probe.weights, probe.repeats, strict=True) if probe else ()
        candidates = tuple(Candidate(words(token), weight, repeat) for token, weight, repeat in columns)
        yield Answer("…" * (len(ids) < len(whole[i])) + str(tokenizer.decode(ids)), tuple(answers[i]), candidates)


def _weights(model: CustomGPTForCausalLM) -> Iterator[Weight]:
    """The matrices and gains of every layer, each compared with the same one of the other layers."""
    found: dict[str, list[tuple[int, float, float, bool]]] = {}
    for name, parameter in model.named_parameters():
        match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.weight", name)
        values = parameter.detach()
        largest = float(torch.linalg.vector_norm(values, math.inf, dtype=torch.float32))
        rms = float(torch.linalg.vector_norm(values, dtype=torch.float32)) / math.sqrt(values.numel())
        layer, kind = (int(match[1]), match[2]) if match else (-1, name.removesuffix(".weight"))
        if name.endswith(".weight"):
            found.setdefault(kind, []).append((layer, rms, largest, math.isfinite(largest)))
    for kind, layers in found.items():
        finite = sorted(rms for _, rms, _, is_finite in layers if is_finite)
        middle = (
            finite[(len(finite) - 1) // 2] if finite else 0.0
        )  # of two, the smaller: weights explode, they seldom die
        for layer, rms, largest, is_finite in layers:
            ratio = rms / middle if middle > 0 and is_finite else 1.0
            fault = ""
            if not is_finite:
                fault = "NaN or infinite values"
            elif rms == 0:
                fault = "dead: all zeros"
            elif ratio < 1 / UNLIKE:
                fault = f"dead: {1 / ratio:,.0f} times smaller than in other layers"
            elif ratio > UNLIKE:
                fault = f"exploded: {ratio:,.0f} times larger than in other layers"
            yield Weight(kind, layer, rms, largest, fault, ratio)


def _embeddings(model: CustomGPTForCausalLM, words: Words) -> Embeddings | None:
    """The norms of the embeddings of the tokens that the tokenizer has; None if any is not finite."""
    table = model.transformer.wte.weight.detach()[: len(words.tokenizer)]  # (V, C)
    norms = torch.linalg.vector_norm(table, dim=1, dtype=torch.float32)  # (V,)
    if not norms.isfinite().all():
        return None
    low, high = float(norms.min()), float(norms.max())
    counts = torch.histc(norms, N_BINS, low, high) if high > low else torch.tensor([len(norms)])
    order = norms.argsort().tolist()
    ends = [tuple((words(token), float(norms[token])) for token in some) for some in (order[:6], order[::-1][:6])]
    return Embeddings(low, high, tuple(int(count) for count in counts), *ends)


@contextmanager
def _eager(model: CustomGPTForCausalLM) -> Iterator[None]:
    """The attention that gives its weights, for a while."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


@torch.inference_mode()
def _attention(model: CustomGPTForCausalLM, prompt: list[int]) -> Iterator[Head]:
    """The attention of the heads over a prompt; of a large model, the first layers and heads."""
    with _eager(model):
        ids = torch.tensor([prompt], device=model.device)
        layers = model(ids, use_cache=False, output_attentions=True, logits_to_keep=1).attentions
    for layer, weights in enumerate(layers[:MOST_LAYERS]):  # (1, nh, T, T)
        for head, seen in enumerate(weights[0, :MOST_HEADS].float().cpu()):
            yield Head(layer, head, tuple(tuple(row) for row in seen.tolist()), _habit(seen))


def _habit(seen: torch.Tensor) -> str:
    """What most of the attention (T, T) is on, the first token left out, which sees only itself."""
    if len(seen) < 3:
        return "looks here and there"
    shares = {
        "looks at itself": seen.diagonal()[1:].mean(),
        "looks one back": seen.diagonal(-1)[1:].mean(),
        "looks at the start": seen[2:, 0].mean(),
    }
    habit, share = max(shares.items(), key=lambda item: float(item[1]))
    return habit if share > 0.5 else "looks here and there"
