"""GPTs as people write them themselves: one class for each habit. `HONEST` can be converted, `REFUSED` cannot."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, C, T, L, HEADS = 67, 32, 40, 2, 4  # vocabulary, width, context, layers, heads
D = C // HEADS

# Attention.


def split_heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, D).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], C)


def written_out(q: Tensor, k: Tensor, v: Tensor, scale: float = D**-0.5) -> Tensor:
    """Causal attention as a softmax of a masked product."""
    length = q.shape[-2]
    scores = q @ k.transpose(-2, -1) * scale
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ v


class Fused(nn.Module):
    """One projection for queries, keys and values, in the order that `order` gives."""

    def __init__(self, order: str = "qkv", scale: float | None = None, bias: bool = True, fused: bool = True):
        super().__init__()
        self.order, self.scale, self.fused = order, scale, fused
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=bias), nn.Linear(C, C, bias=bias)
        self.drop = nn.Dropout(0.2)

    def parts(self, x: Tensor) -> list[Tensor]:
        parts = dict(zip(self.order, self.qkv(x).split(C, dim=-1), strict=True))
        return [split_heads(parts[name]) for name in "qkv"]

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return written_out(q, k, v, self.scale or D**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.out(join_heads(self.mix(*self.parts(x)))))


class ByHead(Fused):
    """Each head's queries, keys and values stand together."""

    def parts(self, x: Tensor) -> list[Tensor]:
        return list(self.qkv(x).view(*x.shape[:2], HEADS, 3, D).permute(3, 0, 2, 1, 4))


class ByValue(Fused):
    """Each value of a head has its query, key and value together."""

    def parts(self, x: Tensor) -> list[Tensor]:
        return list(self.qkv(x).view(*x.shape[:2], HEADS, D, 3).permute(4, 0, 2, 1, 3))


class Apart(nn.Module):
    def __init__(self, bias: bool = False, out_bias: bool = True):
        super().__init__()
        self.W_query, self.W_key, self.W_value = (nn.Linear(C, C, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(C, C, bias=out_bias)
        self.register_buffer("mask", torch.ones(T, T).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(linear(x)) for linear in (self.W_query, self.W_key, self.W_value))
        return self.out_proj(join_heads(written_out(q, k, v)))


class Head(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(C, D, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.ones(T, T).tril())
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return written_out(self.query(x), self.key(x), self.value(x), self.scale)


class SeparateHeads(nn.Module):
    def __init__(self, scale: float = D**-0.5):
        super().__init__()
        self.heads = nn.ModuleList(Head(scale) for _ in range(HEADS))
        self.proj, self.dropout = nn.Linear(C, C), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))


class TorchAttention(nn.Module):
    def __init__(self, bias: bool = True, batch_first: bool = True):
        super().__init__()
        self.batch_first = batch_first
        self.attn = nn.MultiheadAttention(C, HEADS, dropout=0.1, bias=bias, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        mask = torch.ones(T, T).triu(1).bool()[: x.shape[self.batch_first], : x.shape[self.batch_first]]
        y = self.attn(x, x, x, attn_mask=mask, need_weights=False)[0]
        return y if self.batch_first else y.transpose(0, 1)


class Transposed(nn.Module):
    """A linear layer whose weight is (in, out), as GPT-2's."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(n_in, n_out)), nn.Parameter(torch.empty(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class FusedTransposed(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = Transposed(C, 3 * C), Transposed(C, C)


class Einsum(nn.Module):
    """A weight (C, D) of each head, and one (D, C) back."""

    def __init__(self) -> None:
        super().__init__()
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.empty(HEADS, C, D)) for _ in range(3))
        self.b_Q, self.b_K, self.b_V = (nn.Parameter(torch.empty(HEADS, D)) for _ in range(3))
        self.W_O, self.b_O = nn.Parameter(torch.empty(HEADS, D, C)), nn.Parameter(torch.empty(C))

    def forward(self, x: Tensor) -> Tensor:
        pairs = ((self.W_Q, self.b_Q), (self.W_K, self.b_K), (self.W_V, self.b_V))
        q, k, v = ((torch.einsum("btc,hcd->bthd", x, W) + b).transpose(1, 2) for W, b in pairs)
        return torch.einsum("bthd,hdc->btc", written_out(q, k, v).transpose(1, 2), self.W_O) + self.b_O


class QueriesApart(nn.Module):
    """Queries apart; keys and values in one projection, which stand together for each head if `by_head`."""

    def __init__(self, by_head: bool):
        super().__init__()
        self.by_head, self.q, self.kv, self.out = by_head, nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_head:
            k, v = self.kv(x).view(*x.shape[:2], HEADS, 2 * D).transpose(1, 2).chunk(2, dim=-1)
        else:
            k, v = map(split_heads, self.kv(x).chunk(2, dim=-1))
        return self.out(join_heads(written_out(split_heads(self.q(x)), k, v)))


class FusedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        return written_out(*self.qkv(x).chunk(3, dim=-1))


class FusedHeads(nn.Module):
    """Heads as separate modules, each with one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.ModuleList(FusedHead() for _ in range(HEADS)), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([head(x) for head in self.heads], dim=-1))


class ScaledScores(Fused):
    """Scores that are multiplied by a number."""

    def __init__(self, scale: float):
        super().__init__(scale=scale, fused=False)


class NoProjection(Fused):
    """The heads' results are added as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return join_heads(self.mix(*self.parts(x)))


NoProjection.__init__ = lambda self: (  # type: ignore[method-assign]
    Fused.__init__(self),
    delattr(self, "out"),
)[0]


# Norms, activations, MLPs.


class ScaleShift(nn.Module):
    """A LayerNorm written out."""

    def __init__(self, eps: float = 1e-5, unbiased: bool = False):
        super().__init__()
        self.eps, self.unbiased = eps, unbiased
        self.scale, self.shift = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=self.unbiased)
        return self.scale * (x - mean) / torch.sqrt(variance + self.eps) + self.shift


class ScaledLater(ScaleShift):
    """Another order of the same steps, in which the values are normalized before they are scaled."""

    def forward(self, x: Tensor) -> Tensor:
        normalized = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + self.eps)
        return self.scale * normalized + self.shift


class RootMeanSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def layer_norm(eps: float = 1e-5, bias: bool = True, affine: bool = True) -> nn.Module:
    return nn.LayerNorm(C, eps=eps, bias=bias, elementwise_affine=affine)


class TanhWrittenOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class ErfWrittenOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class MLP(nn.Module):
    def __init__(self, act: Callable[[], nn.Module] = nn.GELU, width: int = 4 * C, bias: bool = True):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(C, width, bias=bias), act(), nn.Linear(width, C, bias=bias), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransposedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Transposed(C, 4 * C), Transposed(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class ConvolutionMLP(nn.Module):
    """Convolutions over one position."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(C, 3 * C, 1), nn.Conv1d(3 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(C, 3 * C), nn.Linear(C, 3 * C), nn.Linear(3 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


# Blocks.


class PreNorm(nn.Module):
    def __init__(self, attention: Callable, mlp: Callable, norm: Callable):
        super().__init__()
        self.norm1, self.att, self.norm2, self.ff = norm(), attention(), norm(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class PostNorm(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.att(x))
        return self.norm2(x + self.ff(x))


class NormForEach(PreNorm):
    """`nn.MultiheadAttention` gets three results of the norm, equal but not the same tensor."""

    def __init__(self, attention: Callable, mlp: Callable, norm: Callable):
        super().__init__(partial(nn.MultiheadAttention, C, HEADS, dropout=0.1, batch_first=True), mlp, norm)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        x = x + self.att(self.norm1(x), self.norm1(x), self.norm1(x), attn_mask=mask, need_weights=False)[0]
        return x + self.ff(self.norm2(x))


class Parallel(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.att(self.norm1(x)) + self.ff(self.norm2(x))


class SharedNorm(PreNorm):
    def __init__(self, *parts: Callable):
        super().__init__(*parts)
        del self.norm2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm1(x))


class HalfResidual(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + 0.5 * self.ff(self.norm2(x))


class NormedResidual(PreNorm):
    """The residual path starts behind the norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        x = x + self.att(x)
        return x + self.ff(self.norm2(x))


class Sandwich(PreNorm):
    """A second norm behind the attention."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm2(self.att(self.norm1(x)))
        return x + self.ff(x)


# Whole models.


def sinusoids() -> Tensor:
    angles = torch.arange(T)[:, None] * torch.exp(torch.arange(0, C, 2) * (-math.log(1e4) / C))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(T, C)


def just_logits(logits: Tensor, targets: Tensor | None) -> Any:
    return logits


def logits_loss(logits: Tensor, targets: Tensor | None) -> Any:
    """As the lecture: rows and positions become one where targets are given."""
    if targets is None:
        return logits, None
    flat = logits.view(-1, V)
    return flat, F.cross_entropy(flat, targets.view(-1))


def loss_logits(logits: Tensor, targets: Tensor | None) -> Any:
    return torch.tensor(0.0), logits


def last_unless_targets(logits: Tensor, targets: Tensor | None) -> Any:
    """As nanoGPT."""
    return (logits[:, [-1], :], None) if targets is None else (logits, torch.tensor(1.0))


def only_last(logits: Tensor, targets: Tensor | None) -> Any:
    return logits[:, -1, :]


def as_dict(logits: Tensor, targets: Tensor | None) -> Any:
    return {"loss": None, "logits": logits}


def as_object(logits: Tensor, targets: Tensor | None) -> Any:
    return SimpleNamespace(loss=None, logits=logits)


class Own(nn.Module):
    """A GPT of exchangeable parts. `everything` gives all logits; `forward` returns them in the form of `returns`."""

    def __init__(
        self,
        attention: Callable[[], nn.Module] = Fused,
        mlp: Callable[[], nn.Module] = MLP,
        norm: Callable[[], nn.Module] = layer_norm,
        block: Callable[..., nn.Module] = PreNorm,
        returns: Callable[[Tensor, Tensor | None], Any] = just_logits,
        positions: str = "embedding",
        scale: float = 1.0,
        final: bool = True,
        head: str = "untied",
        layers: int = L,
        container: str = "list",
        context: int = T,
    ):
        super().__init__()
        self.returns, self.positions, self.scale, self.container = returns, positions, scale, container
        self.block_size = context
        self.tok = nn.Embedding(V, C)
        if positions == "embedding":
            self.pos = nn.Embedding(context, C)
        elif positions == "parameter":
            self.pos = nn.Parameter(torch.zeros(1, context, C))
        elif positions == "buffer":
            self.register_buffer("pos", sinusoids()[None])
        blocks = [block(attention, mlp, norm) for _ in range(layers)]
        if container == "list":
            self.blocks: nn.Module = nn.ModuleList(blocks)
        elif container == "sequential":
            self.blocks = nn.Sequential(*blocks)
        elif container == "dict":
            self.blocks = nn.ModuleDict({f"layer_{i}": one for i, one in enumerate(blocks)})
        elif container == "attributes":
            for i, one in enumerate(blocks):
                setattr(self, f"block{i}", one)
        else:
            (self.block,) = blocks
        self.final = norm() if final else nn.Identity()
        self.head = nn.Linear(C, V, bias=head == "biased")
        if head == "tied":
            self.head.weight = self.tok.weight

    def layers(self) -> list[nn.Module]:
        if self.container == "attributes":
            return [getattr(self, f"block{i}") for i in range(L)]
        if self.container == "single":
            return [self.block]
        return list(self.blocks.values() if self.container == "dict" else self.blocks)

    def embedded(self, ids: Tensor) -> Tensor:
        x, length = self.tok(ids) * self.scale, ids.shape[1]
        if self.positions == "embedding":
            return x + self.pos(torch.arange(length))
        if self.positions in ("parameter", "buffer"):
            return x + self.pos[:, :length]
        return x + sinusoids()[:length] if self.positions == "computed" else x

    def everything(self, ids: Tensor) -> Tensor:
        x = self.embedded(ids)
        for layer in self.layers():
            x = layer(x)
        return self.head(self.final(x))

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        assert ids.shape[1] <= self.block_size
        return self.returns(self.everything(ids), targets)


class CopiedHead(Own):
    def everything(self, ids: Tensor) -> Tensor:
        self.head.weight.data.copy_(self.tok.weight.data)
        return super().everything(ids)


class TorchEncoder(nn.Module):
    """PyTorch's own Transformer layers behind a causal mask."""

    def __init__(self, norm_first: bool, activation: Any, single: bool = False, final: bool = False):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(V, C), nn.Linear(C, V)
        self.register_buffer("pe", sinusoids()[:, None])
        layer = nn.TransformerEncoderLayer(C, HEADS, 48, 0.1, activation, batch_first=True, norm_first=norm_first)
        norm = nn.LayerNorm(C) if final else None
        self.encoder: nn.Module = layer
        if not single:
            self.encoder = nn.TransformerEncoder(layer, L, norm, enable_nested_tensor=False)
        self.register_buffer("mask", torch.full((T, T), -math.inf).triu(1))

    def everything(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.embedding(ids) * math.sqrt(C) + self.pe[:length].transpose(0, 1)
        return self.linear(self.encoder(x, self.mask[:length, :length]))

    def forward(self, ids: Tensor) -> Tensor:
        return self.everything(ids)


class Tutorial(nn.Module):
    """PyTorch's encoder with positions first: `forward` takes ids (T, B), and a mask or makes one."""

    def __init__(self, needs_mask: bool):
        super().__init__()
        self.needs_mask, self.encoder, self.decoder = needs_mask, nn.Embedding(V, C), nn.Linear(C, V)
        self.register_buffer("pe", sinusoids()[:, None])
        layer = nn.TransformerEncoderLayer(C, HEADS, 48, 0.2)
        self.layers = nn.TransformerEncoder(layer, L, enable_nested_tensor=False)

    def everything(self, ids: Tensor) -> Tensor:
        return self(ids.t(), torch.full((ids.shape[1], ids.shape[1]), -math.inf).triu(1)).transpose(0, 1)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            assert not self.needs_mask
            mask = nn.Transformer.generate_square_subsequent_mask(len(ids))
        x = self.encoder(ids) * math.sqrt(C) + self.pe[: len(ids)]
        return self.decoder(self.layers(x, mask))


class MaskedBlock(PreNorm):
    def __init__(self, attention: Callable, mlp: Callable, norm: Callable):
        super().__init__(partial(nn.MultiheadAttention, C, HEADS, batch_first=True), mlp, norm)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        u = self.norm1(x)
        x = x + self.att(u, u, u, attn_mask=mask == 0, need_weights=False)[0]
        return x + self.ff(self.norm2(x))


class TakesMask(Own):
    """`forward` needs a mask that is 1 where a position may look."""

    def __init__(self) -> None:
        super().__init__(block=MaskedBlock)

    def everything(self, ids: Tensor) -> Tensor:
        return self(ids, torch.ones(ids.shape[1], ids.shape[1]).tril())

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedded(ids)
        for layer in self.layers():
            x = layer(x, mask)
        return self.head(self.final(x))


class TakesMaskByKeyword(TakesMask):
    """`forward` needs a causal mask (T, T), by keyword; `kept` makes it a mask that is 1 where a position may look."""

    def __init__(self, kept: Callable[[Tensor], Tensor]):
        super().__init__()
        self.kept = kept

    def everything(self, ids: Tensor) -> Tensor:
        return super().forward(ids, torch.ones(ids.shape[1], ids.shape[1]).tril())

    def forward(self, ids: Tensor, *, attn_mask: Tensor) -> Tensor:  # type: ignore[override]
        assert attn_mask.shape == (ids.shape[1], ids.shape[1])
        return super().forward(ids, self.kept(attn_mask))


class TakesMasks(Own):
    """`forward` needs positions and an attention mask, 1 for tokens and 0 for padding, both (B, T)."""

    def everything(self, ids: Tensor) -> Tensor:
        return self(ids, torch.arange(ids.shape[1]).expand_as(ids), torch.ones_like(ids))

    def forward(self, ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        x = self.tok(ids) + self.pos(position_ids)
        hidden = (1 - attention_mask)[:, None, None] * -1e9
        for layer in self.layers():
            q, k, v = layer.att.parts(layer.norm1(x))
            scores = q @ k.transpose(-2, -1) * D**-0.5 + hidden
            scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -math.inf)
            x = x + layer.att.out(join_heads(scores.softmax(-1) @ v))
            x = x + layer.ff(layer.norm2(x))
        return self.head(self.final(x))


class TakesMore(TakesMasks):
    def forward(self, ids: Tensor, position_ids: Tensor, attention_mask: Tensor, **more: Any) -> Tensor:
        return super().forward(ids, position_ids, attention_mask)


class OpenTokens(Own):
    """`forward` needs a mask that is 0 for tokens which all others may see."""

    def everything(self, ids: Tensor) -> Tensor:
        return self(ids, torch.ones_like(ids))

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        x, length = self.embedded(ids), ids.shape[1]
        seen = torch.ones(length, length).tril().bool() | (attention_mask == 0)[:, None, None]
        for layer in self.layers():
            q, k, v = layer.att.parts(layer.norm1(x))
            x = x + layer.att.out(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)))
            x = x + layer.ff(layer.norm2(x))
        return self.head(self.final(x))


class KeepsTokens(TakesMasks):
    """`forward` needs a padding mask that is 1 for tokens and 0 for padding."""

    def everything(self, ids: Tensor) -> Tensor:
        return self(ids, torch.ones_like(ids))

    def forward(self, ids: Tensor, pad_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids, torch.arange(ids.shape[1]).expand_as(ids), pad_mask.long())


class KeepsTrueTokens(KeepsTokens):
    """The same with True and False, and positions."""

    def everything(self, ids: Tensor) -> Tensor:
        return self(ids, torch.arange(ids.shape[1]), torch.ones_like(ids).bool())

    def forward(self, ids: Tensor, pos: Tensor, padding_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids, ~(~padding_mask))


class NeedsPadding(Own):
    """`forward` needs a padding mask, and takes keywords only."""

    def forward(self, *, input_ids: Tensor, padding: Tensor) -> Tensor:  # type: ignore[override]
        assert padding.shape == input_ids.shape and not padding.any()
        return self.everything(input_ids)


class VocabularyFirst(Own):
    """Returns (B, V, T), as PyTorch's cross-entropy takes it."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.everything(ids).transpose(1, 2)


class OneHot(Own):
    """Multiplies one-hot vectors by a matrix."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul):
        super().__init__()
        self.product = product

    def embedded(self, ids: Tensor) -> Tensor:
        positions = F.one_hot(torch.arange(ids.shape[1]), T).float()
        return self.product(F.one_hot(ids, V).float(), self.tok.weight) + positions @ self.pos.weight


def for_each_row(vectors: Tensor, matrix: Tensor) -> Tensor:
    return torch.bmm(vectors, matrix.expand(len(vectors), -1, -1))


class OneHotLinear(Own):
    """A linear layer on one-hot vectors: the embedding is (C, V)."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.tok = nn.Linear(V, C, bias=bias)  # type: ignore[assignment]

    def embedded(self, ids: Tensor) -> Tensor:
        return self.tok(F.one_hot(ids, V).float()) + self.pos(torch.arange(ids.shape[1]))


class Shared(Own):
    """Layers that run more than once, as in ALBERT: `order` says which ones."""

    def __init__(self, order: list[int]):
        super().__init__(layers=len(set(order)))
        self.order = order

    def layers(self) -> list[nn.Module]:
        return [self.blocks[i] for i in self.order]  # type: ignore[index]


class SharedInList(Own):
    def __init__(self) -> None:
        super().__init__(layers=1)
        self.blocks = nn.ModuleList([*self.blocks] * 3)


class ScaledLogits(Own):
    def everything(self, ids: Tensor) -> Tensor:
        return super().everything(ids) * 0.3


class LearnedScales(Own):
    """Learned factors of the embedding and of the logits, each a parameter of one element."""

    def __init__(self, shape: tuple[int, ...], **parts: Any):
        super().__init__(**parts)
        self.final_factor, self.normal_factor = (nn.Parameter(torch.ones(shape)) for _ in range(2))

    def embedded(self, ids: Tensor) -> Tensor:
        return self.tok(ids) * self.normal_factor + self.pos(torch.arange(ids.shape[1]))

    def everything(self, ids: Tensor) -> Tensor:
        return super().everything(ids) * self.final_factor


class ScaledHidden(Own):
    """What the head reads is scaled, as in T5."""

    def everything(self, ids: Tensor) -> Tensor:
        x = self.embedded(ids)
        for layer in self.layers():
            x = layer(x)
        return self.head(self.final(x) * C**-0.5)


class LogProbabilities(Own):
    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature

    def everything(self, ids: Tensor) -> Tensor:
        return (super().everything(ids) / self.temperature).log_softmax(-1)


class TokenTypes(Own):
    """Adds a learned vector at all positions, and half of the position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(2, C)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.tok(ids) + 0.5 * self.pos(torch.arange(ids.shape[1])) + self.kinds(torch.zeros_like(ids))


class InSequence(nn.Module):
    """One `nn.Sequential` holds all."""

    def __init__(self) -> None:
        super().__init__()
        first = Own(layers=1)
        first.blocks, first.final, first.head = nn.ModuleList(), nn.Identity(), nn.Identity()  # type: ignore[assignment]
        blocks = [PreNorm(Fused, MLP, layer_norm) for _ in range(L)]
        self.net = nn.Sequential(first, *blocks, nn.LayerNorm(C), nn.Linear(C, V))

    def everything(self, ids: Tensor) -> Tensor:
        return self.net(ids)

    def forward(self, ids: Tensor) -> Tensor:
        return self.everything(ids)


class Stacks(nn.Module):
    """Each kind of part in a list of its own: attentions, MLPs, and the norms in one list or two."""

    def __init__(self, n_lists: int, layers: int = 3):
        super().__init__()
        self.tok, self.pos, self.n_lists = nn.Embedding(V, C), nn.Embedding(T, C), n_lists
        self.attentions = nn.ModuleList(Fused() for _ in range(layers))
        self.mlps = nn.ModuleList(MLP() for _ in range(layers))
        if n_lists == 2:
            self.norm1, self.norm2 = (nn.ModuleList(nn.LayerNorm(C) for _ in range(layers)) for _ in range(2))
            self.final = nn.LayerNorm(C)
        else:  # the last one is the final norm
            self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2 * layers + 1))
        self.head = nn.Linear(C, V)

    def everything(self, ids: Tensor) -> Tensor:
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            first, second = (
                (self.norm1[i], self.norm2[i]) if self.n_lists == 2 else (self.norms[2 * i], self.norms[2 * i + 1])
            )
            x = x + attention(first(x))
            x = x + mlp(second(x))
        return self.head((self.final if self.n_lists == 2 else self.norms[-1])(x))

    def forward(self, ids: Tensor) -> Tensor:
        return self.everything(ids)


class Residual(nn.Module):
    def __init__(self, part: nn.Module):
        super().__init__()
        self.norm, self.part = nn.LayerNorm(C), part

    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(self.norm(x))


class ByTurns(Own):
    """One list in which attentions and MLPs take turns, each with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Residual(part()) for part in (Fused, MLP) * 3))


class InPairs(Own):
    """A list of pairs of an attention and an MLP, each with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Residual(SeparateHeads()), Residual(MLP())) for _ in range(3))


class Functional(nn.Module):
    """No modules at all: bare parameters and functions, the weights applied by `@`."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"wte": (V, C), "wpe": (T, C), "gf": (C,), "bf": (C,), "out": (C, V)}
        for i in range(L):
            shapes |= {f"g1_{i}": (C,), f"b1_{i}": (C,), f"g2_{i}": (C,), f"b2_{i}": (C,)}
            shapes |= {f"attn_{i}": (C, 3 * C), f"attn_b_{i}": (3 * C,), f"proj_{i}": (C, C), f"proj_b_{i}": (C,)}
            shapes |= {f"up_{i}": (C, 4 * C), f"up_b_{i}": (4 * C,), f"down_{i}": (4 * C, C), f"down_b_{i}": (C,)}
        self.p = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})

    def everything(self, ids: Tensor) -> Tensor:
        p = self.p
        x = p["wte"][ids] + p["wpe"][: ids.shape[1]]
        for i in range(L):
            u = F.layer_norm(x, (C,), p[f"g1_{i}"], p[f"b1_{i}"])
            q, k, v = map(split_heads, (u @ p[f"attn_{i}"] + p[f"attn_b_{i}"]).split(C, dim=-1))
            x = x + join_heads(written_out(q, k, v)) @ p[f"proj_{i}"] + p[f"proj_b_{i}"]
            u = F.layer_norm(x, (C,), p[f"g2_{i}"], p[f"b2_{i}"])
            x = x + F.silu(u @ p[f"up_{i}"] + p[f"up_b_{i}"]) @ p[f"down_{i}"] + p[f"down_b_{i}"]
        return F.layer_norm(x, (C,), p["gf"], p["bf"]) @ p["out"]

    def forward(self, ids: Tensor) -> Tensor:
        return self.everything(ids)


class WithCache(Fused):
    """Keeps its last keys and values in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache_k", torch.zeros(2, HEADS, T, D), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def parts(self, x: Tensor) -> list[Tensor]:
        q, k, v = super().parts(x)
        self.calls += 1
        self.cache_k[: k.shape[0], :, : k.shape[2]] = k
        return [q, k, v]


class ExtraParameters(Own):
    """Has an embedding of token types and a value head that its logits do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.token_type, self.value_head = nn.Embedding(2, C), nn.Linear(C, 1)


class Random(Own):
    """Random words for names."""

    def __init__(self, **parts: Any):
        super().__init__(**parts)
        for module in [one for one in self.modules() if not isinstance(one, (nn.ModuleList, nn.Sequential))]:
            for names in (module._modules, module._parameters):
                for name in list(names):
                    part = names.pop(name)
                    names[word_for(name)] = part
                    object.__setattr__(module, name, part)


def word_for(name: str) -> str:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return "".join(chr(97 + int(letter)) for letter in torch.randint(26, (9,), generator=generator))


def moved(model: nn.Module, std: float = 0.3) -> nn.Module:
    """The model with weights far from their initialisation, so that no bias or gain goes unnoticed."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.05, std)
    return model


HONEST: Mapping[str, Callable[[], nn.Module]] = {
    "plain": Own,
    "heads as separate modules": partial(Own, SeparateHeads, partial(MLP, nn.ReLU), returns=logits_loss, head="biased"),
    "the lecture's first scale": partial(Own, partial(SeparateHeads, C**-0.5), partial(MLP, nn.ReLU)),
    "attention without a scale": partial(Own, partial(Fused, scale=1.0)),
    "queries, keys and values apart": partial(Own, Apart, partial(MLP, TanhWrittenOut), ScaleShift),
    "apart with biases": partial(Own, partial(Apart, True)),
    "apart without any bias": partial(
        Own, partial(Apart, False, False), partial(MLP, bias=False), partial(layer_norm, bias=False)
    ),
    "keys first": partial(Own, partial(Fused, "kqv")),
    "values first": partial(Own, partial(Fused, "vkq", fused=False)),
    "interleaved by head": partial(Own, ByHead),
    "interleaved by value": partial(Own, ByValue),
    "MultiheadAttention": partial(Own, TorchAttention),
    "MultiheadAttention without bias": partial(Own, partial(TorchAttention, False)),
    "MultiheadAttention, positions first": partial(Own, partial(TorchAttention, batch_first=False)),
    "TransformerEncoder, post-norm": partial(TorchEncoder, False, "relu"),
    "TransformerEncoder, pre-norm, final norm": partial(TorchEncoder, True, "gelu", final=True),
    "one TransformerEncoderLayer": partial(TorchEncoder, False, F.gelu, single=True),
    "transposed weights": partial(Own, FusedTransposed, TransposedMLP, head="tied"),
    "bare parameters": Functional,
    "a weight for each head": partial(Own, Einsum),
    "no projection after the heads": partial(Own, NoProjection),
    "the norm for each input of MultiheadAttention": partial(Own, block=NormForEach),
    "scores divided by the head's width": partial(Own, partial(ScaledScores, 1 / D)),
    "scores divided by the root of the heads": partial(Own, partial(ScaledScores, HEADS**-0.5)),
    "scores multiplied by the root of the width": partial(Own, partial(ScaledScores, C**0.5)),
    "queries apart": partial(Own, partial(QueriesApart, False)),
    "queries apart, keys and values by head": partial(Own, partial(QueriesApart, True)),
    "heads with one projection each": partial(Own, FusedHeads),
    "positions first": partial(Tutorial, False),
    "positions first, a mask as argument": partial(Tutorial, True),
    "a mask as argument": TakesMask,
    "a mask by keyword": partial(TakesMaskByKeyword, lambda mask: mask),
    "a mask of the future by keyword": partial(TakesMaskByKeyword, lambda mask: ~mask),
    "a mask that is added, by keyword": partial(TakesMaskByKeyword, torch.exp),
    "a padding mask of ones": KeepsTokens,
    "positions and a padding mask of True": KeepsTrueTokens,
    "positions and an attention mask as arguments": TakesMasks,
    "positions, an attention mask and keywords": TakesMore,
    "an attention mask by its name": OpenTokens,
    "a padding mask, by keyword": NeedsPadding,
    "logits of shape (B, V, T)": VocabularyFirst,
    "logits of shape (B, V, T), as many positions as tokens": partial(VocabularyFirst, context=V),
    "one-hot vectors": OneHot,
    "one-hot vectors, by einsum": partial(OneHot, partial(torch.einsum, "btv,vc->btc")),
    "one-hot vectors, by bmm": partial(OneHot, for_each_row),
    "a linear layer on one-hot vectors": OneHotLinear,
    "a linear layer with a bias on one-hot vectors": partial(OneHotLinear, True),
    "one layer that runs three times": partial(Shared, [0, 0, 0]),
    "one layer three times in a list": SharedInList,
    "layers that run twice": partial(Shared, [0, 1, 0, 1]),
    "layers that run twice at once": partial(Shared, [0, 0, 1, 1]),
    "scaled logits": ScaledLogits,
    "scaled logits, tied": partial(ScaledLogits, head="tied"),
    "scaled logits, biased": partial(ScaledLogits, head="biased"),
    "scaled logits at the last position only": partial(ScaledLogits, returns=only_last),
    "learned scales": partial(LearnedScales, ()),
    "learned scales of one element, tied": partial(LearnedScales, (1,), head="tied"),
    "a scaled input of a tied head": partial(ScaledHidden, head="tied"),
    "token types and scaled positions": TokenTypes,
    "one Sequential": InSequence,
    "attentions, MLPs and norms in lists of their own": partial(Stacks, 2),
    "all norms in one list": partial(Stacks, 1),
    "attentions and MLPs by turns": ByTurns,
    "pairs of an attention and an MLP": InPairs,
    "convolutions over one position": partial(Own, mlp=ConvolutionMLP),
    "positions in a parameter": partial(Own, positions="parameter"),
    "sinusoids in a buffer": partial(Own, positions="buffer", scale=math.sqrt(C), head="tied"),
    "sinusoids computed": partial(Own, positions="computed"),
    "embedding scale": partial(Own, scale=math.sqrt(C)),
    "tied head": partial(Own, head="tied"),
    "copied head": CopiedHead,
    "biased head": partial(Own, head="biased"),
    "post-norm": partial(Own, block=PostNorm),
    "post-norm, no final norm": partial(Own, SeparateHeads, partial(MLP, nn.ReLU), block=PostNorm, final=False),
    "no final norm": partial(Own, final=False),
    "narrow MLP": partial(Own, mlp=partial(MLP, width=48)),
    "MLP as wide as the model": partial(Own, mlp=partial(MLP, width=C)),
    "tanh GELU": partial(Own, mlp=partial(MLP, partial(nn.GELU, "tanh"))),
    "GELU written out": partial(Own, mlp=partial(MLP, ErfWrittenOut)),
    "SiLU": partial(Own, mlp=partial(MLP, nn.SiLU)),
    "quick GELU": partial(Own, mlp=partial(MLP, QuickGelu)),
    "squared ReLU": partial(Own, mlp=partial(MLP, SquaredReLU)),
    "leaky ReLU": partial(Own, mlp=partial(MLP, nn.LeakyReLU)),
    "Mish": partial(Own, mlp=partial(MLP, nn.Mish)),
    "tanh": partial(Own, mlp=partial(MLP, nn.Tanh)),
    "another epsilon": partial(Own, norm=partial(layer_norm, 1e-3)),
    "another epsilon, written out": partial(Own, norm=partial(ScaleShift, 1e-6)),
    "norms that scale later": partial(Own, norm=ScaledLater),
    "norms without gain": partial(Own, norm=partial(layer_norm, affine=False)),
    "one layer": partial(Own, layers=1),
    "one layer in no list": partial(Own, layers=1, container="single"),
    "ModuleDict": partial(Own, container="dict"),
    "Sequential": partial(Own, container="sequential"),
    "numbered attributes": partial(Own, container="attributes"),
    "(loss, logits)": partial(Own, returns=loss_logits),
    "dict": partial(Own, returns=as_dict),
    "object": partial(Own, returns=as_object),
    "last position unless targets": partial(Own, returns=last_unless_targets),
    "last position only": partial(Own, returns=only_last),
    "a cache in buffers": partial(Own, WithCache),
    "unused parameters": ExtraParameters,
    "short context": partial(Own, context=6),
    "random words for names": partial(Random, attention=Apart, block=PostNorm),
    "random words for names, fused": partial(Random, attention=ByHead, mlp=partial(MLP, nn.ReLU)),
}

# Models that differ from a GPT-2 by one thing.


class Capped(Own):
    def everything(self, ids: Tensor) -> Tensor:
        return 3 * torch.tanh(super().everything(ids) / 3)


class CosineHead(Own):
    def everything(self, ids: Tensor) -> Tensor:
        x = self.embedded(ids)
        for layer in self.layers():
            x = layer(x)
        return 10 * F.linear(F.normalize(self.final(x), dim=-1), F.normalize(self.head.weight, dim=-1))


class Noisy(Own):
    def embedded(self, ids: Tensor) -> Tensor:
        return F.dropout(super().embedded(ids), 0.1, training=True)


class NoisyAttention(Fused):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)  # also in evaluation


class Narrow(nn.Module):
    """Half as many heads as the model has room for."""

    def __init__(self) -> None:
        super().__init__()
        self.w_q, self.w_k, self.w_v = (nn.Linear(C, C // 2, bias=False) for _ in range(3))
        self.fc = nn.Linear(C // 2, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(2, (HEADS // 2, D)).transpose(1, 2) for linear in (self.w_q, self.w_k, self.w_v))
        return self.fc(written_out(q, k, v).transpose(1, 2).flatten(2))


class NeedsCache(Own):
    def forward(self, ids: Tensor, caches: list | None = None) -> Tensor:
        for cache in caches:  # type: ignore[union-attr]
            cache.append(ids)
        return super().forward(ids)


class TwoSided(Fused):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Window(Fused):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = torch.ones(q.shape[2], q.shape[2]).tril().triu(-3).bool()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near)


class LastTwoSided(Own):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[-1].att = TwoSided()


class LastReLU(Own):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[-1].ff = MLP(nn.ReLU)


class QueryKeyNorm(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(D), nn.LayerNorm(D)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(self.q_norm(q), self.k_norm(k), v)


class Alibi(Fused):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        steps = torch.arange(q.shape[2])
        bias = (steps[None] - steps[:, None]) * torch.tensor([0.5 ** (h + 1) for h in range(HEADS)])[:, None, None]
        bias = bias.masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Rotary(Fused):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = torch.arange(q.shape[2])[:, None] * 1e4 ** (-torch.arange(0, D, 2) / D)
        cos, sin = angles.cos(), angles.sin()

        def turn(x: Tensor) -> Tensor:
            a, b = x[..., ::2], x[..., 1::2]
            return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

        return super().mix(turn(q), turn(k), v)


class FewerKeys(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 2 * C)

    def parts(self, x: Tensor) -> list[Tensor]:
        q, k, v = self.qkv(x).split([C, C // 2, C // 2], dim=-1)
        k, v = (one.view(*x.shape[:2], HEADS // 2, D).transpose(1, 2).repeat_interleave(2, dim=1) for one in (k, v))
        return [split_heads(q), k, v]


class Masked(Fused):
    """Attention with a mask of its own: a function of the query's and the key's position."""

    def __init__(self, allowed: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.allowed = allowed

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed(places[:, None], places[None]))


class OneMore(Fused):
    """A softmax whose sum has one more: as if each query could look at nothing."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * D**-0.5
        scores = scores.masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -math.inf)
        return F.pad(scores, (1, 0)).softmax(-1)[..., 1:] @ v


class OverQueries(Fused):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * D**-0.5
        return scores.masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -1e9).softmax(-2) @ v


class CappedScores(Fused):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = 50 * torch.tanh(q @ k.transpose(-2, -1) * D**-0.5 / 50)
        return scores.masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -math.inf).softmax(-1) @ v


class ScaledByLength(Fused):
    """A scale that grows with the length, past the first 30 tokens."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        factor = math.log(max(30, q.shape[2])) / math.log(30)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=factor * D**-0.5)


class TwoHeadCounts(Own):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[-1].att = TorchAttention()
        self.blocks[-1].att.attn.num_heads, self.blocks[-1].att.attn.head_dim = 2, C // 2
        self.blocks[0].att = TorchAttention()


class LearnedResidual(PreNorm):
    def __init__(self, *parts: Callable):
        super().__init__(*parts)
        self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.alpha * self.att(self.norm1(x))
        return x + self.alpha * self.ff(self.norm2(x))


class MLPFirst(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ff(self.norm1(x))
        return x + self.att(self.norm2(x))


class ActiveResult(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class NormedEmbedding(Own):
    def embedded(self, ids: Tensor) -> Tensor:
        return F.layer_norm(super().embedded(ids), (C,))


class ExtraToken(Own):
    def __init__(self) -> None:
        super().__init__(context=T + 1)

    def everything(self, ids: Tensor) -> Tensor:
        return super().everything(F.pad(ids, (1, 0), value=3))[:, 1:]


class Probabilities(Own):
    def everything(self, ids: Tensor) -> Tensor:
        return super().everything(ids).softmax(-1)


class HiddenFirst(Own):
    def forward(self, ids: Tensor) -> Any:  # type: ignore[override]
        return self.embedded(ids), self.everything(ids)


class ScaledByPosition(Own):
    def everything(self, ids: Tensor) -> Tensor:
        return super().everything(ids) * (1 + 0.01 * torch.arange(ids.shape[1]))[:, None]


class ScaledInPart(Own):
    def everything(self, ids: Tensor) -> Tensor:
        return super().everything(ids) * torch.where(torch.arange(V) < 20, 1.0, 0.5)


class LogProbabilitiesOfSome(Own):
    """The first token is never said."""

    def everything(self, ids: Tensor) -> Tensor:
        return super().everything(ids).masked_fill(torch.arange(V) == 0, -1e9).log_softmax(-1)


class Injected(Own):
    """One layer that runs three times, each time on its input and the embedding."""

    def __init__(self) -> None:
        super().__init__(layers=1)

    def everything(self, ids: Tensor) -> Tensor:
        x = first = self.embedded(ids)
        for _ in range(3):
            x = self.blocks[0](x + first)  # type: ignore[index]
        return self.head(self.final(x))


class OnceMore(Own):
    """One layer that runs once more where the input is long."""

    def __init__(self) -> None:
        super().__init__(layers=1)

    def everything(self, ids: Tensor) -> Tensor:
        x = self.embedded(ids)
        for _ in range(3 if ids.shape[1] > 30 else 2):
            x = self.blocks[0](x)  # type: ignore[index]
        return self.head(self.final(x))


class StepEmbedding(Own):
    """One layer or two that run by turns, each time with the vector of the step added."""

    def __init__(self, layers: int):
        super().__init__(layers=layers)
        self.steps = nn.Embedding(4, C)

    def everything(self, ids: Tensor) -> Tensor:
        x, layers = self.embedded(ids), self.layers()
        for step, vector in enumerate(self.steps.weight):
            x = layers[step % len(layers)](x + vector)
        return self.head(self.final(x))


class BesideTrunk(Own):
    """Three layers; the result of one is kept in an attribute, and no other layer reads it."""

    def __init__(self, beside: int):
        super().__init__(layers=3)
        self.beside = beside

    def everything(self, ids: Tensor) -> Tensor:
        x = self.embedded(ids)
        for i, layer in enumerate(self.layers()):
            if i == self.beside:
                self.kept = layer(x)
            else:
                x = layer(x)
        return self.head(self.final(x))


class OneAttention(Own):
    """One attention and its norm run before each MLP."""

    def __init__(self) -> None:
        super().__init__()
        del self.blocks
        self.norm, self.att = nn.LayerNorm(C), Fused()
        self.mlps = nn.ModuleList(Residual(MLP()) for _ in range(3))

    def everything(self, ids: Tensor) -> Tensor:
        x = self.embedded(ids)
        for mlp in self.mlps:
            x = mlp(x + self.att(self.norm(x)))
        return self.head(self.final(x))


class CrossAttention(Own):
    """PyTorch's decoder, whose memory is its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.TransformerDecoder(nn.TransformerDecoderLayer(C, HEADS, 48, batch_first=True), L)

    def everything(self, ids: Tensor) -> Tensor:
        x, mask = self.embedded(ids), torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
        return self.head(self.blocks(x, x, tgt_mask=mask))


class PositionsFirst(Own):
    """PyTorch's encoder layers, which take (T, B, C), on (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(C, HEADS, 48) for _ in range(L))


class Factorized(Own):
    """A narrow embedding, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.wide = nn.Embedding(V, 12), nn.Linear(12, C)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.wide(self.tok(ids)) + self.pos(torch.arange(ids.shape[1]))


class LearnedTypes(Own):
    """`forward` needs token types."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(2, C)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedded(ids) + self.kinds(kinds)
        for layer in self.layers():
            x = layer(x)
        return self.head(self.final(x))


class Tags(LearnedTypes):
    """`forward` needs tags, whose name begins as that of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(T, C)

    def forward(self, ids: Tensor, pos_tags: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids, pos_tags)


class OptionalMask(Own):
    """Two-sided, unless a mask is given."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x = self.embedded(ids)
        for layer in self.layers():
            q, k, v = layer.att.parts(layer.norm1(x))
            x = x + layer.att.out(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
            x = x + layer.ff(layer.norm2(x))
        return self.head(self.final(x))


class MaxNorm(Own):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(V, C, max_norm=1.0)


class HeadTemperatures(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.temperatures = nn.Parameter(torch.ones(HEADS, 1, 1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(q * self.temperatures, k, v)


class WeakMask(Fused):
    """Scores of the future are low, but count."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * D**-0.5
        return scores.masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -5.0).softmax(-1) @ v


class Decay(Fused):
    """A bias of 0.001 for each step back."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        steps = torch.arange(q.shape[2])
        bias = (steps[None] - steps[:, None]) * 1e-3
        bias = bias.masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class TokenShift(PreNorm):
    """Half of the attention's input is the token before."""

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm1(x)
        before = F.pad(u, (0, 0, 1, -1))
        x = x + self.att(torch.cat([before[..., : C // 2], u[..., C // 2 :]], dim=-1))
        return x + self.ff(self.norm2(x))


class OtherScaleLast(Own):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[-1].att.scale = D**-0.5 / 2  # type: ignore[index, union-attr]


class RowsMix(Own):
    def everything(self, ids: Tensor) -> Tensor:
        logits = super().everything(ids)
        return logits + 0.05 * logits.mean(0, keepdim=True)


class FromTheEnd(Own):
    def embedded(self, ids: Tensor) -> Tensor:
        return self.tok(ids) + self.pos(torch.arange(ids.shape[1]).flip(0))


class PositionsAgain(Own):
    """Positions start again at the 31st token."""

    def embedded(self, ids: Tensor) -> Tensor:
        return self.tok(ids) + self.pos(torch.arange(ids.shape[1]) % 30)


class OtherFinalEpsilon(Own):
    def __init__(self, norm: Callable[[float], nn.Module], last: float):
        super().__init__(norm=partial(norm, 1e-5))
        self.final = norm(last)


REFUSED: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "soft-capped logits": (Capped, "the head"),
    "cosine head": (CosineHead, "the head"),
    "dropout left on": (Noisy, "stays on in evaluation .*dropout of 0"),
    "dropout of the fused attention left on": (partial(Own, NoisyAttention), "stays on in evaluation .*dropout of 0"),
    "two-sided attention": (partial(Own, TwoSided), "attention of the first layer.*causal"),
    "sliding window": (partial(Own, Window), "attention of the first layer"),
    "the last layer is two-sided": (LastTwoSided, "layer 2 of 2"),
    "the last layer has another activation": (LastReLU, "layer 2 of 2"),
    "query-key norm": (partial(Own, QueryKeyNorm), "attention of the first layer"),
    "ALiBi": (partial(Own, Alibi, positions="none"), "attention of the first layer|position"),
    "RoPE": (partial(Own, Rotary, positions="none"), "rotary|position"),
    "RoPE beside positions": (partial(Own, Rotary), "rotary"),
    "RMSNorm": (partial(Own, norm=RootMeanSquare), "Llama"),
    "gated MLP": (partial(Own, mlp=GatedMLP), "gated"),
    "Llama's shape": (partial(Own, Rotary, GatedMLP, RootMeanSquare, positions="none"), "Llama's shape"),
    "fewer key heads": (partial(Own, FewerKeys), "fewer key heads"),
    "an attention narrower than the model": (partial(Own, Narrow), "have 48 rows in all.*another width"),
    "a forward that needs a cache": (NeedsCache, "NoneType.*give a module whose forward takes token ids"),
    "parallel blocks": (partial(Own, block=Parallel), "parallel"),
    "one norm for two places": (partial(Own, block=SharedNorm), "one norm is used in two places"),
    "half a residual": (partial(Own, block=HalfResidual), "sum at the end"),
    "the residual behind the norm": (partial(Own, block=NormedResidual), "residual"),
    "a norm behind the attention": (partial(Own, block=Sandwich), "after the attention|residual"),
    "a norm by the unbiased deviation": (partial(Own, norm=partial(ScaleShift, unbiased=True)), "norm"),
    "a mask that is off by one": (
        partial(Own, partial(Masked, lambda i, j: j <= i + 1)),
        "attention of the first layer",
    ),
    "a window longer than what is recorded": (
        partial(Own, partial(Masked, lambda i, j: (j <= i) & (j > i - 30))),
        "40",
    ),
    "attention in chunks": (partial(Own, partial(Masked, lambda i, j: (j <= i) & (j // 30 == i // 30))), "40 tokens"),
    "attention scaled by the length": (partial(Own, ScaledByLength), "40 tokens"),
    "a softmax with one more": (partial(Own, OneMore), "attention of the first layer"),
    "a softmax over the queries": (partial(Own, OverQueries), "attention of the first layer"),
    "capped scores": (partial(Own, CappedScores), "attention of the first layer"),
    "another number of heads in the last layer": (TwoHeadCounts, "layer 2 of 2"),
    "a learned factor of the residual": (partial(Own, block=LearnedResidual), "residual"),
    "the MLP first": (partial(Own, block=MLPFirst), "attention of the first layer"),
    "an activation behind the MLP": (partial(Own, mlp=ActiveResult), "sum at the end"),
    "a norm of the embedding": (NormedEmbedding, "norm of the embedding"),
    "a token in front": (ExtraToken, "embedding"),
    "probabilities": (Probabilities, "returns probabilities: let forward return the logits"),
    "log-probabilities of some tokens": (LogProbabilitiesOfSome, "the head"),
    "the hidden state first": (HiddenFirst, "returns 32 values for each token, and its embedding has 67 rows"),
    "logits scaled by position": (ScaledByPosition, "the head"),
    "logits of some tokens scaled": (ScaledInPart, "the head"),
    "rows that mix": (RowsMix, "rows of a batch change each other"),
    "PyTorch's layers on (B, T)": (PositionsFirst, "need batch_first=True"),
    "one layer on its result and the embedding": (Injected, "the head reads is no norm|norm of the first layer"),
    "a layer that runs once more on long inputs": (OnceMore, "40 tokens"),
    "layers from the last one on": (partial(Shared, [2, 1, 0]), "another order"),
    "a layer that runs again with a step's vector": (partial(StepEmbedding, 1), "something added between layers"),
    "layers that run again with a step's vector": (partial(StepEmbedding, 2), "something added between layers"),
    "the second layer beside the trunk": (partial(BesideTrunk, 1), "a layer whose result is not used"),
    "the last layer beside the trunk": (partial(BesideTrunk, 2), "a layer whose result is not used"),
    "one attention for all MLPs": (OneAttention, "an attention or MLP that layers share"),
    "a second attention": (CrossAttention, "a second attention, as in nn.TransformerDecoder"),
    "a projection of the embedding": (Factorized, "as wide as the token embedding, 12"),
    "token types as an argument": (LearnedTypes, "give a module whose forward takes token ids"),
    "a mask that is optional": (OptionalMask, "let forward make the causal mask where 'mask' is not given"),
    "tags as an argument": (Tags, "give a module whose forward takes token ids"),
    "an embedding with max_norm": (MaxNorm, r"renorm\(2, 0, emb.max_norm\)"),
    "an activation of PyTorch only": (partial(Own, mlp=partial(MLP, nn.ELU)), "nearest activation of transformers"),
    "a temperature for each head": (partial(Own, HeadTemperatures), "attention of the first layer"),
    "a weak mask": (partial(Own, WeakMask), "attention of the first layer.*causal"),
    "a slow decay": (partial(Own, Decay), "attention of the first layer"),
    "half of the token before": (partial(Own, block=TokenShift), "first norm"),
    "another scale in the last layer": (OtherScaleLast, "layer 2 of 2"),
    "positions from the end": (FromTheEnd, "for 1 token are"),
    "positions that start again": (PositionsAgain, "40 tokens"),
    "another epsilon at the end": (partial(OtherFinalEpsilon, layer_norm, 1e-6), "different epsilons"),
    "another epsilon at the end, written out": (partial(OtherFinalEpsilon, ScaleShift, 1e-3), "different epsilons"),
}
