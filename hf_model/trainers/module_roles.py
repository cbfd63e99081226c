"""The roles that a module's parameters may have, and the forms that a step may take."""

import collections
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """Names of a weight and a bias of one layer, and the order of the weight's axes that makes it (out, in)."""

    weight: str
    bias: str | None = None
    axes: tuple[int, ...] = (0, 1)

    def matrix(self, parameters: Mapping[str, Tensor], n_in: int) -> Tensor:
        """The weight (out, in). A weight of three axes, one of them the heads, becomes a matrix."""
        return parameters[self.weight].permute(self.axes).reshape(-1, n_in)

    def vector(self, parameters: Mapping[str, Tensor], n_out: int) -> Tensor | None:
        return None if self.bias is None else parameters[self.bias].reshape(n_out)

    def on(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The result for `x`, (B, L, in)."""
        y = x @ self.matrix(parameters, x.shape[2]).t()
        bias = self.vector(parameters, y.shape[2])
        return y if bias is None else y + bias


@dataclass(frozen=True)
class Embedding:
    """The name of the token embedding, and whether the parameter is (C, V)."""

    name: str
    transposed: bool

    def matrix(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The token embedding, (V, C)."""
        return parameters[self.name].t() if self.transposed else parameters[self.name]


@dataclass(frozen=True)
class Norm:
    """Names of a gain and a bias of one layer; a norm without a gain has neither."""

    weight: str | None
    bias: str | None = None


@dataclass(frozen=True)
class Attention:
    """Rows of the joined projections that are queries, keys and values, (3 C), and how the heads attend."""

    rows: Tensor
    n_head: int
    scale: float


@dataclass
class Layer:
    """The roles of one layer's parameters."""

    norm_first: bool = True
    norms: list[Norm] = field(default_factory=list)
    projections: list[Linear] = field(default_factory=list)
    attention: Attention | None = None
    output: Linear | None = None
    up: Linear | None = None
    down: Linear | None = None
    activation: str = ""

    def names(self) -> set[str]:
        """The parameters that have a role, under their names without the layer's number."""
        roles = [*self.norms, *self.projections, self.output, self.up, self.down]
        return {name for role in roles if role is not None for name in (role.weight, role.bias) if name is not None}


def normalized(x: Tensor, norm: Norm, parameters: Mapping[str, Tensor], epsilon: float) -> Tensor:
    weight, bias = (None if name is None else parameters[name] for name in (norm.weight, norm.bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def factor_between(x: Tensor, y: Tensor, usual: float) -> float:
    """The number that `x` is multiplied by to become `y`, if there is one: 1 or the usual one but for rounding."""
    rounding = 1e-12 if x.dtype == torch.float64 else 1e-5
    factor = float((x.double() * y.double()).sum() / x.double().square().sum())
    return next((one for one in (1.0, usual) if abs(factor / one - 1) < rounding), factor)


def attend(joined: Tensor, attention: Attention) -> Tensor:
    """Causal attention (B, L, C) of joined projections (B, L, 3 C)."""
    rows, length, width = joined.shape[0], joined.shape[1], joined.shape[2] // 3
    q, k, v = (
        part.reshape(rows, length, attention.n_head, -1).transpose(1, 2)
        for part in joined[..., attention.rows].split(width, dim=2)
    )
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scale)
    return z.transpose(1, 2).reshape(rows, length, width)


def same_attention(one: Attention, other: Attention) -> bool:
    return (one.n_head, one.scale) == (other.n_head, other.scale) and torch.equal(one.rows, other.rows)


def scales(width: int, n_head: int, usual: bool) -> list[float]:
    """What a product of a query and a key may be multiplied by."""
    size = width // n_head
    values = (size**-0.5, width**-0.5, 1.0) if usual else (1 / size, 1 / width, n_head**-0.5, size**0.5, width**0.5)
    return list(dict.fromkeys(values))


def attentions(width: int, n_head: int, usual: bool) -> Iterator[Attention]:
    """Ways to read joined projections: the order of queries, keys and values, of heads and of their values; the scale.

    Args:
        usual: whether the usual scales are taken, or the others.
    """
    size = width // n_head
    index = torch.arange(3 * width)
    orders = {
        "which, head, value": index.view(3, n_head, size),
        "head, which, value": index.view(n_head, 3, size).permute(1, 0, 2),
        "head, value, which": index.view(n_head, size, 3).permute(2, 0, 1),
        "value, which, head": index.view(size, 3, n_head).permute(1, 2, 0),
        "which, value, head": index.view(3, size, n_head).permute(0, 2, 1),
        "one apart, head, which, value": torch.cat([index[:width], _by_head(index[width:], n_head)]).view(
            3, n_head, size
        ),
    }
    seen = set()
    for order in orders.values():
        for which in itertools.permutations(range(3)):
            rows = order[list(which)].reshape(-1)
            if (key := tuple(rows.tolist())) in seen:
                continue
            seen.add(key)
            for scale in scales(width, n_head, usual):
                yield Attention(rows, n_head, scale)


def _by_head(index: Tensor, n_head: int) -> Tensor:
    """The rows of two projections that are interleaved by head, one after the other."""
    return index.view(n_head, 2, -1).permute(1, 0, 2).reshape(-1)


def head_counts(n: int) -> list[int]:
    """Possible numbers of heads, the usual sizes of a head first."""
    found = [d for d in range(1, n + 1) if n % d == 0]
    return sorted(found, key=lambda d: (abs(math.log2(n / d / 64)), d))


def by_role(projected: list[tuple[Linear, Tensor]]) -> list[tuple[Linear, Tensor]]:
    """Projections of separate heads side by side for each role: by name, with the head's number taken out."""
    if len(projected) <= 3:
        return projected
    groups: dict[str, list[tuple[int, tuple[Linear, Tensor]]]] = {}
    for place, one in enumerate(projected):
        numbers = re.findall(r"\d+", one[0].weight)
        groups.setdefault(re.sub(r"\d+", "#", one[0].weight), []).append((int(numbers[-1]) if numbers else place, one))
    return [one for group in groups.values() for _, one in sorted(group, key=lambda pair: pair[0])]


def norms_in(parameters: Mapping[str, Tensor], width: int) -> Iterator[Norm]:
    """Pairs of vectors that may be gain and bias of a norm: of one module, or a gain alone, or nothing at all."""
    vectors = [name for name, p in parameters.items() if p.numel() == width and p.ndim == 1]
    for weight in vectors:
        place = weight.rpartition(".")[0]
        beside = [name for name in vectors if name != weight and name.rpartition(".")[0] == place]
        for bias in beside:
            yield Norm(weight, bias)
        yield Norm(weight)
    yield Norm(None)


def linears_in(name: str, weight: Tensor, n_in: int, parameters: Mapping[str, Tensor]) -> Iterator[Linear]:
    """Ways in which a parameter may be the weight of a product with `n_in` values."""
    if weight.ndim not in (2, 3) or weight.numel() % n_in:
        return
    n_out = weight.numel() // n_in
    biases = [other for other, p in parameters.items() if p.numel() == n_out and p is not weight and p.ndim < 3]
    biases = [other for other in biases if parameters[other].ndim == 1 or weight.ndim == 3]
    last = name.rpartition(".")[2]
    named = name.removesuffix(last) + last.replace("weight", "bias").replace("kernel", "bias").replace("W", "b")
    place = name.rpartition(".")[0]
    biases.sort(key=lambda other: (other != named, other.rpartition(".")[0] != place))
    for axes in itertools.permutations(range(weight.ndim)):
        shape = [weight.shape[axis] for axis in axes]
        if n_in in (shape[-1], math.prod(shape[1:])):
            for bias in (*biases[:8], None):
                yield Linear(name, bias, axes)


def layer_lists(parameters: Mapping[str, Tensor]) -> Iterator[list[dict[str, str]]]:
    """Ways to see a list of like layers: for each layer, a name without its number to the parameter's name."""
    seen: list[list[dict[str, str]]] = []
    for layers in _layer_lists(parameters):
        if layers not in seen:
            seen.append(layers)
            yield layers


def _layer_lists(parameters: Mapping[str, Tensor]) -> Iterator[list[dict[str, str]]]:
    """The same, with repetitions.

    In "blocks.3.heads.0.weight", the layer's number may be 3 or 0. The rest of the name is then
    "blocks.#.heads.0.weight" or "blocks.3.heads.#.weight". How many parameters share this rest tells the two apart:
    it should be the number of layers.
    """
    places = {name: list(_numbers(name)) for name in parameters}
    counts = collections.Counter(template for found in places.values() for template, _ in found)
    several = {template for template, count in counts.items() if count > 1}
    for templates in (several, set(counts)):
        yield from _lists(_first_numbers(places, templates), parameters)
    for n in sorted(set(counts.values()) - {1}):  # n layers, and one or two parts of a kind in each
        templates = {template for template, count in counts.items() if n <= count < 3 * n}
        for inner_first in (True, False):
            if layers := _joined(_first_numbers(places, templates, inner_first), n, parameters):
                yield layers
    yield [{name: name for name in parameters}]  # one layer that stands in no list


def _first_numbers(
    places: Mapping[str, list[tuple[str, int]]], templates: Collection[str], inner_first: bool = False
) -> dict[str, tuple[str, int]]:
    """For each name, its first number for which the rest of the name is one of the templates: the rest, the number."""
    chosen = {}
    for name, numbers in places.items():
        fits = [(template, number) for template, number in numbers if template in templates]
        if fits:
            chosen[name] = fits[-1] if inner_first else fits[0]
    return chosen


def _joined(places: Mapping[str, tuple[str, int]], n: int, parameters: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """n layers whose parts stand in several lists, or in one list by turns; empty if no list is long enough.

    With two layers, attentions.0 and attentions.1 are a part of one layer each. Of norms.0 to norms.4, the first two
    are the first layer's, the next two the second layer's, and norms.4, such as a final norm, is in none.
    """
    layers: list[dict[str, str]] = [{} for _ in range(n)]
    for template, names in _by_template(places).items():
        in_order = [names[number] for number in sorted(names)]
        each, left = divmod(len(in_order), n)  # how many of them each layer has, and how many are in none
        if left >= each:
            continue
        turns = [in_order[turn : n * each : each] for turn in range(each)]
        if any(len({parameters[name].shape for name in of_layers}) > 1 for of_layers in turns):
            continue
        for turn, of_layers in enumerate(turns):
            for layer, name in zip(layers, of_layers, strict=True):
                layer[template if each == 1 else f"{turn} {template}"] = name
    return layers if layers[0] else []


def _numbers(name: str) -> Iterator[tuple[str, int]]:
    """Each number in a name that may be the layer's, and the name without it: outer modules first."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        for match in reversed(list(re.finditer(r"\d+", part))):
            yield (
                ".".join([*parts[:i], f"{part[: match.start()]}#{part[match.end() :]}", *parts[i + 1 :]]),
                int(match[0]),
            )


def _by_template(places: Mapping[str, tuple[str, int]]) -> dict[str, dict[int, str]]:
    """For each name without its number, the number to the name."""
    templates: dict[str, dict[int, str]] = {}
    for name, (template, number) in places.items():
        templates.setdefault(template, {})[number] = name
    return templates


def _lists(places: Mapping[str, tuple[str, int]], parameters: Mapping[str, Tensor]) -> Iterator[list[dict[str, str]]]:
    """Lists of layers whose parameters have the same names and shapes, the largest list first."""
    templates = _by_template(places)
    lists: dict[tuple[int, ...], list[str]] = {}
    for template, names in templates.items():
        if len({parameters[name].shape for name in names.values()}) == 1:
            lists.setdefault(tuple(sorted(names)), []).append(template)

    def size(numbers: tuple[int, ...]) -> int:
        return sum(parameters[name].numel() for t in lists[numbers] for name in templates[t].values())

    for numbers in sorted(lists, key=size, reverse=True):
        yield [{template: templates[template][number] for template in lists[numbers]} for number in numbers]
