"""Every form of checkpoint that the family's trainers write reads as the same weights, and the rest is refused."""

import argparse
import errno
import mmap
import os
import resource
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from examples.plain_gpt import save_checkpoint
from hf_model.errors import UserError
from hf_model.trainers import read_checkpoint
from tests.reliability.files import bounded
from tests.tiny import gpt

State = dict[str, torch.Tensor]
STATE, WTE = dict(gpt().state_dict()), "transformer.wte.weight"


@dataclass
class TrainerConfig:
    """What trainers of the family pickle instead of a dict."""

    n_head: int = 4
    dropout: float = 0.2
    weight_decay: float = 0.1


@pytest.fixture
def weights() -> State:
    return dict(gpt().state_dict())


def assert_same(state_dict: State, expected: State) -> None:
    assert list(state_dict) == list(expected)
    for name, weight in expected.items():
        assert state_dict[name].dtype == weight.dtype, name
        assert torch.equal(state_dict[name], weight), name


class TestWhereTheWeightsStand:
    @pytest.mark.parametrize("key", ["model_state_dict", "model", "state_dict"])
    @pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
    def test_under_each_key_in_each_format(self, key: str, is_zip: bool, weights: State, saved: Callable) -> None:
        checkpoint = read_checkpoint(saved({"iter_num": 3, key: weights}, _use_new_zipfile_serialization=is_zip))
        assert checkpoint.weights_key == key
        assert_same(checkpoint.state_dict, weights)

    @pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
    def test_bare(self, is_zip: bool, weights: State, saved: Callable) -> None:
        checkpoint = read_checkpoint(saved(weights, _use_new_zipfile_serialization=is_zip))
        assert checkpoint.weights_key is None
        assert_same(checkpoint.state_dict, weights)

    @pytest.mark.parametrize("form", [{"loss": 3.9}, {"config": {"seed": 1}}], ids=["pre-training", "fine-tuning"])
    def test_beside_an_optimizer_in_the_original_s_own_files(self, form: dict, tmp_path: Path) -> None:
        model = gpt()
        model(torch.zeros(1, 4, dtype=torch.long))[0].sum().backward()
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
        save_checkpoint(tmp_path / "ckpt.pt", model, 7, optimizer=optimizer, **form)
        checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
        assert checkpoint.model_args == model.model_args()
        assert checkpoint.progress == {"iter_num": 7} | ({"loss": 3.9} if "loss" in form else {})
        assert_same(checkpoint.state_dict, model.state_dict())

    @pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
    def test_under_wrappers_prefixes(self, prefix: str, weights: State, saved: Callable) -> None:
        path = saved({"model": {prefix + name: weight for name, weight in weights.items()}})
        assert_same(read_checkpoint(path).state_dict, weights)

    def test_beside_causal_mask_buffers(self, weights: State, saved: Callable) -> None:
        masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
        assert_same(read_checkpoint(saved({"model": weights | masks})).state_dict, weights)

    def test_that_require_gradients(self, saved: Callable) -> None:
        parameters = dict(gpt().named_parameters())
        read = read_checkpoint(saved({"model": parameters})).state_dict
        assert not any(weight.requires_grad for weight in read.values())
        assert_same(read, parameters)


class TestTiedHeads:
    @pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
    def test_one_storage_is_one_tensor(self, is_zip: bool, saved: Callable) -> None:
        model = gpt(tied=True)
        path = saved({"model": model.state_dict()}, _use_new_zipfile_serialization=is_zip)
        checkpoint = read_checkpoint(path)
        assert checkpoint.architecture(n_head=4).tie_word_embeddings
        assert_same(checkpoint.state_dict, model.state_dict())

    def test_a_missing_head_is_a_tied_one(self, weights: State, saved: Callable) -> None:
        del weights["lm_head.weight"]
        assert read_checkpoint(saved({"model": weights})).architecture(n_head=4).tie_word_embeddings

    def test_an_equal_copy_is_tied(self, weights: State, saved: Callable) -> None:
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
        assert read_checkpoint(saved({"model": weights})).architecture(n_head=4).tie_word_embeddings

    def test_the_head_alone_is_the_embedding_too(self, weights: State, saved: Callable) -> None:
        weights["lm_head.weight"] = weights.pop("transformer.wte.weight")
        checkpoint = read_checkpoint(saved({"model": weights}))
        assert checkpoint.architecture(n_head=4).tie_word_embeddings
        assert torch.equal(checkpoint.state_dict["transformer.wte.weight"], weights["lm_head.weight"])
        assert checkpoint.has_head_alone

    def test_but_not_of_the_original_whose_heads_are_never_tied(self, weights: State, saved: Callable) -> None:
        weights["lm_head.weight"] = weights.pop("transformer.wte.weight")
        with pytest.raises(UserError, match=r"transformer\.wte\.weight"):
            read_checkpoint(saved({"model_state_dict": weights})).architecture(n_head=4)


class TestUnknownOptions:
    @pytest.mark.parametrize(
        "option",
        [{"mup_enabled": True}, {"use_softmax1": True}, {"logit_cap": 30.0}, {"rotary": "half"}, {"experts": 4}],
    )
    def test_one_that_is_switched_on_is_named(self, option: dict, weights: State, saved: Callable) -> None:
        args = {"n_head": 4, **option}
        assert read_checkpoint(saved({"model": weights, "model_args": args})).unknown_args == option

    def test_those_that_change_no_forward_pass_are_not(self, weights: State, saved: Callable) -> None:
        args = {
            **{"n_head": 4, "attn_pdrop": 0.1, "flash_attn": True, "device": "cuda", "dtype": "bfloat16"},
            **{"learning_rate": 3e-4, "out_dir": "out", "mup_enabled": False, "rope": None, "layer_norm_epsilon": 1e-5},
        }
        assert read_checkpoint(saved({"model": weights, "model_args": args})).unknown_args == {}

    def test_the_training_s_options_beside_the_model_are_not(self, weights: State, saved: Callable) -> None:
        config = {"n_head": 4, "patience": 5, "use_amp": True}
        assert read_checkpoint(saved({"model": weights, "config": config})).unknown_args == {}


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_weights_keep_theirs(self, dtype: torch.dtype, weights: State, saved: Callable) -> None:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        checkpoint = read_checkpoint(saved({"model": weights}))
        assert checkpoint.dtype == dtype
        assert_same(checkpoint.state_dict, weights)

    @pytest.mark.parametrize(
        "dtype, other, both",
        [
            (torch.float32, torch.bfloat16, torch.float32),
            (torch.float16, torch.float32, torch.float32),
            (torch.float16, torch.bfloat16, torch.float32),
        ],
        ids=str,
    )
    def test_of_mixed_ones_the_model_gets_one_that_loses_nothing(
        self, dtype: torch.dtype, other: torch.dtype, both: torch.dtype, weights: State, saved: Callable
    ) -> None:
        mixed = {name: weight.to(other if ".ln_" in name else dtype) for name, weight in weights.items()}
        checkpoint = read_checkpoint(saved({"model": mixed}))
        assert checkpoint.dtype == both
        assert_same(checkpoint.state_dict, mixed)


class WithState:
    """Pickled as a tensor, with the parts of another as its state, which torch puts in its place."""

    def __init__(self, tensor: torch.Tensor, state: torch.Tensor):
        self.tensor, self.state = tensor, state

    def __reduce__(self) -> tuple:
        function, args = self.tensor.__reduce_ex__(2)
        return function, args, (self.state.untyped_storage(), 0, self.state.size(), self.state.stride())


def test_a_tensor_with_a_state_is_refused(weights: State, saved: Callable) -> None:
    name = "transformer.wpe.weight"
    path = saved({"model": weights | {name: WithState(weights[name], -weights[name])}})
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(path)


class Settings(dict):
    """As trainers have it whose settings are read as attributes too."""

    def __init__(self, **settings: object):
        super().__init__(settings)
        self.__dict__.update(settings)


class TestModelArgs:
    @pytest.mark.parametrize(
        "stated, expected",
        [
            ({"model_args": {"n_head": 4, "bias": False, "lr": 1.0}}, {"n_head": 4, "bias": False}),
            ({"model_args": {"n_head": 4, "dropout": None}}, {"n_head": 4}),
            ({"model_args": {"n_head": 4}, "config": {"n_head": 8}}, {"n_head": 4}),
            ({"config": {"n_head": 8, "learning_rate": 1e-3, "device": "cuda"}}, {"n_head": 8}),
            ({"model_args": argparse.Namespace(n_head=4, out_dir="out")}, {"n_head": 4}),
            ({"model_args": TrainerConfig()}, {"n_head": 4, "dropout": 0.2}),
            ({"model_args": Settings(n_head=4, n_embd=999)}, {"n_head": 4, "n_embd": 999}),
            ({"model_args": {"n_head": np.int64(4), "dropout": np.float64(0.2)}}, {"n_head": 4, "dropout": 0.2}),
            ({"model_args": {"n_head": torch.tensor(4)}}, {"n_head": 4}),
            ({"model_args": None}, {}),
            ({}, {}),
        ],
        ids=[
            "a dict",
            "a value of None",
            "model_args beside a config",
            "command line arguments under config",
            "a Namespace",
            "a dataclass",
            "a dict's class",
            "NumPy scalars",
            "a tensor",
            "None",
            "nothing",
        ],
    )
    def test_are_read_from(self, stated: dict, expected: dict, weights: State, saved: Callable) -> None:
        model_args = read_checkpoint(saved({"model": weights} | stated)).model_args
        assert model_args == expected
        assert {type(value) for value in model_args.values()} <= {int, float, bool}

    def test_an_older_file_s_classes_are_read_too(self, weights: State, saved: Callable) -> None:
        content = {"model": weights, "model_args": TrainerConfig(), "best_val_loss": np.float32(0.5)}
        checkpoint = read_checkpoint(saved(content, _use_new_zipfile_serialization=False))
        assert checkpoint.model_args == {"n_head": 4, "dropout": 0.2}
        assert checkpoint.progress == {"best_val_loss": 0.5}

    def test_missing_ones_leave_only_the_heads_to_be_asked_for(self, weights: State, saved: Callable) -> None:
        checkpoint = read_checkpoint(saved(weights))
        with pytest.raises(UserError, match=r"ckpt\.pt: its weights do not tell the number of .* with --n_head"):
            checkpoint.architecture()
        assert checkpoint.architecture(n_head=2).n_head == 2

    def test_a_contradiction_names_the_file(self, weights: State, saved: Callable) -> None:
        checkpoint = read_checkpoint(saved({"model": weights, "model_args": {"n_layer": 12, "n_head": 4}}))
        with pytest.raises(UserError, match=r"ckpt\.pt: model_args says n_layer=12, but the weights say 2"):
            checkpoint.architecture()


@pytest.mark.parametrize(
    "stated, progress",
    [
        ({"iter_num": 600, "loss": 3.9}, {"iter_num": 600, "loss": 3.9}),
        ({"iter_num": 600, "best_val_loss": torch.tensor(0.5)}, {"iter_num": 600, "best_val_loss": 0.5}),
        ({"best_val_loss": np.float32(0.5)}, {"best_val_loss": 0.5}),
        ({"loss": None, "best_val_loss": torch.ones(3)}, {}),
    ],
    ids=["numbers", "a tensor", "a NumPy scalar", "no numbers"],
)
def test_progress_is_read_from(stated: dict, progress: dict, weights: State, saved: Callable) -> None:
    assert read_checkpoint(saved({"model": weights} | stated)).progress == progress


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_weights_are_mapped_and_the_optimizer_state_is_never_read(weights: State, saved: Callable) -> None:
    path = saved({"optimizer_state_dict": torch.ones(32 * 2**20 // 4), "model": weights})
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.state_dict, weights)
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags")
    resident = [int(mapping.partition("Rss:")[2].split()[0]) for mapping in mappings if str(path) in mapping]
    assert sum(resident) > 0
    assert sum(resident) < 4 * 1024  # kB: the weights, and the pages around them; one may be of 2 MiB


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "holds a list, not a dict: save model.state_dict"),
        (torch.ones(2), "holds a Tensor, not a dict"),
        (torch.nn.Linear(2, 2), "its 2 tensors .* have the names of no trainer that is known here: .* --model"),
        ({}, "holds no weights under model_state_dict, model, state_dict; its keys are"),
        ({"net": {"a": 1}, "step": 1}, "holds no weights .* its keys are net, step"),
        ({"a": {"b": torch.ones(2)}, "c": {"d": torch.ones(2)}}, "holds tensors under a, c: save one of them alone"),
        ({"model": STATE | {WTE: [1.0]}}, f"'{WTE}' in its state dict is a list, not a tensor"),
        ({"model": {3: torch.ones(2)}}, "its state dict has the key 3, which is not a name"),
        ({"model": {"a": torch.ones(2), "module.a": torch.ones(2)}}, "the weights 'a' and 'module.a' are both 'a'"),
        ({"model": STATE | {WTE: torch.ones(2, dtype=torch.int64)}}, f"'{WTE}' is not a dense floating-point tensor"),
        ({"model": STATE | {WTE: torch.eye(2).to_sparse()}}, f"'{WTE}' was saved as another .*_rebuild_sparse"),
        ({"model": STATE | {WTE: torch.ones(2, device="meta")}}, f"'{WTE}' was saved as another .*_meta_"),
        ({"model": torch.nn.Linear(2, 2)}, "its 2 tensors .* have the names of no trainer that is known here"),
    ],
)
def test_a_file_with_something_else_is_refused_by_name(content: object, message: str, saved: Callable) -> None:
    with pytest.raises(UserError, match=rf"ckpt\.pt: {message}"):
        read_checkpoint(saved(content))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ckpt\.pt: there is no such file"):
        read_checkpoint(tmp_path / "ckpt.pt")


def save_with_a_large_optimizer(path: Path, gibibytes: int) -> State:
    """Write a file whose optimizer state is a hole of that size, and whose weights are zeros. It takes no disk."""
    with FakeTensorMode():
        weights = {name: torch.empty(weight.shape) for name, weight in gpt().state_dict().items()}
        state = {"exp_avg": torch.empty(gibibytes * 2**28)}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({"model": weights, "optimizer": state, "model_args": {"n_head": 4}}, path)
    return weights


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system with holes and a mapping without reservation")
def test_a_file_may_be_larger_than_memory(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    weights = save_with_a_large_optimizer(path, gibibytes=500)
    with warnings.catch_warnings(), bounded(mebibytes=50):
        warnings.simplefilter("error")  # torch warns of tensors that must not be written to
        read = read_checkpoint(path).state_dict
    assert {name: weight.shape for name, weight in read.items()} == {name: weights[name].shape for name in weights}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_a_file_may_be_larger_than_the_address_space_that_ulimit_allows(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    weights = save_with_a_large_optimizer(path, gibibytes=500)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, hard))
    try:
        assert read_checkpoint(path).state_dict.keys() == weights.keys()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
def test_a_change_of_the_weights_never_reaches_the_file(is_zip: bool, weights: State, saved: Callable) -> None:
    path = saved({"model": weights}, _use_new_zipfile_serialization=is_zip)
    before = path.read_bytes()
    for weight in read_checkpoint(path).state_dict.values():
        weight.add_(1)
    assert path.read_bytes() == before
    assert_same(read_checkpoint(path).state_dict, weights)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
def test_a_system_that_reserves_memory_for_every_mapping_gets_copies(
    is_zip: bool, weights: State, saved: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux does with vm.overcommit_memory=2."""

    def refuse_private(*args: int, flags: int = 0, **how: int) -> mmap.mmap:
        if flags & mmap.MAP_PRIVATE:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return mmap_of(*args, **how)

    mmap_of = mmap.mmap
    path = saved({"model": weights}, _use_new_zipfile_serialization=is_zip)
    monkeypatch.setattr(mmap, "mmap", refuse_private)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_checkpoint(path).state_dict
    assert_same(read, weights)
    for weight in read.values():
        weight.add_(1)


class NoModule:
    """Has the attributes of a module, which hold something else."""

    def __init__(self) -> None:
        self._parameters = self._buffers = self._modules = Path("x")


def test_what_only_looks_like_a_module_is_refused(tmp_path: Path) -> None:
    torch.save({"model": NoModule()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"holds no weights .*save .*state_dict"):
        read_checkpoint(tmp_path / "ckpt.pt")
