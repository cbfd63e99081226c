"""What the targets share: their options, a missing engine, and the comparison of an engine with its source."""

import copy
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_model.errors import UserError, one_line
from hf_model.formats.card_facts import CardFacts
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import probes

TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")
GGUF_TYPES = ("f32", "f16", "q8_0")
TRAINERS = ("original", "nanogpt")
SHARD_SIZE = r"[1-9]\d{0,5}(\.\d{1,6})?[KMGT]B"
MAX_LOGITS = 2**27  # how many are compared: half a gigabyte on either side


@dataclass(frozen=True)
class Options:
    """How to write; each target reads what is its own."""

    card: CardFacts = field(default_factory=CardFacts)
    """What its card says."""
    rounded: str = ""
    """What became of the weights, for the card (`description.rounding`)."""
    max_shard_size: str = "5GB"
    gguf_type: str = "f32"
    quantization: str | None = None
    like: str = "original"

    def __post_init__(self) -> None:
        """Raises UserError for a name that means nothing."""
        for name, names in (("gguf_type", GGUF_TYPES), ("like", TRAINERS)):
            if getattr(self, name) not in names:
                raise UserError(f"{name}={getattr(self, name)!r} is none of {', '.join(names)}")
        if not re.fullmatch(SHARD_SIZE, self.max_shard_size, re.ASCII | re.IGNORECASE):
            raise UserError(f"max_shard_size={self.max_shard_size!r} is no size such as 500MB or 5GB")

    def to_rounded(self) -> str:
        """What the weights were compared with, if they were rounded."""
        return f" to the source's, {self.rounded}" if self.rounded else ""


class MissingEngineError(Exception):
    """The engine that would verify a format is not installed; the message says how to install it."""


def missing(packages: Sequence[str], extra: str) -> str:
    """Which of these packages are not installed and what to do; "" if all are."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if not absent:
        return ""
    return f'{" and ".join(absent)} not installed for {sys.executable}: pip install "custom-gpt-hf[{extra}]"'


def require(packages: Sequence[str], extra: str) -> None:
    """Check that a writer's packages are there.

    Raises:
        UserError: one is not installed.
    """
    if absent := missing(packages, extra):
        raise UserError(absent)


@contextmanager
def blamed_on(what: str) -> Iterator[None]:
    """Turn what an engine raises about a model, of whatever type, into the user's error."""
    try:
        yield
    except (UserError, MissingEngineError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what} ({one_line(error, 300)})") from None


def save_weights(model: PreTrainedModel, folder: Path, max_shard_size: str) -> None:
    """`save_pretrained`, with its errors and the rights of its files like those of any other writing.

    Raises:
        OSError: the disk is full.
    """
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except SafetensorError as error:  # its own form of a full disk
        raise OSError(str(error)) from None
    for weights in folder.glob("*.safetensors"):  # which safetensors lets nobody read but their owner
        shutil.copymode(folder / "config.json", weights)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype are equal as bits: NaN is itself, and 0.0 is not -0.0."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))


def in_float32(model: CustomGPTForCausalLM, activation: str | None = None) -> CustomGPTForCausalLM:
    """The same weights computed in float32, perhaps with another activation; what is float32 already is shared."""
    config = copy.deepcopy(model.config)
    config.dtype = torch.float32
    config.activation_function = activation or config.activation_function
    with torch.device("meta"):
        twin = CustomGPTForCausalLM(config)
    twin.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()}, assign=True)
    twin.tie_weights()
    return twin.eval()


def probe_ids(model: CustomGPTForCausalLM) -> torch.Tensor:
    """Random ids that fill the context, of shape (1, T): every position counts, and what attention mixes up."""
    shape = (1, model.config.block_size)
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def n_compared(model: CustomGPTForCausalLM) -> int:
    """How many of the last positions are compared: all, unless vocabulary and context are very large."""
    return max(1, min(model.config.block_size, MAX_LOGITS // model.config.vocab_size))


@torch.inference_mode()
def logits_of(model: torch.nn.Module, ids: torch.Tensor, keep: int) -> torch.Tensor:
    """Logits of the last `keep` positions of one row of ids, of shape (keep, V), in float32."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0].float()


@dataclass(frozen=True)
class Difference:
    """How far an engine's numbers are from the model's."""

    largest: float
    spread: float
    """The standard deviation of the model's: what the difference is to be judged by."""
    n_positions: int

    def words(self, what: str) -> str:
        if self.largest == 0:
            return f"{what} of {self.n_positions} positions are equal"
        return (
            f"{what} of {self.n_positions} positions differ by at most {self.largest:.1e} "
            f"(their standard deviation is {self.spread:.2g})"
        )


def difference(expected: torch.Tensor, got: torch.Tensor) -> Difference:
    """Compare two tensors of shape (positions, V)."""
    if expected.shape != got.shape:
        raise UserError(f"the engine gave numbers of shape {tuple(got.shape)}, the model {tuple(expected.shape)}")
    return Difference((expected - got).abs().max().item(), expected.std().item(), len(expected))


def check(found: Difference, allowed: float, what: str) -> None:
    """Check that a difference is no larger than what is allowed.

    Raises:
        UserError: it is, or the model's numbers are NaN or infinite.
    """
    if not found.spread < float("inf"):
        raise UserError(f"{what} are NaN or infinite, so there is nothing to compare: --no_verify leaves it out")
    if not found.largest <= allowed:
        raise UserError(f"{found.words(what)}, more than {allowed:.1e}: the files do not hold this model")


def exact(found: Difference) -> float:
    """What is allowed where the same float32 numbers are added up in another order."""
    return 1e-5 * max(1.0, found.spread)


def check_ids(text: str, expected: list[int], got: list[int]) -> None:
    """Check that the target's tokenizer gives the ids of the source's.

    Raises:
        UserError: it does not.
    """
    if expected != got:
        raise UserError(f"the tokenizer encodes {text!r} as {got[:20]}, its source as {expected[:20]}")


def check_written_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Check that the tokenizer in a folder encodes the probes as its source does; how many those are, in words.

    Raises:
        UserError: it does not.
    """
    written = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = probes(tokenizer)
    for text in texts:
        check_ids(text, encode(tokenizer, text), encode(written, text))
    return f"{len(texts)} texts encoded the same"


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text).input_ids
