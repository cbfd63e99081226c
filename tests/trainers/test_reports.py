"""Situations from public bug reports (docs/bug_reports.md) that once went wrong here, each with what is right."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig

from hf_model import convert, load
from hf_model.errors import UserError
from hf_model.loading import Source
from hf_model.trainers import read_checkpoint
from tests.tiny import SIZES, gpt, save_tokenizer


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_a_tied_pair_with_nan_is_still_tied_and_the_nan_is_told(tmp_path: Path) -> None:
    model, lines = gpt(tied=True), []
    with torch.no_grad():
        model.transformer.wte.weight[3] = float("nan")
    path = saved(tmp_path / "ckpt.pt", {"model": model.state_dict(), "model_args": model.model_args()})
    convert(path, save_tokenizer(tmp_path / "tokenizer.json"), tmp_path / "hf", report=lines.append)
    assert any(line.startswith("warning: there are NaN") for line in lines)


def test_the_second_mask_of_older_transformers_is_no_weight(tmp_path: Path) -> None:
    state = dict(gpt().state_dict())
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    assert read_checkpoint(saved(tmp_path / "a.pt", state)).state_dict.keys() == gpt().state_dict().keys()


@pytest.mark.parametrize("kind", [dict, lambda **args: argparse.Namespace(**args)], ids=["a dict", "a Namespace"])
def test_a_command_line_holds_the_training_s_options_too(kind: type, tmp_path: Path) -> None:
    args = {"n_head": 4, "epochs": 3, "patience": 5, "run": "a"}
    content = {"model": gpt().state_dict(), "config": kind(**args)}
    assert read_checkpoint(saved(tmp_path / "a.pt", content)).unknown_args == {}
    content = {"model": gpt().state_dict(), "config": kind(**args, use_softmax1=True)}
    assert read_checkpoint(saved(tmp_path / "b.pt", content)).unknown_args == {"use_softmax1": True}


def test_litgpt_s_files_are_answered_with_its_own_converter(tmp_path: Path) -> None:
    names = (
        "norm_1.weight",
        "attn.qkv.weight",
        "attn.proj.weight",
        "norm_2.weight",
        "mlp.fc.weight",
        "mlp.proj.weight",
    )
    state = {f"transformer.h.{layer}.{name}": torch.ones(4, 4) for layer in range(2) for name in names}
    with pytest.raises(UserError, match="convert_from_litgpt"):
        read_checkpoint(saved(tmp_path / "lit_model.pth", {"model": state}))


@pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package here")
@pytest.mark.parametrize("key", [None, "model"], ids=["bare", "under a key"])
def test_parts_of_weights_are_answered_with_how_to_save_whole_ones(key: str | None, tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        state = {name: distribute_tensor(one, mesh, [Shard(0)]) for name, one in gpt().state_dict().items()}
        path = saved(tmp_path / "model_world_size_1_rank_0.pt", {key: state} if key else state)
    finally:
        dist.destroy_process_group()
    with pytest.raises(UserError, match=r"each process saved its own part: .*full_state_dict=True"):
        read_checkpoint(path)


def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 16, "vocab_size": 300}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


@pytest.mark.parametrize("key", [None, "state"], ids=["bare", "under a key"])
def test_transformers_own_gpt2_is_read_with_its_logits(key: str | None, tmp_path: Path) -> None:
    model, tokenizer = gpt2(), save_tokenizer(tmp_path / "tokenizer.json")
    state = model.state_dict()
    path = saved(tmp_path / "ckpt.pt", {key: state, "step": 1} if key else state)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        got = load(path, tokenizer, n_head=4, device="cpu")[0](ids).logits
        assert torch.allclose(got, model(ids).logits, atol=1e-5)


def test_a_folder_of_transformers_gpt2_is_answered_with_a_command_that_reads_it(tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2" / "tokenizer.json")
    with pytest.raises(UserError, match="holds a model of type 'gpt2'") as raised:
        load(tmp_path / "gpt2")
    _, path, _, tokenizer = str(raised.value).partition(": give ")[2].split()
    loaded = Source.of(path, tokenizer).load()
    assert loaded.model.config.n_head == 4 and loaded.model.config.activation_function == "gelu_new"
    assert any(item == "activation" and "config.json" in text for item, text in loaded.choices)


def test_a_trainer_s_own_type_of_config_is_answered_with_the_file(tmp_path: Path) -> None:
    class OwnConfig(PretrainedConfig):
        model_type = "own-gpt"

    model = gpt()
    OwnConfig(n_head=SIZES["n_head"], n_layer=SIZES["n_layer"], dropout=0.0).save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="unknown model_type 'own-gpt'") as raised:
        load(tmp_path, save_tokenizer(tmp_path / "tokenizer.json"))
    path = str(raised.value).partition("--checkpoint_path ")[2].rstrip(")")
    assert Source.of(path, tmp_path / "tokenizer.json").load().model.config.n_head == SIZES["n_head"]


def test_an_option_of_the_activation_is_answered_by_activation(tmp_path: Path) -> None:
    model = gpt()
    content = {"model": model.state_dict(), "model_args": model.model_args() | {"act_fn": "gelu_tanh"}}
    path, tokenizer = saved(tmp_path / "a.pt", content), save_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="act_fn='gelu_tanh'"):
        Source.of(path, tokenizer).load()
    loaded = Source.of(path, tokenizer, activation="gelu_pytorch_tanh").load()
    assert loaded.model.config.activation_function == "gelu_pytorch_tanh"
    assert not any(item == "warning" for item, _ in loaded.choices)


def test_a_vocabulary_by_ids_is_not_called_half_of_one(tmp_path: Path) -> None:
    model = gpt()
    path = saved(tmp_path / "a.pt", {"model": model.state_dict(), "model_args": model.model_args()})
    (tmp_path / "vocab.json").write_text(json.dumps({str(number): f"word{number}" for number in range(90)}))
    with pytest.raises(UserError, match=r"vocab\.json: maps ids to texts"):
        Source.of(path, tmp_path / "vocab.json").load()
