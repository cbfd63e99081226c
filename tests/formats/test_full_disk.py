"""A disk that is full, a quota or a limit of size is told as such by every format's writer; no engine is blamed."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hf_model.conversion import convert
from hf_model.errors import UserError
from hf_model.formats import FORMATS

PACKAGES = {"gguf": ["gguf"], "ctranslate2": ["ctranslate2"], "onnx": ["onnx", "onnxscript"]}


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", FORMATS)
def test_is_said_in_one_line(format: str, capitals: Path, tmp_path: Path) -> None:
    for package in PACKAGES.get(format, []):
        pytest.importorskip(package, reason=f"{package} is not installed (the `{format}` extra)")
    with largest_file(500_000), pytest.raises(UserError, match=r"out: cannot be written \(.*File too large"):
        convert(capitals, None, tmp_path / "out", format=format, verify=False)
    assert not list(tmp_path.iterdir())


def test_at_any_byte_of_a_file(capitals: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed (the `gguf` extra)")
    for n_bytes in (0, 100, 5_000, 60_000, 2_000_000, 2_185_000):
        with largest_file(n_bytes), pytest.raises(UserError, match="File too large"):
            convert(capitals, None, tmp_path / "out", format="gguf", verify=False)


def test_a_model_that_an_engine_does_not_take_is_still_said_to_be_that(refuses: Callable) -> None:
    pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed (the `ctranslate2` extra)")
    assert "CTranslate2 does not take the model" in refuses("ctranslate2", {}, quantization="int3")
