"""Models with the names of public trainers, in classes of our own: nothing of the trainers' code is here."""

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, C, T, L, HEADS = 67, 32, 24, 3, 4  # vocabulary, width, context, layers, heads
D = C // HEADS


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float = D**-0.5) -> Tensor:
    """Attention as a masked softmax: q, k, v (…, T, head width)."""
    length = q.shape[-2]
    future = torch.ones(length, length).triu(1).bool()
    return (q @ k.mT * scale).masked_fill(future, -math.inf).softmax(-1) @ v


def split(x: Tensor) -> Tensor:
    return x.unflatten(2, (HEADS, D)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def moved(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Weights far from their initialisation: no bias or gain goes unnoticed."""
    for weight in model.parameters():
        nn.init.normal_(weight, mean=0.05, std=std)
    return model.eval()


class ScaleShiftNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), self.scale, self.shift)


class BookAttention(nn.Module):
    def __init__(self, qkv_bias: bool) -> None:
        super().__init__()
        self.W_query, self.W_key, self.W_value = (nn.Linear(C, C, bias=qkv_bias) for _ in range(3))
        self.out_proj = nn.Linear(C, C)
        self.register_buffer("mask", torch.ones(T, T).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(join(causal(*(split(w(x)) for w in (self.W_query, self.W_key, self.W_value)))))


class FastBookAttention(nn.Module):
    def __init__(self, qkv_bias: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=qkv_bias), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, D)).permute(2, 0, 3, 1, 4)
        return self.proj(join(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class WrittenOutGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class FeedForward(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(C, 4 * C), activation, nn.Linear(4 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class BookBlock(nn.Module):
    def __init__(self, qkv_bias: bool, fast: bool) -> None:
        super().__init__()
        self.att = (FastBookAttention if fast else BookAttention)(qkv_bias)
        self.ff = FeedForward(nn.GELU(approximate="tanh") if fast else WrittenOutGELU())
        self.norm1, self.norm2 = (nn.LayerNorm(C) if fast else ScaleShiftNorm() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class Book(nn.Module):
    """LLMs-from-scratch's names. It is 64 wide for each head in the book; here the heads are told."""

    def __init__(self, qkv_bias: bool = False, fast: bool = False) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(V, C), nn.Embedding(T, C)
        self.trf_blocks = nn.Sequential(*(BookBlock(qkv_bias, fast) for _ in range(L)))
        self.final_norm = nn.LayerNorm(C) if fast else ScaleShiftNorm()
        self.out_head = nn.Linear(C, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


class Head(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(C, D, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.ones(T, T).tril())
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return causal(self.query(x), self.key(x), self.value(x), self.scale)


class MultiHead(nn.Module):
    def __init__(self, scale: float, projects: bool = True) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(scale) for _ in range(HEADS))
        self.proj = nn.Linear(C, C) if projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class LectureFeedForward(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(C, 4 * C), activation, nn.Linear(4 * C, C), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LectureBlock(nn.Module):
    def __init__(self, norm_first: bool, scale: float, activation: nn.Module) -> None:
        super().__init__()
        self.sa, self.ffwd = MultiHead(scale), LectureFeedForward(activation)
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.norm_first = norm_first

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.sa(self.ln1(x))
            return x + self.ffwd(self.ln2(x))
        x = self.ln1(x + self.sa(x))
        return self.ln2(x + self.ffwd(x))


class Lecture(nn.Module):
    """The lecture's names. Courses use the same ones for post-norm blocks, and older copies for another scale."""

    def __init__(
        self,
        norm_first: bool = True,
        scale: float = D**-0.5,
        activation: type[nn.Module] = nn.ReLU,
        final_norm: bool = True,
        vocab_size: int = V,
    ) -> None:
        super().__init__()
        self.final_norm = final_norm
        self.token_embedding_table, self.position_embedding_table = nn.Embedding(vocab_size, C), nn.Embedding(T, C)
        self.blocks = nn.Sequential(*(LectureBlock(norm_first, scale, activation()) for _ in range(L)))
        self.ln_f, self.lm_head = nn.LayerNorm(C), nn.Linear(C, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding_table(ids) + self.position_embedding_table(torch.arange(ids.shape[1]))
        x = self.blocks(x)
        return self.lm_head(self.ln_f(x) if self.final_norm else x)


class TrainLLMFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.hidden(x).relu())


class TrainLLMBlock(nn.Module):
    def __init__(self, scale: float, projects: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn, self.mlp = MultiHead(scale, projects), TrainLLMFeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class TrainLLM(nn.Module):
    """train-llm-from-scratch's names. Its older models have no output projection, and the oldest another scale."""

    def __init__(self, scale: float = D**-0.5, projects: bool = True, vocab_size: int = V) -> None:
        super().__init__()
        self.token_embed, self.position_embed = nn.Embedding(vocab_size, C), nn.Embedding(T, C)
        self.attn_blocks = nn.ModuleList(TrainLLMBlock(scale, projects) for _ in range(L))
        self.layer_norm, self.lm_head = nn.LayerNorm(C), nn.Linear(C, vocab_size)
        self.register_buffer("pos_idxs", torch.arange(T))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embed(ids) + self.position_embed(self.pos_idxs[: ids.shape[1]])
        for block in self.attn_blocks:
            x = block(x)
        return self.lm_head(self.layer_norm(x))


def trained(model: nn.Module, ids: Tensor, steps: int, length: int = T) -> nn.Module:
    """Train a model on stretches of a text for some steps."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = random.Random(0)
    for _ in range(steps):
        starts = [draw.randrange(len(ids) - length - 1) for _ in range(16)]
        batch = torch.stack([ids[start : start + length + 1] for start in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
