"""What the trainers of the family leave on a disk, written by a plain-PyTorch stand-in: none of their code is here."""

import json
import math
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from examples.plain_gpt import GPT, CausalSelfAttention
from tests.tiny import gpt

TEXT = 'To be, or not to be?\nThat is the question:\nÆsop\'s 3 foxes — "漢字" 🙂\n\n'
CHARACTERS = sorted(set(TEXT))
STOI = {character: number for number, character in enumerate(CHARACTERS)}
META = {"vocab_size": len(CHARACTERS), "itos": dict(enumerate(CHARACTERS)), "stoi": STOI}
END_OF_TEXT = "<|endoftext|>"


def encode(text: str) -> Tensor:
    """A prompt of characters as nanoGPT encodes it, (1, T)."""
    return torch.tensor([[STOI[character] for character in text]])


def save_meta(path: Path, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(META, protocol))
    return path


def save_gpt2_pair(folder: Path, names: tuple[str, str] = ("vocab.json", "merges.txt")) -> ByteLevelBPETokenizer:
    """Write GPT-2's two files for a vocabulary of 300, its one special token last."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT] * 2, vocab_size=299, show_progress=False)
    vocabulary = tokenizer.get_vocab()
    for number in range(len(vocabulary), 299):
        vocabulary[f"unused{number}"] = number
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(json.dumps(vocabulary | {END_OF_TEXT: 299}), encoding="utf-8")
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / names[1]).write_text("\n".join(lines), encoding="utf-8")
    return tokenizer


# --- nanoGPT


def save_nanogpt(root: Path, model: GPT, dataset: str = "tiny_char", **model_args) -> Path:
    """Write out/ckpt.pt as nanoGPT's train.py does."""
    optimizer = torch.optim.AdamW(model.parameters())
    path = root / "out" / "ckpt.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": model.model_args() | model_args,
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "dataset": dataset, "compile": False, "learning_rate": 1e-3},
    }
    torch.save(checkpoint, path)
    return path


def nano_character_model(**changes) -> GPT:
    return gpt(**{"vocab_size": len(CHARACTERS), "tied": True} | changes)


# --- build-nanogpt


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int


GPTConfig.__module__, GPTConfig.__qualname__ = "__main__", "GPTConfig"


def save_build_nanogpt(root: Path, model: GPT) -> Path:
    """Write log/model_00050.pt, its config pickled as an object of the script's own class."""
    sizes = {name: getattr(model.config, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    path = root / "log" / "model_00050.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    main = sys.modules["__main__"]
    main.GPTConfig = GPTConfig
    try:
        config = GPTConfig(**sizes)
        torch.save({"model": model.state_dict(), "config": config, "step": 50, "val_loss": 5.5}, path)
    finally:
        del main.GPTConfig
    return path


# --- minGPT


class MaskedAttention(nn.Module):
    """Attention as a softmax over masked scores, with the mask kept as a buffer."""

    bias: Tensor

    def __init__(self, attention: CausalSelfAttention, block_size: int):
        super().__init__()
        self.n_head = attention.n_head
        self.c_attn, self.c_proj = attention.c_attn, attention.c_proj
        self.register_buffer("bias", torch.ones(block_size, block_size).tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        scores = q @ k.mT / math.sqrt(C // self.n_head)
        scores = scores.masked_fill(self.bias[:, :, :T, :T] == 0, -math.inf)
        y = F.softmax(scores, dim=-1) @ v  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def mingpt_model(**changes) -> GPT:
    """A model of type gpt-nano, or with changes to its sizes."""
    sizes = {"n_layer": 3, "n_head": 3, "n_embd": 48, "vocab_size": len(CHARACTERS), "activation": "gelu_new"}
    model = gpt(**sizes | changes)
    for block in model.transformer.h:
        block.attn = MaskedAttention(block.attn, model.config.block_size)
    return model


def save_mingpt(root: Path, model: GPT, model_type: str | None = "gpt-nano") -> Path:
    """Write model.pt, a bare state dict, and config.json beside it."""
    root.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), root / "model.pt")
    sizes = {"n_layer": None, "n_head": None, "n_embd": None, "vocab_size": None, "block_size": None}
    config = {"system": {"seed": 3407}, "model": {"model_type": model_type, **sizes}}
    (root / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")
    return root / "model.pt"
