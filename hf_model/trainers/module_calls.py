"""Run a module of any class, and record each tensor that its operators return."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

B = 2  # rows of tokens
SAMPLE = 4096  # values of a recorded tensor that are compared first
CLOSE = 3e-5  # relative error (root mean square) of two float32 results that differ by rounding only
WRAPPERS = ("_orig_mod", "module")  # torch.compile; DataParallel, DistributedDataParallel


class NoReadingError(Exception):
    """No form fits at one step; the message names the step and how far the nearest form is off."""


def unwrap(module: nn.Module) -> nn.Module:
    """The module that `torch.compile`, `DataParallel` or `DistributedDataParallel` wraps."""
    while [name for name, _ in module.named_children()] in [[name] for name in WRAPPERS]:
        (module,) = module.children()
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

    def error(self, computed: Tensor) -> float:
        """The relative error of the recorded tensor that is nearest to `computed` (B, L, D)."""
        width = computed.shape[2]
        if width not in self.forms:
            return math.inf
        wanted = computed.reshape(-1)[self.places[width]]
        errors = (self.samples[width] - wanted).square().mean(dim=1).nan_to_num(math.inf)
        error = error_between(self.forms[width][int(errors.argmin())], computed)
        return error if error == error else math.inf

    def holds(self, computed: Tensor) -> bool:
        return self.error(computed) < CLOSE


def error_between(one: Tensor, other: Tensor) -> float:
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
