"""What training data tells of a model: its loss with labels shifted or not, its exact answers, the options that fit."""

import copy
import math
import random
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from hf_model.errors import UserError
from hf_model.generation import LONG_TEXT, LONG_TOKENS, Sampling, continue_prompts, encode, encode_example
from hf_model.learnt.diagnosis import Finding
from hf_model.loading import with_weights
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.records import read_records
from hf_model.tokenizer import example_texts, prompt_text, takes_instructions

SEED = 0
OPERATIONS = 1e12  # for the loss, some ten seconds on a small machine; each alternative gets a tenth of it
MOST_TOKENS = 32768
MOST_ANSWERS = 32
LONGEST_ANSWER = 100  # tokens
CHUNK = 8  # records in one pass
TEXT_BYTES = 4 * 2**20  # read from the start of a file of text or token ids
BEGINNING = 16  # tokens
N_BEGINNINGS = 4
N_WORST = 8
N_BUCKETS = 16
HEAD_SIZES = range(8, 257)
CLEARLY = 3.0  # standard errors by which a better option must be ahead
TIE = 1e-4  # nats; smaller differences do not decide: the wrong form of GELU was once ahead by 1e-6
UNSHIFTED_AHEAD = 1.0  # nats
OPTIONS = {"n_head": "--n_head", "activation_function": "--activation"}  # those that no weight tells


@dataclass(frozen=True)
class Row:
    """A sequence of the training data."""

    ids: list[int]
    start: int
    """Where the answer begins; 1 for raw text, whose first token nothing predicts."""
    prompt_ids: tuple[int, ...] = ()
    prompt: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Losses:
    """The losses of some rows in nats, one value for each predicted token; all tensors have the shape (N,)."""

    shifted: torch.Tensor
    """The loss of each token of an answer, its first token and its end included, given the tokens before it."""
    position: torch.Tensor
    """The token's position in its row."""
    row: torch.Tensor
    unshifted: torch.Tensor
    """The loss of the token just read; meaningful where `differs` is true."""
    differs: torch.Tensor
    """Whether the token just read belongs to the answer and differs from the next one."""


@dataclass(frozen=True)
class Alternative:
    """The model's loss with another value of an option that no weight tells."""

    option: str
    value: int | str
    loss: float
    ahead: float
    """By how many standard errors this value is better than the chosen one; negative where it is worse."""


@dataclass(frozen=True)
class MeasuredRecord:
    """A record, the mean loss of its answer, and the model's own greedy answer (None for raw text)."""

    prompt: str
    answer: str
    loss: float
    own: str | None


@dataclass(frozen=True)
class Measurement:
    """A model compared with its training data."""

    path: str
    is_text: bool
    n_used: int
    n_all: int
    n_tokens: int
    loss: float
    """Mean over the tokens of the answers (for raw text: over all tokens), labels shifted by one."""
    loss_shifted: float | None
    """The same where shifted and unshifted labels differ; None where they never do."""
    loss_unshifted: float | None
    repeats: bool
    """Whether the model was trained to repeat the token that it has just read."""
    n_exact: int | None
    """How many of `n_asked` answers greedy decoding gives exactly; None for raw text."""
    n_asked: int
    even_choice: float
    """log V, the loss of a model that finds all tokens equally likely."""
    chosen: dict[str, int | str]
    """The options that no weight tells, and their values."""
    chosen_loss: float
    """The loss on the sample on which the alternatives were measured."""
    alternatives: tuple[Alternative, ...]
    by_position: tuple[tuple[int, float], ...]
    """The first position of each stretch of the context, and the mean loss there."""
    worst: tuple[MeasuredRecord, ...]
    beginnings: tuple[tuple[str, str], ...]
    """For raw text, the beginnings of some stretches and their continuations."""

    @property
    def unit(self) -> str:
        return "stretches" if self.is_text else "records"

    @property
    def fits_badly(self) -> bool:
        """Whether the loss is above that of an even choice, though the model does not repeat its tokens."""
        return self.loss > self.even_choice and not self.repeats

    @property
    def better(self) -> list[Alternative]:
        """For each option, the alternative that fits best, if it fits better than the chosen value; best one first.

        A value whose loss is above that of an even choice does not fit, however far ahead it is.
        """
        fitting = [other for other in self.alternatives if other.loss < self.even_choice]
        ahead = [other for other in fitting if other.ahead > CLEARLY and not self.ties(other)]
        ahead.sort(key=lambda other: other.loss)
        return [other for i, other in enumerate(ahead) if other.option not in [before.option for before in ahead[:i]]]

    def ties(self, other: Alternative) -> bool:
        """Whether the data cannot decide between an alternative and the chosen value."""
        return abs(other.ahead) <= CLEARLY or abs(other.loss - self.chosen_loss) < TIE

    def findings(self) -> Iterator[Finding]:
        """What was measured, in plain words; the first finding names the data."""
        size = f"{self.n_used} of {self.n_all} {self.unit}, {self.n_tokens} tokens, seed {SEED}"
        yield Finding("training data", f"{self.path} ({size})")
        if self.loss_shifted is not None:
            meaning = "it predicts the next token"
            if self.repeats:
                meaning = "this model was trained to repeat its current token"
            elif self.loss_shifted > self.even_choice:
                meaning = "it predicts neither the next token nor the current one"
            yield Finding(
                "text's loss" if self.is_text else "answers' loss",
                f"{self.loss_shifted:.2f} with labels shifted by one, {self.loss_unshifted:.2f} with labels not "
                f"shifted: {meaning}",
            )
        perplexity = f"{math.exp(self.loss):,.2f}" if self.loss < 20 else f"e^{self.loss:.0f}"
        yield Finding("perplexity", f"{perplexity} (loss {self.loss:.3f}; an even choice has {self.even_choice:.2f})")
        if self.fits_badly:
            yield Finding(
                "warning",
                "the loss is above that of an even choice among all tokens: the tokenizer or the data is not the one "
                "of the training, or --activation or --n_head is wrong",
            )
        if self.n_exact is not None:
            share = f" ({self.n_exact / self.n_asked:.0%})" if self.n_asked else ""
            yield Finding("exact answers", f"{self.n_exact} of {self.n_asked}{share}")
        for option in self.chosen:
            yield self._option_finding(option)

    def _option_finding(self, option: str) -> Finding:
        """Which value of an option fits."""
        chosen, flag = self.chosen[option], OPTIONS[option]
        others = sorted((other for other in self.alternatives if other.option == option), key=lambda other: other.loss)
        name = flag.strip("-")
        if not others:
            return Finding(name, f"{chosen}: there is no other")
        own, best = _told_apart(self.chosen_loss, others[0].loss)
        losses = f"loss {own}, and {best} with {others[0].value}"
        for other in self.better:
            if other.option == option:
                return Finding(
                    "warning",
                    f"{flag} {other.value} fits better than {chosen}: loss {best} against {own}. "
                    f"Convert again with {flag} {other.value}",
                )
        if self.fits_badly and others[0].loss >= self.even_choice:
            return Finding(name, f"no value fits this data: {chosen} has {losses}")
        if self.ties(others[0]):
            return Finding(name, f"{chosen} and {others[0].value} tie: {losses}; the data does not tell them apart")
        return Finding(name, f"{chosen} fits best: {losses}")

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON, with those that the fields lead to."""
        return {
            **asdict(self),
            "perplexity": math.exp(min(self.loss, 700)),
            "better": [asdict(other) for other in self.better],
            "seed": SEED,
        }


def _told_apart(one: float, other: float) -> tuple[str, str]:
    """Two losses, with four digits or as many as tell them apart."""
    for digits in range(4, 9):
        texts = f"{one:.{digits}g}", f"{other:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts


def measure(model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> Measurement:
    """Compare a model with a sample of its training data.

    The sample is drawn with a fixed seed. Its size is bounded by the arithmetic that the losses cost.

    Args:
        path: JSON Lines of records with an instruction, an optional input and an output; for a model of raw text, a
            text file; for any model nanoGPT's train.bin, which holds token ids of 16 bits.

    Raises:
        UserError: the file cannot be read, has no such records, or nothing in it fits into the context.
    """
    has_ids = path.suffix == ".bin"
    is_text = has_ids or not takes_instructions(tokenizer)
    read = _id_rows if has_ids else _text_rows if is_text else _record_rows
    rows, n_all = read(path, tokenizer, model.config.block_size)
    if not rows:
        raise UserError(
            f"{path}: holds nothing to measure: no answer fits into the context of {model.config.block_size}"
        )
    n_tokens = min(MOST_TOKENS, OPERATIONS / (2 * model.num_parameters()))
    used = _first(rows, n_tokens)
    losses = _losses(model, used, len(tokenizer))
    shifted, unshifted = None, None
    if losses.differs.any():
        shifted, unshifted = (loss[losses.differs].mean().item() for loss in (losses.shifted, losses.unshifted))
    repeats = shifted is not None and unshifted is not None and unshifted + UNSHIFTED_AHEAD < shifted
    chosen_loss, alternatives = _alternatives(model, _first(rows, n_tokens / 10), len(tokenizer), repeats)
    n_exact, n_asked = None, 0
    if not is_text:
        asked = [row for row in used if len(row.ids) - row.start <= LONGEST_ANSWER][:MOST_ANSWERS]
        answers = _own_answers(model, tokenizer, asked)
        n_asked = len(asked)
        n_exact = sum(answer.strip() == row.answer.strip() for answer, row in zip(answers, asked, strict=True))
    return Measurement(
        path=str(path),
        is_text=is_text,
        n_used=len(used),
        n_all=n_all,
        n_tokens=sum(len(row.ids) for row in used),
        loss=losses.shifted.mean().item(),
        loss_shifted=shifted,
        loss_unshifted=unshifted,
        repeats=repeats,
        n_exact=n_exact,
        n_asked=n_asked,
        even_choice=math.log(len(tokenizer)),
        chosen={option: getattr(model.config, option) for option in OPTIONS},
        chosen_loss=chosen_loss,
        alternatives=alternatives,
        by_position=tuple(_by_position(losses)),
        worst=tuple(_worst(model, tokenizer, losses, used, is_text)),
        beginnings=tuple(_beginnings(tokenizer, used)) if is_text else (),
    )


def _record_rows(path: Path, tokenizer: PreTrainedTokenizerFast, block_size: int) -> tuple[list[Row], int]:
    """The records as fine-tuning text in a random order, without those whose answer is out of the context."""
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("output"), str):
            raise UserError(f"{path}, line {number}: training data needs the answer too, a string under 'output'")
    n_all = len(records)
    random.Random(SEED).shuffle(records)
    rows = []
    longest = max(LONG_TEXT, LONG_TOKENS * block_size)  # characters: a context has no place for more
    for record in records[: MOST_TOKENS // 8]:
        asked, answer = (record["instruction"], record.get("input") or ""), record["output"]
        try:
            prompt, end = example_texts(tokenizer, answer, *asked)
            if len(prompt) > longest:
                continue
            ids = encode_example(tokenizer, (prompt + end)[:longest])[0, :block_size].tolist()
            prompt_ids = encode_example(tokenizer, prompt)[0].tolist()
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        # A token may hold the prompt's last characters and the answer's first ones: it counts as the answer's.
        pairs = enumerate(zip(ids, prompt_ids, strict=False))
        start = next((n for n, (one, other) in pairs if one != other), len(prompt_ids))
        if 0 < start < len(ids):
            rows.append(Row(ids, start, tuple(prompt_ids), prompt_text(tokenizer, *asked), answer))
    return rows, n_all


def _text_rows(path: Path, tokenizer: PreTrainedTokenizerFast, block_size: int) -> tuple[list[Row], int]:
    """Stretches of a text file, each as long as the context, in a random order."""
    text = _start_of(path).decode("utf-8", "ignore")
    try:
        ids = encode(tokenizer, text, add_special_tokens=False)[0].tolist()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return _stretches(ids, tokenizer, block_size)


def _id_rows(path: Path, tokenizer: PreTrainedTokenizerFast, block_size: int) -> tuple[list[Row], int]:
    """Stretches of nanoGPT's train.bin or val.bin: unsigned 16-bit token ids, in the byte order of the machine.

    Format: https://github.com/karpathy/nanoGPT/blob/master/data/openwebtext/prepare.py
    """
    content = _start_of(path)
    ids = [number for (number,) in struct.iter_unpack("=H", content[: len(content) // 2 * 2])]
    if ids and max(ids) >= len(tokenizer):
        raise UserError(
            f"{path}: holds the token id {max(ids)}, but the tokenizer has {len(tokenizer)} tokens: it is not "
            "nanoGPT's data (token ids of 16 bits), or was made with another tokenizer"
        )
    return _stretches(ids, tokenizer, block_size)


def _start_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(TEXT_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _stretches(ids: list[int], tokenizer: PreTrainedTokenizerFast, block_size: int) -> tuple[list[Row], int]:
    """The ids in stretches, each as long as the context, in a random order."""
    stretches = [ids[start : start + block_size] for start in range(0, len(ids), block_size)]
    rows = [Row(stretch, 1, answer=str(tokenizer.decode(stretch))) for stretch in stretches if len(stretch) > 1]
    random.Random(SEED).shuffle(rows)
    return rows, len(rows)


def _first(rows: list[Row], n_tokens: float) -> list[Row]:
    """The first rows, up to this many tokens, and at least one."""
    chosen: list[Row] = []
    seen = 0
    for row in rows:
        if chosen and seen + len(row.ids) > n_tokens:
            break
        chosen.append(row)
        seen += len(row.ids)
    return chosen


@torch.inference_mode()
def _losses(model: CustomGPTForCausalLM, rows: list[Row], n_tokens: int) -> Losses:
    """The losses of every token of the answers; ids past the tokenizer's are left out of the choice."""
    parts: list[tuple[torch.Tensor, ...]] = []
    for first in range(0, len(rows), CHUNK):
        chunk = rows[first : first + CHUNK]
        T = max(len(row.ids) for row in chunk)
        padded = torch.tensor([row.ids + [0] * (T - len(row.ids)) for row in chunk])  # on the right: nothing sees it
        logits = model(padded.to(model.device), use_cache=False).logits[..., :n_tokens].float().cpu()  # (B, T, V)
        for i, row in enumerate(chunk):
            ids, n = torch.tensor(row.ids), len(row.ids)
            at, now, following = logits[i, row.start - 1 : n - 1], ids[row.start - 1 : n - 1], ids[row.start :]
            differs = now != following
            differs[: 0 if row.prompt == "" else 1] = False  # the prompt's last token is no label of either kind
            parts.append(
                (
                    cross_entropy(at, following, reduction="none"),
                    torch.arange(row.start, n),
                    torch.full((n - row.start,), first + i),
                    cross_entropy(at, now, reduction="none"),
                    differs,
                )
            )
    return Losses(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _alternatives(
    model: CustomGPTForCausalLM, rows: list[Row], n_tokens: int, repeats: bool
) -> tuple[float, tuple[Alternative, ...]]:
    """The loss of a few rows with the model as it is, and with every other value of the options."""

    def losses_of(other: CustomGPTForCausalLM) -> torch.Tensor:
        losses = _losses(other, rows, n_tokens)
        return losses.unshifted[losses.differs] if repeats and losses.differs.any() else losses.shifted

    C, config = model.config.n_embd, model.config
    values: list[tuple[str, int | str]] = [
        *(("n_head", n) for n in range(1, C + 1) if C % n == 0 and C // n in HEAD_SIZES and n != config.n_head),
        ("activation_function", "gelu_new" if config.activation_function == "gelu" else "gelu"),
    ]
    chosen = losses_of(model)
    found = []
    for option, value in values:
        changed = copy.deepcopy(config)
        setattr(changed, option, value)
        other = losses_of(with_weights(changed, model.state_dict()))
        gain = chosen - other  # (N,)
        error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        ahead = gain.mean().item() / error if error > 0 else 0.0
        found.append(Alternative(option, value, other.mean().item(), ahead))
    return chosen.mean().item(), tuple(found)


def _own_answers(model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[str]:
    """The model's greedy answers to the prompts of these rows."""
    if not rows:
        return []
    longest = min(LONGEST_ANSWER, max(len(row.ids) - row.start for row in rows))
    prompts = [torch.tensor([row.prompt_ids]) for row in rows]
    return continue_prompts(model, tokenizer, prompts, Sampling(temperature=0, max_new_tokens=longest))


def _by_position(losses: Losses) -> Iterator[tuple[int, float]]:
    """The mean loss in stretches of equal length."""
    longest = int(losses.position.max()) + 1
    width = max(1, math.ceil(longest / N_BUCKETS))
    for start in range(0, longest, width):
        here = (losses.position >= start) & (losses.position < start + width)
        if here.any():
            yield start, losses.shifted[here].mean().item()


def _worst(
    model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, losses: Losses, rows: list[Row], is_text: bool
) -> Iterator[MeasuredRecord]:
    """The records with the highest mean loss, the highest first."""
    means = [(losses.shifted[losses.row == i].mean().item(), row) for i, row in enumerate(rows)]
    worst = sorted(means, key=lambda pair: -pair[0])[:N_WORST]
    own = [None] * len(worst) if is_text else _own_answers(model, tokenizer, [row for _, row in worst])
    for (loss, row), answer in zip(worst, own, strict=True):
        yield MeasuredRecord(row.prompt, row.answer, loss, answer)


def _beginnings(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> Iterator[tuple[str, str]]:
    """The beginnings of the first rows, and how each goes on."""
    for row in rows[:N_BEGINNINGS]:
        n = min(BEGINNING, len(row.ids) // 2)
        yield str(tokenizer.decode(row.ids[:n])), str(tokenizer.decode(row.ids[n:]))
