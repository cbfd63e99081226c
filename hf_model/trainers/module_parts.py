"""Find the GPT in what wraps it, and check that it holds its weights."""

from torch import nn

from hf_model.errors import UserError

WRAPPERS = ("_orig_mod", "module")  # torch.compile; DataParallel, DistributedDataParallel
SHARDED = (
    "its weights are sharded by fully_shard. On all ranks: state = get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True, cpu_offload=True)), from torch.distributed.checkpoint.state_dict. "
    "Then on rank 0: plain = GPT(config); plain.load_state_dict(state); convert(plain, ...)"
)
FLAT = (
    "its weights are sharded by FullyShardedDataParallel. On all ranks: with FSDP.summon_full_params(model, "
    "writeback=False): and in this block, on rank 0: convert(model, ...)"
)


def unwrap(module: nn.Module) -> nn.Module:
    """The module that `torch.compile`, `DataParallel` or `DistributedDataParallel` wraps."""
    while [name for name, _ in module.named_children()] in [[name] for name in WRAPPERS]:
        (module,) = module.children()
    return module


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
    """Check that a module has parameters, and holds each of them whole.

    Raises:
        UserError: it does not; the message says how to gather them.
    """
    name, parameters = type(module).__name__, list(module.parameters())
    if not parameters:
        raise UserError(f"{name}: has no parameters")
    kinds = {type(parameter).__name__ for parameter in parameters}
    if "DTensor" in kinds:
        raise UserError(f"{name}: {SHARDED}")
    if "FlatParameter" in kinds:
        raise UserError(f"{name}: {FLAT}")
    if any(parameter.device.type == "meta" for parameter in parameters):
        raise UserError(f"{name}: its weights are on the meta device, which holds no values: load them first")
