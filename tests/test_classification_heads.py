"""A pre-trained decoder with a label head, for one label a text or one a token."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_model import CustomGPTConfig, CustomGPTForCausalLM
from hf_model.modeling_custom_gpt import CustomGPTForSequenceClassification, CustomGPTForTokenClassification

HEADS = {
    "AutoModelForSequenceClassification": CustomGPTForSequenceClassification,
    "AutoModelForTokenClassification": CustomGPTForTokenClassification,
}


@pytest.fixture
def pretrained(tmp_path: Path) -> CustomGPTForCausalLM:
    torch.manual_seed(0)
    config = CustomGPTConfig(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=32)
    model = CustomGPTForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "pretrained")
    return model


@pytest.mark.parametrize("head_class", HEADS.values())
def test_the_decoder_is_the_pretrained_one(pretrained: CustomGPTForCausalLM, tmp_path: Path, head_class: type) -> None:
    model = head_class.from_pretrained(tmp_path / "pretrained", num_labels=3)
    for name, weight in pretrained.transformer.state_dict().items():
        assert torch.equal(model.transformer.state_dict()[name], weight), name


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_label_of_a_text_is_read_at_its_last_token(pretrained: CustomGPTForCausalLM, padding_side: str) -> None:
    model = CustomGPTForSequenceClassification(pretrained.config).eval()
    text, padding = torch.randint(4, 97, (1, 10)), torch.full((1, 5), model.config.pad_token_id)
    order = (padding, text) if padding_side == "left" else (text, padding)
    padded = torch.cat(order, dim=1)
    mask = (padded != model.config.pad_token_id).long()
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, model(text).logits)


@pytest.mark.parametrize("head_class", HEADS.values())
def test_a_few_steps_learn_the_labels(pretrained: CustomGPTForCausalLM, tmp_path: Path, head_class: type) -> None:
    torch.manual_seed(0)
    model = head_class.from_pretrained(tmp_path / "pretrained", num_labels=2).train()
    input_ids = torch.randint(4, 97, (16, 10))
    labels = (input_ids >= 50).long()  # of each token, or of the last one
    labels = labels[:, -1] if head_class is CustomGPTForSequenceClassification else labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert torch.equal(model.eval()(input_ids).logits.argmax(-1), labels)


def test_saved_classifiers_load_without_this_package(pretrained: CustomGPTForCausalLM, tmp_path: Path) -> None:
    input_ids, expected = torch.arange(4, 14).unsqueeze(0), {}
    for auto_class, head_class in HEADS.items():
        head_class.register_for_auto_class(auto_class)
        model = head_class.from_pretrained(tmp_path / "pretrained").eval()
        model.save_pretrained(tmp_path / auto_class)
        expected[auto_class] = model(input_ids).logits
    script = f"""
import sys, torch, transformers
sys.modules["hf_model"] = None  # makes its import an error
logits = {{}}
for name in {list(HEADS)}:
    model = getattr(transformers, name).from_pretrained(name, trust_remote_code=True).eval()
    logits[name] = model(torch.arange(4, 14).unsqueeze(0)).logits
torch.save(logits, "logits.pt")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    logits = torch.load(tmp_path / "logits.pt")
    assert all(torch.equal(logits[name], expected[name]) for name in HEADS)
