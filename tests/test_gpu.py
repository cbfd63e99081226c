"""On a GPU the model gives what it gives on the CPU. Skipped where there is no GPU."""

from pathlib import Path

import pytest
import torch

import generate
from hf_model import CustomGPTForCausalLM
from hf_model.tokenizer import format_prompt
from tests.tiny import load_plain

EXAMPLE = Path(__file__).parent.parent / "examples" / "capitals"
FILES = (EXAMPLE / "ckpt.pt", EXAMPLE / "tokenizer.json")
QUESTION = "What is the capital of France?"
GPU = torch.device("cuda")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    _, tokenizer = load_plain(*FILES)
    return tokenizer(format_prompt(QUESTION), return_tensors="pt").input_ids


def model_in(dtype: str) -> CustomGPTForCausalLM:
    return load_plain(*FILES, dtype=dtype)[0]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("float16", 0.05), ("bfloat16", 0.4)])
def test_logits_are_the_cpus(ids: torch.Tensor, dtype: str, tolerance: float) -> None:
    with torch.no_grad():
        expected = model_in("float32")(ids).logits
        logits = model_in(dtype).to(GPU)(ids.to(GPU)).logits
    torch.testing.assert_close(logits.float().cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic cache", "compiled"])
def test_tokens_are_the_cpus_past_the_context_too(ids: torch.Tensor, options: dict[str, str]) -> None:
    within = model_in("float32").config.block_size - ids.shape[1]
    for new in (within, within + 8):
        greedy = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 1}
        expected = model_in("float32").generate(ids, **greedy)
        assert torch.equal(model_in("float32").to(GPU).generate(ids.to(GPU), **greedy, **options).cpu(), expected)


def test_gradients_are_the_cpus(ids: torch.Tensor) -> None:
    def gradients(device: torch.device) -> dict[str, torch.Tensor]:
        model = model_in("float32").to(device)
        model(ids.to(device), labels=ids.to(device)).loss.backward()
        return {name: weight.grad.cpu() for name, weight in model.named_parameters()}

    torch.testing.assert_close(gradients(GPU), gradients(torch.device("cpu")), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [[], ["--cache_implementation", "static"]], ids=["as it is", "compiled"])
def test_generate_py_takes_the_gpu_by_itself(options: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    files = ["--checkpoint_path", str(FILES[0]), "--tokenizer_path", str(FILES[1])]
    monkeypatch.setattr("sys.argv", ["generate.py", *files, "--prompt", QUESTION, "--temperature", "0", *options])
    assert generate.main() == 0
    output = capsys.readouterr().out
    assert "device      cuda:0\n" in output
    assert "Response: Paris[EOS]" in output
