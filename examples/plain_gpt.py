"""The user's own code: a GPT in plain PyTorch with its sampling loop and its checkpoint files.

This is the reference that the Hugging Face model is tested against, so it shares no code with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class GPTConfig:
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 32000
    bias: bool = True  # in every Linear and every LayerNorm, lm_head aside
    dropout: float = 0.1
    # the checkpoint's model_args know nothing of these two
    activation: Literal["gelu", "gelu_new", "gelu_pytorch_tanh"] = "gelu"  # exact (erf), or a tanh form of GPT-2's
    tied: bool = False  # lm_head shares wte's weight, as in nanoGPT


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, nh, T, hs)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


def new_gelu(x: Tensor) -> Tensor:
    """GPT-2's tanh form, written out as in older nanoGPT: `nn.GELU(approximate="tanh")` differs in the last bits."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def torch_tanh_gelu(x: Tensor) -> Tensor:
    """The tanh form as PyTorch has it, which build-nanogpt uses."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": new_gelu,
    "gelu_pytorch_tanh": torch_tanh_gelu,
}


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = ACTIVATIONS[config.activation]
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """Everything below lm_head: token ids to final hidden states."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, idx: Tensor) -> Tensor:
        T, block_size = idx.shape[1], self.wpe.num_embeddings
        if T > block_size:
            raise ValueError(f"{T} tokens do not fit into a context of {block_size}")
        positions = torch.arange(T, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer.wte.weight = self.lm_head.weight

        self.apply(init_weights)
        # each block adds twice to the residual stream: scale those layers so that its variance stays put
        for name, weight in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of every position, and the loss if there are targets: already shifted, -1 where ignored."""
        logits = self.lm_head(self.transformer(idx))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 0.8,
        top_k: int = 50,
        repetition_penalty: float = 1.0,
        eos_id: int | None = None,
    ) -> Tensor:
        """Continue one sequence `idx` (1, T) token by token; temperature 0 takes the likeliest token."""
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size :]
            logits = self.lm_head(self.transformer(context)[:, -1:])[:, -1]  # (1, V), the last position only
            if repetition_penalty > 1:
                seen = context[0].unique()
                seen_logits = logits[0, seen]
                logits[0, seen] = torch.where(
                    seen_logits > 0, seen_logits / repetition_penalty, seen_logits * repetition_penalty
                )
            if temperature == 0:
                next_id = logits.argmax(dim=-1, keepdim=True)  # (1, 1)
            else:
                logits = logits / temperature
                if top_k > 0:
                    kth_largest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits[logits < kth_largest] = -math.inf
                next_id = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)  # (1, 1)
            idx = torch.cat((idx, next_id), dim=1)
            if next_id.item() == eos_id:
                break
        return idx

    def model_args(self) -> dict[str, int | float | bool]:
        """The dict that a checkpoint stores, from which `GPTConfig(**model_args)` makes the config again."""
        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
        return {name: getattr(self.config, name) for name in names}


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def save_checkpoint(
    path: str | Path,
    model: GPT,
    iter_num: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss: float | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Write the fine-tuning script's file if its `config` is given, otherwise the pre-training script's."""
    checkpoint = {
        "iter_num": iter_num,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict() if optimizer else None,
        "model_args": model.model_args(),
    }
    if config is None:
        checkpoint["loss"] = loss
    else:
        checkpoint["scaler_state_dict"] = {}  # what a GradScaler that is switched off saves
        checkpoint["config"] = config
    torch.save(checkpoint, path)
