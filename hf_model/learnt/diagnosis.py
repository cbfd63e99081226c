"""What can be told of a model from its weights and its own answers: a stutter, no training, no numbers.

A model whose labels were not shifted by one learns to repeat the tokens of its answers, not any token. So it is asked
at the answers that it is about to give itself.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import format_prompt, takes_instructions

N_CANDIDATES = 8
N_WORDS = 1000
RUN_STEPS = 20
# Set on some 200 small models: docs/diagnosis.md.
STUTTER_MASS = 0.2
STUTTER_RUN = 0.6
FLAT = 0.3
NORMS_MOVED = 0.25  # a model whose norms are further from where they began was trained, or made by hand
FLAT_BY_WIDTH = 4e-4  # twice what normal(0, 0.02) weights give by chance
FEW_TOKENS = 16
"""A vocabulary below this may be as good as even in its text too, as the four letters of a genome are."""

INSTRUCTIONS = (
    ("What is the capital of France?", ""),
    ("Name three primary colors.", ""),
    ("Summarize the text.", "The cat slept all day."),
    ("Is the sky blue?", ""),
)

Verdict = Literal["stutters", "untrained", "nothing", "no numbers"]


@dataclass(frozen=True)
class Probe:
    """What the model makes of one prompt of its own format."""

    prompt: tuple[int, ...]
    candidates: tuple[int, ...]
    """The likeliest next tokens, the likeliest first; special tokens and the prompt's last one are left out."""
    weights: tuple[float, ...]
    """Their probabilities, which add up to 1."""
    repeats: tuple[float, ...]
    """The probability that each, once it is read, comes again."""
    flatness: float
    """Nats that the next token's entropy lies below that of an even choice; the prompt's last token is left out."""

    @property
    def copy_mass(self) -> float:
        return sum(weight * repeat for weight, repeat in zip(self.weights, self.repeats, strict=True))


@dataclass(frozen=True)
class Diagnosis:
    """A verdict and its evidence, means over the probes."""

    verdict: Verdict
    probes: tuple[Probe, ...] = ()
    copy_mass: float = 0.0
    """S1: the probability that the model gives again the token that it has just read, at its own answers."""
    flatness: float = 0.0
    """FLAT, in nats: 0 for a model that knows nothing."""
    flat_below: float = 0.0
    """The flatness below which a model of this width counts as untrained."""
    run: float | None = None
    """RUN: the share of greedy steps that give the token before again; None where nobody needs to know."""

    def line(self) -> str:
        """The verdict and its numbers, in plain words."""
        if self.verdict == "no numbers":
            return "the model's predictions are NaN or infinite: values overflow in this dtype, try --dtype float32"
        if not self.probes:
            return "nothing to say: its vocabulary or its context is too small to ask it anything"
        if self.verdict == "untrained":
            return (
                "the model is untrained: after a prompt all tokens are about as likely as each other "
                f"({self.flatness:.2f} nats from an even choice, below {self.flat_below:.2f}). It was saved before it "
                "learnt, or these are other weights than you think"
            )
        copies = (
            f"at its own answers it repeats the token that it has just read with a probability of {self.copy_mass:.0%}"
        )
        if self.verdict == "stutters":
            return (
                f"the model stutters: {copies}, and {self.run:.0%} of its next steps do. Its labels were probably not "
                "shifted by one in fine-tuning, so it has learnt to repeat; sampling options will not cure that, "
                "fine-tuning with shifted labels will (the labels of this model in transformers are shifted). If its "
                "training text is itself such repeats, as rows of dashes are, then this is right"
            )
        return f"nothing to say: {copies}, and its predictions are {self.flatness:.1f} nats from an even choice"


def non_finite(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or an infinity."""
    return [
        name
        for name, tensor in state_dict.items()
        if not all(extreme.isfinite() for extreme in torch.aminmax(tensor))  # NaN is passed on by both
    ]


@torch.inference_mode()
def diagnose(model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Diagnosis:
    """Ask the model what it would answer to a few prompts of its own format, and whether it repeats those answers.

    It costs one pass over the prompts and one step of eight rows for each; a model that repeats, some steps more.
    Nothing is sampled, and the random state stays as it was.
    """
    steps = min(RUN_STEPS, model.config.block_size // 2 - 1)
    longest = model.config.block_size - 1 - max(steps, 0)
    prompts = [ids[-longest:] for ids in own_prompts(tokenizer) if longest > 0]
    ordinary = _ordinary_tokens(tokenizer)
    if not prompts or len(ordinary) < 2:
        return Diagnosis("nothing")

    rows = Rows(model, prompts, len(tokenizer))
    probes = _ask(rows, prompts, ordinary) if rows.are_numbers() else []
    if not probes or not rows.are_numbers():
        return Diagnosis("no numbers")
    found = Diagnosis(
        "nothing",
        tuple(probes),
        copy_mass=sum(probe.copy_mass for probe in probes) / len(probes),
        flatness=sum(probe.flatness for probe in probes) / len(probes),
        flat_below=max(FLAT, FLAT_BY_WIDTH * model.config.n_embd),
    )
    copies = found.copy_mass >= STUTTER_MASS and steps > 0
    # A model that has learnt nothing but to copy is flat but for that; a fresh one can copy by chance, its head tied.
    may_be_flat = copies or len(tokenizer) < FEW_TOKENS
    moved = norms_moved(model)
    if found.flatness < found.flat_below and moved < NORMS_MOVED and (moved == 0 or not may_be_flat):
        return replace(found, verdict="untrained")
    if not copies:
        return found
    n_rows = len(rows.mask) // len(prompts)
    rows.select(range(0, len(rows.mask), n_rows))  # the likeliest candidate of each prompt
    likeliest = torch.tensor([probe.candidates[0] for probe in probes])
    run = _share_repeated(rows, likeliest, steps, tokenizer.eos_token_id)
    return replace(found, verdict="stutters" if run >= STUTTER_RUN else "nothing", run=run)


def _ask(rows: "Rows", prompts: list[list[int]], ordinary: list[int]) -> list[Probe]:
    """What each prompt's next token would be, and whether it comes again; leaves a row for each of these tokens."""
    last = torch.tensor([ids[-1] for ids in prompts])  # (B,)
    rest = rows.next_logits.scatter(1, last[:, None], -math.inf)  # (B, V)
    entropy = torch.distributions.Categorical(logits=rest).entropy()  # (B,)
    flatness = math.log(rows.n_tokens - 1) - entropy

    allowed = torch.full_like(rest, -math.inf).index_fill_(1, torch.tensor(ordinary), 0)
    top = (rest + allowed).topk(min(N_CANDIDATES, len(ordinary) - 1))  # (B, K)
    candidates, weights = top.indices, top.values.softmax(dim=-1)
    rows.repeat_interleave(candidates.shape[1])
    rows.step(candidates.flatten())
    repeats = rows.next_logits.softmax(dim=-1).gather(1, candidates.reshape(-1, 1)).view_as(candidates)  # (B, K)
    return [
        Probe(
            tuple(ids),
            tuple(candidates[i].tolist()),
            tuple(weights[i].tolist()),
            tuple(repeats[i].tolist()),
            float(flat),
        )
        for i, (ids, flat) in enumerate(zip(prompts, flatness, strict=True))
    ]


def norms_moved(model: CustomGPTForCausalLM) -> float:
    """How far the LayerNorms' gains are from 1, where they stand before the first step of training, in the mean."""
    gains = [parameter for name, parameter in model.named_parameters() if "ln_" in name and name.endswith("weight")]
    return max(float((gain.float() - 1).abs().mean()) for gain in gains)


def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    special = set(tokenizer.all_special_ids)
    return [token for token in range(len(tokenizer)) if token not in special]


def own_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """A few prompts, as token ids, of the format that the model was trained on."""
    if takes_instructions(tokenizer):
        return [ids for text in INSTRUCTIONS if (ids := tokenizer(format_prompt(*text)).input_ids)]
    return list(_raw_prompts(tokenizer))


def _raw_prompts(tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Text of the tokenizer's own pieces: the token that starts a text, then words that are early in the vocabulary."""
    start = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), None)
    first = [] if start is None else [start]
    ordinary = _ordinary_tokens(tokenizer)
    letters = (token for token in ordinary if any(char.isalpha() for char in tokenizer.decode([token])))
    words = list(islice(letters, N_WORDS)) or ordinary[:N_WORDS]
    chooser = random.Random(0)
    for _ in INSTRUCTIONS:
        yield first + chooser.choices(words, k=6)


def _share_repeated(rows: "Rows", tokens: torch.Tensor, steps: int, end: int | None) -> float:
    """The share of greedy steps after `tokens` (B,) that give the token before again; those after an end do not."""
    goes_on = torch.ones_like(tokens, dtype=torch.bool)
    repeated, before = 0, tokens
    for following in _greedy(rows, steps, end):
        if end is not None:
            goes_on &= following != end
        repeated += int((goes_on & (following == before)).sum())
        before = following
        if not goes_on.any():
            break
    return repeated / (steps * len(tokens))


def _greedy(rows: "Rows", steps: int, end: int | None) -> Iterator[torch.Tensor]:
    """The rows' next greedy tokens, (B,) for each step; what comes after an end is anything.

    A stutterer's tokens are easily guessed: the last one again. So a pass reads as many of them as may be right, and
    what is behind the first wrong guess is read again.
    """
    token = rows.next_logits.argmax(dim=-1)  # (B,)
    goes_on = torch.ones_like(token, dtype=torch.bool)
    guesses = left = steps
    while True:
        yield token
        left -= 1
        if left <= 0:
            return
        if end is not None:
            goes_on &= token != end
        guessed = token[:, None].repeat(1, min(guesses, left))  # (B, N)
        found = rows.read(guessed).argmax(dim=-1)  # (B, N), what follows each
        right = ((found == guessed) | ~goes_on[:, None]).all(dim=0)  # (N,)
        n_right = int(right.long().cumprod(dim=0).sum())
        found = found[:, : n_right + 1]
        rows.forget(guessed.shape[1] - found.shape[1])
        for again in found[:, :-1].unbind(dim=1):
            yield again
            left -= 1
        token, guesses = found[:, -1], 2 * n_right + 1


class Rows:
    """Prompts that a model goes on with token by token, side by side: left-padded, with their keys and values."""

    def __init__(self, model: CustomGPTForCausalLM, prompts: Sequence[Sequence[int]], n_tokens: int):
        self.model = model
        self.n_tokens = n_tokens
        """Ids from here on are padding of the vocabulary."""
        self.cache = DynamicCache(config=model.config)
        T = max(map(len, prompts))
        self.mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in prompts])  # (B, T)
        padded = torch.tensor([[0] * (T - len(ids)) + list(ids) for ids in prompts])  # (B, T)
        self.next_logits = self._forward(padded, keep=1)[:, -1]  # (B, V)

    def _forward(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """Read tokens (B, N), and give the logits after the last `keep`, (B, keep, V)."""
        device = self.model.device
        output = self.model(
            ids.to(device),
            attention_mask=self.mask.to(device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits[..., : self.n_tokens].float().cpu()

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read tokens (B, N) more in each row, and give the logits after each, (B, N, V)."""
        self.mask = torch.nn.functional.pad(self.mask, (0, tokens.shape[1]), value=1)
        return self._forward(tokens, keep=tokens.shape[1])

    def forget(self, n: int) -> None:
        """As if the last `n` tokens of each row had not been read."""
        if n:
            self.cache.crop(-n)
            self.mask = self.mask[:, :-n]

    def are_numbers(self) -> bool:
        return bool(self.next_logits.isfinite().all())

    def step(self, tokens: torch.Tensor) -> None:
        """Read one token more in each row, `tokens` of shape (B,)."""
        self.next_logits = self.read(tokens[:, None])[:, -1]

    def repeat_interleave(self, times: int) -> None:
        """Every row `times` times, side by side."""
        self.cache.batch_repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, dim=0)

    def select(self, rows: Sequence[int]) -> None:
        """These rows only."""
        indices = torch.tensor(rows)
        self.cache.batch_select_indices(indices.to(self.model.device))
        self.mask, self.next_logits = self.mask[indices], self.next_logits[indices]
