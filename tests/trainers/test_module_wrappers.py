"""What people wrap a GPT in is looked through, and weights that are not there are named with what to do."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from hf_model import load
from hf_model.errors import UserError
from tests.trainers.own_models import OptionalMask, Own, PreNorm, V, last_unless_targets, moved


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "input.txt"
    path.write_text("".join(chr(33 + i) for i in range(V)))
    return path


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def check_read(wrapped: nn.Module, text: Path) -> list[str]:
    """Check that a wrapped `moved(Own())` gives its logits; the notes."""
    notes: list[str] = []

    def report(item: str, line: str) -> None:
        if item == "note":
            notes.append(line)

    own, _ = load(wrapped, None, characters_of=text, device="cpu", report=report)
    ids = torch.randint(V, (2, 40))
    with torch.no_grad():
        expected = moved(Own()).eval().everything(ids)  # type: ignore[operator]
        assert (own(ids).logits - expected).abs().max() <= 1e-5 * expected.std()
    return notes


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, compiled_in_place])
def test_wrappers_are_looked_through(wrap: Callable, text: Path) -> None:
    assert check_read(wrap(moved(Own(returns=last_unless_targets))), text) == []


@pytest.mark.parametrize("wrap", [DistributedDataParallel, lambda model: torch.compile(DistributedDataParallel(model))])
def test_ddp_is_looked_through(wrap: Callable, process_group: None, text: Path) -> None:
    assert check_read(wrap(moved(Own())), text) == []


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("policy", [None, ModuleWrapPolicy({PreNorm})])
def test_fsdp_is_read_where_the_weights_are_summoned(
    policy: Any, use_orig_params: bool, process_group: None, text: Path
) -> None:
    options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": use_orig_params}
    model = FullyShardedDataParallel(moved(Own()), auto_wrap_policy=policy, **options)
    with pytest.raises(UserError, match=r"are sharded.*get_model_state_dict"):
        check_read(model, text)
    ids = torch.randint(V, (2, 9))
    before = model.eval()(ids)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        check_read(model, text)
    assert torch.equal(model(ids), before)


def test_fully_sharded_weights_are_named_with_what_to_do(process_group: None, text: Path) -> None:
    model = moved(Own())
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    with pytest.raises(UserError, match=r"are sharded.*get_model_state_dict.*convert\(plain"):
        load(model, None, characters_of=text)


class Trainer(nn.Module):
    """As a LightningModule: it has the GPT, and small modules beside it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.metric = model, nn.Linear(2, 2)


class Passes(Trainer):
    def forward(self, ids: Tensor) -> Any:
        return self.model(ids)


class TakesBatch(Trainer):
    def forward(self, batch: dict[str, Tensor]) -> Any:
        assert isinstance(batch, dict)
        return self.model(batch["input_ids"])


class GivesLoss(Trainer):
    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(ids).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("kind", [Trainer, TakesBatch, GivesLoss])
def test_the_gpt_in_a_lightning_module_is_read(kind: Callable, text: Path) -> None:
    (note,) = check_read(kind(moved(Own())), text)
    assert re.search(rf"read from its part 'model' \(Own\), as {kind.__name__} itself gives no logits: it .+", note)


class NeedsMemory(Trainer):
    def forward(self, ids: Tensor, memory: Tensor) -> Any:
        return self.model(ids) + memory.float()[:1, :1, None] * torch.arange(V)


def test_a_part_is_not_taken_for_a_module_that_needs_more_than_token_ids(text: Path) -> None:
    with pytest.raises(UserError, match=r"needs memory.*its part Own .* give this part"):
        check_read(NeedsMemory(moved(Own())), text)


def test_a_forward_that_passes_through_is_read_as_it_is(text: Path) -> None:
    (note,) = check_read(Passes(moved(Own())), text)
    assert "left out" in note and "metric.weight" in note


class GivesMask(Trainer):
    """Gives what the model's `forward` does not make by itself."""

    def forward(self, ids: Tensor) -> Any:
        return self.model(ids, torch.ones(ids.shape[1], ids.shape[1]).tril().bool())


def test_a_module_that_gives_the_causal_mask_is_read(text: Path) -> None:
    (note,) = check_read(GivesMask(moved(OptionalMask())), text)
    assert "metric.weight" in note


class LowRank(nn.Module):
    """As PEFT's: a matrix, and two narrow ones whose product is added."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 4), nn.Linear(4, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_lora_matrices_are_to_be_merged(text: Path) -> None:
    model = Own()
    model.blocks[0].att.qkv = LowRank(model.blocks[0].att.qkv)  # type: ignore[index, union-attr]
    with pytest.raises(UserError, match=r"merge_and_unload\(\)"):
        load(moved(model), None, characters_of=text)


def test_a_model_on_the_meta_device_has_no_values(text: Path) -> None:
    with torch.device("meta"):
        model = Own()
    with pytest.raises(UserError, match="meta device"):
        load(model, None, characters_of=text)


def test_autocast_and_lower_precision_of_products_are_left_out_and_stay(text: Path) -> None:
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            own, _ = load(moved(Own()), None, characters_of=text, device="cpu")
            assert torch.is_autocast_enabled("cpu")
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before
    assert own.config.n_layer == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_gpu_is_read_and_stays_there(dtype: torch.dtype, text: Path) -> None:
    model = moved(Own(positions="parameter")).to("cuda", dtype)
    own, _ = load(model, None, characters_of=text, device="cpu")
    assert all(parameter.is_cuda and parameter.dtype == dtype for parameter in model.parameters())
    assert torch.equal(own.transformer.wte.weight, model.tok.weight.cpu())  # type: ignore[union-attr]
