"""Text from a prompt, on the stock `model.generate`: what `generate.py` does between its arguments and its output."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers.decoders import DecodeStream
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)
from transformers.generation.streamers import BaseStreamer

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.conversion import default_generation, load_original
from hf_model.errors import UserError, memory_for, one_line
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenization import check_vocabulary, convert_tokenizer


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, or the best one there is: cuda, then mps, then the CPU.

    Raises:
        UserError: there is no such device.
    """
    accelerators = [
        *(f"cuda:{index}" for index in range(torch.cuda.device_count())),
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]
    if name is None:
        return torch.device(accelerators[0] if accelerators else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("holds no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # each backend has its own way of not being there
        raise UserError(
            f"--device {name}: there is no such device here; there is {', '.join([*accelerators, 'cpu'])}"
        ) from None
    return device


@memory_for("to load the model")
def load(
    checkpoint_path: str | Path,
    tokenizer_path: str | Path | None,
    *,
    device: torch.device,
    dtype: str = "auto",
    n_head: int | None = None,
    activation: str = "gelu",
) -> tuple[CustomGPTForCausalLM, PreTrainedTokenizerFast]:
    """Load the original's checkpoint file, or a converted folder.

    Args:
        checkpoint_path: a `.pt` file (converted in memory, memory-mapped, nothing written) or a folder.
        tokenizer_path: the original's tokenizer JSON; None takes the folder's own.
        device: where the model goes.
        dtype: `"auto"` for that of the weights, or the name of a torch dtype.
        n_head, activation: as in `load_original`, for a file.

    Raises:
        UserError: a file or the folder is not what it should be.
    """
    if Path(checkpoint_path).is_dir():
        model, tokenizer = _load_folder(Path(checkpoint_path), tokenizer_path, dtype)
    else:
        if tokenizer_path is None:
            raise UserError(f"{checkpoint_path}: is a file, so the tokenizer must be given too")
        model, tokenizer, _ = load_original(
            checkpoint_path, tokenizer_path, dtype=dtype, n_head=n_head, activation=activation
        )
    return model.to(device), tokenizer


def _load_folder(
    folder: Path, tokenizer_path: str | Path | None, dtype: str
) -> tuple[CustomGPTForCausalLM, PreTrainedTokenizerFast]:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no model (no config.json)")
    try:
        # A stranger's folder may name code of its own; the library would ask on the terminal whether to run it.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, CustomGPTConfig):
            raise UserError(
                f"{folder}: holds a model of type {config.model_type!r}, not {CustomGPTConfig.model_type!r}"
            )
        _check_sizes(folder, config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        model, loading = loaded
        if astray := sorted(loading["missing_keys"] | loading["unexpected_keys"]):  # the library would go on without
            raise UserError(f"{folder}: its config.json and its weights do not belong together ({', '.join(astray)})")
        if tokenizer_path is None:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        else:
            tokenizer = convert_tokenizer(tokenizer_path, model_max_length=config.block_size)
            model.generation_config = default_generation(tokenizer, config.vocab_size)
        check_vocabulary(tokenizer, config.vocab_size, tokenizer_path or folder, folder)
        return model, tokenizer
    except UserError:
        raise
    # The folder's files are not to be trusted in anything: whatever they trip in the library is their fault.
    except Exception as error:
        raise UserError(f"{folder}: cannot be loaded ({one_line(error, 200)})") from None


def _check_sizes(folder: Path, config: CustomGPTConfig) -> None:
    """Refuse sizes that the weights cannot have, for which the library would first take the time and the memory."""
    layers: set[str] = set()
    n_bytes = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:  # reads names and shapes only
            layers.update(found[1] for name in file.keys() if (found := re.search(r"\bh\.(\d+)\.", name)))  # noqa: SIM118
        n_bytes += path.stat().st_size
    if not n_bytes:
        raise UserError(f"{folder}: cannot be loaded (no file named model.safetensors, nor a part of it)")
    n_weights = (config.vocab_size + config.block_size + 12 * config.n_layer * config.n_embd) * config.n_embd
    if config.n_layer > len(layers) or n_weights > 2 * n_bytes:  # the narrowest weights have four bits
        raise UserError(
            f"{folder}: its config.json and its weights do not belong together (n_layer={config.n_layer}, "
            f"n_embd={config.n_embd}, vocab_size={config.vocab_size} and block_size={config.block_size} are "
            f"more than the weights' {len(layers)} layers and {n_bytes:,} bytes)"
        )


@dataclass(frozen=True)
class Sampling:
    """How to sample; the defaults are the original script's."""

    max_new_tokens: int = 150
    temperature: float = 0.8
    """0 means greedy decoding."""
    top_k: int = 50
    """0 means all tokens."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    seed: int = 1337

    def kwargs(self) -> dict[str, Any]:
        """Arguments of `model.generate`."""
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if self.temperature > 0:
            how = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {
            **how,
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "num_return_sequences": self.num_return_sequences,
        }


class TokenStream(BaseStreamer):
    """Gathers the tokens of a generation as they come, and gives each new piece of text to a function.

    The pieces of a single sequence add up to its text in `Generation`. (The library's `TextStreamer` decodes everything
    anew for each token, which is slow in long texts.) Of several sequences, the tokens are only kept.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], None], prompt_text: bool):
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.prompt_text = prompt_text
        """Whether the prompt and special tokens belong to the text."""
        self.awaits_prompt = True
        self.ids: list[int] = []
        """The tokens that the text is made of, as integers: thousands of little tensors would scatter the heap."""
        self.rows: list[list[int]] = []
        """Of several sequences, the new tokens of each."""
        self.decoder = DecodeStream(skip_special_tokens=not prompt_text)
        self.length = 0
        self.has_begun = False

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
                self._emit(self.decoder.step(self.tokenizer.backend_tokenizer, token_id) or "")

    def end(self) -> None:
        """Give what the decoder still holds: bytes that never became a character."""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=not self.prompt_text)
        self._emit(text[self.length :])

    def _emit(self, piece: str) -> None:
        # The space between "Response:" and the response belongs to the format.
        shown = piece if self.prompt_text or self.has_begun else piece.lstrip()
        self.length += len(piece)
        self.has_begun = self.has_begun or bool(shown)
        if shown:
            self.on_text(shown)


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
    """What came out of one call."""

    texts: list[str]
    """Each sequence with its prompt and special tokens, or the bare response."""
    new_tokens: int
    """Over all sequences, [EOS] included."""
    seconds: float


def encode(tokenizer: PreTrainedTokenizerFast, content: str, parse_special_tokens: bool = False) -> torch.Tensor:
    """Token ids of shape (1, T): `[BOS]` and the content.

    `parse_special_tokens` says whether "[EOS]" typed by a user is the special token (as in the original) or text.
    """
    # A command line's bytes that are no UTF-8 arrive as unpaired surrogates, which no tokenizer takes.
    content = content.encode("utf-8", "replace").decode("utf-8")
    return tokenizer(content, return_tensors="pt", split_special_tokens=not parse_special_tokens).input_ids


DRAWING = threading.RLock()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Threads take turns: torch has one random generator for all of them, and each must draw what it would alone."""
    with DRAWING:
        torch.manual_seed(seed)
        yield


@contextmanager
def _no_distribution() -> Iterator[None]:
    """Turn torch's refusal to draw from probabilities that are not numbers into the user's error."""
    try:
        yield
    except RuntimeError as error:
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
    stream = TokenStream(tokenizer, on_text, prompt_text=not response_only)
    input_ids = input_ids.to(model.device)
    prompt = input_ids[0].tolist()

    def text(ids: list[int]) -> str:
        if response_only:
            return tokenizer.decode(ids, skip_special_tokens=True).lstrip()
        return tokenizer.decode(prompt + ids)

    try:
        with _seeded(sampling.seed):
            start = time.perf_counter()
            sequences = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                streamer=stream,
                logits_processor=LogitsProcessorList([OnlyNumbers()]),
                **sampling.kwargs(),
            )  # (num_return_sequences, T + new)
            seconds = time.perf_counter() - start
    except KeyboardInterrupt:
        stream.end()
        on_text("\n".join(text(_up_to(tokenizer.eos_token_id, row)) for row in stream.rows))
        raise
    responses = [_up_to(tokenizer.eos_token_id, row) for row in sequences[:, len(prompt) :].tolist()]
    return Generation([text(ids) for ids in responses], new_tokens=sum(map(len, responses)), seconds=seconds)


@memory_for("to generate")
@_no_distribution()
def continue_prompts(
    model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[torch.Tensor], sampling: Sampling
) -> list[str]:
    """The bare responses to several prompts, each of shape (1, T), in one left-padded batch.

    Raises:
        UserError: the model's logits are NaN or infinite.
    """
    batch = tokenizer.pad({"input_ids": [prompt[0].tolist() for prompt in prompts]}, return_tensors="pt")
    with _seeded(sampling.seed):
        sequences = model.generate(
            **batch.to(model.device), logits_processor=LogitsProcessorList([OnlyNumbers()]), **sampling.kwargs()
        )  # (B, T + new)
    responses = sequences[:, batch.input_ids.shape[1] :].tolist()
    return [
        tokenizer.decode(_up_to(tokenizer.eos_token_id, ids), skip_special_tokens=True).lstrip() for ids in responses
    ]


def _up_to(eos_token_id: int, ids: list[int]) -> list[int]:
    """The ids up to and including the first [EOS]; a sequence that ends before its neighbours is padded after it."""
    return ids[: ids.index(eos_token_id) + 1] if eos_token_id in ids else ids
