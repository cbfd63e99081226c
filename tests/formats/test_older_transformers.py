"""A stock folder loads in older versions of transformers: the same ids, logits and greedy answer.

The versions are folders that pip made, named in OLDER_TRANSFORMERS and separated by the system's path separator:

    pip install --no-deps --target OLD transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
    OLDER_TRANSFORMERS=OLD python -m pytest tests/formats/test_older_transformers.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_model.conversion import convert
from tests import relatives
from tests.tiny import gpt, save_files

VERSIONS = [path for path in os.environ.get("OLDER_TRANSFORMERS", "").split(os.pathsep) if path]
PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (auto.from_pretrained(sys.argv[1]) for auto in (AutoTokenizer, AutoModelForCausalLM))
inputs = tokenizer(sys.argv[2], return_tensors="pt")
with torch.inference_mode():
    logits = model(**inputs).logits[0].tolist()
answer = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0].tolist()
print(json.dumps([inputs.input_ids[0].tolist(), logits, answer, tokenizer.decode(answer)]))
"""


def stock_folder(kind: str, folder: Path) -> tuple[Path, str]:
    """A stock folder, and a prompt for it."""
    if kind == "characters":
        path = relatives.save_nanogpt(folder, relatives.nano_character_model())
        return convert(path, relatives.save_meta(folder / "meta.pkl"), folder / "stock", format="gpt2"), "To be"
    return convert(*save_files(folder, gpt(tied=True)), folder / "stock", format="gpt2"), "the cat"


@pytest.mark.parametrize("kind", ["instructions", "characters"])
def test_the_tokenizer_has_a_name_that_versions_4_and_5_know(kind: str, tmp_path: Path) -> None:
    folder, _ = stock_folder(kind, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.skipif(not VERSIONS, reason="OLDER_TRANSFORMERS names no folder")
@pytest.mark.parametrize("kind", ["instructions", "characters"])
@pytest.mark.parametrize("version", VERSIONS)
def test_gives_the_same_ids_logits_and_answer(version: str, kind: str, tmp_path: Path) -> None:
    folder, prompt = stock_folder(kind, tmp_path)
    command = [sys.executable, "-c", PROGRAM, str(folder), prompt]
    process = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": version}, capture_output=True, encoding="utf-8", cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    ids, logits, answer, text = json.loads(process.stdout.splitlines()[-1])

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    assert ids == inputs.input_ids[0].tolist()
    torch.testing.assert_close(torch.tensor(logits), model(**inputs).logits[0], rtol=1e-5, atol=1e-5)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0].tolist()
    assert (answer, text) == (expected, tokenizer.decode(expected))
