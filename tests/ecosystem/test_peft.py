"""LoRA adapters from PEFT on the converted example."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.ecosystem.conftest import NEW_FACTS, answer, rows

peft = pytest.importorskip("peft", reason="PEFT is not installed (the `ecosystem` extra)")

QUESTION, FACT = NEW_FACTS[0]


def lora(model: PreTrainedModel, **settings) -> "peft.PeftModel":
    settings = {"target_modules": "all-linear", "r": 8, "lora_alpha": 32, "task_type": "CAUSAL_LM"} | settings
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def train(model: torch.nn.Module, tokenizer, steps: int = 20) -> None:
    ids = torch.tensor([rows(tokenizer)[0]["input_ids"]])
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def adapter(capitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained adapter."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    model = lora(AutoModelForCausalLM.from_pretrained(capitals))
    train(model, AutoTokenizer.from_pretrained(capitals))
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target_modules", ["all-linear", ["c_attn", "c_proj", "c_fc"]])
def test_the_attention_and_mlp_projections_are_the_targets(model: PreTrainedModel, target_modules) -> None:
    adapted = lora(model, target_modules=target_modules).targeted_module_names
    projections = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sorted(adapted) == sorted(f"transformer.h.{layer}.{name}" for layer in range(3) for name in projections)


def test_only_the_adapter_is_trained(model: PreTrainedModel, tokenizer) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = lora(model)
    train(adapted, tokenizer, steps=2)
    after = {name.replace(".base_layer", ""): weight for name, weight in adapted.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_saved_adapter_loads_and_has_learnt_the_fact(adapter: Path, model: PreTrainedModel, tokenizer) -> None:
    assert answer(model, tokenizer, QUESTION) != FACT
    loaded = peft.PeftModel.from_pretrained(model, adapter).eval()
    assert answer(loaded, tokenizer, QUESTION) == FACT


def test_the_auto_class_takes_the_adapter_folder_itself(adapter: Path, tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapter)
    assert answer(model, tokenizer, QUESTION) == FACT


def test_a_merged_adapter_is_a_plain_model_that_saves_and_loads(
    adapter: Path, model: PreTrainedModel, tokenizer, tmp_path: Path
) -> None:
    names = set(model.state_dict())
    adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.tensor([rows(tokenizer)[0]["input_ids"]])
    expected = adapted(input_ids=ids).logits
    adapted.merge_and_unload().save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(merged(ids).logits, expected)


def test_lora_has_the_same_gradients_under_gradient_checkpointing(capitals: Path, tokenizer) -> None:
    adapted = lora(AutoModelForCausalLM.from_pretrained(capitals, dropout=0.0)).train()
    ids = torch.tensor([rows(tokenizer)[0]["input_ids"]])
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            adapted.activation_checkpointing_enable()
        adapted.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append([weight.grad for name, weight in adapted.named_parameters() if "lora_B" in name])
    assert all(gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])
