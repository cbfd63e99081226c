"""How the formats are verified: an engine's numbers against the model of the source, its ids against the tokenizer."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_model.errors import UserError
from hf_model.loading import Source, with_weights
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import FoundTokenizer, probes

MAX_LOGITS = 2**27  # compared at most: half a gigabyte on either side


def compared_with(source: Source) -> str:
    """The words before the result of a comparison, which tell what it was compared with and no more."""
    if source.module is not None:
        return "compared with your model: "
    return f"compared with the {'folder' if source.is_folder else 'file'}: "


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits: NaN equals NaN, and 0.0 differs from -0.0."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))


def equal_tensors(n_tensors: int, rounded: str) -> str:
    return f"{n_tensors} tensors equal bit for bit" + (f" to the source's, {rounded}" if rounded else "")


def in_float32(model: CustomGPTForCausalLM, activation: str | None = None) -> CustomGPTForCausalLM:
    """The model with its weights in float32, which are shared if they are float32 already.

    Args:
        activation: computed in place of the model's own; None for its own.
    """
    config = copy.deepcopy(model.config)
    config.dtype = torch.float32
    config.activation_function = activation or config.activation_function
    return with_weights(config, {name: tensor.float() for name, tensor in model.state_dict().items()})


def reference_logits(model: CustomGPTForCausalLM, activation: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids that fill the context, of shape (1, T), and the model's float32 logits, of shape (positions, V).

    The positions are the last ones: all T, unless vocabulary and context are very large.
    """
    T, V = model.config.block_size, model.config.vocab_size
    ids = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(0))
    return ids, logits_of(in_float32(model, activation), ids, n_last=max(1, min(T, MAX_LOGITS // V)))


@torch.inference_mode()
def logits_of(model: torch.nn.Module, ids: torch.Tensor, n_last: int) -> torch.Tensor:
    """Logits of the last positions of one row of ids, of shape (n_last, V), in float32."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=n_last).logits[0].float()


@dataclass(frozen=True)
class Difference:
    """How far an engine's numbers are from the model's."""

    what: str
    """What was compared, such as "the logits"."""
    largest: float
    spread: float
    """The standard deviation of the model's numbers, by which the largest difference is judged."""
    n_positions: int

    def __str__(self) -> str:
        numbers, others = f"{self.what} of {self.n_positions} positions", "those of the model for transformers"
        if self.largest == 0:
            return f"{numbers} are equal to {others}"
        off = f"{self.largest:.1e} (their standard deviation is {self.spread:.2g})"
        return f"{numbers} differ by at most {off} from {others}"

    @property
    def rounding(self) -> float:
        """What the sums of float32 may differ by if they are added up in another order."""
        return 1e-5 * max(1.0, self.spread)

    def check(self, allowed: float) -> None:
        """Raise UserError if the difference is larger than `allowed`, or if the model's numbers are not finite."""
        if not self.spread < float("inf"):
            raise UserError(
                f"{self.what} are NaN or infinite and cannot be compared: add --no_verify to leave this out"
            )
        if not self.largest <= allowed:
            raise UserError(f"{self}, more than {allowed:.1e}: the files do not hold this model")


def compare(what: str, expected: torch.Tensor, got: torch.Tensor) -> Difference:
    """The difference of two tensors of shape (positions, V).

    Raises:
        UserError: they have different shapes.
    """
    if expected.shape != got.shape:
        raise UserError(f"the engine gave {what} of shape {tuple(got.shape)}, the model {tuple(expected.shape)}")
    return Difference(what, (expected - got).abs().max().item(), expected.std().item(), len(expected))


def check_ids(found: FoundTokenizer, texts: Sequence[str], encoded: Sequence[list[int]]) -> str:
    """Check that texts were encoded as their source's tokenizer encodes them, and say so.

    Raises:
        UserError: one was not.
    """
    for text, got in zip(texts, encoded, strict=True):
        if got != (expected := found.encode(text)):
            raise UserError(
                f"the tokenizer encodes {text!r} differently from {found.taken}: as {got[:20]}, not {expected[:20]}"
            )
    return f"{len(texts)} texts encoded the same"


def check_tokenizer_files(folder: Path, source: Source) -> str:
    """`check_ids` for the tokenizer that AutoTokenizer loads from a folder."""
    found = source.find_tokenizer()
    written = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = probes(found.tokenizer)
    return check_ids(found, texts, [written(text, verbose=False).input_ids for text in texts])
