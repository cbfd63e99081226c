"""Where the tests of trainers save their checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`torch.save` to ckpt.pt; the arguments behind the content are `torch.save`'s."""

    def save(content: object, **how) -> Path:
        torch.save(content, tmp_path / "ckpt.pt", **how)
        return tmp_path / "ckpt.pt"

    return save
