"""Which device is taken, and what a file or a folder is loaded as."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_model import CustomGPTForCausalLM
from hf_model.conversion import convert
from hf_model.devices import pick_device
from hf_model.errors import UserError
from hf_model.loading import load
from tests.tiny import CHECKPOINT, TOKENIZER, gpt, save_files, save_tokenizer

CPU = torch.device("cpu")


class TestDevice:
    @pytest.mark.parametrize(
        "n_cuda, has_mps, expected", [(2, True, "cuda:0"), (0, True, "mps"), (0, False, "cpu")], ids=str
    )
    def test_the_best_one_is_chosen(
        self, n_cuda: int, has_mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
        assert pick_device() == torch.device(expected)

    def test_the_one_that_is_named_is_taken(self) -> None:
        assert pick_device("cpu") == CPU

    @pytest.mark.parametrize("name", ["cuda:99", "mps:7", "abacus", "meta", ""])
    def test_one_that_is_not_there_is_refused_with_those_that_are(self, name: str) -> None:
        with pytest.raises(UserError, match=f"--device {name}: there is no such device here; there is (.*, )?cpu$"):
            pick_device(name)


class TestLoad:
    def test_a_file_is_converted_in_memory(self, tmp_path: Path) -> None:
        original = gpt()
        model, tokenizer = load(*save_files(tmp_path, original), device=CPU)
        ids = torch.randint(300, (2, 16))
        assert torch.equal(model(ids).logits, original(ids)[0])
        assert tokenizer.model_max_length == 16
        assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "tokenizer.json"}

    def test_a_folder_brings_its_tokenizer(self, capitals: Path) -> None:
        model, tokenizer = load(capitals, None, device=CPU)
        assert isinstance(model, CustomGPTForCausalLM)
        assert len(tokenizer) == 1024

    def test_a_folder_can_be_given_another_tokenizer(self, capitals: Path, tmp_path: Path) -> None:
        _, tokenizer = load(capitals, save_tokenizer(tmp_path / "tokenizer.json"), device=CPU)
        assert (len(tokenizer), tokenizer.model_max_length) == (300, 64)

    @pytest.mark.parametrize("form", ["file", "folder"])
    def test_weights_get_the_dtype_that_is_asked_for(self, form: str, capitals: Path) -> None:
        sources = (CHECKPOINT, TOKENIZER) if form == "file" else (capitals, None)
        assert load(*sources, device=CPU)[0].dtype == torch.float32
        assert load(*sources, device=CPU, dtype="bfloat16")[0].dtype == torch.bfloat16

    @pytest.mark.parametrize("strange", [torch.complex64, torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
    def test_weights_that_are_no_real_numbers_are_refused(
        self, strange: torch.dtype, capitals: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(capitals, tmp_path / "hf")
        tensors = {name: tensor.to(strange) for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"unsupported dtype"):
            load(folder, device=CPU)

    def test_a_configuration_s_dtype_rounds_nothing(self, capitals: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(capitals, tmp_path / "hf")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
        weights = load(convert(folder, None, tmp_path / "again"), device=CPU)[0].state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in load(capitals)[0].state_dict().items())
        assert all(weight.dtype == torch.float32 for weight in weights.values())

    def test_sizes_that_are_not_the_weights_are_said_to_be_that(self, capitals: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(capitals, tmp_path / "hf")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"block_size": 32}))
        with pytest.raises(
            UserError,
            match=r"do not belong together \(transformer\.wpe\.weight has the shape",
        ):
            load(folder, device=CPU)

    def test_a_folder_with_many_ids_without_a_token_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        many = gpt(vocab_size=400_000, n_layer=1, n_embd=8, tied=True)
        model, tokenizer = load(convert(*save_files(tmp_path, many), tmp_path / "hf"), device=CPU)
        assert model.generation_config.suppress_tokens == list(range(len(tokenizer), 400_000))

    def test_suppressed_ids_that_a_smaller_vocabulary_no_longer_has_are_left_out(
        self, capitals: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(capitals, tmp_path / "hf")
        generation = json.loads((folder / "generation_config.json").read_text())
        generation["suppress_tokens"] = [1024, 1025]
        (folder / "generation_config.json").write_text(json.dumps(generation))
        assert load(folder, device=CPU)[0].generation_config.suppress_tokens is None

    def test_a_file_without_a_tokenizer_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"ckpt\.pt: needs a tokenizer"):
            load(CHECKPOINT, None, device=CPU)

    @pytest.mark.parametrize(
        "config, message",
        [
            (None, r"holds no model \(no config\.json\)"),
            ({"model_type": "gpt2"}, "holds a model of type 'gpt2', not 'custom_gpt'"),
            ({"model_type": "custom_gpt", "n_layer": 0}, "cannot be loaded .*`n_layer` must be at least 1"),
            ({"model_type": "custom_gpt"}, "cannot be loaded .no model.safetensors"),
        ],
    )
    def test_a_folder_of_something_else_is_refused(self, config: dict | None, message: str, tmp_path: Path) -> None:
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(UserError, match=f"{tmp_path}: {message}"):
            load(tmp_path, None, device=CPU)


def test_threads_that_load_other_dtypes_do_not_disturb_each_other(capitals: Path, tmp_path: Path) -> None:
    folders = {
        dtype: convert(CHECKPOINT, TOKENIZER, tmp_path / str(dtype), dtype=dtype, verify=False)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }

    def dtypes_of(dtype: torch.dtype) -> set[torch.dtype]:
        return {parameter.dtype for parameter in load(folders[dtype], device=CPU)[0].parameters()}

    wanted = [*folders] * 8
    with ThreadPoolExecutor(len(folders)) as pool:
        assert list(pool.map(dtypes_of, wanted)) == [{dtype} for dtype in wanted]
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("option", [{"instructions": True}, {"eos_token": "[PAD]"}, {"bos_token": "[PAD]"}], ids=str)
def test_a_folder_s_own_tokenizer_is_not_silently_kept_against_an_option(option: dict, capitals: Path) -> None:
    with pytest.raises(UserError, match=f"--tokenizer_path {capitals}"):
        load(capitals, **option)
    tokenizer = load(capitals, capitals, **option)[1]
    assert tokenizer.eos_token == option.get("eos_token", "[EOS]")
    assert tokenizer.bos_token == option.get("bos_token", "[BOS]")
