"""What a model's weights and its own answers tell: whether it stutters, is untrained, or gives no numbers at all.

A model whose labels were not shifted by one learns to repeat the tokens of its answers, not any token. So the diagnosis
looks at the answers that the model is about to give. docs/diagnosis.md explains the measures and their thresholds.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedTokenizerFast

from hf_model.errors import UserError
from hf_model.generation import encode_prompt
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import end_ids, fitted, takes_instructions

N_CANDIDATES = 8
N_WORDS = 1000  # of a raw vocabulary, from which prompts are made
RUN_STEPS = 20
# Thresholds measured on some 200 small models.
STUTTER_MASS = 0.2
STUTTER_RUN = 0.6
FLAT = 0.3  # nats
FLAT_BY_WIDTH = 4e-4  # nats for each unit of n_embd: twice what fresh weights, normal(0, 0.02), give by chance
NORMS_MOVED = 0.25  # gains of LayerNorm that are further from 1 were trained, or set by hand
FEW_TOKENS = 16  # in the text of a smaller vocabulary all tokens may be equally frequent, as in a genome

INSTRUCTIONS = (
    ("What is the capital of France?", ""),
    ("Name three primary colors.", ""),
    ("Summarize the text.", "The cat slept all day."),
    ("Is the sky blue?", ""),
)

Verdict = Literal["healthy", "stutters", "untrained", "no numbers", "unknown"]
SUBJECTS: dict[Verdict, str] = {
    "healthy": "healthy",
    "stutters": "the model stutters",
    "untrained": "the model is untrained",
    "no numbers": "the model's predictions are NaN or infinite",
    "unknown": "unknown",
}


@dataclass(frozen=True)
class Finding:
    """One line on a model: what it is about, or "note" or "warning", and the text."""

    about: str
    text: str

    def __str__(self) -> str:
        return f"{self.about}: {self.text}" if self.about in ("note", "warning") else f"{self.about:<13} {self.text}"


LARGE, N_PROMPTS_LARGE = 300_000_000, 2  # a model with more parameters reads only its shortest prompts: seconds less


@dataclass(frozen=True)
class Probe:
    """What the model makes of one prompt of its own format."""

    prompt: tuple[int, ...]
    candidates: tuple[int, ...]
    """The likeliest next tokens, the likeliest first, without special tokens and without the prompt's last token."""
    weights: tuple[float, ...]
    """The candidates' probabilities, scaled to add up to 1."""
    repeats: tuple[float, ...]
    """For each candidate, the probability that the model gives it again right after reading it."""
    flatness: float
    """log(V - 1) minus the entropy of the next token, in nats; the prompt's last token is left out of the choice."""

    @property
    def copy_mass(self) -> float:
        return sum(weight * repeat for weight, repeat in zip(self.weights, self.repeats, strict=True))


@dataclass(frozen=True)
class Diagnosis:
    """A verdict and its evidence; the numbers are means over the probes."""

    verdict: Verdict
    """"unknown" if the vocabulary or the context is too small to ask the model anything."""
    probes: tuple[Probe, ...] = ()
    copy_mass: float = 0.0
    """S1: the probability that the model repeats the token that it has just read, in its own answers."""
    flatness: float = 0.0
    """FLAT, in nats: 0 where all tokens are equally likely."""
    flat_below: float = 0.0
    """The flatness below which a model of this width counts as untrained."""
    most_flatness: float = 0.0
    """log(V - 1): the flatness of a model that is certain of every token."""
    run: float | None = None
    """RUN: the share of greedy steps that repeat the token before; None where the copy mass is low."""

    @property
    def is_harm(self) -> bool:
        return self.verdict not in ("healthy", "unknown")

    def __str__(self) -> str:
        return f"{SUBJECTS[self.verdict]}: {self.details()}"

    def details(self) -> str:
        """The figures and their meaning in plain words."""
        if self.verdict == "unknown":
            return "the vocabulary or the context is too small to ask the model anything"
        if self.verdict == "no numbers":
            return "values overflow in this dtype; try --dtype float32"
        if self.verdict == "untrained":
            return (
                f"after a prompt, all tokens are about equally likely ({self.flatness:.2f} nats from an even choice, "
                f"below {self.flat_below:.2f}). It was saved before it learnt, or this is not the file you think"
            )
        if self.verdict == "stutters":
            return (
                f"in its own answers it repeats the token that it has just read with a probability of "
                f"{self.copy_mass:.0%}, and {self.run:.0%} of the next steps repeat too. Its labels were probably not "
                "shifted by one in fine-tuning, so it learnt to repeat. Sampling options will not cure that; "
                "fine-tuning with shifted labels will (this model shifts its labels itself, as every model in "
                "transformers does). If its training text is made of such repeats, as rows of dashes are, then the "
                "model is right"
            )
        repeats = f"does not repeat itself ({self.copy_mass:.0%})"
        if self.run is not None:
            repeats = f"may repeat a token ({self.copy_mass:.0%}) but does not go on ({self.run:.0%} of the next steps)"
        is_confident = self.flatness >= self.flat_below
        nats = f"{self.flatness:.1f} of {self.most_flatness:.1f} nats"
        return f"{repeats}, {'is confident' if is_confident else 'chooses almost evenly'} ({nats})"


def non_finite(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or an infinity."""
    return [
        name
        for name, tensor in state_dict.items()
        if not all(extreme.isfinite() for extreme in torch.aminmax(tensor))  # NaN becomes both extremes
    ]


@torch.inference_mode()
def diagnose(model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Diagnosis:
    """Ask a model for the beginnings of its answers to a few prompts of its own format, and whether it repeats them.

    The cost is one pass over the prompts and one step of eight rows for each prompt; for a model that repeats, one
    more pass or twenty more steps. The random state is left unchanged.
    """
    steps = min(RUN_STEPS, model.config.block_size // 2 - 1)
    longest = model.config.block_size - 1 - steps
    prompts = [ids[-longest:] for ids in own_prompts(tokenizer)]
    if model.num_parameters() > LARGE:
        prompts = sorted(prompts, key=len)[:N_PROMPTS_LARGE]
    ordinary = _ordinary_tokens(tokenizer)
    if steps < 1 or not prompts or len(ordinary) < 2:
        return Diagnosis("unknown")

    rows = Rows(model, prompts, len(tokenizer))
    probes = _ask(rows, prompts, ordinary) if rows.next_logits.isfinite().all() else []
    if not probes or not rows.next_logits.isfinite().all():
        return Diagnosis("no numbers")
    found = Diagnosis(
        "healthy",
        tuple(probes),
        copy_mass=sum(probe.copy_mass for probe in probes) / len(probes),
        flatness=sum(probe.flatness for probe in probes) / len(probes),
        flat_below=max(FLAT, FLAT_BY_WIDTH * model.config.n_embd),
        most_flatness=math.log(len(tokenizer) - 1),
    )
    copies = found.copy_mass >= STUTTER_MASS
    # A trained model may be flat too, if it learnt only to copy or has few tokens; a fresh one with a tied head may
    # copy by chance. In these two cases the norms decide.
    may_be_flat = copies or len(tokenizer) < FEW_TOKENS
    moved = norms_moved(model)
    if found.flatness < found.flat_below and moved < NORMS_MOVED and (moved == 0 or not may_be_flat):
        return replace(found, verdict="untrained")
    if not copies:
        return found
    rows.select(torch.arange(0, len(rows.mask), len(rows.mask) // len(prompts)))  # each prompt's likeliest candidate
    likeliest = torch.tensor([probe.candidates[0] for probe in probes])
    run = _share_repeated(rows, likeliest, steps, end_ids(tokenizer))
    return replace(found, verdict="stutters" if run >= STUTTER_RUN else "healthy", run=run)


def _ask(rows: "Rows", prompts: list[list[int]], ordinary: list[int]) -> list[Probe]:
    """Each prompt's likeliest next tokens, and whether they come again. Leaves `rows` with a row for each of them."""
    last = torch.tensor([ids[-1] for ids in prompts])  # (B,)
    rest = rows.next_logits.scatter(1, last[:, None], -math.inf)  # (B, V)
    entropy = torch.distributions.Categorical(logits=rest).entropy()  # (B,)
    flatness = math.log(rows.n_tokens - 1) - entropy

    allowed = torch.full_like(rest, -math.inf).index_fill_(1, torch.tensor(ordinary), 0)
    top = (rest + allowed).topk(min(N_CANDIDATES, len(ordinary) - 1))  # (B, K)
    candidates, weights = top.indices, top.values.softmax(dim=-1)
    rows.select(torch.arange(len(prompts)).repeat_interleave(candidates.shape[1]))
    rows.step(candidates.flatten())
    repeats = rows.next_logits.softmax(dim=-1).gather(1, candidates.reshape(-1, 1)).view_as(candidates)  # (B, K)
    columns = zip(prompts, candidates.tolist(), weights.tolist(), repeats.tolist(), flatness.tolist(), strict=True)
    return [Probe(tuple(ids), tuple(top), tuple(share), tuple(again), flat) for ids, top, share, again, flat in columns]


def norms_moved(model: CustomGPTForCausalLM) -> float:
    """The largest mean distance of a LayerNorm's gains from 1, their value before training."""
    gains = [parameter for name, parameter in model.named_parameters() if "ln_" in name and name.endswith("weight")]
    return max(float((gain.float() - 1).abs().mean()) for gain in gains)


def _ordinary_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    special = set(tokenizer.all_special_ids)
    return [token for token in range(len(tokenizer)) if token not in special]


def own_prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """A few prompts, as token ids, in the format that the model was trained on."""
    prompts = []
    for texts in INSTRUCTIONS if takes_instructions(tokenizer) else ():
        with suppress(UserError):  # a word or character that the tokenizer does not know
            prompts.append(encode_prompt(tokenizer, *fitted(tokenizer, *texts))[0].tolist())
    return [ids for ids in prompts if ids] or list(_raw_prompts(tokenizer))


def _raw_prompts(tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """The token that starts a text, if there is one, then random words from the first ones of the vocabulary."""
    start = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), None)
    first = [] if start is None else [start]
    ordinary = _ordinary_tokens(tokenizer)
    letters = (token for token in ordinary if any(char.isalpha() for char in tokenizer.decode([token])))
    words = list(islice(letters, N_WORDS)) or ordinary[:N_WORDS]
    chooser = random.Random(0)
    for _ in INSTRUCTIONS if words else ():
        yield first + chooser.choices(words, k=6)


def _share_repeated(rows: "Rows", tokens: torch.Tensor, steps: int, ends: list[int]) -> float:
    """RUN: the share of greedy steps after `tokens` (B,) that repeat the token before; steps after an end do not."""
    if torch.equal(rows.next_logits.argmax(dim=-1), tokens):
        # Most stutterers repeat one token for ever. One pass shows that; twenty steps take a second (134M, float32).
        guessed = tokens[:, None].repeat(1, steps)
        if torch.equal(rows.read(guessed).argmax(dim=-1), guessed):
            return 1.0
        rows.forget(steps)
    goes_on = torch.ones_like(tokens, dtype=torch.bool)
    repeated, before = 0, tokens
    for _ in range(steps):
        following = rows.next_logits.argmax(dim=-1)  # (B,)
        for end in ends:
            goes_on &= following != end
        repeated += int((goes_on & (following == before)).sum())
        rows.step(following)
        before = following
    return repeated / (steps * len(tokens))


class Rows:
    """Left-padded prompts that a model continues side by side, with their keys and values."""

    def __init__(self, model: CustomGPTForCausalLM, prompts: Sequence[Sequence[int]], n_tokens: int):
        self.model = model
        self.n_tokens = n_tokens  # ids from this one on are padding
        self.cache = DynamicCache(config=model.config)
        T = max(map(len, prompts))
        self.mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in prompts])  # (B, S)
        padded = torch.tensor([[0] * (T - len(ids)) + list(ids) for ids in prompts])  # (B, T)
        self.next_logits = self._forward(padded, logits_to_keep=1)[:, -1]  # (B, V)

    def _forward(self, ids: torch.Tensor, logits_to_keep: int = 0) -> torch.Tensor:
        """The logits of the last `logits_to_keep` positions, or of all if it is 0, as in transformers."""
        ids, mask = ids.to(self.model.device), self.mask.to(self.model.device)
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": logits_to_keep}
        logits = self.model(ids, attention_mask=mask, **options).logits
        return logits[..., : self.n_tokens].float().cpu()

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read more tokens (B, N) in each row; returns the logits after each, (B, N, V), in float32 on the CPU."""
        self.mask = torch.nn.functional.pad(self.mask, (0, ids.shape[1]), value=1)
        return self._forward(ids)

    def step(self, ids: torch.Tensor) -> None:
        """Read one more token in each row; `ids` has the shape (B,)."""
        self.next_logits = self.read(ids[:, None])[:, -1]

    def forget(self, n: int) -> None:
        """Drop the last `n` tokens of `read`, which left `next_logits` as they were."""
        self.cache.crop(-n)
        self.mask = self.mask[:, :-n]

    def select(self, rows: torch.Tensor) -> None:
        """Keep the rows with these numbers; a number that comes twice gives a copy."""
        self.cache.batch_select_indices(rows.to(self.model.device))
        self.mask, self.next_logits = self.mask[rows], self.next_logits[rows]
