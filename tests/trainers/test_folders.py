"""The folders that trainers' libraries leave are read with the same weights, or answered with the command to run."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file, save_model
from torch import nn

from examples.plain_gpt import GPT
from hf_model.errors import UserError
from hf_model.loading import Loaded, Source
from tests.tiny import SIZES, gpt, save_tokenizer

N_HEAD = SIZES["n_head"]


def load(path: Path, **options) -> Loaded:
    tokenizer = save_tokenizer(path.parent / "tokenizer.json")
    return Source.of(path, tokenizer, **{"n_head": N_HEAD} | options).load()


def assert_same(loaded: Loaded, model: GPT) -> None:
    """Every weight is equal, the heads are the model's, and so is whether the head is tied."""
    state = loaded.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight), name
    assert loaded.model.config.tie_word_embeddings == model.config.tied
    assert loaded.model.config.n_head == model.config.n_head


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> GPT:
    return gpt(tied=request.param)


class TestAccelerate:
    @pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
    def test_save_state(self, safe: bool, model: GPT, tmp_path: Path) -> None:
        accelerator = accelerate.Accelerator(cpu=True)
        prepared, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        accelerator.save_state(str(tmp_path / "state"), safe_serialization=safe)
        assert_same(load(tmp_path / "state"), prepared)

    @pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
    @pytest.mark.parametrize("size", ["1GB", "30KB"], ids=["whole", "in shards"])
    def test_save_model(self, size: str, safe: bool, model: GPT, tmp_path: Path) -> None:
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.save_model(model, str(tmp_path / "m"), max_shard_size=size, safe_serialization=safe)
        assert_same(load(tmp_path / "m"), model)

    def test_shards_without_their_index_are_answered(self, model: GPT, tmp_path: Path) -> None:
        accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path / "m"), max_shard_size="30KB")
        (tmp_path / "m" / "model.safetensors.index.json").unlink()
        with pytest.raises(UserError, match=r"without an index: copy the file ….index.json too"):
            load(tmp_path / "m")

    def test_a_missing_shard_is_named(self, model: GPT, tmp_path: Path) -> None:
        accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path / "m"), max_shard_size="30KB")
        next((tmp_path / "m").glob("model-00002-*")).unlink()
        with pytest.raises(UserError, match=r"names 'model-00002-of-\d+\.safetensors', and there is no such file"):
            load(tmp_path / "m")

    def test_a_tensor_belongs_in_one_shard(self, tmp_path: Path) -> None:
        weights = {"a": torch.ones(2), "b": torch.ones(3)}
        for name, held in (("m-1.safetensors", ("a",)), ("m-2.safetensors", ("a", "b"))):
            save_file({key: weights[key] for key in held}, tmp_path / name)
        index = tmp_path / "model.safetensors.index.json"
        for places in (
            {"a": "m-1.safetensors", "b": "m-2.safetensors"},
            {"a": "m-2.safetensors", "b": "m-1.safetensors"},
        ):
            index.write_text(json.dumps({"weight_map": places}))
            with pytest.raises(UserError, match=rf"holds 'a', which belongs in {places['a']}"):
                load(index)

    @pytest.mark.parametrize("name", ["../m.bin", "/etc/passwd", "a/b.bin", "model.safetensors.index.json"])
    def test_an_index_that_leads_elsewhere_is_refused(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="there is no such file beside it"):
            load(tmp_path)


class TestSafetensors:
    def test_one_name_of_a_tied_pair(self, tmp_path: Path) -> None:
        model = gpt(tied=True)
        save_model(model, str(tmp_path / "any.safetensors"))
        assert_same(load(tmp_path / "any.safetensors"), model)

    @pytest.mark.parametrize(
        "beside",
        [
            {"n_head": 4, "n_embd": 32},
            {"num_heads": 4, "d_model": 32, "dropout": 0.0},
            {"config": {"n_head": 4, "n_layer": 2}},
        ],
    )
    def test_a_config_beside_tells_the_heads(self, beside: dict, model: GPT, tmp_path: Path) -> None:
        save_model(model, str(tmp_path / "model.safetensors"))
        (tmp_path / "config.json").write_text(json.dumps(beside))
        assert_same(load(tmp_path, n_head=None), model)

    def test_the_metadata_tells_the_heads(self, tmp_path: Path) -> None:
        model = gpt()
        save_file(model.state_dict(), tmp_path / "a.safetensors", {"format": "pt", "n_head": "4", "note": "mine"})
        assert_same(load(tmp_path / "a.safetensors", n_head=None), model)

    def test_an_unknown_option_beside_stops_the_conversion(self, model: GPT, tmp_path: Path) -> None:
        save_model(model, str(tmp_path / "model.safetensors"))
        (tmp_path / "config.json").write_text(json.dumps({"n_head": 4, "n_layer": 2, "use_softmax1": True}))
        with pytest.raises(UserError, match=r"config\.json beside it says use_softmax1=True"):
            load(tmp_path, n_head=None)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
    def test_other_dtypes_are_refused(self, dtype: torch.dtype, tmp_path: Path) -> None:
        state = gpt().state_dict()
        state["transformer.wpe.weight"] = state["transformer.wpe.weight"].to(dtype)
        save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=r"'transformer\.wpe\.weight' is not a dense floating-point tensor"):
            load(tmp_path / "a.safetensors")


class TestTrainer:
    """What transformers' Trainer leaves of a model of the user's own class."""

    def test_a_checkpoint_among_its_state(self, model: GPT, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoint-500"
        folder.mkdir()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"state": {}}, folder / name)
        (folder / "trainer_state.json").write_text("{}")
        assert_same(load(folder), model)
        with pytest.raises(UserError, match="give it with --n_head"):
            load(folder, n_head=None)

    def test_of_several_checkpoints_one_must_be_given(self, tmp_path: Path) -> None:
        for step in (500, 1000):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            torch.save(gpt().state_dict(), folder / "pytorch_model.bin")
            os.utime(folder, (step, step))
        with pytest.raises(UserError, match=r"checkpoint-1000, .*checkpoint-500: give one of them"):
            load(tmp_path)

    def test_of_two_kinds_of_file_one_must_be_given(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        save_model(gpt(), str(folder / "model.safetensors"))
        os.utime(folder / "model.safetensors", (1, 1))
        torch.save(gpt().state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"pytorch_model\.bin, .*model\.safetensors: give one of them"):
            load(folder)

    def test_a_folder_that_may_not_be_read_is_one_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "iterdir", refuse)
        with pytest.raises(UserError, match=rf"{tmp_path}: cannot be read \(Permission denied\)"):
            load(tmp_path)

    def test_of_several_files_one_must_be_given(self, tmp_path: Path) -> None:
        for name in ("model_05000.pt", "model_10000.pt"):
            torch.save(gpt().state_dict(), tmp_path / name)
        with pytest.raises(UserError, match=r"model_10000\.pt, .*model_05000\.pt: give one of them"):
            load(tmp_path)


class Wrapper(nn.Module):
    def __init__(self, model: GPT):
        super().__init__()
        self.model = model


class TestLightning:
    @pytest.mark.parametrize("sizes", [{"n_head": 4, "lr": 3e-4}, {"config": {"n_head": 4, "n_layer": 2}, "lr": 3e-4}])
    def test_a_checkpoint(self, sizes: dict, model: GPT, tmp_path: Path) -> None:
        content = {"epoch": 1, "state_dict": Wrapper(model).state_dict(), "hyper_parameters": sizes, "loops": {}}
        torch.save(content, tmp_path / "epoch=1.ckpt")
        assert_same(load(tmp_path / "epoch=1.ckpt", n_head=None), model)

    def test_an_option_of_the_model_stops_the_conversion(self, model: GPT, tmp_path: Path) -> None:
        sizes = {"n_head": 4, "use_rope": True, "patience": 3}
        torch.save({"state_dict": model.state_dict(), "hyper_parameters": sizes}, tmp_path / "a.ckpt")
        with pytest.raises(UserError, match=r"hyper_parameters says use_rope=True, which may change"):
            load(tmp_path / "a.ckpt", n_head=None)

    def test_two_models_in_one_file_are_refused(self, tmp_path: Path) -> None:
        both = {f"{name}.{key}": value for name in ("net", "ema") for key, value in gpt().state_dict().items()}
        torch.save({"state_dict": both}, tmp_path / "a.ckpt")
        with pytest.raises(UserError, match=r"holds two models, whose names begin with 'net\.' and 'ema\.'"):
            load(tmp_path / "a.ckpt")


def save_deepspeed(
    folder: Path, model: GPT, tag: str = "global_step5", file: str = "mp_rank_00_model_states.pt"
) -> Path:
    """Write what `DeepSpeedEngine.save_checkpoint` writes: ZeRO-3 leaves empty weights in files for each process."""
    step = folder / tag
    step.mkdir(parents=True)
    state = model.state_dict()
    if file.startswith("zero"):
        state = {name: torch.empty(0) for name in state}
    content = {"module": state, "buffer_names": [], "param_shapes": [], "ds_config": {}, "ds_version": "0.19.8"}
    torch.save(content, step / file)
    torch.save({"optimizer_state_dict": {}}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text(tag)
    return folder


class TestDeepSpeed:
    @pytest.mark.parametrize("tag", ["global_step5", "checkpoint"], ids=["its own", "Lightning's"])
    def test_whole_weights(self, tag: str, model: GPT, tmp_path: Path) -> None:
        folder = save_deepspeed(tmp_path / "ds", model, tag)
        for path in (folder, folder / tag, folder / tag / "mp_rank_00_model_states.pt"):
            assert_same(load(path), model)
        with pytest.raises(UserError, match=r"optimizer's state: give .*mp_rank_00_model_states\.pt"):
            load(folder / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")

    def test_half_precision_weights_are_said_to_be_that(self, tmp_path: Path) -> None:
        choices = load(save_deepspeed(tmp_path / "ds", gpt().bfloat16())).choices
        assert any("bfloat16 weights" in text and "zero_to_fp32" in text for _, text in choices)

    def test_partitioned_weights_are_answered_with_its_program(self, model: GPT, tmp_path: Path) -> None:
        folder = save_deepspeed(tmp_path / "ds", model, file="zero_pp_rank_0_mp_rank_00_model_states.pt")
        (folder / "zero_to_fp32.py").touch()  # the folder's own program is not proposed
        command = (
            rf"python -m deepspeed\.utils\.zero_to_fp32 {folder} {folder}/joined; "
            rf"then give --checkpoint_path {folder}/joined\. .* runs what the files hold: "
            r"use it for your own files only"
        )
        for path in (folder, folder / "global_step5", *(folder / "global_step5").iterdir()):
            with pytest.raises(UserError, match=command):
                load(path)
        (folder / "zero_to_fp32.py").unlink()
        (folder / "latest").unlink()
        with pytest.raises(UserError, match=r"python -m deepspeed\.utils\.zero_to_fp32 .*/joined -t global_step5;"):
            load(folder)


class TestDistributed:
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_is_answered_with_a_command_that_makes_a_file(self, model: GPT, tmp_path: Path) -> None:
        folder = tmp_path / "step 5"
        dcp.save({"model": model.state_dict(), "step": 5}, checkpoint_id=str(folder), no_dist=True)
        with pytest.raises(UserError, match=r"checkpoint of torch\.distributed") as raised:
            load(folder)
        for path in (tmp_path, folder / "__0_0.distcp", folder / ".metadata"):
            with pytest.raises(UserError, match=r"dcp_to_torch.* use it for your own files only"):
                load(path)
        command = shlex.split(str(raised.value).partition("with: ")[2].partition(";")[0])
        assert command[0] == "python"  # of the activated environment
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, *command[1:]], check=True, timeout=120, env=environment, capture_output=True)
        path = str(raised.value).partition("--checkpoint_path ")[2].partition(". ")[0]
        assert_same(load(Path(shlex.split(path)[0])), model)


class TestOtherKeys:
    @pytest.mark.parametrize("key", ["state", "net", "model_state", "weights"])
    def test_the_one_state_dict_under_any_name_is_read(self, key: str, model: GPT, tmp_path: Path) -> None:
        torch.save({"step": 3, key: model.state_dict(), "optimizer": {"state": {}}}, tmp_path / "policy.pt")
        assert_same(load(tmp_path / "policy.pt"), model)

    def test_of_two_none_is_taken(self, tmp_path: Path) -> None:
        torch.save({"student": gpt().state_dict(), "teacher": gpt().state_dict()}, tmp_path / "a.pt")
        with pytest.raises(UserError, match="holds tensors under student, teacher: save one of them alone"):
            load(tmp_path / "a.pt")
