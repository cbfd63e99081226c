"""Tiny models and files in the original's formats, and where the example's files are."""

from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from examples.plain_gpt import GPT, GPTConfig, save_checkpoint
from hf_model import CustomGPTConfig, CustomGPTForCausalLM
from hf_model.loading import Source

ROOT = Path(__file__).parent.parent
CAPITALS = ROOT / "examples" / "capitals"
CHECKPOINT, TOKENIZER = CAPITALS / "ckpt.pt", CAPITALS / "tokenizer.json"

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 300}
BOS, EOS, PAD = 2, 3, 1


def gpt(**changes) -> GPT:
    """The plain-PyTorch reference, its weights far from their initialisation: no bias or gain goes unnoticed."""
    model = GPT(GPTConfig(**SIZES | changes)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=0.1, std=0.3)
    return model


def twin(model: GPT) -> CustomGPTForCausalLM:
    """The Hugging Face model with the weights of the reference."""
    config = CustomGPTConfig(
        **model.model_args(), activation_function=model.config.activation, tie_word_embeddings=model.config.tied
    )
    hugging_face = CustomGPTForCausalLM(config)
    hugging_face.load_state_dict(model.state_dict())
    return hugging_face.eval()


def save_tokenizer(path: Path) -> Path:
    """Write a tokenizer as the original's train_tokenizer.py does, with 300 tokens."""
    text = "Instruction: What is the capital of France? Input: the cat sat on the mat. Response: Paris"
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [text] * 2, vocab_size=300, special_tokens=["[UNK]", "[PAD]", "[BOS]", "[EOS]"], show_progress=False
    )
    tokenizer.post_processor = TemplateProcessing(
        single="[BOS] $A [EOS]",
        pair="[BOS] $A [EOS] [BOS] $B [EOS]",
        special_tokens=[("[BOS]", BOS), ("[EOS]", EOS)],
    )
    tokenizer.save(str(path))
    return path


def save_files(folder: Path, model: GPT) -> tuple[Path, Path]:
    """Write a model's checkpoint and the tokenizer beside it, as the original has them."""
    save_checkpoint(folder / "ckpt.pt", model, iter_num=7, config={"seed": 1})
    return folder / "ckpt.pt", save_tokenizer(folder / "tokenizer.json")


def load_plain(
    path: Path, tokenizer_path: Path | str, **options
) -> tuple[CustomGPTForCausalLM, PreTrainedTokenizerFast]:
    """The model and the tokenizer of a trainer's files, as a converted folder holds them."""
    loaded = Source(path, tokenizer_path, **options).load()
    return loaded.model, loaded.tokenizer
