"""Read a GPT from a `torch.nn.Module` of any class.

The model runs on a few random tokens, and each tensor that an operator returns is recorded. Every step of a GPT
(embeddings, norm, projections, attention, MLP, head) is then computed here from the model's parameters, in each form
that this project can hold. The form whose result is among the recorded tensors is the one that the model computes.
Names order the candidates; they prove nothing.

Shapes: B rows of L tokens, C = n_embd, H the width of the MLP, V = vocab_size.
"""

import collections
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
LLAMA = (
    "If this is Llama's shape (RMSNorm, rotary positions, a gated MLP), use a converter to LlamaForCausalLM, such as "
    "llama2.c's export.py or minimind's convert_model.py"
)
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


@contextmanager
def moved(module: nn.Module, std: float) -> Iterator[None]:
    """Exchange a module's weights for random ones in float32, and put its own tensors back.

    Which form a module computes does not depend on its weights. An untrained model's weights hide the form: a bias of
    zeros, gains of one and attention that is almost even make several forms give the same result.
    """
    tensors = [*module.parameters(), *module.buffers()]
    own = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    try:
        for tensor, data in own:
            if isinstance(tensor, nn.Parameter):
                values = torch.randn(data.shape, generator=generator)
                values.mul_(std) if data.ndim > 1 else values.mul_(0.5).add_(0.5)
                tensor.data = values.to(data.device)
            else:
                tensor.data = data.float()
        yield
    finally:
        for tensor, data in own:
            tensor.data = data


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
    """Names of a weight and a bias of one layer, and the order of the weight's axes that makes it (out, in)."""

    weight: str
    bias: str | None = None
    axes: tuple[int, ...] = (0, 1)

    def matrix(self, parameters: Mapping[str, Tensor], n_in: int) -> Tensor:
        """The weight (out, in). A weight of three axes, one of them the heads, becomes a matrix."""
        return parameters[self.weight].permute(self.axes).reshape(-1, n_in)

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

    def names(self) -> set[str]:
        """The parameters that have a role, under their names without the layer's number."""
        roles = [*self.norms, *self.projections, self.output, self.up, self.down]
        return {name for role in roles if role is not None for name in (role.weight, role.bias) if name is not None}


class _Reader:
    def __init__(self, module: nn.Module, activations: Mapping[str, Activation]):
        self.module, self.activations = module, activations
        self.parameters = {
            name: parameter.detach() for name, parameter in module.named_parameters() if parameter.is_floating_point()
        }
        self.notes: list[str] = []
        self.epsilon: float | None = None

    def read(self) -> Reading:
        self._find_embedding()
        with moved(self.module, std=1.5 * self.width**-0.5):
            self.moved = {name: self.module.get_parameter(name).detach().cpu() for name in self.parameters}
            self._record()
            self._find_input()
            positions = self._find_positions()
            layers, layer = self._find_layers()
            final, head = self._head(layers, layer)
            self._check_all(layers, layer, final, head)
        del self.moved, self.pool, self.recorder
        return self._assemble(layers, layer, final, head, self._as_long_as_it_runs(positions))

    def _find_layers(self) -> tuple[list[dict[str, str]], Layer]:
        first: NoReadingError | None = None
        for layers in _layers(self.parameters):
            try:
                return layers, self._layer({template: self.moved[name] for template, name in layers[0].items()})
            except NoReadingError as error:
                first = first or error
        raise first or NoReadingError("no list of like layers was found in it")

    def _check_all(self, layers: Sequence[Mapping[str, str]], layer: Layer, final: Norm | None, head: Linear) -> None:
        """Compute every layer in the form of the first one, and the logits."""
        x, allowed = self.x, CLOSE
        for i, names in enumerate(layers):
            x = self._run(layer, x, {template: self.moved[name] for template, name in names.items()})
            allowed += CLOSE  # rounding adds up
            if not (error := self.pool.error(x)) < allowed:
                raise NoReadingError(f"layer {i + 1} of {len(layers)} is not like the first: it is {error:.2g} off")
        if final is not None:
            x = normalized(x, final, self.moved, self._epsilons()[0])
        if not (error := _error(self._linear_of(x, head, self.moved), self.logits)) < allowed:
            raise NoReadingError(f"its layers fit, but its logits are {error:.2g} off")

    def _run(self, layer: Layer, x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        def attention(u: Tensor) -> Tensor:
            assert layer.attention is not None
            joined = torch.cat([self._linear_of(u, linear, own) for linear in layer.projections], dim=2)
            z = attend(joined, layer.attention)
            return z if layer.output is None else self._linear_of(z, layer.output, own)

        def mlp(u: Tensor) -> Tensor:
            assert layer.up is not None and layer.down is not None
            active = self.activations[layer.activation](self._linear_of(u, layer.up, own))
            return self._linear_of(active, layer.down, own)

        first, second = ((lambda u, n=norm: normalized(u, n, own, self._epsilons()[0])) for norm in layer.norms)
        if layer.norm_first:
            x = x + attention(first(x))
            return x + mlp(second(x))
        x = first(x + attention(x))
        return second(x + mlp(x))

    def _find_embedding(self) -> None:
        """The parameter that the token ids look up."""
        self.device = next(iter(self.parameters.values())).device
        ids = torch.zeros((B, 2), dtype=torch.long, device=self.device)
        recorder = Recorder(ids)
        with NoFastPath(), recorder:
            logits_of(self.module, ids)
        if (found := recorder.embedding) is None:
            raise NoReadingError("its token embedding was not found: no matrix is looked up by the token ids")
        same = (n for n, p in self.parameters.items() if p.shape == found.shape and torch.equal(p, found))
        self.embedding_name = next(same, "")
        if not self.embedding_name:
            raise NoReadingError("its token embedding is not one of its parameters")
        self.vocab_size, self.width = found.shape

    def _record(self) -> None:
        """Run the module on the longest input of `LENGTHS` that it takes."""
        for length in LENGTHS:
            self.ids = torch.randint(self.vocab_size, (B, length), generator=torch.Generator().manual_seed(0))
            recorder = Recorder(self.ids.to(self.device))
            try:
                with NoFastPath(), recorder:
                    logits = logits_of(self.module, recorder.ids)
                break
            except NoReadingError as error:
                failure = error
        else:
            raise failure
        again = logits_of(self.module, recorder.ids)
        if not torch.equal(logits, again) and _error(logits, again) > CLOSE:
            raise NoReadingError("it gives other logits for the same tokens the second time: dropout left on?")
        self.length, self.recorder = length, recorder
        self.logits = logits.cpu()
        self.pool = Pool(recorder.values, length)

    # Embeddings.

    def _find_input(self) -> None:
        """Find the first layer's input among the recorded tensors: a multiple of the embedding, plus positions."""
        rows = self.moved[self.embedding_name][self.ids]  # (B, L, C)
        between = rows[0] - rows[1]  # in which positions cancel
        found = None
        for form in self.pool.forms.get(self.width, []):
            difference = form[0] - form[1]
            scale = float((difference * between).sum() / between.square().sum())
            positions = (form - scale * rows).mean(dim=0)  # (L, C)
            if scale > 0 and _error(positions + scale * rows, form) < CLOSE:
                found = (form, scale)
        if found is None:
            raise NoReadingError("the input of its first layer is not token embedding plus position embedding")
        self.x, self.scale = found
        for usual in (1.0, math.sqrt(self.width)):
            if abs(self.scale / usual - 1) < 1e-5:
                self.scale = usual
        self.positions = (self.x - self.scale * rows).mean(dim=0)

    def _find_positions(self) -> Tensor:
        """All learned or computed positions, (block_size, C)."""
        own = {**self.parameters, **dict(self.module.named_buffers())}
        self.position_name = ""
        for name, tensor in {**dict(self.module.named_buffers()), **self.moved}.items():
            if tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[-1] == self.width:
                table = tensor.float().cpu().reshape(-1, self.width)
                for start in range(min(4, max(0, len(table) - self.length + 1))):
                    if _error(table[start : start + self.length], self.positions) < CLOSE:
                        self.position_name = name
                        return own[name].detach().cpu().reshape(-1, self.width)[start:]
        for length in self._stated_lengths():
            if (computed := self._computed_positions(length)) is not None:
                self.notes.append(f"the {length} computed positions became a table")
                return computed
        raise NoReadingError("its positions are computed, and no attribute such as block_size says how many there are")

    def _as_long_as_it_runs(self, table: Tensor) -> Tensor:
        """The table up to the longest input that the module takes; its logits for such an input are kept."""
        for length in (len(table), *(n for n in self._stated_lengths() if n < len(table))):
            generator = torch.Generator().manual_seed(1)
            self.longest = torch.randint(self.vocab_size, (1, length), generator=generator).to(self.device)
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
        ids = torch.zeros((B, length), dtype=torch.long, device=self.device)
        recorder = Recorder(ids)
        try:
            with NoFastPath(), recorder:
                logits_of(self.module, ids)
        except NoReadingError:
            return None
        row = self.scale * self.moved[self.embedding_name][0]
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
        if layer.norm_first and layer.norms[0] == layer.norms[1] != Norm(None):
            raise NoReadingError("one norm is used in two places of a layer")
        entry = second[1]
        result = self._mlp(layer, entry, middle if layer.norm_first else entry, parameters)
        if layer.norm_first:
            after = middle + result
            if not self.pool.holds(after):
                raise NoReadingError(f"the sum at the end of the first layer is {self.pool.error(after):.2g} off")
            return layer
        third = self._norm_of(entry + result, norms, parameters)
        if third is None:
            raise NoReadingError("no norm at the end of the first layer fits")
        layer.norms.append(third[0])
        if layer.norms[0] == layer.norms[1] != Norm(None):
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
        least = min(error for error, _, _, _ in found)
        _, norm, self.epsilon, y = next(one for one in found if one[0] <= 3 * least)
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
        if not projected:
            raise NoReadingError(self._no_norm(parameters))
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
                f"positions, normalized queries, or no causal mask? {LLAMA}"
            )
        tried.sort(key=lambda one: one[0])
        best = tried[0]
        for _, attention, z in tried[1:]:
            if not same_attention(attention, best[1]) and _error(z, best[2]) > CLOSE:
                raise NoReadingError("the attention of the first layer: two forms fit equally well")
        layer.attention = best[1]
        return best[2]

    def _no_norm(self, parameters: Mapping[str, Tensor]) -> str:
        """Why nothing reads the first layer's input."""
        scaled = self.x / self.x.square().mean(dim=-1, keepdim=True).sqrt()
        gains = [p for p in parameters.values() if p.ndim == 1 and len(p) == self.width]
        if any(self.pool.error(scaled * gain) < 100 * CLOSE for gain in (1.0, *gains)):
            return f"the norm of the first layer is RMSNorm. {LLAMA}"
        nearest = self._nearest_norm(self.x, list(_norms(parameters, self.width)), parameters)
        return f"the norm of the first layer: the nearest LayerNorm is {nearest:.2g} off; another kind of norm? {LLAMA}"

    def _output(self, layer: Layer, attended: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        left = {name: p for name, p in parameters.items() if name not in {one.weight for one in layer.projections}}
        found = self._linears_on(attended, left, self.width)
        if not found:
            if self.pool.holds(self.x + attended):
                return attended  # no output projection
            raise NoReadingError("the projection after the attention of the first layer was not found")
        if (added := self._added(self.x, *found[0], parameters)) is None:
            raise NoReadingError("the residual sum after the attention of the first layer does not fit")
        layer.output, written = added
        return written

    def _added(
        self, x: Tensor, linear: Linear, y: Tensor, parameters: Mapping[str, Tensor]
    ) -> tuple[Linear, Tensor] | None:
        """A linear layer and its result, where the sum with `x` was recorded; the bias may be added to the sum."""
        if linear.bias is None:
            for name, p in parameters.items():
                is_large = p.shape == (self.width,) and float(p.norm() / y.norm()) > APART * CLOSE
                if is_large and self.pool.holds(x + y + p):
                    return replace(linear, bias=name), y + p
        return (linear, y) if self.pool.holds(x + y) else None

    def _mlp(self, layer: Layer, x: Tensor, residual: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The MLP's result on `x`, which is added to `residual`."""
        used = {one.weight for one in (*layer.projections, *([layer.output] if layer.output else []))}
        left = {name: p for name, p in parameters.items() if name not in used}
        nearest = math.inf
        for up, hidden in self._linears_on(x, left):
            rest = {name: p for name, p in left.items() if name != up.weight}
            fits: dict[str, tuple[float, Linear, Tensor]] = {}
            for name, act in self.activations.items():
                active = act(hidden)
                error = self.pool.error(active)
                nearest = min(nearest, error)
                if error < CLOSE and (down := self._linears_on(active, rest, self.width)):
                    fits[name] = (error, *(self._added(residual, *down[0], parameters) or down[0]))
            if fits:
                layer.activation = self._decide({name: error for name, (error, _, _) in fits.items()})
                _, layer.down, result = fits[layer.activation]
                layer.up = up
                return result
        if nearest == math.inf:
            raise NoReadingError("the MLP of the first layer was not found: no matrix reads its input")
        raise NoReadingError(f"the MLP of the first layer: the nearest activation is {nearest:.2g} off; gated? {LLAMA}")

    def _decide(self, errors: Mapping[str, float]) -> str:
        """The activation: the first name whose result is as near as the best one, if all such names agree."""
        best = min(errors, key=lambda name: errors[name])
        fits = [name for name, error in errors.items() if error < max(CLOSE / APART, APART * errors[best])]
        grid = torch.linspace(-6, 6, 1001)
        different = [n for n in fits if _error(self.activations[n](grid), self.activations[best](grid)) > CLOSE]
        if different:
            raise NoReadingError(f"the activation may be {best} or {different[0]}: its input is too small to tell")
        exact = [name for name in fits if errors[name] == 0.0]
        return (exact or fits)[0]

    # The head.

    def _head(self, layers: Sequence[Mapping[str, str]], layer: Layer) -> tuple[Norm | None, Linear]:
        """The final norm and the head: the norm whose result, times a matrix of V rows, is the logits."""
        inside = {names[template] for names in layers for template in layer.names()}
        outside = {name: p for name, p in self.moved.items() if name not in inside}
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
                    return self._final_norm(form, outside, layer), head
        raise NoReadingError(
            f"the head: no matrix of {V} rows gives the logits from a recorded tensor (the nearest is {nearest:.2g} "
            "off); a soft cap, or a scale?"
        )

    def _final_norm(self, entry: Tensor, outside: Mapping[str, Tensor], layer: Layer) -> Norm | None:
        norms = list(_norms(outside, self.width))
        if not layer.norm_first:  # a layer ends in a norm of its own
            norms.remove(Norm(None))
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
        positions: Tensor,
    ) -> Reading:
        assert layer.attention is not None
        C, n_head, scale = self.width, layer.attention.n_head, layer.attention.scale
        own = {name: parameter.cpu() for name, parameter in self.parameters.items()}
        embedding, matrix = own[self.embedding_name], head.matrix(own, C)
        if matrix.shape != embedding.shape:
            raise NoReadingError(f"its head has {len(matrix)} rows, and its embedding {len(embedding)}")
        tied = self.scale == 1 and torch.equal(matrix, embedding)
        state: dict[str, Tensor | None] = {
            "transformer.wte.weight": embedding if self.scale == 1 else embedding * self.scale,
            "transformer.wpe.weight": positions.to(embedding.dtype),
        }
        for i, names in enumerate(layers):
            in_layer = {template: own[name] for template, name in names.items()}
            state |= {f"transformer.h.{i}.{name}": p for name, p in layer_tensors(layer, in_layer, C).items()}
        if final is not None:
            state |= norm_tensors("transformer.ln_f", final, own, C)
        has_bias = any(value is not None for name, value in state.items() if name.endswith(".bias"))
        if not tied:
            state["lm_head.weight"] = matrix.contiguous()
        if head.bias is not None:
            state["lm_head.bias"] = head.vector(own, len(matrix))
        self._note_unused(layers, layer, final, head)
        H = state["transformer.h.0.mlp.c_fc.weight"]
        assert H is not None
        options = {
            "vocab_size": len(embedding),
            "block_size": len(positions),
            "n_layer": len(layers),
            "n_head": n_head,
            "n_embd": C,
            "bias": has_bias,
            "dropout": self._dropout(),
            "activation_function": layer.activation,
            "layer_norm_epsilon": self.epsilon if self.epsilon is not None else 1e-5,
            "tie_word_embeddings": tied,
            "n_inner": None if len(H) == 4 * C else len(H),
            "norm_first": layer.norm_first,
            "final_norm": final is not None,
            "head_bias": head.bias is not None,
            "attention_scale": None if scale == (C // n_head) ** -0.5 else scale,
        }
        logits = self.longest_logits.float().cpu()
        return Reading(options, filled(state, has_bias), self.longest.cpu(), logits, tuple(self.notes))

    def _note_unused(self, layers: Sequence[Mapping[str, str]], layer: Layer, final: Norm | None, head: Linear) -> None:
        used = {self.embedding_name, self.position_name, head.weight, head.bias}
        used |= {names[template] for names in layers for template in layer.names()}
        used |= set() if final is None else {final.weight, final.bias}
        if unused := [name for name in self.parameters if name not in used]:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            self.notes.append(f"left out, because no logit depends on it: {', '.join(unused[:3])}{more}")

    def _dropout(self) -> float:
        rates = {part.p for part in self.module.modules() if isinstance(part, nn.Dropout)}
        return max(rates) if rates and max(rates) < 1 else 0.0


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


def _layers(parameters: Mapping[str, Tensor]) -> Iterator[list[dict[str, str]]]:
    """Ways to see a list of like layers: for each layer, a name without its number to the parameter's name."""
    places = {name: list(_numbers(name)) for name in parameters}
    counts = collections.Counter(template for found in places.values() for template, _ in found)
    several = {
        name: next(((template, n) for template, n in found if counts[template] > 1), None)
        for name, found in places.items()
    }
    first = {name: next(iter(found), None) for name, found in places.items()}
    for chosen in (several, first):  # the first number that differs from name to name, or simply the first one
        yield from _lists({name: place for name, place in chosen.items() if place is not None}, parameters)
    yield [{name: name for name in parameters}]  # one layer that stands in no list


def _numbers(name: str) -> Iterator[tuple[str, int]]:
    """Each number in a name that may be the layer's, and the name without it: outer modules first."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        for match in reversed(list(re.finditer(r"\d+", part))):
            yield (
                ".".join([*parts[:i], f"{part[: match.start()]}#{part[match.end() :]}", *parts[i + 1 :]]),
                int(match[0]),
            )


def _lists(places: Mapping[str, tuple[str, int]], parameters: Mapping[str, Tensor]) -> Iterator[list[dict[str, str]]]:
    """Lists of layers whose parameters have the same names and shapes, the largest list first."""
    templates: dict[str, dict[int, str]] = {}
    for name, (template, number) in places.items():
        templates.setdefault(template, {})[number] = name
    lists: dict[tuple[int, ...], list[str]] = {}
    for template, names in templates.items():
        if len({parameters[name].shape for name in names.values()}) == 1:
            lists.setdefault(tuple(sorted(names)), []).append(template)

    def size(numbers: tuple[int, ...]) -> int:
        return sum(parameters[name].numel() for t in lists[numbers] for name in templates[t].values())

    for numbers in sorted(lists, key=size, reverse=True):
        yield [{template: templates[template][number] for template in lists[numbers]} for number in numbers]


def layer_tensors(layer: Layer, own: Mapping[str, Tensor], C: int) -> dict[str, Tensor | None]:
    """One layer's tensors under this project's names; None for a bias that the layer does not have."""
    assert layer.attention is not None and layer.up is not None and layer.down is not None
    tensors: dict[str, Tensor | None] = {}
    for place, norm in zip(("ln_1", "ln_2"), layer.norms, strict=True):
        tensors |= norm_tensors(place, norm, own, C)
    parts = [linear.matrix(own, C) for linear in layer.projections]
    biases = [linear.vector(own, len(matrix)) for linear, matrix in zip(layer.projections, parts, strict=True)]
    rows = layer.attention.rows
    tensors["attn.c_attn.weight"] = _rows(torch.cat(parts), rows)
    tensors["attn.c_attn.bias"] = None
    if any(bias is not None for bias in biases):
        joined = [part.new_zeros(len(part)) if bias is None else bias for bias, part in zip(biases, parts, strict=True)]
        tensors["attn.c_attn.bias"] = _rows(torch.cat(joined), rows)
    tensors["attn.c_proj.weight"], tensors["attn.c_proj.bias"] = torch.eye(C, dtype=parts[0].dtype), None
    H = layer.up.matrix(own, C).shape[0]
    linears = {"attn.c_proj": (layer.output, C, C), "mlp.c_fc": (layer.up, C, H), "mlp.c_proj": (layer.down, H, C)}
    for place, (linear, n_in, n_out) in linears.items():
        if linear is not None:
            tensors[f"{place}.weight"] = linear.matrix(own, n_in).contiguous()
            tensors[f"{place}.bias"] = linear.vector(own, n_out)
    return tensors


def _rows(joined: Tensor, rows: Tensor) -> Tensor:
    """The rows in that order; the tensor itself if they stand so already."""
    return joined if torch.equal(rows, torch.arange(len(rows))) else joined[rows]


def norm_tensors(place: str, norm: Norm, parameters: Mapping[str, Tensor], width: int) -> dict[str, Tensor | None]:
    weight = None if norm.weight is None else parameters[norm.weight].reshape(width)
    bias = None if norm.bias is None else parameters[norm.bias].reshape(width)
    return {f"{place}.weight": torch.ones(width) if weight is None else weight, f"{place}.bias": bias}


def filled(state: Mapping[str, Tensor | None], has_bias: bool) -> dict[str, Tensor]:
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
