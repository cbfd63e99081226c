"""Converted folders in older versions of transformers: the same ids, logits and greedy answer, or one true sentence.

OLDER_TRANSFORMERS names the folders of the versions, separated by the system's path separator. `.ci/run` makes them with
`pip install --no-deps --target FOLDER` and the packages that each version needs, which are laid over the environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_model.conversion import convert
from tests import relatives
from tests.tiny import gpt, save_files

VERSIONS = {
    next(Path(path).glob("transformers-*.dist-info")).name[len("transformers-") : -len(".dist-info")]: path
    for path in os.environ.get("OLDER_TRANSFORMERS", "").split(os.pathsep)
    if path
}
PROGRAM = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "trust"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
inputs = tokenizer(prompt, return_tensors="pt")
with torch.inference_mode():
    logits = model(**inputs).logits[0].tolist()
answer = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0].tolist()
print(json.dumps([transformers.__version__, inputs.input_ids[0].tolist(), logits, answer, tokenizer.decode(answer)]))
"""
needs_versions = pytest.mark.skipif(not VERSIONS, reason="OLDER_TRANSFORMERS names no folder")


def folder_and_prompt(kind: str, folder: Path, format: str) -> tuple[Path, str]:
    """A converted folder, and a prompt for it."""
    if kind == "characters":
        path = relatives.save_nanogpt(folder, relatives.nano_character_model())
        return convert(path, relatives.save_meta(folder / "meta.pkl"), folder / "converted", format=format), "To be"
    return convert(*save_files(folder, gpt(tied=True)), folder / "converted", format=format), "the cat"


def run(version: str, folder: Path, prompt: str, *, trust: bool) -> subprocess.CompletedProcess[str]:
    """What the program above prints with this version of transformers."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), prompt, "trust" if trust else ""],
        env=os.environ | {"PYTHONPATH": VERSIONS[version], "HF_HOME": str(folder.parent / "hf_home")},
        capture_output=True,
        encoding="utf-8",
        cwd=folder.parent,
    )


def check_equal(version: str, folder: Path, prompt: str, *, trust: bool) -> None:
    process = run(version, folder, prompt, trust=trust)
    assert process.returncode == 0, process.stderr
    found, ids, logits, answer, text = json.loads(process.stdout.splitlines()[-1])
    assert found == version

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    assert ids == inputs.input_ids[0].tolist()
    assert torch.equal(torch.tensor(logits), model(**inputs).logits[0])
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0].tolist()
    assert (answer, text) == (expected, tokenizer.decode(expected))


@pytest.mark.parametrize("kind", ["instructions", "characters"])
def test_the_tokenizer_has_a_name_that_versions_4_and_5_know(kind: str, tmp_path: Path) -> None:
    folder, _ = folder_and_prompt(kind, tmp_path, "gpt2")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


@needs_versions
@pytest.mark.parametrize("kind", ["instructions", "characters"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_stock_folder_gives_the_same_ids_logits_and_answer(version: str, kind: str, tmp_path: Path) -> None:
    folder, prompt = folder_and_prompt(kind, tmp_path, "gpt2")
    check_equal(version, folder, prompt, trust=False)


@needs_versions
@pytest.mark.parametrize("version", VERSIONS)
def test_the_model_s_code_gives_the_same_or_says_which_version_it_needs(version: str, tmp_path: Path) -> None:
    folder, prompt = folder_and_prompt("instructions", tmp_path, "transformers")
    if Version(version) >= Version("5.4"):
        check_equal(version, folder, prompt, trust=True)
    else:
        process = run(version, folder, prompt, trust=True)
        sentence = "needs transformers 5.4 or later; a folder of `--format gpt2` loads anywhere"
        assert process.returncode != 0
        assert sentence in process.stderr.splitlines()[-1]


def test_the_card_names_the_same_version_as_the_code(capitals: Path) -> None:
    for name in ("README.md", "configuration_custom_gpt.py"):
        assert "needs transformers 5.4 or later" in (capitals / name).read_text(encoding="utf-8")
