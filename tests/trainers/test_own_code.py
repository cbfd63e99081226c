"""`model="FILE.py:NAME"`: the user's own code makes the model, and a checkpoint gives its weights."""

import sys
from pathlib import Path

import pytest
import torch

from hf_model import convert, load
from hf_model.errors import UserError
from tests.trainers.own_models import Own, SeparateHeads, V, moved

CODE = """
from dataclasses import dataclass
from functools import partial
from tests.trainers.own_models import Own, SeparateHeads

@dataclass
class Config:
    block_size: int = 24
    unused: int = 1

class GPT(Own):
    def __init__(self, config: Config):
        super().__init__(SeparateHeads, context=config.block_size)

def build():
    return GPT(Config())

def sized(block_size):
    return GPT(Config(block_size))

def needy(width, depth):
    return build()

def constant(BLOCK_SIZE: int):
    return sized(BLOCK_SIZE)

def counted(count: int):
    return build()

def future(config: "Config"):
    return GPT(config)

def narrow(block_size, dropout=0.0):
    return sized(block_size)

def parses():
    import argparse
    argparse.ArgumentParser().parse_args(["--lr"])

def removes():
    import sys
    sys.path[:] = sys.path[2:]
    return build()

def broken():
    raise ValueError("no such model")
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "input.txt").write_text("".join(chr(33 + i) for i in range(V)))
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def weights(context: int) -> dict[str, torch.Tensor]:
    return dict(moved(Own(SeparateHeads, context=context)).state_dict())


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod.", "gpt.net."])
@pytest.mark.parametrize(
    "name, key, context", [("build", None, 24), ("GPT", "config", 12), ("sized", "hyper_parameters", 12)]
)
def test_the_code_makes_the_model_and_the_file_gives_its_weights(
    prefix: str, name: str, key: str | None, context: int, code: Path
) -> None:
    state = weights(context)
    content = {"state_dict": {prefix + one: tensor for one, tensor in state.items()}}
    path = code.with_name("ckpt.pt")
    torch.save(content if key is None else content | {key: {"block_size": context, "learning_rate": 0.1}}, path)
    model, _ = load(path, None, characters_of=code.with_name("input.txt"), model=f"{code}:{name}", device="cpu")
    assert model.config.block_size == context
    assert torch.equal(model.transformer.wte.weight, state["tok.weight"])


@pytest.mark.parametrize(
    "model, says",
    [
        ("mine.py:nothing", "has no class or function 'nothing'"),
        ("mine.py:broken", "ValueError: no such model"),
        ("mine.py:parses", "ended the program: put what parses options"),
        ("other.py:build", "there is no file"),
        ("build", "such as train.py:build"),
    ],
)
def test_what_is_wrong_with_the_code_is_said(model: str, says: str, code: Path, monkeypatch) -> None:
    monkeypatch.chdir(code.parent)
    torch.save(weights(24), "ckpt.pt")
    with pytest.raises(UserError, match=says):
        convert("ckpt.pt", None, "hf", characters_of="input.txt", model=model)
    assert not Path("hf").exists()


@pytest.mark.parametrize("code", ["lib/models/net.py:Net", "build.py:build"])
def test_the_code_imports_from_the_folder_where_the_trainer_is_started(code: str, tmp_path: Path, monkeypatch) -> None:
    """A package is imported by its name from there; a function may import only when it is called."""
    models = tmp_path / "lib" / "models"
    models.mkdir(parents=True)
    (models / "parts.py").write_text("from tests.trainers.own_models import Own, SeparateHeads as Heads")
    (models / "net.py").write_text(
        "from lib.models.parts import Heads, Own\ndef Net():\n    return Own(Heads, context=24)"
    )
    (tmp_path / "build.py").write_text("def build():\n    from lib.models.net import Net\n    return Net()")
    (tmp_path / "input.txt").write_text("".join(chr(33 + i) for i in range(V)))
    torch.save(weights(24), tmp_path / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert load("ckpt.pt", None, characters_of="input.txt", model=code, device="cpu")[0].config.block_size == 24
    assert sys.path == path


def test_a_file_of_a_package_may_have_relative_imports(tmp_path: Path, monkeypatch) -> None:
    models = tmp_path / "mygpt" / "models"
    models.mkdir(parents=True)
    for folder in (models, models.parent):
        (folder / "__init__.py").touch()
    (models.parent / "parts.py").write_text("from tests.trainers.own_models import Own, SeparateHeads as Heads")
    (models / "net.py").write_text("from ..parts import Heads, Own\ndef net():\n    return Own(Heads, context=24)")
    (tmp_path / "input.txt").write_text("".join(chr(33 + i) for i in range(V)))
    torch.save(weights(24), tmp_path / "ckpt.pt")
    monkeypatch.chdir(models)  # not the folder that holds the package
    paths, path = (tmp_path / "ckpt.pt", None), list(sys.path)
    options = {"characters_of": tmp_path / "input.txt", "model": "net.py:net", "device": "cpu"}
    assert load(*paths, **options)[0].config.block_size == 24
    assert sys.path == path


def test_arguments_that_nothing_gives_are_named_with_what_to_do(code: Path) -> None:
    torch.save(weights(24), code.parent / "model.pt")
    said = "the checkpoint has no value for width and depth: write a function without arguments that returns the model"
    with pytest.raises(UserError, match=said):
        load(code.parent / "model.pt", characters_of=code.parent / "input.txt", model=f"{code}:needy")


def test_missing_and_unknown_weights_are_named(code: Path) -> None:
    state = weights(24)
    state["extra.weight"] = state.pop("tok.weight")
    torch.save(state, code.with_name("ckpt.pt"))
    with pytest.raises(UserError, match=r"lacks 'tok.weight'.*'extra.weight'"):
        load(code.with_name("ckpt.pt"), None, characters_of=code.with_name("input.txt"), model=f"{code}:build")


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", ["adapter.weight", "model.blocks.0.talking.weight", "talking.weight"])
def test_a_square_matrix_and_a_name_without_the_prefix_are_not_dropped(prefix: str, name: str, code: Path) -> None:
    state = {prefix + one: tensor for one, tensor in weights(24).items()} | {name: torch.randn(8, 8)}
    torch.save(state, code.with_name("ckpt.pt"))
    with pytest.raises(UserError, match=f"no place for '{name.removeprefix(prefix)}'"):
        load(code.with_name("ckpt.pt"), None, characters_of=code.with_name("input.txt"), model=f"{code}:build")


@pytest.mark.parametrize("key", ["hparams", "cfg"])
def test_what_is_stated_is_found_under_each_key_that_trainers_have(key: str, code: Path) -> None:
    torch.save({"state_dict": weights(12), key: {"block_size": 12}}, code.with_name("ckpt.pt"))
    paths = code.with_name("ckpt.pt"), None
    model, _ = load(*paths, characters_of=code.with_name("input.txt"), model=f"{code}:sized", device="cpu")
    assert model.config.block_size == 12


@pytest.mark.parametrize("name", ["GPT", "sized", "constant", "future"])
@pytest.mark.parametrize(
    "stated",
    [
        {"model_cfg": {"block_size": 12, "unused": 0}, "config": {"seed": 1, "model": {"block_size": None}}},
        {"config": {"seed": 1, "data": {"path": "x"}, "model": {"block_size": 12}}},
        {"config": {"lr": 0.1}, "hparams": {"block_size": 12}},
    ],
)
def test_of_several_dicts_the_one_with_the_arguments_names_is_taken(stated: dict, name: str, code: Path) -> None:
    torch.save({"model_state": weights(12)} | stated, code.with_name("ckpt.pt"))
    paths = code.with_name("ckpt.pt"), None
    model, _ = load(*paths, characters_of=code.with_name("input.txt"), model=f"{code}:{name}", device="cpu")
    assert model.config.block_size == 12


@pytest.mark.parametrize("width", [None, 99])
def test_the_options_of_the_model_alone_count_before_others(width: int | None, code: Path) -> None:
    """A training's configuration may have more of the arguments' names, and values from an earlier run."""
    stated = {"model_args": {"block_size": 12}, "config": {"block_size": width, "dropout": 0.1}}
    torch.save({"model": weights(12)} | stated, code.with_name("ckpt.pt"))
    paths = code.with_name("ckpt.pt"), None
    model, _ = load(*paths, characters_of=code.with_name("input.txt"), model=f"{code}:narrow", device="cpu")
    assert model.config.block_size == 12


def test_the_code_may_change_where_it_imports_from(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.save(weights(24), code.with_name("ckpt.pt"))
    paths = code.with_name("ckpt.pt"), None
    model, _ = load(*paths, characters_of=code.with_name("input.txt"), model=f"{code}:removes", device="cpu")
    assert model.config.block_size == 24


def test_an_argument_that_is_a_number_is_not_given_a_whole_configuration(code: Path) -> None:
    torch.save({"state_dict": weights(24), "config": {"block_size": 24}}, code.with_name("ckpt.pt"))
    with pytest.raises(UserError, match="the checkpoint has no value for count: write a function without arguments"):
        load(code.with_name("ckpt.pt"), None, characters_of=code.with_name("input.txt"), model=f"{code}:counted")


def test_a_file_that_parses_options_when_it_is_imported_is_told_as_such(code: Path) -> None:
    torch.save(weights(24), code.with_name("ckpt.pt"))
    parser = code.with_name("parser.py")
    parser.write_text("import argparse\nargparse.ArgumentParser().parse_args(['--model'])\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"parser\.py:build: its code ended the program: .* under `if __name__"):
        load(code.with_name("ckpt.pt"), None, characters_of=code.with_name("input.txt"), model=f"{parser}:build")


def test_llm_c_s_file_needs_no_code(code: Path) -> None:
    code.with_name("model.bin").write_bytes((20240326).to_bytes(4, "little") + bytes(1020))
    with pytest.raises(UserError, match=r"is a model of llm\.c.*leave out --model"):
        load(code.with_name("model.bin"), None, characters_of=code.with_name("input.txt"), model=f"{code}:build")


def test_a_head_that_is_tied_in_the_code_may_be_tied_in_the_file(code: Path) -> None:
    code.write_text(code.read_text() + "\ndef tied():\n    return Own(SeparateHeads, context=24, head='tied')\n")
    model = moved(Own(SeparateHeads, context=24, head="tied"))
    torch.save(model.state_dict(), code.with_name("ckpt.pt"))
    loaded, _ = load(
        code.with_name("ckpt.pt"), None, characters_of=code.with_name("input.txt"), model=f"{code}:tied", device="cpu"
    )
    assert loaded.config.tie_word_embeddings
    assert torch.equal(loaded.lm_head.weight, model.tok.weight)
