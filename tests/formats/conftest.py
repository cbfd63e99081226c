"""Models over the shapes that an engine may get wrong, as the original's two files and as a converted folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_model.conversion import convert
from hf_model.errors import UserError
from tests.tiny import gpt, save_files

SHAPES = {
    "with biases": {},
    "without biases": {"bias": False},
    "tied": {"tied": True},
    "padded vocabulary": {"vocab_size": 320},
    "tanh gelu": {"activation": "gelu_new"},
    "eight heads": {"n_head": 8},
}
Exported = Callable[..., tuple[Path, list[str]]]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> dict:
    return SHAPES[request.param]


@pytest.fixture
def export(tmp_path: Path) -> Exported:
    """Convert a reference model to a format, from its `.pt` file or a folder; its folder and what was said."""

    def run(format: str, shape: dict, *, from_folder: bool = False, weights: torch.dtype = torch.float32, **how):
        torch.manual_seed(0)
        source = save_files(tmp_path, gpt(**shape).to(weights))
        how |= {"activation": shape.get("activation", "gelu")} if not from_folder else {}
        if from_folder:
            source = convert(*source, tmp_path / "hf", activation=shape.get("activation", "gelu"), verify=False), None
        lines: list[str] = []
        return convert(*source, tmp_path / "out", format=format, report=lines.append, **how), lines

    return run


@pytest.fixture
def refuses(export: Exported, tmp_path: Path) -> Callable[..., str]:
    """The message with which a conversion is refused; nothing may be left of it."""

    def run(format: str, shape: dict, **how) -> str:
        with pytest.raises(UserError) as error:
            export(format, shape, **how)
        assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]
        return str(error.value)

    return run
