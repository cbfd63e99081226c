"""Read a GPT from a `torch.nn.Module` of any class.

The model runs on a few random tokens, and each tensor that an operator returns is recorded. Every step of a GPT
(embeddings, norm, projections, attention, MLP, head) is then computed here from the model's parameters, in each form
that this project can hold. The form whose result is among the recorded tensors is the one that the model computes.
Names order the candidates; they prove nothing.

Shapes: B rows of L tokens, C = n_embd, H the width of the MLP, V = vocab_size.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_model.errors import UserError

B = 2
LENGTHS = (23, 13, 7, 5, 3, 2)  # primes, so that a length is taken for no other size; the longest that runs is taken
CLOSE = 3e-5  # relative error (root mean square) of two float32 results that differ by rounding only
APART = 10.0  # how many times further off the second-best form must be
SAMPLE = 4096  # values of a recorded tensor that are compared first
EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 0.0)
WRAPPERS = ("_orig_mod", "module")  # torch.compile; DataParallel, DistributedDataParallel
LENGTH_NAMES = re.compile(
    r"(block|context|ctx|max|seq|pos).*(size|len|length|ctx|positions?|embeddings)|n_ctx|n_positions"
)

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reading:
    """What a module computes, in this project's terms."""

    options: dict[str, Any]
    """Fields of `CustomGPTConfig`: sizes, `activation_function`, `layer_norm_epsilon` and so on."""
    state_dict: dict[str, Tensor]
    """Tensors under the names of `CustomGPTForCausalLM`, on the CPU, in the module's dtype."""
    ids: Tensor
    """Random token ids (1, block_size), the longest input that the module takes."""
    logits: Tensor
    """The module's logits for `ids`, (1, T, V), or (1, 1, V) if it gives the last position only."""
    notes: tuple[str, ...] = ()
    """What was folded or filled in, in words."""


class NoReadingError(Exception):
    """No form fits at one step; the message names the step and how far the nearest form is off."""


def read_module(module: nn.Module, activations: Mapping[str, Activation]) -> Reading:
    """Find out what a module computes, and its tensors under this project's names.

    Args:
        module: takes token ids of shape (B, T) and returns logits. It is left as it was.
        activations: name to function, the preferred names first.

    Raises:
        UserError: no form of this model family fits, or more than one does; the message names the step.
    """
    module = unwrap(module)
    with untouched(module):
        try:
            return _Reader(module, activations).read()
        except NoReadingError as error:
            raise UserError(f"{type(module).__name__}: cannot be read as a GPT: {error}") from None


def unwrap(module: nn.Module) -> nn.Module:
    """The module that `torch.compile`, `DataParallel` or `DistributedDataParallel` wraps."""
    while isinstance(inner := next((getattr(module, name, None) for name in WRAPPERS), None), nn.Module) or isinstance(
        inner := getattr(module, "module", None), nn.Module
    ):
        if len(list(module.children())) != 1:
            break
        module = inner
    return module


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run a block without gradients and in evaluation mode; restore the modes, buffers and random state after it."""
    modes = {part: part.training for part in module.modules()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        module.eval()
        try:
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode
            for name, buffer in module.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])


# Logits of a module, however it returns them.


def logits_of(module: nn.Module, ids: Tensor, every_position: bool = True) -> Tensor:
    """Logits (B, T, V) for token ids (B, T).

    Takes a tensor, a tuple or list that begins with one, a dict or an object with `logits`; of shape (B, T, V) or
    (B T, V). If the module gives the last position only, targets are given too, and at last each prefix is run.

    Args:
        every_position: False accepts the last position only, (B, 1, V), and saves running each prefix.

    Raises:
        NoReadingError: the module does not run on token ids, or returns no logits.
    """
    rows, length = ids.shape
    last = _logits(_call(module, ids), rows, length)
    if last.shape[1] == length:
        return last
    for args, kwargs in (((), {"targets": ids}), ((), {"labels": ids}), ((ids,), {})):
        try:
            full = _logits(module(ids, *args, **kwargs), rows, length)
        except Exception:
            continue
        if full.shape[1] == length and torch.allclose(full[:, -1:], last, rtol=1e-3, atol=1e-4):
            return full
    if not every_position:
        return last
    return torch.cat([_logits(_call(module, ids[:, : n + 1]), rows, n + 1)[:, -1:] for n in range(length)], dim=1)


def _call(module: nn.Module, ids: Tensor) -> Any:
    try:
        return module(ids)
    except Exception as error:  # the user's code may fail in any way
        raise NoReadingError(f"it does not run on token ids of shape {tuple(ids.shape)} ({error})") from None


def _logits(output: Any, rows: int, length: int) -> Tensor:
    for name in ("logits", "lm_logits"):
        if isinstance(output, Mapping) and name in output:
            output = output[name]
        elif isinstance(getattr(output, name, None), Tensor):
            output = getattr(output, name)
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        output = next((part for part in output if isinstance(part, Tensor) and part.ndim >= 2), None)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise NoReadingError(f"it returns {type(output).__name__}, not logits")
    if output.ndim == 2:
        output = output.view(rows, -1, output.shape[-1])
    if output.ndim != 3 or output.shape[0] != rows or output.shape[1] not in (1, length):
        raise NoReadingError(f"it returns shape {tuple(output.shape)} for {rows} rows of {length} tokens")
    return output


# Recorded tensors.


class NoFastPath(TorchFunctionMode):
    """Any function mode keeps PyTorch's Transformer modules from computing a whole layer in one operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Keeps a copy of each floating-point tensor that an operator returns, the norms' epsilons and the embedding."""

    def __init__(self, ids: Tensor):
        super().__init__()
        self.ids = ids
        self.values: list[Tensor] = []
        self.epsilons: list[float] = []
        self.embedding: Tensor | None = None
        """The matrix that the token ids look up."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_layer_norm.default:
            self.epsilons.append(args[4])
        if func is torch.ops.aten.embedding.default and self.embedding is None:
            self._look_up(args[0], args[1])
        if func is torch.ops.aten.index.Tensor and self.embedding is None and args[0].ndim == 2:
            self._look_up(args[0], args[1][0])
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel() % self.ids.numel() == 0:
                self.values.append(value.detach().float().cpu().clone())
        return output

    def _look_up(self, matrix: Tensor, index: Tensor | None) -> None:
        if index is not None and index.shape == self.ids.shape and torch.equal(index, self.ids):
            self.embedding = matrix


class Pool:
    """The recorded tensors in the form (B, L, D), and the search for the one that is nearest to a computed one."""

    def __init__(self, values: Iterable[Tensor], length: int):
        self.forms: dict[int, list[Tensor]] = {}
        for value in values:
            for form in _forms(value, length):
                self.forms.setdefault(form.shape[2], []).append(form)
        generator = torch.Generator().manual_seed(0)
        self.places = {width: torch.randperm(B * length * width, generator=generator)[:SAMPLE] for width in self.forms}
        self.samples = {
            width: torch.stack([form.reshape(-1)[self.places[width]] for form in forms])
            for width, forms in self.forms.items()
        }

    def nearest(self, computed: Tensor) -> tuple[float, int]:
        """The relative error of the recorded tensor nearest to `computed` (B, L, D), and its index."""
        width = computed.shape[2]
        if width not in self.forms:
            return math.inf, -1
        wanted = computed.reshape(-1)[self.places[width]]
        errors = (self.samples[width] - wanted).square().mean(dim=1).nan_to_num(math.inf)
        index = int(errors.argmin())
        error = _error(self.forms[width][index], computed)
        return (error, index) if error == error else (math.inf, -1)

    def error(self, computed: Tensor) -> float:
        return self.nearest(computed)[0]

    def holds(self, computed: Tensor) -> bool:
        return self.error(computed) < CLOSE


def _error(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt() / other.std().clamp(min=1e-30))


def _forms(value: Tensor, length: int) -> Iterator[Tensor]:
    """A recorded tensor as (B, L, D): rows and positions in either order or as one, heads apart or not."""
    shape = value.shape
    if shape[:2] == (B, length):
        yield value.reshape(B, length, -1)
    elif shape[:2] == (length, B):
        yield value.transpose(0, 1).reshape(B, length, -1)
    elif value.ndim == 4 and shape[0] == B and shape[2] == length:  # (B, heads, L, D)
        yield value.transpose(1, 2).reshape(B, length, -1)
    elif value.ndim == 3 and shape[1] == length and shape[0] % B == 0:  # (B heads, L, D)
        yield value.view(B, -1, length, shape[2]).transpose(1, 2).reshape(B, length, -1)
    elif value.ndim == 2 and shape[0] == B * length:
        yield value.view(B, length, -1)


# What a step may be made of.


@dataclass(frozen=True)
class Linear:
    """Names of a weight and a bias of one layer, and how they stand: as `nn.Linear` has them, or transposed."""

    weight: str
    bias: str | None = None
    is_transposed: bool = False

    def matrix(self, parameters: Mapping[str, Tensor], n_in: int) -> Tensor:
        """The weight (out, in). A weight of each head (heads, in, D) or (heads, D, in) becomes one."""
        weight = parameters[self.weight]
        if weight.ndim == 3:
            weight = (weight.transpose(1, 2) if self.is_transposed else weight).reshape(-1, n_in)
        elif self.is_transposed:
            weight = weight.t()
        return weight

    def vector(self, parameters: Mapping[str, Tensor], n_out: int) -> Tensor | None:
        return None if self.bias is None else parameters[self.bias].reshape(n_out)


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


class _Reader:
    def __init__(self, module: nn.Module, activations: Mapping[str, Activation]):
        self.module, self.activations = module, activations
        self.parameters = {
            name: parameter.detach() for name, parameter in module.named_parameters() if parameter.is_floating_point()
        }
        self.notes: list[str] = []
        self.epsilon: float | None = None

    def read(self) -> Reading:
        self._record()
        self._embeddings()
        best: NoReadingError | None = None
        for layers in _layers(self.parameters):
            try:
                layer = self._layer(self._cpu(layers[0]))
            except NoReadingError as error:
                best = best or error
                continue
            head = self._head(layers)
            return self._assemble(layers, layer, *head)
        raise best or NoReadingError("no list of like layers was found in it")

    def _cpu(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        return {template: self.parameters[name].float().cpu() for template, name in names.items()}

    def _record(self) -> None:
        """Run the module on the longest input that it takes, in float32."""
        device = next(iter(self.parameters.values())).device
        self.vocab_size = max(p.shape[0] for p in self.parameters.values() if p.ndim == 2)
        n_ids = self._few_ids(device)
        for length in LENGTHS:
            self.ids = torch.randint(n_ids, (B, length), generator=torch.Generator().manual_seed(0)).to(device)
            recorder = Recorder(self.ids)
            try:
                with NoFastPath(), recorder:
                    logits = self._in_float32(self.ids)
                break
            except NoReadingError as error:
                failure = error
        else:
            raise failure
        again = self._in_float32(self.ids)
        if not torch.equal(logits, again) and _error(logits.float(), again.float()) > CLOSE:
            raise NoReadingError("it gives other logits for the same tokens the second time: dropout left on?")
        if not logits.isfinite().all():
            raise NoReadingError("its logits are NaN or infinite")
        self.length, self.recorder = length, recorder
        self.logits = logits.float().cpu()
        self.pool = Pool(recorder.values, length)

    def _few_ids(self, device: torch.device) -> int:
        """How many token ids there are: rows of the matrix that the ids look up."""
        ids = torch.zeros((B, 2), dtype=torch.long, device=device)
        recorder = Recorder(ids)
        with NoFastPath(), recorder:
            self._in_float32(ids)
        if recorder.embedding is None:
            raise NoReadingError("its token embedding was not found: no matrix is looked up by the token ids")
        looked_up = recorder.embedding.float()
        same = (
            n for n, p in self.parameters.items() if p.shape == looked_up.shape and torch.equal(p.float(), looked_up)
        )
        self.embedding_name = next(same, "")
        if not self.embedding_name:
            raise NoReadingError("its token embedding is not one of its parameters")
        self.vocab_size = recorder.embedding.shape[0]
        return self.vocab_size

    def _in_float32(self, ids: Tensor) -> Tensor:
        if all(parameter.dtype == torch.float32 for parameter in self.parameters.values()):
            return logits_of(self.module, ids)
        named = itertools.chain(self.module.named_parameters(), self.module.named_buffers())
        wide = {name: tensor.float() for name, tensor in named if tensor.is_floating_point()}
        return logits_of(_Functional(self.module, wide), ids)

    # Embeddings.

    def _embeddings(self) -> None:
        """Find the first layer's input among the recorded tensors: a multiple of the embedding, plus positions."""
        embedding = self.parameters[self.embedding_name].float().cpu()
        C = self.width = embedding.shape[1]
        rows = embedding[self.ids.cpu()]  # (B, L, C)
        between = rows[0] - rows[1]  # in which positions cancel
        found = None
        for form in self.pool.forms.get(C, []):
            difference = form[0] - form[1]
            scale = float((difference * between).sum() / between.square().sum().clamp(min=1e-30))
            positions = (form - scale * rows).mean(dim=0)  # (L, C)
            if scale > 0 and _error(positions + scale * rows, form) < CLOSE:
                found = (form, scale, positions)
        if found is None:
            raise NoReadingError("the input of its first layer is not token embedding plus position embedding")
        self.x, self.scale, self.positions = found
        if abs(self.scale - 1) < 1e-5:
            self.scale = 1.0
        elif abs(self.scale / math.sqrt(C) - 1) < 1e-5:
            self.scale = math.sqrt(C)
        self.positions = (self.x - self.scale * rows).mean(dim=0)

    def position_table(self) -> Tensor:
        """All learned or computed positions, (block_size, C)."""
        tensors = {**self.parameters, **dict(self.module.named_buffers())}
        for tensor in tensors.values():
            if tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[-1] == self.width:
                table = tensor.detach().float().cpu().reshape(-1, self.width)
                for start in range(min(4, max(0, len(table) - self.length + 1))):
                    if _error(table[start : start + self.length], self.positions) < CLOSE:
                        return self._as_long_as_it_runs(table[start:])
        for length in self._stated_lengths():
            if (computed := self._computed_positions(length)) is not None:
                self.notes.append(f"the {length} computed positions became a table")
                return self._as_long_as_it_runs(computed)
        raise NoReadingError("its positions are computed, and no attribute such as block_size says how many there are")

    def _as_long_as_it_runs(self, table: Tensor) -> Tensor:
        """The table up to the longest input that the module takes; its logits for such an input are kept."""
        for length in (len(table), *(n for n in self._stated_lengths() if n < len(table))):
            generator = torch.Generator().manual_seed(1)
            self.longest = torch.randint(self.vocab_size, (1, length), generator=generator).to(self.ids.device)
            try:
                self.longest_logits = logits_of(self.module, self.longest, every_position=False)
                return table[:length]
            except NoReadingError:
                continue
        raise NoReadingError(f"it does not run on {len(table)} tokens, as many as it has positions for")

    def _stated_lengths(self) -> list[int]:
        """Lengths that attributes or causal masks of the module state, the longest first."""
        stated: set[int] = set()
        for part in self.module.modules():
            configs = [value for name, value in vars(part).items() if "conf" in name.lower()]
            for holder in (part, *configs):
                fields = holder if isinstance(holder, Mapping) else getattr(holder, "__dict__", {})
                stated |= {
                    n for name, n in fields.items() if type(n) is int and LENGTH_NAMES.fullmatch(str(name).lower())
                }
        for buffer in self.module.buffers():
            if buffer.ndim >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1:
                stated.add(buffer.shape[-1])
        return sorted((n for n in stated if n >= self.length), reverse=True)

    def _computed_positions(self, length: int) -> Tensor | None:
        ids = torch.zeros((B, length), dtype=torch.long, device=self.ids.device)
        recorder = Recorder(ids)
        try:
            with NoFastPath(), recorder:
                self._in_float32(ids)
        except NoReadingError:
            return None
        row = self.scale * self.parameters[self.embedding_name][0].float().cpu()
        for value in recorder.values:
            if value.shape == (B, length, self.width):
                positions = value[0] - row
                if _error(positions[: self.length], self.positions) < CLOSE:
                    return positions
        return None

    # One layer.

    def _layer(self, parameters: dict[str, Tensor]) -> Layer:
        layer = Layer()
        norms = list(_norms(parameters, self.width))
        first = self._norm_of(self.x, norms, parameters)
        if first is not None:
            layer.norms.append(first[0])
            entry = first[1]
            projected = self._projections(entry, parameters)
        if first is None or not projected:
            layer.norm_first, layer.norms, entry = False, [], self.x
            projected = self._projections(entry, parameters)
        attended = self._attention(layer, projected, parameters)  # (B, L, C)
        written = self._output(layer, attended, parameters)
        middle = self.x + written
        if (second := self._norm_of(middle, norms, parameters)) is None:
            raise NoReadingError(
                f"after the attention of the first layer: no norm of the sum fits (the nearest is "
                f"{self._nearest_norm(middle, norms, parameters):.2g} off); parallel blocks, or another kind of norm?"
            )
        layer.norms.append(second[0])
        if layer.norms[0] == layer.norms[-1] and len(layer.norms) == 2:
            raise NoReadingError("one norm is used in two places of a layer")
        entry = second[1]
        result = self._mlp(layer, entry, parameters)
        if layer.norm_first:
            after = middle + result
            if not self.pool.holds(after):
                raise NoReadingError(f"the sum at the end of the first layer is {self.pool.error(after):.2g} off")
            return layer
        third = self._norm_of(entry + result, norms, parameters)
        if third is None:
            raise NoReadingError("no norm at the end of the first layer fits")
        layer.norms.append(third[0])
        if layer.norms[0] == layer.norms[1]:
            raise NoReadingError("one norm is used in two places of a layer")
        return layer

    def _epsilons(self) -> list[float]:
        """Candidates for the norms' epsilon: seen in a call, an attribute of a module, or a usual one."""
        if self.epsilon is not None:
            return [self.epsilon]
        seen = list(dict.fromkeys(self.recorder.epsilons))
        if len(seen) == 1:
            return seen
        stated = {
            value
            for part in self.module.modules()
            for name, value in vars(part).items()
            if "eps" in name.lower() and isinstance(value, float) and 0 <= value < 0.1
        }
        return list(dict.fromkeys([*seen, *stated, *EPSILONS]))

    def _norm_of(
        self, x: Tensor, norms: Sequence[Norm], parameters: Mapping[str, Tensor]
    ) -> tuple[Norm, Tensor] | None:
        """The norm whose result on `x` was recorded, and that result."""
        found: list[tuple[float, Norm, float, Tensor]] = []
        for norm in norms:
            for epsilon in self._epsilons():
                y = normalized(x, norm, parameters, epsilon)
                error = self.pool.error(y)
                if error < CLOSE:
                    found.append((error, norm, epsilon, y))
        if not found:
            return None
        _, norm, epsilon, y = min(found, key=lambda one: one[0])
        self.epsilon = epsilon
        return norm, y

    def _nearest_norm(self, x: Tensor, norms: Sequence[Norm], parameters: Mapping[str, Tensor]) -> float:
        errors = [self.pool.error(normalized(x, n, parameters, self.epsilon or 1e-5)) for n in norms]
        return min(errors, default=math.inf)

    def _linear_of(self, x: Tensor, linear: Linear, parameters: Mapping[str, Tensor]) -> Tensor:
        y = x @ linear.matrix(parameters, x.shape[2]).t()
        bias = linear.vector(parameters, y.shape[2])
        return y if bias is None else y + bias

    def _linears_on(
        self, x: Tensor, parameters: Mapping[str, Tensor], n_out: int | None = None
    ) -> list[tuple[Linear, Tensor]]:
        """Each weight whose product with `x` was recorded, with the bias that fits, and the product."""
        found = []
        for name, weight in parameters.items():
            for linear in _linears(name, weight, x.shape[2], parameters):
                y = self._linear_of(x, linear, parameters)
                if (n_out is None or y.shape[2] == n_out) and self.pool.holds(y):
                    found.append((linear, y))
                    break
        return found

    def _projections(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[tuple[Linear, Tensor]]:
        return [(linear, y) for linear, y in self._linears_on(x, parameters)]

    def _attention(
        self, layer: Layer, projected: list[tuple[Linear, Tensor]], parameters: Mapping[str, Tensor]
    ) -> Tensor:
        C = self.width
        rows = sum(y.shape[2] for _, y in projected)
        if rows != 3 * C:
            raise NoReadingError(
                f"the attention of the first layer: its projections have {rows} rows in all, and queries, keys and "
                f"values of a GPT have {3 * C}; fewer key heads, or parallel blocks?"
            )
        projected = _by_role(projected)
        layer.projections = [linear for linear, _ in projected]
        joined = torch.cat([y for _, y in projected], dim=2)  # (B, L, 3 C)
        best, nearest = None, math.inf
        n_parts = len(projected)
        heads = [n_parts // 3] if n_parts > 3 and n_parts % 3 == 0 else [n_parts] if n_parts > 3 else _divisors(C)
        tried = []
        for attention in _attentions(C, heads):
            z = attend(joined, attention)
            error = self.pool.error(z)
            nearest = min(nearest, error)
            if error < CLOSE:
                tried.append((error, attention, z))
        if not tried:
            raise NoReadingError(
                f"the attention of the first layer: the nearest form is {nearest:.2g} off; rotary positions, a bias on "
                "positions, normalized queries, or no causal mask?"
            )
        tried.sort(key=lambda one: one[0])
        best = tried[0]
        for _, attention, z in tried[1:]:
            if not same_attention(attention, best[1]) and _error(z, best[2]) > CLOSE:
                raise NoReadingError("the attention of the first layer: two forms fit equally well")
        layer.attention = best[1]
        return best[2]

    def _output(self, layer: Layer, attended: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        left = {name: p for name, p in parameters.items() if name not in {one.weight for one in layer.projections}}
        found = self._linears_on(attended, left, self.width)
        if not found:
            if self.pool.holds(self.x + attended):
                return attended  # no output projection
            raise NoReadingError("the projection after the attention of the first layer was not found")
        layer.output = found[0][0]
        if not self.pool.holds(self.x + found[0][1]):
            raise NoReadingError("the residual sum after the attention of the first layer does not fit")
        return found[0][1]

    def _mlp(self, layer: Layer, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        used = {one.weight for one in (*layer.projections, *([layer.output] if layer.output else []))}
        left = {name: p for name, p in parameters.items() if name not in used}
        for up, hidden in self._linears_on(x, left):
            errors = {name: self.pool.error(act(hidden)) for name, act in self.activations.items()}
            name = min(errors, key=lambda one: errors[one])
            if errors[name] >= CLOSE:
                nearest = errors[name]
                continue
            name = self._decide(name, errors, hidden)
            active = self.activations[name](hidden)
            rest = {key: p for key, p in left.items() if key != up.weight}
            if down := self._linears_on(active, rest, self.width):
                layer.up, layer.down, layer.activation = up, down[0][0], name
                return down[0][1]
        try:
            raise NoReadingError(f"the MLP of the first layer: the nearest activation is {nearest:.2g} off; gated?")
        except UnboundLocalError:
            raise NoReadingError("the MLP of the first layer was not found: no matrix reads its input") from None

    def _decide(self, best: str, errors: Mapping[str, float], hidden: Tensor) -> str:
        """The activation: the first name whose result is as near as the best one, if all such names agree."""
        fits = [name for name, error in errors.items() if error < max(CLOSE / APART, APART * errors[best])]
        grid = torch.linspace(-6, 6, 1001)
        different = [n for n in fits if _error(self.activations[n](grid), self.activations[best](grid)) > CLOSE]
        if different:
            raise NoReadingError(f"the activation may be {best} or {different[0]}: its input is too small to tell")
        exact = [name for name in fits if errors[name] == 0.0]
        return (exact or fits)[0]

    # The head.

    def _head(self, layers: Sequence[Mapping[str, str]]) -> tuple[Norm | None, Linear, dict[str, Tensor]]:
        """The final norm and the head: the norm whose result, times a matrix of V rows, is the logits."""
        inside = {name for layer in layers for name in layer.values()} if len(layers) > 1 else set()
        outside = {name: p.float().cpu() for name, p in self.parameters.items() if name not in inside}
        V = self.logits.shape[2]
        forms = self.pool.forms.get(self.width, [])
        heads = [
            linear
            for name, weight in outside.items()
            if weight.numel() == V * self.width
            for linear in _linears(name, weight, self.width, outside)
        ]
        nearest = math.inf
        for form in reversed(forms):
            for head in heads:
                y = self._linear_of(form, head, outside)
                if y.shape[2] != V:
                    continue
                error = _error(y, self.logits)
                nearest = min(nearest, error)
                if error < CLOSE:
                    return self._final_norm(form, outside), head, outside
        raise NoReadingError(
            f"the head: no matrix of {V} rows gives the logits from a recorded tensor (the nearest is {nearest:.2g} "
            "off); a soft cap, or a scale?"
        )

    def _final_norm(self, entry: Tensor, outside: Mapping[str, Tensor]) -> Norm | None:
        norms = list(_norms(outside, self.width))
        for form in reversed(self.pool.forms[self.width]):
            for norm in norms:
                for epsilon in self._epsilons():
                    if _error(normalized(form, norm, outside, epsilon), entry) < CLOSE and _error(form, entry) > CLOSE:
                        return norm
        return None

    # Everything under this project's names.

    def _assemble(
        self,
        layers: Sequence[Mapping[str, str]],
        layer: Layer,
        final: Norm | None,
        head: Linear,
        outside: Mapping[str, Tensor],
    ) -> Reading:
        C, attention = self.width, layer.attention
        assert attention is not None and layer.up is not None and layer.down is not None
        positions = self.position_table()
        dtype = next(iter(self.parameters.values())).dtype
        embedding = self.parameters[self.embedding_name].cpu()
        embedding = embedding if self.scale == 1 else embedding * self.scale
        state: dict[str, Tensor | None] = {
            "transformer.wte.weight": embedding,
            "transformer.wpe.weight": positions.to(dtype),
        }
        H = layer.up.matrix({t: self.parameters[n] for t, n in layers[0].items()}, C).shape[0]
        for i, names in enumerate(layers):
            own = {template: self.parameters[name].cpu() for template, name in names.items()}
            to = f"transformer.h.{i}."
            for place, norm in zip(("ln_1", "ln_2"), layer.norms, strict=True):
                state |= _norm_tensors(f"{to}{place}", norm, own, C)
            parts = [(linear.matrix(own, C), linear) for linear in layer.projections]
            joined = torch.cat([matrix for matrix, _ in parts])
            biases = [linear.vector(own, len(matrix)) for matrix, linear in parts]
            bias = None
            if any(one is not None for one in biases):
                zeros = [matrix.new_zeros(len(matrix)) for matrix, _ in parts]
                bias = torch.cat([zero if one is None else one for one, zero in zip(biases, zeros, strict=True)])
            rows = attention.rows
            state[f"{to}attn.c_attn.weight"] = joined[rows].contiguous()
            state[f"{to}attn.c_attn.bias"] = None if bias is None else bias[rows].contiguous()
            output = torch.eye(C, dtype=dtype) if layer.output is None else layer.output.matrix(own, C)
            state[f"{to}attn.c_proj.weight"] = output.contiguous()
            state[f"{to}attn.c_proj.bias"] = None if layer.output is None else layer.output.vector(own, C)
            for place, linear, n_in, n_out in (("c_fc", layer.up, C, H), ("c_proj", layer.down, H, C)):
                state[f"{to}mlp.{place}.weight"] = linear.matrix(own, n_in).contiguous()
                state[f"{to}mlp.{place}.bias"] = linear.vector(own, n_out)
        if final is not None:
            given = {name: self.parameters[name].cpu() for name in outside}
            state |= _norm_tensors("transformer.ln_f", final, given, C)
        matrix = head.matrix({name: self.parameters[name].cpu() for name in outside}, C)
        head_bias = head.vector({name: self.parameters[name].cpu() for name in outside}, matrix.shape[0])
        tied = self.scale == 1 and matrix.shape == embedding.shape and torch.equal(matrix, embedding)
        if not tied:
            state["lm_head.weight"] = matrix.contiguous()
        if head_bias is not None:
            state["lm_head.bias"] = head_bias
        has_bias = any(
            value is not None for name, value in state.items() if name.endswith(".bias") and name != "lm_head.bias"
        )
        options = {
            "vocab_size": self.logits.shape[2],
            "block_size": len(positions),
            "n_layer": len(layers),
            "n_head": attention.n_head,
            "n_embd": C,
            "bias": has_bias,
            "dropout": self._dropout(),
            "activation_function": layer.activation,
            "layer_norm_epsilon": self.epsilon if self.epsilon is not None else 1e-5,
            "tie_word_embeddings": tied,
            "n_inner": None if H == 4 * C else H,
            "norm_first": layer.norm_first,
            "final_norm": final is not None,
            "head_bias": head_bias is not None,
            "attention_scale": None if attention.scale == (C // attention.n_head) ** -0.5 else attention.scale,
        }
        return Reading(
            options,
            _filled(state, has_bias),
            self.longest.cpu(),
            self.longest_logits.float().cpu(),
            tuple(self.notes),
        )

    def _dropout(self) -> float:
        rates = {part.p for part in self.module.modules() if isinstance(part, nn.Dropout)}
        return max(rates) if rates and max(rates) < 1 else 0.0


class _Functional(nn.Module):
    """A module run with other tensors in place of its own."""

    inner: nn.Module

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]):
        super().__init__()
        object.__setattr__(self, "inner", module)
        self.tensors = tensors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.inner, self.tensors, args, kwargs, tie_weights=True)


def normalized(x: Tensor, norm: Norm, parameters: Mapping[str, Tensor], epsilon: float) -> Tensor:
    weight, bias = (None if name is None else parameters[name] for name in (norm.weight, norm.bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


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


def _attentions(width: int, heads: Iterable[int]) -> Iterator[Attention]:
    """Ways to read joined projections: the order of queries, keys and values, of heads and of their values."""
    for n_head in heads:
        size = width // n_head
        index = torch.arange(3 * width)
        orders = {
            "which, head, value": index.view(3, n_head, size),
            "head, which, value": index.view(n_head, 3, size).permute(1, 0, 2),
            "head, value, which": index.view(n_head, size, 3).permute(2, 0, 1),
            "value, which, head": index.view(size, 3, n_head).permute(1, 2, 0),
            "which, value, head": index.view(3, size, n_head).permute(0, 2, 1),
        }
        seen = set()
        for order in orders.values():
            for which in itertools.permutations(range(3)):
                rows = order[list(which)].reshape(-1)
                if (key := tuple(rows.tolist())) in seen:
                    continue
                seen.add(key)
                for scale in dict.fromkeys((size**-0.5, width**-0.5, 1.0)):
                    yield Attention(rows, n_head, scale)


def _divisors(n: int) -> list[int]:
    """Possible numbers of heads, the usual sizes of a head first."""
    found = [d for d in range(1, n + 1) if n % d == 0]
    return sorted(found, key=lambda d: (abs(math.log2(n / d / 64)), d))


def _by_role(projected: list[tuple[Linear, Tensor]]) -> list[tuple[Linear, Tensor]]:
    """Projections of separate heads side by side for each role: by name, with the head's number taken out."""
    if len(projected) <= 3:
        return projected
    groups: dict[str, list[tuple[int, tuple[Linear, Tensor]]]] = {}
    for place, one in enumerate(projected):
        numbers = re.findall(r"\d+", one[0].weight)
        groups.setdefault(re.sub(r"\d+", "#", one[0].weight), []).append((int(numbers[-1]) if numbers else place, one))
    return [one for group in groups.values() for _, one in sorted(group, key=lambda pair: pair[0])]


def _norms(parameters: Mapping[str, Tensor], width: int) -> Iterator[Norm]:
    """Pairs of vectors that may be gain and bias of a norm: of one module, or a gain alone, or nothing at all."""
    vectors = [name for name, p in parameters.items() if p.numel() == width and p.ndim == 1]
    for weight in vectors:
        place = weight.rpartition(".")[0]
        beside = [name for name in vectors if name != weight and name.rpartition(".")[0] == place]
        for bias in beside:
            yield Norm(weight, bias)
        yield Norm(weight)
    yield Norm(None)


def _linears(name: str, weight: Tensor, n_in: int, parameters: Mapping[str, Tensor]) -> Iterator[Linear]:
    """Ways in which a parameter may be the weight of a product with `n_in` values."""
    if weight.ndim not in (2, 3) or weight.numel() % n_in:
        return
    ways = [False] * (weight.shape[-1] == n_in) + [True] * (weight.shape[-2] == n_in)
    n_out = weight.numel() // n_in
    biases = [other for other, p in parameters.items() if p.numel() == n_out and p is not weight and p.ndim <= 2]
    biases = [other for other in biases if parameters[other].ndim == 1 or weight.ndim == 3]
    last = name.rpartition(".")[2]
    named = name.removesuffix(last) + last.replace("weight", "bias").replace("kernel", "bias").replace("W", "b")
    place = name.rpartition(".")[0]
    biases.sort(key=lambda other: (other != named, other.rpartition(".")[0] != place))
    for is_transposed in ways:
        for bias in (*biases[:8], None):
            yield Linear(name, bias, is_transposed)


def _layers(parameters: Mapping[str, Tensor]) -> Iterator[list[dict[str, str]]]:
    """Ways to see a list of like layers: for each layer, a name without its number to the parameter's name."""
    templates: dict[str, dict[int, str]] = {}
    for name in parameters:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if re.fullmatch(r"\D*\d+\D*", part)), None)
        if place is not None:
            number = int(re.findall(r"\d+", parts[place])[0])
            template = ".".join([*parts[:place], re.sub(r"\d+", "#", parts[place]), *parts[place + 1 :]])
            templates.setdefault(template, {})[number] = name
    counts: dict[tuple[int, ...], int] = {}
    for numbers in templates.values():
        if len({parameters[name].shape for name in numbers.values()}) == 1:
            key = tuple(sorted(numbers))
            counts[key] = counts.get(key, 0) + sum(parameters[name].numel() for name in numbers.values())
    for key in sorted(counts, key=lambda key: -counts[key]):
        chosen = {t: n for t, n in templates.items() if tuple(sorted(n)) == key}
        yield [{template: numbers[number] for template, numbers in chosen.items()} for number in key]
    yield [{name: name for name in parameters}]  # one layer that stands in no list


def _norm_tensors(place: str, norm: Norm, parameters: Mapping[str, Tensor], width: int) -> dict[str, Tensor | None]:
    weight = None if norm.weight is None else parameters[norm.weight].reshape(width)
    bias = None if norm.bias is None else parameters[norm.bias].reshape(width)
    return {f"{place}.weight": torch.ones(width) if weight is None else weight, f"{place}.bias": bias}


def _filled(state: Mapping[str, Tensor | None], has_bias: bool) -> dict[str, Tensor]:
    """The tensors, with zeros for a bias that some layers of the model have and others do not."""
    filled = {}
    for name, tensor in state.items():
        if tensor is not None:
            filled[name] = tensor
        elif has_bias:
            weight = state[name.removesuffix("bias") + "weight"]
            assert weight is not None
            filled[name] = weight.new_zeros(weight.shape[0])
    return filled
