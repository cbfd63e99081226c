"""What the page shows, as plain values: answers token by token, weights by layer, embeddings, attention."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import torch
from transformers import PreTrainedTokenizerFast

from hf_model.generation import encode
from hf_model.learnt.diagnosis import Probe, Rows, own_prompts
from hf_model.learnt.inspection import Inspection
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import end_ids

ANSWER_STEPS = 24
N_ALTERNATIVES = 5
MOST_LAYERS = MOST_HEADS = 12  # whose attention is drawn
MOST_MAP_TOKENS = 32
UNLIKE = 16.0  # times the same weight of the other layers: exploded; one part in as many: dead
N_BINS = 40
N_ENDS = 6  # the shortest and the longest embeddings that are named
HABIT = 0.5  # share of a head's attention


@dataclass(frozen=True)
class Token:
    """A token of an answer, its probability, and the next likeliest tokens with theirs."""

    text: str
    probability: float
    alternatives: tuple[tuple[str, float], ...]
    is_copy: bool
    """Whether it repeats the token before."""


@dataclass(frozen=True)
class Candidate:
    """A token that may begin the answer, its probability, and the probability that the model then repeats it."""

    text: str
    weight: float
    repeat: float


@dataclass(frozen=True)
class Answer:
    prompt: str
    tokens: tuple[Token, ...]
    expected: str
    """How the training text goes on; "" where the prompt is not from there."""
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Weight:
    """A tensor: the root mean square of its values, the largest one, and what is wrong with it ("" if nothing)."""

    kind: str
    layer: int
    """-1 outside the layers."""
    rms: float
    largest: float
    fault: str
    ratio: float
    """The root mean square, divided by the median over the layers."""


@dataclass(frozen=True)
class Embeddings:
    """The norms of the token embeddings: how many are in each bin, and the tokens at both ends."""

    low: float
    high: float
    counts: tuple[int, ...]
    shortest: tuple[tuple[str, float], ...]
    longest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Head:
    """How much each token of a prompt (rows) looks at each (columns), and what the head mostly looks at."""

    layer: int
    head: int
    weights: tuple[tuple[float, ...], ...]
    habit: str
    share: float
    """The share of its attention that the habit explains; 0 without a habit."""


@dataclass(frozen=True)
class Content:
    inspection: Inspection
    answers: tuple[Answer, ...]
    weights: tuple[Weight, ...]
    embeddings: Embeddings | None
    attention_tokens: tuple[str, ...]
    attention: tuple[Head, ...]


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    expected: str = ""
    probe: Probe | None = None


def gather(inspection: Inspection, model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Content:
    """Compute all that the page shows. A model whose numbers are not finite has weights to show, and no answers."""
    words = Words(tokenizer)
    works = inspection.diagnosis is not None and inspection.diagnosis.verdict != "no numbers"
    prompts = list(_prompts(inspection, tokenizer)) if works and model.config.block_size > 1 else []
    attended = prompts[0].ids[-min(MOST_MAP_TOKENS, model.config.block_size) :] if prompts else []
    return Content(
        inspection,
        answers=tuple(_answers(prompts, model, words)) if prompts else (),
        weights=tuple(_weights(model)),
        embeddings=_embeddings(model, words),
        attention_tokens=tuple(map(words, attended)),
        attention=tuple(_attention(model, attended)) if attended else (),
    )


class Words:
    """Token ids as text. Bytes that are only a part of a character are shown as numbers, as in "\\xe2\\x80"."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        # The alphabet of byte-level BPE: printable bytes stand for themselves, the others begin at U+0100.
        self.bytes = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def __call__(self, token: int) -> str:
        text = str(self.tokenizer.decode([token]))
        if text and "�" not in text:
            return text
        name = str(self.tokenizer.convert_ids_to_tokens(token))
        if "�" in name or not all(char in self.bytes for char in name):
            return name
        return bytes(self.bytes[char] for char in name).decode("utf-8", "backslashreplace")


def _prompts(inspection: Inspection, tokenizer: PreTrainedTokenizerFast) -> Iterator[Prompt]:
    """The beginnings of raw training text where there is some, otherwise the diagnosis' own prompts."""
    if inspection.measurement is not None and inspection.measurement.beginnings:
        for text, expected in inspection.measurement.beginnings:
            yield Prompt(encode(tokenizer, text, add_special_tokens=False)[0].tolist(), expected)
    else:
        probes = inspection.diagnosis.probes if inspection.diagnosis is not None else ()
        for ids, probe in zip_longest(own_prompts(tokenizer), probes):
            yield Prompt(ids, probe=probe)


@torch.inference_mode()
def _answers(prompts: list[Prompt], model: CustomGPTForCausalLM, words: Words) -> Iterator[Answer]:
    """The greedy answer to each prompt, token by token."""
    tokenizer, block_size, ends = words.tokenizer, model.config.block_size, end_ids(words.tokenizer)
    longest = max(1, block_size - ANSWER_STEPS, block_size // 2)
    read = [prompt.ids[-longest:] for prompt in prompts]
    rows = Rows(model, read, len(tokenizer))
    answers: list[list[Token]] = [[] for _ in prompts]
    before = [ids[-1] for ids in read]
    is_open = [True] * len(prompts)
    for _ in range(min(ANSWER_STEPS, block_size - max(map(len, read)))):
        top = rows.next_logits.softmax(dim=-1).topk(min(N_ALTERNATIVES + 1, len(tokenizer)))  # (B, K)
        for i, (ids, probabilities) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True)):
            if is_open[i]:
                (text, probability), *others = zip(map(words, ids), probabilities, strict=True)
                answers[i].append(Token(text, probability, tuple(others), ids[0] == before[i]))
                is_open[i] = ids[0] not in ends
            before[i] = ids[0]
        if not any(is_open):
            break
        rows.step(top.indices[:, 0])
    for prompt, ids, tokens in zip(prompts, read, answers, strict=True):
        probe = prompt.probe
        columns = zip(probe.candidates, probe.weights, probe.repeats, strict=True) if probe else ()
        candidates = tuple(Candidate(words(token), weight, repeat) for token, weight, repeat in columns)
        text = "…" * (len(ids) < len(prompt.ids)) + str(tokenizer.decode(ids))
        yield Answer(text, tuple(tokens), prompt.expected, candidates)


def _summing_dtype(values: torch.Tensor) -> torch.dtype:
    """A dtype that holds a sum of many squares. 16 bits do not."""
    return torch.promote_types(values.dtype, torch.float32)


def _weights(model: CustomGPTForCausalLM) -> Iterator[Weight]:
    """The matrices and gains of every layer, each compared with the same one of the other layers."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(".weight"):
            continue
        match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.weight", name)
        layer, kind = (int(match[1]), match[2]) if match else (-1, name.removesuffix(".weight"))
        values = parameter.detach()
        dtype = _summing_dtype(values)
        largest = float(torch.linalg.vector_norm(values, math.inf, dtype=dtype))
        rms = float(torch.linalg.vector_norm(values, dtype=dtype)) / math.sqrt(values.numel())
        found.setdefault(kind, []).append((layer, rms, largest))
    for kind, layers in found.items():
        finite = sorted(rms for _, rms, largest in layers if math.isfinite(largest))
        # Of two layers the smaller one counts as normal: weights explode more often than they die.
        middle = finite[(len(finite) - 1) // 2] if finite else 0.0
        for layer, rms, largest in layers:
            ratio = rms / middle if middle > 0 and math.isfinite(largest) else 1.0
            fault = ""
            if not math.isfinite(largest):
                fault = "NaN or infinite values"
            elif rms == 0:
                fault = "dead: all zeros"
            elif ratio < 1 / UNLIKE:
                fault = f"dead: {1 / ratio:,.0f} times smaller than in other layers"
            elif ratio > UNLIKE:
                fault = f"exploded: {ratio:,.0f} times larger than in other layers"
            yield Weight(kind, layer, rms, largest, fault, ratio)


def _embeddings(model: CustomGPTForCausalLM, words: Words) -> Embeddings | None:
    """The norms of the embeddings of the tokenizer's tokens; None if any is not finite."""
    table = model.transformer.wte.weight.detach()[: len(words.tokenizer)]  # (V, C)
    norms = torch.linalg.vector_norm(table, dim=1, dtype=_summing_dtype(table))  # (V,)
    if not norms.isfinite().all():
        return None
    low, high = float(norms.min()), float(norms.max())
    counts = torch.histc(norms, N_BINS, low, high) if high > low else torch.tensor([len(norms)])
    order = norms.argsort().tolist()
    ends = (order[:N_ENDS], order[::-1][:N_ENDS])
    shortest, longest = (tuple((words(token), float(norms[token])) for token in end) for end in ends)
    return Embeddings(low, high, tuple(int(count) for count in counts), shortest, longest)


@contextmanager
def _eager(model: CustomGPTForCausalLM) -> Iterator[None]:
    """Compute attention in the way that returns its weights, and restore the usual way afterwards."""
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
            yield Head(layer, head, tuple(map(tuple, seen.tolist())), *_habit(seen))


def _habit(seen: torch.Tensor) -> tuple[str, float]:
    """What most of the attention (T, T) is on, and its share. The first token, which sees only itself, is left out."""
    if len(seen) >= 3:
        shares = {
            "looks at itself": float(seen.diagonal()[1:].mean()),
            "looks one back": float(seen.diagonal(-1)[1:].mean()),
            "looks at the start": float(seen[2:, 0].mean()),
        }
        habit, share = max(shares.items(), key=lambda item: item[1])
        if share > HABIT:
            return habit, share
    return "looks here and there", 0.0
