"""Reads a whole `nn.Module` that was pickled, without its code: its tensors by name, and what its modules state."""

from collections.abc import Iterable, Iterator
from typing import Any

from hf_model.errors import UserError
from hf_model.trainers.pickle_reader import StandIn, dict_of, fields_of, kind_of

MAX_MODULES = 20_000
KINDS = ("_parameters", "_buffers", "_modules")  # attributes of each module: dicts by name
# torch's modules that are an activation, to the name in transformers. A module's own attributes tell variants apart.
ACTIVATIONS = {"ReLU": "relu", "GELU": "gelu", "SiLU": "silu", "Tanh": "tanh", "Sigmoid": "sigmoid", "Mish": "mish"}


def is_module(value: Any) -> bool:
    """Whether a value is a pickled `nn.Module`. Its attributes then have dicts of parameters, buffers and modules."""
    state = value.state if isinstance(value, StandIn) else None
    return isinstance(state, dict) and all(isinstance(dict_of(state.get(kind)), dict) for kind in KINDS)


def modules_in(module: StandIn) -> Iterator[tuple[str, StandIn]]:
    """A module and all modules in it, with what stands in front of their tensors' names.

    Raises:
        UserError: they are too many. A small file can hold one module in many places.
    """
    waiting = [("", module)]
    for _ in range(MAX_MODULES):
        if not waiting:
            return
        prefix, found = waiting.pop()
        yield prefix, found
        inner = dict_of(found.state["_modules"])
        waiting += [(f"{prefix}{name}.", value) for name, value in reversed(inner.items()) if is_module(value)]
    raise UserError(f"holds a model of more than {MAX_MODULES:,} modules")


def state_dict_of(module: StandIn) -> dict[str, Any]:
    """The tensors that `module.state_dict()` would have, under the same names."""
    found = {}
    for prefix, inner in modules_in(module):
        skipped = inner.state.get("_non_persistent_buffers_set")
        not_saved = skipped.content if isinstance(skipped, StandIn) else None
        for kind in ("_parameters", "_buffers"):
            for name, tensor in dict_of(inner.state[kind]).items():
                if tensor is not None and not (kind == "_buffers" and name in (not_saved or ())):
                    found[f"{prefix}{name}"] = tensor
    return found


def activation_of(module: StandIn, places: Iterable[str]) -> str | None:
    """The activation, if there are activations of one kind at these places, and they are modules of torch.

    Args:
        places: what stands in front of the names in each MLP.
    """
    places = tuple(places)
    kinds = {
        "gelu_pytorch_tanh" if inner.state.get("approximate") == "tanh" else ACTIVATIONS[kind_of(inner)]
        for prefix, inner in modules_in(module)
        if inner.name.startswith("torch.nn.modules.activation.")
        and kind_of(inner) in ACTIVATIONS
        and prefix.startswith(places)
    }
    return kinds.pop() if len(kinds) == 1 else None


def epsilon_of(module: StandIn) -> float | None:
    """The norms' epsilon; None if no module states one.

    Raises:
        UserError: the norms are not LayerNorms, or have different epsilons.
    """
    stated = {eps for _, inner in modules_in(module) if isinstance(eps := inner.state.get("eps"), float)}
    others = {
        kind_of(inner)
        for _, inner in modules_in(module)
        if (inner.name.startswith("torch.nn.modules.normalization.") and kind_of(inner) != "LayerNorm")
        or "rmsnorm" in kind_of(inner).lower()
    }
    if others:
        raise UserError(f"its norms are {', '.join(sorted(others))}, not LayerNorm: not a GPT of this shape")
    if len(stated) > 1:
        raise UserError(f"its norms have different epsilons ({', '.join(map(str, sorted(stated)))})")
    return stated.pop() if stated else None


def heads_of(module: StandIn, names: Iterable[str]) -> int | None:
    """The number of heads, if the modules or their configurations state one and the same under these names."""
    stated = set()
    for _, inner in modules_in(module):
        for holder in (inner.state, *(fields_of(inner.state.get(name)) or {} for name in ("config", "cfg", "args"))):
            stated |= {holder[name] for name in names if type(holder.get(name)) is int}
    return stated.pop() if len(stated) == 1 else None
