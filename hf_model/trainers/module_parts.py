"""Find the GPT in what wraps it, and check that it holds its weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_model.errors import UserError

WRAPPERS = ("_orig_mod", "module")  # torch.compile; DataParallel, DistributedDataParallel
GATHER = (
    "its weights are sharded. On all ranks: state = get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True, cpu_offload=True)), from torch.distributed.checkpoint.state_dict. Then on rank 0: "
    "plain = GPT(config); plain.load_state_dict(state); convert(plain, ...)"
)

MAX_NORM = (
    "an embedding has max_norm, so each use changes its weights. Change them all at once: "
    "emb.weight.data = emb.weight.data.renorm(2, 0, emb.max_norm); emb.max_norm = None"
)


def unwrap(module: nn.Module) -> nn.Module:
    """The module that `torch.compile`, `DataParallel`, `DistributedDataParallel` or FSDP wraps."""
    while _is_summoned(module) or [name for name, _ in module.named_children()] in [[name] for name in WRAPPERS]:
        (module,) = module.children()
    return module


@contextmanager
def without_fsdp(module: nn.Module) -> Iterator[None]:
    """Run a block in which a module's parts are not wrapped by FSDP, whose whole weights were summoned."""
    wrapped = [
        (parent, name, part)
        for parent in module.modules()
        for name, part in parent.named_children()
        if _is_summoned(part)
    ]
    try:
        for parent, name, part in wrapped:
            parent._modules[name] = unwrap(part)
        yield
    finally:
        for parent, name, part in wrapped:
            parent._modules[name] = part


def _is_fsdp(module: nn.Module) -> bool:
    return type(module).__name__ == "FullyShardedDataParallel"  # by name: its import takes a second


def _is_summoned(module: nn.Module) -> bool:
    return _is_fsdp(module) and getattr(module, "training_state").name == "SUMMON_FULL_PARAMS"  # noqa: B009


def main_part(module: nn.Module) -> nn.Module | None:
    """The part with nearly all parameters, such as the GPT that a LightningModule trains; None if there is none."""
    total = _size(module)
    for part in module.children():
        if _size(part) > 0.9 * total:
            return unwrap(part)
    return None


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_held(module: nn.Module) -> None:
    """Check that a module has parameters, holds each of them whole, and does not change them when it runs.

    Raises:
        UserError: it does not; the message says what to do.
    """
    name, parameters = type(module).__name__, list(module.parameters())
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError(f"{name}: is TorchScript: give the model that it was made of")
    if not parameters:
        raise UserError(f"{name}: has no parameters")
    if any(type(parameter).__name__ == "DTensor" for parameter in parameters) or any(map(_is_fsdp, module.modules())):
        raise UserError(f"{name}: {GATHER}")
    if any(parameter.device.type == "meta" for parameter in parameters):
        raise UserError(f"{name}: its weights are on the meta device, which holds no values: load them first")
    if any(isinstance(part, nn.Embedding) and part.max_norm is not None for part in module.modules()):
        raise UserError(f"{name}: {MAX_NORM}")
