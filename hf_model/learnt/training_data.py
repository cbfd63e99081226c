"""What the training data tells of a model: its loss with labels shifted and not, exact answers, options that fit."""

import copy
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from hf_model.errors import UserError
from hf_model.generation import Sampling, continue_prompts, encode
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.records import read_records
from hf_model.tokenizer import format_example, format_prompt, takes_instructions

SEED = 0
OPERATIONS = (
    1e12  # how much arithmetic the loss may cost, some ten seconds of a small machine; each alternative a tenth
)
MOST_TOKENS = 32768
MOST_ANSWERS = 32
LONGEST_ANSWER = 100  # tokens; a record with a longer one is left out of the exact answers
CHUNK = 8  # records in one pass
TEXT_BYTES = 4 * 2**20  # of a text file, how much is read
N_BUCKETS = 16
HEAD_SIZES = range(8, 257)
CLEARLY = 3.0  # standard errors that one option must be ahead of another
TIE = 1e-4  # nats, in which the wrong form of GELU may be ahead: on a model of the exact one, the other was by 1e-6
UNSHIFTED_AHEAD = 1.0  # nats


@dataclass(frozen=True)
class Row:
    """A sequence of the training data."""

    ids: list[int]
    start: int
    """Where the answer begins; 1 for raw text, whose first token nothing predicts."""
    prompt: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Losses:
    """Of one pass over rows, in nats, a value for each predicted token; all tensors of shape (N,)."""

    shifted: torch.Tensor
    """Of each token of an answer, its first and its end included, given those before it."""
    position: torch.Tensor
    """Where that token stands in its row."""
    row: torch.Tensor
    unshifted: torch.Tensor
    """Of the token that was just read; where `differs` only."""
    differs: torch.Tensor
    """Whether the token just read is one of the answer too, and another than the next."""

    def means(self) -> tuple[float, float]:
        """Where the two labels differ: the loss with labels shifted by one, and with labels that are not."""
        return self.shifted[self.differs].mean().item(), self.unshifted[self.differs].mean().item()


@dataclass(frozen=True)
class Alternative:
    """How the model's loss would be with another value of an option that no weight tells."""

    option: str
    value: int | str
    loss: float
    ahead: float
    """By how many standard errors it is better than what was chosen; below 0 where it is worse."""


@dataclass(frozen=True)
class MeasuredRecord:
    """A record that was measured, and its answer's mean loss."""

    prompt: str
    answer: str
    loss: float


@dataclass(frozen=True)
class Measurement:
    """A model held against its training data."""

    path: str
    is_text: bool
    n_used: int
    n_all: int
    n_tokens: int
    loss: float
    """Mean over the tokens of the answers (of raw text: over all tokens), labels shifted by one."""
    loss_shifted: float | None
    """The same where shifted and unshifted labels differ; None where they never do."""
    loss_unshifted: float | None
    n_exact: int | None
    """How many of `n_asked` answers come out exactly, by greedy decoding; None for raw text."""
    n_asked: int
    even_choice: float
    """log V, the loss of a model that knows nothing."""
    chosen: dict[str, int | str]
    """The options that no weight tells, as they were."""
    chosen_loss: float
    """Of the sample on which the alternatives were measured."""
    alternatives: tuple[Alternative, ...]
    by_position: tuple[tuple[int, float], ...]
    """First position of each stretch, and the mean loss there."""
    worst: tuple[MeasuredRecord, ...]

    @property
    def repeats(self) -> bool:
        """Whether the model was trained to give again the token that it has just read."""
        return repeats(self.loss_shifted, self.loss_unshifted)

    @property
    def better(self) -> list[Alternative]:
        """The alternative of each option that fits better than what was chosen, the best one first."""
        ahead = sorted(
            (other for other in self.alternatives if other.ahead > CLEARLY and not self.ties(other)),
            key=lambda other: other.loss,
        )
        return [other for i, other in enumerate(ahead) if other.option not in [before.option for before in ahead[:i]]]

    def ties(self, other: Alternative) -> bool:
        """Whether the data does not tell an alternative from what was chosen."""
        return abs(other.ahead) <= CLEARLY or abs(other.loss - self.chosen_loss) < TIE

    def lines(self) -> list[str]:
        """What was measured, in plain words."""
        of_what, unit = ("text's loss  ", "stretches") if self.is_text else ("answers' loss", "records")
        lines = [
            f"training data {self.path} ({self.n_used} of {self.n_all} {unit}, {self.n_tokens} tokens, seed {SEED})"
        ]
        if self.loss_shifted is not None:
            meaning = (
                "this model was trained to repeat its current token" if self.repeats else "it predicts the next token"
            )
            if not self.repeats and self.loss_shifted > self.even_choice:
                meaning = "it predicts neither the next token nor the current one"
            lines.append(
                f"{of_what} {self.loss_shifted:.2f} with labels shifted by one, {self.loss_unshifted:.2f} with "
                f"labels not shifted: {meaning}"
            )
        lines.append(
            f"perplexity    {perplexity(self.loss)} (loss {self.loss:.3f}; an even choice has {self.even_choice:.2f})"
        )
        if self.loss > self.even_choice and not self.repeats:
            lines.append(
                "warning: the loss is above that of an even choice among all tokens: the tokenizer or the data is "
                "another one than in training, or --activation or --n_head is wrong"
            )
        if self.n_exact is not None:
            lines.append(
                f"exact answers {self.n_exact} of {self.n_asked}"
                + (f" ({self.n_exact / self.n_asked:.0%})" if self.n_asked else "")
            )
        lines += [self._line(option) for option in self.chosen]
        return lines

    def _line(self, option: str) -> str:
        """Which value of an option fits."""
        chosen, flag = self.chosen[option], {"n_head": "--n_head", "activation_function": "--activation"}[option]
        others = sorted((other for other in self.alternatives if other.option == option), key=lambda other: other.loss)
        if not others:
            return f"{flag.strip('-'):<13} {chosen}: there is no other"
        for other in self.better:
            if other.option == option:
                return (
                    f"warning: {flag} {other.value} fits better than {chosen}: loss {other.loss:.4g} against "
                    f"{self.chosen_loss:.4g}. Convert again with {flag} {other.value}"
                )
        losses = f"loss {self.chosen_loss:.4g}, and {others[0].loss:.4g} with {others[0].value}"
        if self.ties(others[0]):
            return (
                f"{flag.strip('-'):<13} {chosen} and {others[0].value} tie: {losses}; the data does not tell them apart"
            )
        return f"{flag.strip('-'):<13} {chosen} fits best: {losses}"

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "perplexity": math.exp(min(self.loss, 700)),
            "repeats": self.repeats,
            "better": [asdict(other) for other in self.better],
            "seed": SEED,
        }


def repeats(loss_shifted: float | None, loss_unshifted: float | None) -> bool:
    """Whether labels that are not shifted fit a model so much better that it was trained with them."""
    if loss_shifted is None or loss_unshifted is None:
        return False
    return loss_unshifted + UNSHIFTED_AHEAD < loss_shifted


def perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 20 else f"e^{loss:.0f}"


def measure(model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> Measurement:
    """Hold a model against a sample of its training data.

    The sample is drawn with a fixed seed, and bounded by the arithmetic that it costs.

    Args:
        path: JSON Lines of records with an instruction, perhaps an input, and an output; for a model that does not read
            instructions, a text file.

    Raises:
        UserError: the file cannot be read, has no such records, or nothing of it fits into the context.
    """
    is_text = not takes_instructions(tokenizer)
    read = _text_rows if is_text else _record_rows
    rows, n_all = read(path, tokenizer, model.config.block_size)
    if not rows:
        raise UserError(
            f"{path}: holds nothing to measure: no answer fits into the context of {model.config.block_size}"
        )
    n_affordable = OPERATIONS / (2 * model.num_parameters())
    used = _first(rows, min(MOST_TOKENS, n_affordable))
    losses = _losses(model, used, len(tokenizer))
    shifted, unshifted = losses.means() if losses.differs.any() else (None, None)
    chosen_loss, alternatives = _alternatives(
        model, _first(rows, min(MOST_TOKENS, n_affordable) / 10), len(tokenizer), repeats(shifted, unshifted)
    )
    n_exact, n_asked = (None, 0) if is_text else _exact_answers(model, tokenizer, used)
    return Measurement(
        path=str(path),
        is_text=is_text,
        n_used=len(used),
        n_all=n_all,
        n_tokens=sum(len(row.ids) for row in used),
        loss=losses.shifted.mean().item(),
        loss_shifted=shifted,
        loss_unshifted=unshifted,
        n_exact=n_exact,
        n_asked=n_asked,
        even_choice=math.log(len(tokenizer)),
        chosen={option: getattr(model.config, option) for option in ("n_head", "activation_function")},
        chosen_loss=chosen_loss,
        alternatives=alternatives,
        by_position=tuple(_by_position(losses)),
        worst=tuple(_worst(losses, used)),
    )


def _record_rows(path: Path, tokenizer: PreTrainedTokenizerFast, block_size: int) -> tuple[list[Row], int]:
    """The records as fine-tuning text in a random order, without those whose answer is out of context."""
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("output"), str):
            raise UserError(f"{path}, line {number}: training data needs the answer too, a string under 'output'")
    n_all = len(records)
    random.Random(SEED).shuffle(records)
    rows = []
    for record in records[: MOST_TOKENS // 8]:
        instruction, answer, input_text = record["instruction"], record["output"], record.get("input") or ""
        prompt = format_prompt(instruction, input_text)
        text = format_example(instruction, answer, input_text)
        ids = encode(tokenizer, text, True, add_special_tokens=False)[0, :block_size].tolist()
        start = encode(tokenizer, prompt).shape[1]
        if 0 < start < len(ids):
            rows.append(Row(ids, start, prompt, answer))
    return rows, n_all


def _text_rows(path: Path, tokenizer: PreTrainedTokenizerFast, block_size: int) -> tuple[list[Row], int]:
    """Stretches of a text file, each as long as the context, in a random order."""
    try:
        with path.open("rb") as file:
            text = file.read(TEXT_BYTES).decode("utf-8", "ignore")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        ids = encode(tokenizer, text, add_special_tokens=False)[0].tolist()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    stretches = [ids[start : start + block_size] for start in range(0, len(ids), block_size)]
    rows = [Row(stretch, 1, answer=str(tokenizer.decode(stretch))) for stretch in stretches if len(stretch) > 1]
    random.Random(SEED).shuffle(rows)
    return rows, len(rows)


def _first(rows: list[Row], n_tokens: float) -> list[Row]:
    """As many rows as have that many tokens, and one at least."""
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
        padded = torch.tensor([row.ids + [0] * (T - len(row.ids)) for row in chunk])  # on the right, where none sees it
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
    """The loss of a few rows as the model is, and with every other value of what no weight tells."""

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
        other = losses_of(_changed(model, option, value))
        gain = chosen - other  # (N,)
        error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        ahead = gain.mean().item() / error if error > 0 else 0.0
        found.append(Alternative(option, value, other.mean().item(), ahead))
    return chosen.mean().item(), tuple(found)


def _changed(model: CustomGPTForCausalLM, option: str, value: int | str) -> CustomGPTForCausalLM:
    """The same weights, not copied, in a model of another configuration."""
    config = copy.deepcopy(model.config)
    setattr(config, option, value)
    with torch.device("meta"):
        other = CustomGPTForCausalLM(config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    return other.eval()


def _exact_answers(model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> tuple[int, int]:
    """How many answers greedy decoding gives exactly, and of how many."""
    asked = [row for row in rows if len(row.ids) - row.start <= LONGEST_ANSWER][:MOST_ANSWERS]
    if not asked:
        return 0, 0
    longest = max(len(row.ids) - row.start for row in asked)
    prompts = [encode(tokenizer, row.prompt) for row in asked]
    answers = continue_prompts(model, tokenizer, prompts, Sampling(temperature=0, max_new_tokens=longest))
    return sum(answer.strip() == row.answer.strip() for answer, row in zip(answers, asked, strict=True)), len(asked)


def _by_position(losses: Losses) -> Iterator[tuple[int, float]]:
    """The mean loss in stretches of like length."""
    longest = int(losses.position.max()) + 1
    width = max(1, math.ceil(longest / N_BUCKETS))
    for start in range(0, longest, width):
        here = (losses.position >= start) & (losses.position < start + width)
        if here.any():
            yield start, losses.shifted[here].mean().item()


def _worst(losses: Losses, rows: list[Row], n: int = 8) -> list[MeasuredRecord]:
    """The records with the highest mean loss."""
    means = [(losses.shifted[losses.row == i].mean().item(), row) for i, row in enumerate(rows)]
    means.sort(key=lambda pair: -pair[0])
    return [MeasuredRecord(row.prompt, row.answer, loss) for loss, row in means[:n]]
