"""What every test has: no network, the same random state; and for those that ask, the example converted once."""

import os
import signal
from pathlib import Path

# Both are read by the imports below, and by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # more threads only wait for each other over matrices of this size

import pytest
import torch

from hf_model.conversion import convert
from tests.tiny import CHECKPOINT, TOKENIZER

# A shell starts its background programs with Ctrl-C ignored, which the processes that tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def capitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as a converted folder; not to be written to."""
    return convert(CHECKPOINT, TOKENIZER, tmp_path_factory.mktemp("example") / "capitals")
