"""Find a module's head: the steps from the last layer's result to the logits."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_model.trainers.module_calls import CLOSE, OUT_OF_LINE, NoReadingError, error_between
from hf_model.trainers.module_roles import Linear, Norm, factor_between, linears_in, normalized, norms_in

# The norm that gives a known result, and that result. From what is normalized, the candidates, the parameters and a
# function of a result to its relative error.
NormOf = Callable[[Tensor, Sequence[Norm], Mapping[str, Tensor], Callable[[Tensor], float]], tuple[Norm, Tensor] | None]


@dataclass(frozen=True)
class Head:
    """The steps from the last layer's result to what the module returns."""

    norm: Norm | None
    linear: Linear
    scale: float
    """What the logits are multiplied by."""
    log_probabilities: bool
    """Whether a log-softmax follows."""

    def on(self, x: Tensor, parameters: Mapping[str, Tensor], epsilon: float) -> Tensor:
        """What the module returns for the last layer's result `x`, (B, L, C)."""
        if self.norm is not None:
            x = normalized(x, self.norm, parameters, epsilon)
        return _returned(self.scale * self.linear.on(x, parameters), self.log_probabilities)

    def names(self) -> set[str]:
        """The parameters that have a role."""
        roles: list[Linear | Norm] = [self.linear, *([] if self.norm is None else [self.norm])]
        return {name for role in roles for name in (role.weight, role.bias) if name is not None}


def check_returned(logits: Tensor, vocab_size: int) -> None:
    """Check that a module returns logits or log-probabilities, one for each token of the vocabulary."""
    n = logits.shape[2]
    if n != vocab_size:
        raise NoReadingError(
            f"it returns {n} values for each token, and its embedding has {vocab_size} rows: let forward return the "
            "logits, alone or as the first tensor"
        )
    if logits.min() >= 0 and _are_ones(logits.sum(dim=-1)):
        raise NoReadingError("it returns probabilities: let forward return the logits, without softmax")


def find_head(
    last: Tensor, logits: Tensor, forms: Sequence[Tensor], outside: Mapping[str, Tensor], norm_of: NormOf
) -> Head:
    """Find the norm of `last` whose result, times a matrix of V rows, is the logits.

    Args:
        last: the last layer's result, (B, L, C).
        logits: what the module returned, (B, L, V) or (B, 1, V).
        forms: the recorded tensors (B, L, C), in their order.
        outside: the parameters that are in no layer.

    Raises:
        NoReadingError: no norm or no matrix fits.
    """
    width, n_positions, V = last.shape[2], logits.shape[1], logits.shape[2]
    heads = [
        linear
        for name, weight in outside.items()
        if weight.numel() == V * width
        for linear in linears_in(name, weight, width, outside)
    ]
    log_probabilities = _are_ones(logits.exp().sum(dim=-1))
    nearest, failure = math.inf, None
    for form, linear in itertools.product(reversed(forms), heads):
        y = linear.on(form[:, -n_positions:], outside)
        if y.shape[2] != V:
            continue
        scale = _scale_between(y, logits, width**-0.5, log_probabilities)
        error = error_between(_returned(scale * y, log_probabilities), logits)
        nearest = min(nearest, error)
        if error < CLOSE:
            try:
                return Head(_final_norm(last, form, outside, norm_of), linear, scale, log_probabilities)
            except NoReadingError as reason:  # what the head reads may itself be scaled
                failure = failure or reason
    raise failure or NoReadingError(
        f"the head: no matrix of {V} rows gives the logits from a recorded tensor (the nearest is {nearest:.2g} "
        "off); a soft cap?"
    )


def _scale_between(y: Tensor, logits: Tensor, usual: float, log_probabilities: bool) -> float:
    """The number that `y` is multiplied by to become the logits, if there is one.

    Log-probabilities are logits less one number for each token.
    """
    if log_probabilities:
        y, logits = (values - values.mean(dim=-1, keepdim=True) for values in (y, logits))
    return factor_between(y, logits, usual)


def _final_norm(last: Tensor, entry: Tensor, outside: Mapping[str, Tensor], norm_of: NormOf) -> Norm | None:
    """The norm between the last layer's result and what the head reads; None if the two are the same."""
    if error_between(last, entry) < CLOSE:
        return None
    norms = list(norms_in(outside, last.shape[2]))
    if (found := norm_of(last, norms, outside, lambda y: error_between(y, entry))) is None:
        raise NoReadingError(
            "the layers that were found fit, but what the head reads is no norm of the last one's result; layers "
            "in another order, or without a number in their names, an attention or MLP that layers share, "
            f"{OUT_OF_LINE}?"
        )
    return found[0]


def _returned(logits: Tensor, log_probabilities: bool) -> Tensor:
    return logits.log_softmax(dim=-1) if log_probabilities else logits


def _are_ones(sums: Tensor) -> bool:
    return float((sums - 1).abs().max()) < 10 * CLOSE
