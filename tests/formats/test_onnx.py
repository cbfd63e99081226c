"""The ONNX folder: onnxruntime gives the reference's logits with a cache, for any batch and any length."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.formats.conftest import Exported
from tests.tiny import SIZES, gpt

pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed (the `onnx` extra)")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the `onnx` extra)")

ALL = {"bias": False, "tied": True, "vocab_size": 320}  # an export takes half a minute


@pytest.mark.parametrize("shape", [{}, ALL], ids=str)
def test_gives_the_logits_of_the_plain_reference_token_by_token(shape: dict, export: Exported) -> None:
    folder, lines = export("onnx", shape)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    ids = torch.randint(300, (3, SIZES["block_size"]))
    torch.manual_seed(0)
    expected = gpt(**shape)(ids)[0]
    names = [put.name for put in session.get_inputs()]
    cache = [np.zeros((3, 4, 0, 8), np.float32)] * 4
    for start, end in [(0, 5), *((position, position + 1) for position in range(5, SIZES["block_size"]))]:
        values = [ids[:, start:end].numpy(), np.ones((3, end), np.int64), *cache]
        logits, *cache = session.run(None, dict(zip(names, values, strict=True)))
        torch.testing.assert_close(torch.from_numpy(logits), expected[:, start:end], rtol=1e-5, atol=1e-5)
    assert "by onnxruntime, with and without a cache, in batches of 1 to 3" in lines[-1]
    assert [path.name for path in folder.glob("*.py")] == ["example.py"]

    too_long = [np.zeros((1, 17), np.int64), np.ones((1, 17), np.int64), *[np.zeros((1, 4, 0, 8), np.float32)] * 4]
    with pytest.raises(Exception, match=r"out of data bounds|out of bounds"):
        session.run(None, dict(zip(names, too_long, strict=True)))


def test_float16_is_kept_and_verified(export: Exported) -> None:
    folder, lines = export("onnx", ALL, weights=torch.float16)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert {put.type for put in session.get_inputs()} == {"tensor(int64)", "tensor(float16)"}
    assert lines[-1].startswith("verified      by onnxruntime")


def test_bfloat16_is_refused(refuses: Callable) -> None:
    assert "--dtype float32" in refuses("onnx", {}, weights=torch.bfloat16)


def test_a_wrong_number_of_heads_is_noticed(refuses: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_model.formats import onnx

    original = onnx.export

    def mutant(model, folder):
        for block in model.transformer.h:  # its heads exchange halves
            weight = block.attn.c_attn.weight
            block.attn.c_attn.weight.data = torch.cat([weight[4:32], weight[:4], weight[32:]])
        original(model, folder)

    monkeypatch.setattr(onnx, "export", mutant)
    assert "the files do not hold this model" in refuses("onnx", {})
