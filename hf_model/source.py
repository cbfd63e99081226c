"""Where a model to be written for an engine comes from: the original's two files, or a converted folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_model.checkpoint import Checkpoint, read_checkpoint
from hf_model.description import describe_source
from hf_model.errors import UserError
from hf_model.loading import AUTO_MAP, load_folder, load_original
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM


class Loaded(NamedTuple):
    model: CustomGPTForCausalLM
    tokenizer: PreTrainedTokenizerFast
    """None for a folder without one, where none is needed."""
    checkpoint: Checkpoint | None
    """What the file held; None for a folder."""


@dataclass(frozen=True)
class Source:
    """A `.pt` file with its tokenizer JSON, or a folder: converted, or saved by whatever has trained it since.

    Nothing is kept in memory. The writer of a format reads the source, and its verification reads it again, so that
    nothing which the writer did to its model can hide an error.
    """

    path: Path
    tokenizer_path: Path | None = None
    """None takes a folder's own."""
    dtype: str = "auto"
    n_head: int | None = None
    activation: str = "gelu"

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    def load(self, needs_tokenizer: bool = True) -> Loaded:
        """The model on the CPU, in `dtype`, and its tokenizer; a folder may lack one if `needs_tokenizer` is False.

        Raises:
            UserError: a file or the folder is not what it should be.
        """
        if self.is_folder:
            model, tokenizer = load_folder(self.path, self.tokenizer_path, self.dtype, needs_tokenizer)
            if getattr(model.config, "quantization_config", None) is not None:
                raise UserError(
                    f"{self.path}: is quantized, so its weights are not the model's: convert the full model"
                )
            model.config.auto_map = AUTO_MAP  # a trainer may have saved a part of it
            return Loaded(model, tokenizer, None)
        if self.tokenizer_path is None:
            raise UserError(f"{self.path}: is a file, so the tokenizer must be given too")
        return Loaded(
            *load_original(
                self.path, self.tokenizer_path, dtype=self.dtype, n_head=self.n_head, activation=self.activation
            )
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors as they stand in the source, mapped anew; a tied head among them."""
        if self.is_folder:
            return AutoModelForCausalLM.from_pretrained(self.path, trust_remote_code=False).state_dict()
        weights = read_checkpoint(self.path, check_bytes=False).state_dict
        weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
        return weights

    def describe(self, checkpoint: Checkpoint | None) -> str:
        return f"{self.path} (a folder)" if checkpoint is None else describe_source(checkpoint)
