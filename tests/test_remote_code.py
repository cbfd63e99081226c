"""A converted folder works by its own code where this project is not installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.plain_gpt import GPT, GPTConfig
from tests.tiny import CHECKPOINT

# Runs where `hf_model` cannot be imported. Arguments: the converted folder, a folder to write to.
ELSEWHERE = """
import json, pathlib, sys
sys.modules["hf_model"] = None  # so that importing it fails, whatever is installed
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

folder, out = sys.argv[1], pathlib.Path(sys.argv[2])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

model.save_pretrained(out / "again")
tokenizer.save_pretrained(out / "again")
again = AutoModelForCausalLM.from_pretrained(out / "again", trust_remote_code=True)

ids = torch.arange(4, 68).unsqueeze(0)
prompt = tokenizer("Sing!", return_tensors="pt")
torch.save(
    {
        "logits": model(ids).logits,
        "logits of the base model": model.lm_head(base(ids).last_hidden_state),
        "logits of the copy": again(ids).logits,
        "past the context": model.generate(**prompt, do_sample=False, max_new_tokens=90, eos_token_id=None),
    },
    out / "tensors.pt",
)
report = {
    "classes": [type(thing).__name__ for thing in (config, base, model)],
    "modules": [type(thing).__module__ for thing in (config, base, model, again)],
    "prompt": prompt.input_ids[0].tolist(),
    "length": model.generate(**prompt, max_length=20, eos_token_id=None).shape[1],
    "again": sorted(path.name for path in (out / "again").iterdir()),
}
(out / "report.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has never seen a converted folder."""
    return os.environ | {"HF_HOME": str(tmp_path_factory.mktemp("hf_home"))}


@pytest.fixture(scope="module")
def out(capitals: Path, elsewhere: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program above wrote."""
    out = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(capitals), str(out)]
    subprocess.run(command, cwd=out, env=elsewhere, check=True, timeout=300)
    return out


@pytest.fixture(scope="module")
def tensors(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "tensors.pt", weights_only=True)


@pytest.fixture(scope="module")
def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def original() -> GPT:
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    model = GPT(GPTConfig(**checkpoint["model_args"])).eval()
    model.load_state_dict(checkpoint["model_state_dict"])
    return model


@pytest.mark.parametrize("name", ["logits", "logits of the base model", "logits of the copy"])
def test_logits_equal_the_original_bit_for_bit(name: str, tensors: dict[str, torch.Tensor], original: GPT) -> None:
    assert torch.equal(tensors[name], original(torch.arange(4, 68).unsqueeze(0))[0])


def test_generation_goes_on_past_the_context_as_the_original_does(
    tensors: dict[str, torch.Tensor], report: dict, original: GPT
) -> None:
    expected = original.generate(torch.tensor([report["prompt"]]), max_new_tokens=90, temperature=0)
    assert tensors["past the context"].tolist() == expected.tolist()


def test_the_caller_s_max_length_holds(report: dict) -> None:
    assert report["length"] == 20


def test_the_classes_are_the_folder_s_own(report: dict) -> None:
    assert report["classes"] == ["CustomGPTConfig", "CustomGPTModel", "CustomGPTForCausalLM"]
    assert all(module.startswith("transformers_modules.") for module in report["modules"])


def test_a_copy_that_is_saved_there_carries_the_code_again(report: dict) -> None:
    assert {"configuration_custom_gpt.py", "modeling_custom_gpt.py"} <= set(report["again"])


def test_the_card_s_own_example_answers(capitals: Path, elsewhere: dict[str, str]) -> None:
    card = (capitals / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    command = [sys.executable, "-I", "-c", code]
    process = subprocess.run(command, cwd=capitals.parent, env=elsewhere, capture_output=True, encoding="utf-8")
    assert process.stdout.strip() == "Paris", process.stderr
