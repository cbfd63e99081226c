"""Reads a whole `nn.Module` that was pickled, without its code: its tensors by name, and what its modules state."""

from collections.abc import Iterable, Iterator
from typing import Any

from hf_model.trainers.pickle_reader import StandIn, dict_of, fields_of, kind_of

MAX_MODULE_DEPTH = 32
# torch's modules that are an activation, to the name in transformers. A module's own attributes tell variants apart.
ACTIVATIONS = {"ReLU": "relu", "GELU": "gelu", "SiLU": "silu", "Tanh": "tanh", "Sigmoid": "sigmoid", "Mish": "mish"}


def is_module(value: Any) -> bool:
    """Whether a value is a pickled `nn.Module`. Its attributes then have dicts of parameters, buffers and modules."""
    state = value.state if isinstance(value, StandIn) else None
    return isinstance(state, dict) and {"_parameters", "_buffers", "_modules"} <= state.keys()


def modules_in(module: StandIn, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, StandIn]]:
    """A module and all modules in it, with what stands in front of their tensors' names."""
    yield prefix, module
    if depth < MAX_MODULE_DEPTH:
        for name, inner in (dict_of(module.state["_modules"]) or {}).items():
            if is_module(inner):
                yield from modules_in(inner, f"{prefix}{name}.", depth + 1)


def state_dict_of(module: StandIn) -> dict[str, Any]:
    """The tensors that `module.state_dict()` would have, under the same names."""
    found = {}
    for prefix, inner in modules_in(module):
        skipped = inner.state.get("_non_persistent_buffers_set")
        not_saved = skipped.content if isinstance(skipped, StandIn) else None
        for kind in ("_parameters", "_buffers"):
            for name, tensor in (dict_of(inner.state[kind]) or {}).items():
                if tensor is not None and not (kind == "_buffers" and name in (not_saved or ())):
                    found[f"{prefix}{name}"] = tensor
    return found


def activation_of(module: StandIn) -> str | None:
    """The activation, if the module has activations of one kind only, and as modules of torch."""
    kinds = {
        "gelu_pytorch_tanh" if inner.state.get("approximate") == "tanh" else ACTIVATIONS[kind_of(inner)]
        for _, inner in modules_in(module)
        if inner.name.startswith("torch.nn.modules.activation.") and kind_of(inner) in ACTIVATIONS
    }
    return kinds.pop() if len(kinds) == 1 else None


def epsilon_of(module: StandIn) -> float | None:
    """The norms' epsilon, if the modules state one and the same."""
    stated = {eps for _, inner in modules_in(module) if isinstance(eps := inner.state.get("eps"), float)}
    return stated.pop() if len(stated) == 1 else None


def heads_of(module: StandIn, names: Iterable[str]) -> int | None:
    """The number of heads, if the modules or their configurations state one and the same under these names."""
    stated = set()
    for _, inner in modules_in(module):
        for holder in (inner.state, *(fields_of(inner.state.get(name)) or {} for name in ("config", "cfg", "args"))):
            stated |= {holder[name] for name in names if type(holder.get(name)) is int}
    return stated.pop() if len(stated) == 1 else None
