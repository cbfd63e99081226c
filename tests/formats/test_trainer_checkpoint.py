"""Back to a trainer: the file that comes out is the one that went in, and the plain reference loads it."""

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.plain_gpt import GPT, GPTConfig
from hf_model.conversion import convert
from hf_model.errors import UserError
from hf_model.formats import trainer_checkpoint
from tests.formats.conftest import Exported
from tests.tiny import CHECKPOINT, SIZES, TOKENIZER, gpt, save_files


def load(folder: Path) -> dict:
    return torch.load(folder / "ckpt.pt", weights_only=True)


def test_file_to_folder_to_file_gives_equal_tensors(tmp_path: Path) -> None:
    folder = convert(CHECKPOINT, TOKENIZER, tmp_path / "hf")
    back = load(convert(folder, None, tmp_path / "back", format="checkpoint"))
    original = torch.load(CHECKPOINT, weights_only=True)
    assert back["model_args"] == original["model_args"]
    assert list(back["model_state_dict"]) == list(original["model_state_dict"])
    for name, tensor in original["model_state_dict"].items():
        assert back["model_state_dict"][name].dtype == tensor.dtype
        assert torch.equal(back["model_state_dict"][name], tensor)


@pytest.mark.parametrize("from_folder", [False, True], ids=["from a file", "from a folder"])
def test_the_original_trainer_s_class_loads_it(shape: dict, from_folder: bool, export: Exported) -> None:
    folder, lines = export("checkpoint", shape, from_folder=from_folder)
    content = load(folder)
    config = GPTConfig(**content["model_args"], activation=shape.get("activation", "gelu"))
    model = GPT(config).eval()
    model.load_state_dict(content["model_state_dict"])
    torch.manual_seed(0)
    ids = torch.randint(300, (2, SIZES["block_size"]))
    torch.manual_seed(0)
    assert torch.equal(model(ids)[0], gpt(**shape)(ids)[0])
    assert content["iter_num"] == (0 if from_folder else 7)
    said = "\n".join(lines)
    assert ("no word for a tied head" in said) == ("tied" in shape)
    assert ("no word for gelu_new" in said) == ("activation" in shape)
    assert "optimizer's state is gone" in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_keeps_half_precision(dtype: torch.dtype, export: Exported) -> None:
    folder, _ = export("checkpoint", {}, weights=dtype)
    assert {tensor.dtype for tensor in load(folder)["model_state_dict"].values()} == {dtype}


class TestLikeNanoGPT:
    def test_has_what_its_resume_reads(self, export: Exported) -> None:
        """The steps of train.py's `init_from='resume'`, on the plain reference with a tied head."""
        folder, _ = export("checkpoint", {"tied": True, "bias": False}, like="nanogpt")
        content = load(folder)
        assert {"iter_num", "best_val_loss", "config"} <= content.keys()
        names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
        model = GPT(GPTConfig(**{name: content["model_args"][name] for name in names}, tied=True, dropout=0))
        model.load_state_dict(content["model"])
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
        optimizer.load_state_dict(content["optimizer"])
        ids = torch.randint(300, (2, 8))
        losses = []
        for _ in range(5):
            _, loss = model(ids[:, :-1], ids[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    def test_the_tied_head_is_one_tensor(self, export: Exported) -> None:
        folder, _ = export("checkpoint", {"tied": True}, like="nanogpt")
        weights = load(folder)["model"]
        assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()

    def test_refuses_a_head_that_is_not_tied(self, refuses: Callable) -> None:
        assert "not tied" in refuses("checkpoint", {}, like="nanogpt")


def test_takes_a_folder_without_a_tokenizer(capitals: Path, tmp_path: Path) -> None:
    """As `merge_and_unload().save_pretrained(folder)` of PEFT leaves it."""
    model = AutoModelForCausalLM.from_pretrained(capitals)
    model.transformer.h[0].mlp.c_fc.weight.data += 1
    model.save_pretrained(tmp_path / "merged")
    back = load(convert(tmp_path / "merged", None, tmp_path / "back", format="checkpoint"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(back["model_state_dict"][name], tensor)
    with pytest.raises(UserError, match=r"holds no tokenizer.*--tokenizer_path"):
        convert(tmp_path / "merged", None, tmp_path / "gpt2", format="gpt2")
    convert(tmp_path / "merged", TOKENIZER, tmp_path / "gpt2", format="gpt2")


def test_an_adapter_is_to_be_merged_first(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"PEFT adapter.*merge_and_unload"):
        convert(tmp_path / "adapter", None, tmp_path / "back", format="checkpoint")


@pytest.mark.parametrize(
    "field, value, message", [("layer_norm_epsilon", 1e-6, "epsilon"), ("activation_function", "relu", "relu")]
)
def test_refuses_what_no_such_trainer_makes(
    field: str, value: object, message: str, capitals: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(capitals)
    setattr(model.config, field, value)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "other", None, tmp_path / "back", format="checkpoint")


def test_a_wrong_number_of_heads_is_noticed(refuses: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer_checkpoint.content

    def mutant(*args):
        content = original(*args)
        content["model_args"]["n_head"] //= 2
        return content

    monkeypatch.setattr(trainer_checkpoint, "content", mutant)
    assert "says n_head=2, its source 4" in refuses("checkpoint", {})


def test_a_full_disk_is_an_error_of_the_disk_wherever_it_is_full(tmp_path: Path) -> None:
    what = {"a": torch.zeros(100, 100), "b": {str(i): torch.zeros(10) for i in range(5)}}
    trainer_checkpoint.save(what, path := tmp_path / "ckpt.pt")
    whole = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (*range(0, whole, 997), *range(whole - 300, whole, 13)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(OSError, match="File too large"):
                trainer_checkpoint.save(what, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestOverwrite:
    def test_replaces_what_was_written_here(self, tmp_path: Path) -> None:
        files = save_files(tmp_path, gpt())
        folder = convert(*files, tmp_path / "back", format="checkpoint")
        with pytest.raises(UserError, match="exists already"):
            convert(*files, folder, format="checkpoint")
        convert(*files, folder, format="checkpoint", overwrite=True)

    def test_spares_a_trainer_s_own_checkpoint(self, tmp_path: Path) -> None:
        files = save_files(tmp_path, gpt())
        with pytest.raises(UserError, match=r"holds 'ckpt\.pt', which is a source"):
            convert(*files, tmp_path, format="checkpoint", overwrite=True)

    def test_spares_a_checkpoint_that_was_trained_further(self, tmp_path: Path) -> None:
        files = save_files(tmp_path, gpt())
        folder = convert(*files, tmp_path / "back", format="checkpoint")
        content = load(folder) | {"optimizer_state_dict": {"step": 1}}
        torch.save(content, folder / "ckpt.pt")
        said: list[str] = []
        convert(*files, folder, format="checkpoint", overwrite=True, report=said.append)
        assert load(folder.with_name("back.1")).keys() == content.keys()
        assert any("back.1" in line and "ckpt.pt" in line for line in said)

    def test_refuses_to_replace_the_source(self, tmp_path: Path) -> None:
        folder = convert(*save_files(tmp_path, gpt()), tmp_path / "hf")
        with pytest.raises(UserError, match="is the source itself"):
            convert(folder, None, folder, format="gpt2", overwrite=True)
        with pytest.raises(UserError, match="is the source itself"):
            convert(folder, None, folder / "nowhere" / "..", format="gpt2", overwrite=True)

    @pytest.mark.parametrize("by_a_link", [False, True])
    def test_refuses_to_replace_a_folder_with_the_source_in_it(self, by_a_link: bool, tmp_path: Path) -> None:
        files = save_files(tmp_path, gpt())
        folder = convert(*files, tmp_path / "back", format="checkpoint")
        source = folder / "ckpt.pt"
        before = source.read_bytes()
        if by_a_link:
            source = tmp_path / "link.pt"
            source.symlink_to(folder / "ckpt.pt")
        with pytest.raises(UserError, match=r"back: holds 'ckpt\.pt', which is a source; choose another --output_dir"):
            convert(source, files[1], folder, format="checkpoint", dtype="float16", overwrite=True)
        assert (folder / "ckpt.pt").read_bytes() == before

    @pytest.mark.parametrize("option", ["tokenizer_path", "characters_of", "training_data"])
    def test_refuses_to_replace_a_folder_with_a_file_in_it_that_is_read(self, option: str, tmp_path: Path) -> None:
        checkpoint_path, tokenizer_path = save_files(tmp_path, gpt())
        folder = convert(checkpoint_path, tokenizer_path, tmp_path / "hf")
        how = {"tokenizer_path": tokenizer_path} | {option: folder / "tokenizer.json"}
        with pytest.raises(UserError, match=r"hf: holds 'tokenizer\.json', which is a source"):
            convert(checkpoint_path, output_dir=folder, overwrite=True, **how)
