"""The configuration: its names, its defaults and the values that it refuses."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_model import CustomGPTConfig, CustomGPTForCausalLM, CustomGPTModel
from tests.tiny import BOS, EOS, PAD, SIZES


def test_the_auto_classes_know_the_model_type() -> None:
    config = AutoConfig.for_model("custom_gpt", **SIZES)
    assert type(config) is CustomGPTConfig
    assert type(AutoModel.from_config(config)) is CustomGPTModel
    assert type(AutoModelForCausalLM.from_config(config)) is CustomGPTForCausalLM


def test_the_standard_names_are_the_checkpoint_names() -> None:
    config = CustomGPTConfig(n_layer=3, n_head=2, n_embd=8, block_size=16)
    assert config.num_hidden_layers == 3
    assert config.num_attention_heads == 2
    assert config.hidden_size == 8
    assert config.max_position_embeddings == 16
    assert CustomGPTConfig(hidden_size=24, num_attention_heads=2).n_embd == 24


def test_the_defaults_are_the_format_document_s() -> None:
    config = CustomGPTConfig()
    assert (config.bias, config.dropout, config.activation_function) == (True, 0.1, "gelu")
    assert (config.layer_norm_epsilon, config.tie_word_embeddings) == (1e-5, False)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS, EOS, PAD)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"n_layer": 0}, "`n_layer` must be at least 1, got 0"),
        ({"n_head": 0}, "`n_head` must be at least 1, got 0"),
        ({"n_embd": -8}, "`n_embd` must be at least 1, got -8"),
        ({"block_size": 0}, "`block_size` must be at least 1, got 0"),
        ({"vocab_size": 0}, "`vocab_size` must be at least 1, got 0"),
        ({"n_embd": 8, "n_head": 3}, r"`n_embd` \(8\) must be divisible by `n_head` \(3\)"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"`dropout` must be in \[0, 1\), got -0.1"),
        ({"activation_function": "sine"}, "`activation_function` 'sine' is not one of gelu, "),
        ({"n_layer": "2"}, "Field 'n_layer' expected int, got str"),
        ({"bias": "yes"}, "Field 'bias' expected bool, got str"),
    ],
)
def test_impossible_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        CustomGPTConfig(**values)
