"""Puts the library's own tests on the path, as the package `tests` that they take themselves to be."""

import os
import sys
from pathlib import Path

# Before transformers is imported: nothing here may need the Hub, and tests marked slow are to run too.
os.environ |= {"HF_HUB_OFFLINE": "1", "RUN_SLOW": "1"}

import pytest
from fetch import fetch
from tiny_models import write_tiny_models

collect_ignore = ["stand_ins"]


def pytest_configure(config: pytest.Config) -> None:
    # Their markers are declared in a file that the source distribution lacks.
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnknownMarkWarning")
    try:
        root = fetch()
    except RuntimeError as error:
        raise pytest.UsageError(f"conformance: the library's own tests cannot be had. {error}") from None
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), str(Path(__file__).parents[1])])  # of processes tests start
    write_tiny_models(root / "tiny_models")
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(root / "tiny_models")
