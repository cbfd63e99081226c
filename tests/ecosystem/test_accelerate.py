"""accelerate: several processes, more model than memory, and weights of fewer bits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from examples.distributed import train
from tests.ecosystem.conftest import answer
from tests.tiny import ROOT

QUESTION = "What is the capital of France?"


def test_two_processes_train_the_weights_that_one_does(
    model: PreTrainedModel, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model", str(capitals), "--steps", "4", "--out_dir"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch = [*launcher, "-m", "examples.distributed.train", *arguments, str(tmp_path / "two")]
    launched = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True)
    assert "2 processes, gloo" in launched.stdout, launched.stderr
    monkeypatch.setattr(sys, "argv", ["train", *arguments, str(tmp_path / "one")])
    train.main()
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, weight in model.state_dict().items():
        assert not torch.equal(one[name], weight)
        torch.testing.assert_close(two[name], one[name])


def test_a_model_larger_than_memory_runs_from_disk(model: PreTrainedModel, capitals: Path, tokenizer, tmp_path) -> None:
    memory = {"cpu": 1_700_000}  # of 2 MB of weights
    offloaded = AutoModelForCausalLM.from_pretrained(
        capitals, device_map="auto", max_memory=memory, offload_folder=tmp_path
    )
    assert {"cpu", "disk"} <= set(offloaded.hf_device_map.values())
    assert answer(offloaded, tokenizer, QUESTION) == "Paris"
    ids = torch.randint(4, model.config.vocab_size, (2, 9))
    assert torch.equal(offloaded(ids).logits, model(ids).logits)


def test_int8_weights_keep_the_answer(capitals: Path, tokenizer) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed (the `ecosystem` extra)")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(capitals, quantization_config=config)
    for block in quantized.transformer.h:
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            assert isinstance(linear.weight, torchao.Int8Tensor)
    assert answer(quantized, tokenizer, QUESTION) == "Paris"
