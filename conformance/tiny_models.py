"""The tiny model that the library's tests ask for."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_model import CustomGPTConfig, CustomGPTForCausalLM, CustomGPTModel
from hf_model.modeling_custom_gpt import CustomGPTForSequenceClassification, CustomGPTForTokenClassification
from hf_model.tokenizer import convert_tokenizer

MODEL_CLASSES = (
    CustomGPTModel,
    CustomGPTForCausalLM,
    CustomGPTForSequenceClassification,
    CustomGPTForTokenClassification,
)

EXAMPLE_TOKENIZER = Path(__file__).parents[1] / "examples" / "capitals" / "tokenizer.json"


def tiny_config(vocab_size: int = 99) -> CustomGPTConfig:
    """Without dropout: runs in training mode, in one process and in two, are compared step by step."""
    return CustomGPTConfig(vocab_size=vocab_size, block_size=128, n_layer=2, n_head=4, n_embd=32, dropout=0.0)


def converted_tokenizer() -> PreTrainedTokenizerBase:
    return convert_tokenizer(EXAMPLE_TOKENIZER, tiny_config().block_size)


def write_tiny_models(folder: Path) -> None:
    """A model of each class with its tokenizer, in folders named as the library's pipeline tests look for them."""
    tokenizer = converted_tokenizer()
    summary = {}
    for model_class in MODEL_CLASSES:
        model_folder = folder / CustomGPTConfig.model_type / model_class.__name__
        model_class(tiny_config(vocab_size=len(tokenizer))).save_pretrained(model_folder)
        tokenizer.save_pretrained(model_folder)
        summary[model_class.__name__] = {"tokenizer_classes": [type(tokenizer).__name__], "processor_classes": []}
    reports = folder / "reports"
    reports.mkdir(exist_ok=True)
    (reports / "tiny_model_summary.json").write_text(json.dumps(summary), encoding="utf-8")
