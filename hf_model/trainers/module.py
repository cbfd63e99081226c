"""Read a GPT from a `torch.nn.Module` of any class.

The module runs on a few random tokens with random weights, and each tensor that an operator returns is recorded. Every
step of a GPT (embeddings, norm, projections, attention, MLP, head) is then computed here from the same weights, in each
form that this project can hold. The form whose result is among the recorded tensors is the one that the module
computes. Names order the candidates; they prove nothing.

Shapes: B rows of L tokens, C = n_embd, H the width of the MLP, V = vocab_size.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_model.errors import UserError
from hf_model.trainers.module_calls import (
    CLOSE,
    NEEDED,
    OUT_OF_LINE,
    B,
    NoFastPath,
    NoReadingError,
    Pool,
    Recorder,
    error_between,
    exchanged,
    find_calls,
    mask_argument,
    random_weights,
    unknown_arguments,
    untouched,
)
from hf_model.trainers.module_head import Head, check_returned, find_head
from hf_model.trainers.module_parts import check_held, main_part, unwrap, without_fsdp
from hf_model.trainers.module_roles import (
    Attention,
    Embedding,
    Layer,
    Linear,
    Norm,
    attend,
    attentions,
    by_role,
    factor_between,
    head_counts,
    layer_lists,
    linears_in,
    normalized,
    norms_in,
    same_attention,
)
from hf_model.trainers.module_tensors import Found, notes_of, options_of, tensors_of
from hf_model.trainers.names import LLAMA

LENGTHS = (23, 13, 7, 5, 3, 2)  # primes, so that a length is taken for no other size; the longest that runs is taken
APART = 10.0  # how many times further off the second-best form must be
ROUNDING = CLOSE / 10  # of a norm in the first layer; an epsilon of 1e-6 in place of 1e-5 makes more
EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 0.0)
EPSILONS_DIFFER = "its norms have different epsilons, and a model of this family has one for all"
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
    samples: tuple[tuple[Tensor, Tensor], ...]
    """Random token ids (1, T), for T of 1, 5 and block_size, and the module's logits in float32 or float64: (1, T, V),
    or (1, 1, V) if it gives the last position only."""
    log_probabilities: bool
    """Whether the module gives the logits after a log-softmax."""
    notes: tuple[str, ...] = ()
    """What was folded or filled in, in words."""


def read_module(module: nn.Module, activations: Mapping[str, Activation]) -> Reading:
    """Find out what a module computes, and its tensors under this project's names.

    Args:
        module: takes token ids of shape (B, T) and returns logits. It is left as it was.
        activations: name to function, the preferred names first.

    Raises:
        UserError: no form of this model family fits, or more than one does; the message names the step.
    """
    module = unwrap(module)
    with without_fsdp(module):
        check_held(module)
        with untouched(module):
            failure: NoReadingError | None = None
            try:
                for reader in _readers(module, activations):
                    try:
                        return reader.read()
                    except NoReadingError as error:
                        failure = failure or error
            except NoReadingError as error:
                failure = failure or error
            has_lora = any("lora_" in name for name, _ in module.named_parameters())
            why = "it has LoRA matrices; convert the result of its merge_and_unload()" if has_lora else failure
            raise UserError(f"{type(module).__name__}: cannot be read as a GPT: {why}")


def _readers(module: nn.Module, activations: Mapping[str, Activation]) -> Iterator["_Reader"]:
    """One for each way to call the module, or the one part that is a whole GPT in a module which gives no logits."""
    ids = torch.ones((B, 2), dtype=torch.long, device=next(module.parameters()).device)
    part: nn.Module | None = module
    failure: NoReadingError | None = None
    while part is not None:
        name = next(name for name, one in module.named_modules() if one is part)
        kinds = type(part).__name__, type(module).__name__
        said = f"read from its part {name!r} ({kinds[0]}), as {kinds[1]} itself gives no logits: {failure}"
        notes = [] if failure is None else [said]
        try:
            for logits_of in find_calls(part, ids):
                yield _Reader(part, logits_of, activations, notes)
            return
        except NoReadingError as error:
            failure, inner = failure or error, main_part(part)
            if inner is not None and unknown_arguments(part):
                kind = type(inner).__name__
                raise NoReadingError(f"{error}. If its part {kind} is a whole GPT by itself, give this part") from None
            part = inner
    raise NoReadingError(f"{failure}; {NEEDED}")


class _Reader:
    def __init__(
        self,
        module: nn.Module,
        logits_of: Callable[[Tensor], Tensor],
        activations: Mapping[str, Activation],
        notes: Sequence[str],
    ):
        self.module, self.logits_of, self.activations = module, logits_of, activations
        self.notes = list(notes)
        self.epsilon: float | None = None
        self.unread: list[Tensor] = []  # joined projections that no form of attention fits
        self.device = next(module.parameters()).device
        self.parameters = {
            name: parameter.detach() for name, parameter in module.named_parameters() if parameter.is_floating_point()
        }
        is_double = all(parameter.dtype == torch.float64 for parameter in self.parameters.values())
        self.dtype = torch.float64 if is_double else torch.float32  # in which the forms are compared

    def read(self) -> Reading:
        self._find_embedding()
        with exchanged(self.module, random_weights(1.5 * self.width**-0.5, self.dtype)):
            self.moved = {name: self.module.get_parameter(name).detach().cpu() for name in self.parameters}
            self._record()
            self._find_input()
            self._find_positions()
            found = self._find_layers()
        del self.moved, self.pool, self.recorder
        with self._own_weights():
            positions = self._position_table()
            samples = self._samples(len(positions))
        own = {name: parameter.cpu() for name, parameter in self.parameters.items()}
        tensors = tensors_of(found, own, positions[: samples[-1][0].shape[1]])
        options = options_of(found, tensors) | {"dropout": self._dropout()}
        return Reading(options, tensors, samples, found.head.log_probabilities, (*self.notes, *notes_of(found, own)))

    def _dropout(self) -> float:
        rates = {part.p for part in self.module.modules() if isinstance(part, nn.Dropout)}
        return max(rates) if rates and max(rates) < 1 else 0.0

    def _find_layers(self) -> Found:
        """The first list of layers of which each one, and the head after them, computes what was recorded."""
        failures: list[NoReadingError] = []
        is_read = False
        notes = list(self.notes)
        for listed in layer_lists(self.parameters):
            self.epsilon, self.notes = None, list(notes)
            try:
                layer = self._layer(self._in_layer(listed[0]))
            except NoReadingError as error:
                failures.append(error)
                continue
            try:
                layers, last, allowed = self._runs(listed, layer)
                head = self._head(layers, layer, last)
                self._check_logits(layers, layer, head, allowed)
                return Found(self.embedding, self.scale, self.position_name, layers, layer, head, self._epsilon)
            except NoReadingError as error:
                if not is_read:
                    is_read, failures = True, [error]  # it says more than why other lists are none
        raise failures[0]

    def _runs(self, layers: list[dict[str, str]], layer: Layer) -> tuple[list[dict[str, str]], Tensor, float]:
        """The layers in the order in which they run, the last recorded result, and the error that rounding may make.

        Each result is computed in the form of the first layer, and must have been recorded. After a layer runs the next
        one. If layers are shared, as in ALBERT, the first one may run after the last one, or each one several times.
        """
        order: list[int] = []
        x, allowed = self.x, CLOSE
        while len(order) < len(self.pool.forms[self.width]):
            allowed += CLOSE  # rounding adds up
            candidates = list(dict.fromkeys(((order[-1] + 1) % len(layers), order[-1]))) if order else [0]
            results = {i: self._run(layer, x, self._in_layer(layers[i])) for i in candidates}
            errors = {i: self.pool.error(y) for i, y in results.items()}
            if (fits := next((i for i in candidates if errors[i] < allowed), None)) is None:
                break
            order.append(fits)
            x = results[fits]
        if (place := len(set(order))) < len(layers):
            error = errors.get(place, math.inf)
            raise NoReadingError(
                f"layer {place + 1} of {len(layers)} is not like the first: it is {error:.2g} off; another form, "
                f"{OUT_OF_LINE}?"
            )
        if len(order) > len(layers):
            n = f"its {len(layers)} layers run" if len(layers) > 1 else "its one layer runs"
            self.notes.append(f"{n} {len(order)} times in all: each run became a layer with a copy of the weights")
        return [layers[i] for i in order], self.pool.nearest(x), allowed

    def _head(self, layers: Sequence[Mapping[str, str]], layer: Layer, last: Tensor) -> Head:
        inside = {names[template] for names in layers for template in layer.names()}
        outside = {name: p for name, p in self.moved.items() if name not in inside}
        check_returned(self.logits, self.vocab_size)
        head = find_head(last, self.logits, self.pool.forms.get(self.width, []), outside, self._norm_of)
        if head.log_probabilities:
            self.notes.append(
                "your model returns log-probabilities, the converted one logits with the same probabilities"
            )
        return head

    def _in_layer(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        return {template: self.moved[name] for template, name in names.items()}

    def _check_logits(self, layers: Sequence[Mapping[str, str]], layer: Layer, head: Head, allowed: float) -> None:
        """Compute the logits from the embeddings on; for tokens that may be padding, a difference is only noted."""
        ends = self._ending(self._after(self.x, layers, layer), head)
        if not (error := error_between(ends, self.logits)) < allowed:
            raise NoReadingError(f"its layers fit, but its logits are {error:.2g} off")
        x = self.scale * self.embedding.matrix(self.moved)[self.padded_ids] + self.positions
        ends = self._ending(self._after(x, layers, layer), head)
        if not error_between(ends, self.padded_logits) < allowed:
            self.notes.append(
                f"your model treats {self._padding(ends, allowed)} apart, as padding; the converted one does so only "
                "with an attention_mask"
            )

    def _padding(self, ends: Tensor, allowed: float) -> str:
        """The token that is hidden, in words: the first one whose logits are not the computed ones."""
        errors = (ends - self.padded_logits)[0].square().mean(dim=1).sqrt() / self.padded_logits.std()
        places = (~(errors < allowed)).nonzero()
        if len(errors) == self.length and len(places):
            return f"token {self.padded_ids[0, places[0]].item()}"
        return f"one of the tokens 0, 1, 2, 3 and {self.vocab_size - 1}"

    def _after(self, x: Tensor, layers: Sequence[Mapping[str, str]], layer: Layer) -> Tensor:
        """The last layer's result, (B, L, C)."""
        for names in layers:
            x = self._run(layer, x, self._in_layer(names))
        return x

    def _ending(self, x: Tensor, head: Head) -> Tensor:
        """What the module returns, from the last layer's result, for as many positions as the module gives."""
        return head.on(x[:, -self.logits.shape[1] :], self.moved, self._epsilon)

    def _run(self, layer: Layer, x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        def attention(u: Tensor) -> Tensor:
            assert layer.attention is not None
            joined = torch.cat([linear.on(u, own) for linear in layer.projections], dim=2)
            z = attend(joined, layer.attention)
            return z if layer.output is None else layer.output.on(z, own)

        def mlp(u: Tensor) -> Tensor:
            assert layer.up is not None and layer.down is not None
            active = self.activations[layer.activation](layer.up.on(u, own))
            return layer.down.on(active, own)

        first, second = ((lambda u, n=norm: normalized(u, n, own, self._epsilon)) for norm in layer.norms)
        if layer.norm_first:
            x = x + attention(first(x))
            return x + mlp(second(x))
        x = first(x + attention(x))
        return second(x + mlp(x))

    def _find_embedding(self) -> None:
        """The parameter that the token ids look up."""
        ids = torch.ones((B, 2), dtype=torch.long, device=self.device)
        recorder = Recorder(ids, most=0)
        with NoFastPath(), recorder:
            self.logits_of(ids)
        if (found := recorder.embedding) is None:
            raise NoReadingError("its token embedding was not found: no matrix is looked up by the token ids")
        matrices = [(name, p) for name, p in self.parameters.items() if p.ndim == 2]
        forms = [(name, transposed, p.t() if transposed else p) for transposed in (False, True) for name, p in matrices]
        like = [form for form in forms if form[2].shape == found.shape]
        same = [form for form in like if form[2].data_ptr() == found.data_ptr() and form[2].stride() == found.stride()]
        equal = (form for form in like if torch.equal(form[2], found))
        if (form := next(iter(same), None) or next(equal, None)) is None:
            raise NoReadingError("its token embedding is not one of its parameters")
        self.embedding = Embedding(form[0], form[1])
        self.vocab_size, self.width = found.shape

    def _record(self) -> None:
        """Run the module on the longest input of `LENGTHS` that it takes."""
        for length in LENGTHS:
            self.ids = self._random_ids(B, length)
            recorder = Recorder(self.ids, dtype=self.dtype)
            try:
                with NoFastPath(), recorder:
                    logits = self.logits_of(recorder.ids)
                break
            except NoReadingError as error:
                failure = error
        else:
            raise NoReadingError(f"{failure}; {NEEDED}")
        padded = self.ids.clone()
        unusual = torch.tensor([0, 1, 2, 3, self.vocab_size - 1]).clamp(max=self.vocab_size - 1)[: length - 2]
        padded[0, 1 : 1 + len(unusual)] = unusual.to(self.device)
        again = self.logits_of(padded)
        if not error_between(logits[1], again[1]) <= CLOSE:  # so for rows that are positions: the second sees the first
            if not error_between(logits, self.logits_of(self.ids)) <= CLOSE:
                raise NoReadingError(
                    "it gives other logits for the same tokens the second time: dropout that stays on in evaluation "
                    "(then make the model with a dropout of 0)?"
                )
            raise NoReadingError(
                "the rows of a batch change each other's logits: nn.Transformer's modules need batch_first=True for "
                "ids of shape (B, T)"
            )
        self.length, self.recorder = length, recorder
        self.ids, self.logits = self.ids.cpu(), logits.cpu()
        self.padded_ids, self.padded_logits = padded.cpu(), again.cpu()
        self.pool = Pool(recorder.values, length)

    def _random_ids(self, rows: int, length: int) -> Tensor:
        """Random token ids, none of which is usual for padding, (rows, length)."""
        generator = torch.Generator().manual_seed(length)
        low, high = (4, self.vocab_size - 1) if self.vocab_size > 8 else (0, self.vocab_size)
        return torch.randint(low, high, (rows, length), generator=generator, device="cpu").to(self.device)

    # Embeddings.

    def _find_input(self) -> None:
        """Find the first layer's input among the recorded tensors: a multiple of the embedding, plus positions."""
        rows = self.embedding.matrix(self.moved)[self.ids]  # (B, L, C)
        between = rows[0] - rows[1]  # in which positions cancel
        found = None
        for place, form in enumerate(self.pool.forms.get(self.width, [])):
            difference = form[0] - form[1]
            scale = factor_between(between, difference, math.sqrt(self.width))
            positions = (form - scale * rows).mean(dim=0)  # (L, C)
            if scale and error_between(positions + scale * rows, form) < CLOSE:
                found = (form, scale, positions, place)
        if found is None:
            raise NoReadingError("the input of its first layer is not token embedding plus position embedding")
        self.x, self.scale, self.positions, self.place = found

    def _find_positions(self) -> None:
        """Find the parameter or buffer that holds the positions, if one does."""
        self.position_name, self.first_position = "", 0
        for name, tensor in {**dict(self.module.named_buffers()), **self.moved}.items():
            if tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[-1] == self.width:
                table = tensor.to("cpu", self.dtype).reshape(-1, self.width)
                for start in range(min(4, max(0, len(table) - self.length + 1))):
                    if error_between(table[start : start + self.length], self.positions) < CLOSE:
                        self.position_name, self.first_position = name, start
                        return

    def _position_table(self) -> Tensor:
        """All positions, (block_size, C), with the module's own weights."""
        if self.position_name:
            table = self.parameters.get(self.position_name)
            if table is None:
                table = self.module.get_buffer(self.position_name)
            return table.detach().cpu().reshape(-1, self.width)[self.first_position :]
        for length in self._stated_lengths():
            ids = self._random_ids(B, length)
            recorder = Recorder(ids, most=self.place + 1, width=self.width, dtype=self.dtype)
            try:
                with NoFastPath(), recorder:
                    self.logits_of(ids)
            except NoReadingError:
                continue
            own = {self.embedding.name: self.module.get_parameter(self.embedding.name)}
            table = recorder.values[self.place][0] - self.scale * self.embedding.matrix(own)[ids[0]].cpu()
            became = "computed positions became a table" if table.any() else "positions are zeros: your model adds none"
            self.notes.append(f"the {length} {became}")
            return table
        raise NoReadingError("no attribute says how many positions it has: set one, such as model.block_size = 1024")

    def _own_weights(self) -> AbstractContextManager[None]:
        """The module's own weights, in float32 if they are narrower."""
        dtypes = {parameter.dtype for parameter in self.parameters.values()}
        is_wide = dtypes <= {torch.float32, torch.float64}
        return nullcontext() if is_wide else exchanged(self.module, lambda tensor: tensor.data.float())

    def _samples(self, n_positions: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """Token ids and logits, for 1 and 5 tokens and as many as the module takes."""
        ids, logits = self._longest(n_positions)
        lengths = [n for n in (1, 5) if n < ids.shape[1]]
        samples = [(ids[:, :length], self.logits_of(ids[:, :length])) for length in lengths]
        return tuple((ids.cpu(), logits.cpu()) for ids, logits in (*samples, (ids, logits)))

    def _longest(self, n_positions: int) -> tuple[Tensor, Tensor]:
        """The longest input that the module takes, and its logits."""
        for length in (n_positions, *(n for n in self._stated_lengths() if n < n_positions)):
            ids = self._random_ids(1, length)
            try:
                return ids, self.logits_of(ids)
            except NoReadingError:
                continue
        raise NoReadingError(f"it does not run on {n_positions} tokens, as many as it has positions for")

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

    # One layer.

    def _layer(self, parameters: dict[str, Tensor]) -> Layer:
        layer = Layer()
        norms = list(norms_in(parameters, self.width))
        first = self._norm_of(self.x, norms, parameters)
        if first is not None:
            layer.norms.append(first[0])
            entry = first[1]
            projected = self._linears_on(entry, parameters)
        if first is None or not projected:
            layer.norm_first, layer.norms, entry = False, [], self.x
            projected = self._linears_on(entry, parameters)
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
        seen = list(dict.fromkeys(self.recorder.epsilons))
        if len(seen) > 1:
            raise NoReadingError(EPSILONS_DIFFER)
        if seen:
            return seen
        stated = {
            value
            for part in self.module.modules()
            for name, value in vars(part).items()
            if "eps" in name.lower() and isinstance(value, float) and 0 <= value < 0.1
        }
        return list(dict.fromkeys([*stated, *EPSILONS]))

    def _norm_of(
        self,
        x: Tensor,
        norms: Sequence[Norm],
        parameters: Mapping[str, Tensor],
        error_of: Callable[[Tensor], float] | None = None,
    ) -> tuple[Norm, Tensor] | None:
        """The norm whose result on `x` was recorded, or has a small error by `error_of`; and that result."""
        found = []
        for norm in norms:
            for epsilon in self._epsilons():
                y = normalized(x, norm, parameters, epsilon)
                error = (error_of or self.pool.error)(y)
                if error < CLOSE:
                    found.append((error, norm, epsilon, y))
        return self._settled(found)

    @property
    def _epsilon(self) -> float:
        return 1e-5 if self.epsilon is None else self.epsilon

    def _settled(self, found: Sequence[tuple[float, Norm, float, Tensor]]) -> tuple[Norm, Tensor] | None:
        """The first of the best fits (error, norm, epsilon, result); all norms must have one epsilon."""
        if not found:
            return None
        least = min(error for error, _, _, _ in found)
        fits = [one for one in found if one[0] <= 3 * least]
        if self.epsilon is not None:
            fits = [one for one in found if one[0] <= max(3 * least, ROUNDING) and one[2] == self.epsilon]
            if not fits:
                raise NoReadingError(EPSILONS_DIFFER)
        _, norm, self.epsilon, y = fits[0]
        return norm, y

    def _nearest_norm(self, x: Tensor, norms: Sequence[Norm], parameters: Mapping[str, Tensor]) -> float:
        errors = [self.pool.error(normalized(x, n, parameters, self._epsilon)) for n in norms]
        return min(errors, default=math.inf)

    def _linears_on(
        self, x: Tensor, parameters: Mapping[str, Tensor], n_out: int | None = None
    ) -> list[tuple[Linear, Tensor]]:
        """Each weight whose product with `x` was recorded, with the bias that fits, and the product."""
        found = []
        for name, weight in parameters.items():
            for linear in linears_in(name, weight, x.shape[2], parameters):
                y = linear.on(x, parameters)
                if (n_out is None or y.shape[2] == n_out) and self._holds_in_all(y):
                    found.append((linear, y))
                    break
        return found

    def _holds_in_all(self, y: Tensor) -> bool:
        """Whether a product was recorded as one, or in three parts, as by `nn.MultiheadAttention`."""
        return self.pool.holds(y) or (y.shape[2] == 3 * self.width and all(map(self.pool.holds, y.chunk(3, dim=2))))

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
                f"values of a GPT have {3 * C}; fewer key heads, an attention of another width, or parallel blocks?"
            )
        projected = by_role(projected)
        layer.projections = [linear for linear, _ in projected]
        joined = torch.cat([y for _, y in projected], dim=2)  # (B, L, 3 C)
        if any(torch.equal(joined, other) for other in self.unread):
            raise NoReadingError("no form of attention fits")  # found out already, in another list of layers
        nearest = math.inf
        n_parts = len(projected)
        heads = [n_parts // 3] if n_parts > 3 and n_parts % 3 == 0 else [n_parts] if n_parts > 3 else head_counts(C)
        tried: list[tuple[float, Attention, Tensor]] = []
        for usual, n_head in itertools.product((True, False), heads):
            for attention in attentions(C, n_head, usual):
                z = attend(joined, attention)
                error = self.pool.error(z)
                nearest = min(nearest, error)
                if error < CLOSE:
                    tried.append((error, attention, z))
            if tried:
                break
        if not tried:
            self.unread.append(joined)
            mask = mask_argument(self.module)
            makes = f" (let forward make the causal mask where {mask!r} is not given)" if mask else ""
            raise NoReadingError(
                f"the attention of the first layer: the nearest form is {nearest:.2g} off; rotary positions, a bias on "
                f"positions, normalized queries, or no causal mask{makes}? {LLAMA}"
            )
        tried.sort(key=lambda one: one[0])
        best = tried[0]
        for _, attention, z in tried[1:]:
            if not same_attention(attention, best[1]) and error_between(z, best[2]) > CLOSE:
                raise NoReadingError("the attention of the first layer: two forms fit equally well")
        layer.attention = best[1]
        return best[2]

    def _no_norm(self, parameters: Mapping[str, Tensor]) -> str:
        """Why nothing reads the first layer's input."""
        scaled = self.x / self.x.square().mean(dim=-1, keepdim=True).sqrt()
        gains = [p for p in parameters.values() if p.ndim == 1 and len(p) == self.width]
        if any(self.pool.error(scaled * gain) < 100 * CLOSE for gain in (torch.ones(self.width), *gains)):
            return f"the norm of the first layer is RMSNorm. {LLAMA}"
        nearest = self._nearest_norm(self.x, list(norms_in(self.moved, self.width)), self.moved)
        if nearest < CLOSE:
            return "the first layer: no matrix reads its first norm; a norm of the embedding?"
        if not gains:
            return f"no layer is as wide as the token embedding, {self.width}; a projection between them?"
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
            hidden = self.pool.nearest(hidden)
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
            raise NoReadingError(
                "the MLP of the first layer was not found: no matrix reads its input; a second attention, as in "
                "nn.TransformerDecoder, or a convolution?"
            )
        if nearest < CLOSE:
            raise NoReadingError(
                f"the MLP of the first layer: no matrix takes its activation; gated, or three matrices? {LLAMA}"
            )
        raise NoReadingError(
            f"the MLP of the first layer: the nearest activation of transformers is {nearest:.2g} off; another one, or "
            f"gated? {LLAMA}"
        )

    def _decide(self, errors: Mapping[str, float]) -> str:
        """The activation: the first name whose result is as near as the best one, if all such names agree."""
        best = min(errors, key=lambda name: errors[name])
        fits = [name for name, error in errors.items() if error < max(CLOSE / APART, APART * errors[best])]
        grid = torch.linspace(-6, 6, 1001, device="cpu", dtype=torch.float32)
        different = [n for n in fits if error_between(self.activations[n](grid), self.activations[best](grid)) > CLOSE]
        if different:
            raise NoReadingError(f"the activation may be {best} or {different[0]}: its input is too small to tell")
        exact = [name for name in fits if errors[name] == 0.0]
        return (exact or fits)[0]
