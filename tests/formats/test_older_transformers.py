"""Converted folders in older versions of transformers: the same ids, logits and greedy answer, or one true sentence.

OLDER_TRANSFORMERS names the folders of the versions, separated by the system's path separator. `.ci/run` makes them by
`pip install --no-deps --target FOLDER` with the packages that each version needs; they are laid over the environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
# Arguments: pairs of a folder and a prompt for it. Prints what each folder gives, or why it does not load.
PROGRAM = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

def given(folder, prompt):
    trust = folder.endswith("with code")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits[0].tolist()
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0].tolist()
    return inputs.input_ids[0].tolist(), logits, answer, tokenizer.decode(answer)

results = [transformers.__version__]
for folder, prompt in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        results.append(given(folder, prompt))
    except ImportError as error:
        results.append(str(error))
print(json.dumps(results))
"""
Folders = dict[str, tuple[Path, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Converted folders, with a prompt for each."""
    root = tmp_path_factory.mktemp("older")
    torch.manual_seed(0)
    instructions = save_files(root, gpt(tied=True))
    (root / "nano").mkdir()
    characters = relatives.save_nanogpt(root / "nano", relatives.nano_character_model())
    meta = relatives.save_meta(root / "nano" / "meta.pkl")
    return {
        "stock": (convert(*instructions, root / "stock", format="gpt2"), "the cat"),
        "stock, of characters": (convert(characters, meta, root / "stock of characters", format="gpt2"), "To be"),
        "with code": (convert(*instructions, root / "with code"), "the cat"),
    }


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def given(version: str, folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each folder gives in this version: ids, logits, the answer's ids and its text; or why it does not load."""
    empty = tmp_path_factory.mktemp("elsewhere")
    arguments = [str(argument) for pair in folders.values() for argument in pair]
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | {"PYTHONPATH": VERSIONS[version], "HF_HOME": str(empty)},
        capture_output=True,
        encoding="utf-8",
        cwd=empty,
    )
    assert process.returncode == 0, process.stderr
    found, *results = json.loads(process.stdout.splitlines()[-1])
    assert found == version
    return dict(zip(folders, results, strict=True))


def check(given: Any, folder: Path, prompt: str) -> None:
    assert isinstance(given, list), given
    ids, logits, answer, text = given
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    assert ids == inputs.input_ids[0].tolist()
    assert torch.equal(torch.tensor(logits), model(**inputs).logits[0])
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0].tolist()
    assert (answer, text) == (expected, tokenizer.decode(expected))


@pytest.mark.parametrize("kind", ["stock", "stock, of characters"])
def test_a_stock_folder_gives_the_same_ids_logits_and_answer(
    kind: str, given: dict[str, Any], folders: Folders
) -> None:
    check(given[kind], *folders[kind])


def test_a_folder_with_code_gives_the_same_or_says_which_version_it_needs(
    version: str, given: dict[str, Any], folders: Folders
) -> None:
    if Version(version) >= Version("5.4"):
        check(given["with code"], *folders["with code"])
    else:
        sentence = "This folder's code needs transformers 5.4 or later; a folder of `--format gpt2` loads anywhere."
        assert given["with code"] == sentence


@pytest.mark.parametrize("kind", ["stock", "stock, of characters"])
def test_the_tokenizer_has_a_name_that_versions_4_and_5_know(kind: str, folders: Folders) -> None:
    config = json.loads((folders[kind][0] / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_card_names_the_same_version_as_the_code(folders: Folders) -> None:
    for name in ("README.md", "configuration_custom_gpt.py"):
        assert "needs transformers 5.4 or later" in (folders["with code"][0] / name).read_text(encoding="utf-8")
