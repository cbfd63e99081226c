"""Where a model to be written for an engine comes from: a trainer's files, or a converted folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_model.description import describe_source
from hf_model.errors import UserError
from hf_model.folder import read_config
from hf_model.loading import AUTO_MAP, check_weights, load_folder, own_vocabulary, prompt_choice, read_original
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import FoundTokenizer, ModelInfo, find_tokenizer
from hf_model.trainers import Checkpoint, read_checkpoint


class Loaded(NamedTuple):
    model: CustomGPTForCausalLM
    tokenizer: PreTrainedTokenizerFast
    """None for a folder without one, where none is needed."""
    checkpoint: Checkpoint | None
    """What the file held; None for a folder."""
    vocabulary: FoundTokenizer | None
    """Where the tokenizer was taken from."""
    choices: tuple[tuple[str, str], ...] = ()
    """What the user did not say: what it is, and what was taken and why."""


@dataclass(frozen=True)
class Source:
    """A `.pt` file with its vocabulary, or a folder: converted, or saved by whatever has trained it since.

    Nothing is kept in memory. The writer of a format reads the source, and its verification reads it again, so that
    nothing which the writer did to its model can hide an error.
    """

    path: Path
    tokenizer_path: str | Path | None = None
    """As in `loading.read_original`; None takes a folder's own."""
    dtype: torch.dtype | str = "auto"
    n_head: int | None = None
    activation: str = "auto"
    characters_of: str | Path | None = None
    raw: bool = False

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    def load(self, needs_tokenizer: bool = True) -> Loaded:
        """The model on the CPU, in `dtype`, and its tokenizer; a folder may lack one if `needs_tokenizer` is False.

        Raises:
            UserError: a file or the folder is not what it should be.
        """
        if self.is_folder:
            model, vocabulary = load_folder(
                self.path,
                self.tokenizer_path,
                self.dtype,
                characters_of=self.characters_of,
                raw=self.raw,
                needs_tokenizer=needs_tokenizer,
            )
            if getattr(model.config, "quantization_config", None) is not None:
                raise UserError(
                    f"{self.path}: is quantized, so its weights are not the model's: convert the full model"
                )
            model.config.auto_map = AUTO_MAP  # a trainer may have saved a part of it
            tokenizer: Any = None if vocabulary is None else vocabulary.tokenizer
            return Loaded(model, tokenizer, None, vocabulary, prompt_choice(tokenizer) if vocabulary else ())
        original = read_original(
            self.path,
            self.tokenizer_path,
            dtype=self.dtype,
            n_head=self.n_head,
            activation=self.activation,
            characters_of=self.characters_of,
            raw=self.raw,
        )
        vocabulary = original.vocabulary
        return Loaded(original.model, vocabulary.tokenizer, original.checkpoint, vocabulary, original.choices)

    def vocabulary(self) -> FoundTokenizer:
        """The vocabulary as it stands in the source, read anew."""
        if self.is_folder and self.tokenizer_path is None and self.characters_of is None:
            return own_vocabulary(self.path)
        if self.is_folder:
            config = read_config(self.path)
            model = ModelInfo(self.path, config.vocab_size, config.block_size)
        else:
            checkpoint = read_checkpoint(self.path, check_bytes=False)
            architecture = checkpoint.architecture(self.n_head)
            model = ModelInfo(self.path, architecture.vocab_size, architecture.block_size, checkpoint.dataset)
        return find_tokenizer(self.tokenizer_path, model, characters_of=self.characters_of, raw=self.raw)

    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors as they stand in the source, mapped anew; a tied head among them."""
        if self.is_folder:
            config = read_config(self.path)
            return AutoModelForCausalLM.from_pretrained(
                self.path,
                config=config,
                dtype=check_weights(self.path, config) or "auto",
                use_safetensors=True,
                trust_remote_code=False,
            ).state_dict()
        weights = read_checkpoint(self.path, check_bytes=False).state_dict
        weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
        return weights

    def describe(self, checkpoint: Checkpoint | None) -> str:
        return f"{self.path} (a folder)" if checkpoint is None else describe_source(checkpoint)
