"""A GPT trained in plain PyTorch (nanoGPT and its relatives) as a Hugging Face model.

    from hf_model import Sampling, convert, encode, format_prompt, generate, load

    convert("ckpt.pt", "tokenizer.json", "capitals-hf")  # once; raises UserError with what to do
    model, tokenizer = load("capitals-hf")  # or load("ckpt.pt", "tokenizer.json"): nothing is written
    prompt = encode(tokenizer, format_prompt("What is the capital of France?"))  # token ids, (1, T)
    print(generate(model, tokenizer, prompt, Sampling(temperature=0), response_only=True).texts[0])

Importing this package makes transformers' Auto classes know the model, so that a converted folder loads without
`trust_remote_code`. The functions above are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.errors import UserError
from hf_model.modeling_custom_gpt import (
    CustomGPTForCausalLM,
    CustomGPTForSequenceClassification,
    CustomGPTForTokenClassification,
    CustomGPTModel,
)

if TYPE_CHECKING:
    from hf_model.batch import answer_file as answer_file
    from hf_model.conversion import convert as convert
    from hf_model.generation import Sampling as Sampling
    from hf_model.generation import encode as encode
    from hf_model.generation import generate as generate
    from hf_model.loading import load as load
    from hf_model.records import read_records as read_records
    from hf_model.tokenizer import format_prompt as format_prompt
    from hf_model.trainers import read_checkpoint as read_checkpoint

__version__ = "0.2.0"

AutoConfig.register(CustomGPTConfig.model_type, CustomGPTConfig, exist_ok=True)
CustomGPTConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, CustomGPTModel),
    (AutoModelForCausalLM, CustomGPTForCausalLM),
    (AutoModelForSequenceClassification, CustomGPTForSequenceClassification),
    (AutoModelForTokenClassification, CustomGPTForTokenClassification),
):
    auto_class.register(CustomGPTConfig, model_class, exist_ok=True)
    # So that `save_pretrained` puts the model's code beside its weights, for those who do not have this package.
    model_class.register_for_auto_class(auto_class.__name__)

HOMES = {  # where the functions stand that are imported when they are first used
    "Sampling": "generation",
    "answer_file": "batch",
    "convert": "conversion",
    "encode": "generation",
    "format_prompt": "tokenizer",
    "generate": "generation",
    "load": "loading",
    "read_checkpoint": "trainers",
    "read_records": "records",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


__all__ = [
    "CustomGPTConfig",
    "CustomGPTForCausalLM",
    "CustomGPTForSequenceClassification",
    "CustomGPTForTokenClassification",
    "CustomGPTModel",
    "Sampling",
    "UserError",
    "answer_file",
    "convert",
    "encode",
    "format_prompt",
    "generate",
    "load",
    "read_checkpoint",
    "read_records",
]
