"""A GPT trained in plain PyTorch (nanoGPT and its relatives) as a Hugging Face model.

    from hf_model import Sampling, convert, encode, format_prompt, generate, load

    convert("ckpt.pt", "tokenizer.json", "capitals-hf")  # once; raises UserError with what to do
    model, tokenizer = load("capitals-hf")  # or load("ckpt.pt", "tokenizer.json"): nothing is written
    prompt = encode(tokenizer, format_prompt("What is the capital of France?"))  # token ids, (1, T)
    print(generate(model, tokenizer, prompt, Sampling(temperature=0), response_only=True).texts[0])

The functions; `help(hf_model.convert)` explains one with its arguments and errors:

    convert          convert a checkpoint, a folder or your own model to the folder of a format
    inspect          find out what a model has learnt; nothing is written
    load             the model and the tokenizer of a checkpoint, a folder or your own model; nothing is written
    encode           the token ids of a text
    encode_prompt    the token ids of a prompt in the model's prompt format
    format_prompt    an instruction in the format of fine-tuning, as text
    generate         continue a prompt of token ids
    read_records     read a file of prompts
    answer_file      answer these prompts in batches, write a file, and continue a run that was stopped
    read_checkpoint  the weights and sizes in a trainer's file; no model is built

`Sampling` holds the options of generation. `UserError` is the error for what a user can correct.

Importing this package registers the model with transformers' Auto classes, so that a converted folder loads without
`trust_remote_code`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_model.batch import answer_file
from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.conversion import convert
from hf_model.errors import UserError
from hf_model.generation import Sampling, encode, encode_prompt, generate
from hf_model.learnt.inspection import inspect
from hf_model.loading import load
from hf_model.modeling_custom_gpt import (
    CustomGPTForCausalLM,
    CustomGPTForSequenceClassification,
    CustomGPTForTokenClassification,
    CustomGPTModel,
)
from hf_model.records import read_records
from hf_model.tokenizer import format_prompt
from hf_model.trainers import read_checkpoint

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
    # `save_pretrained` then copies the model's code into the folder, for those who do not have this package.
    model_class.register_for_auto_class(auto_class.__name__)

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
    "encode_prompt",
    "format_prompt",
    "generate",
    "inspect",
    "load",
    "read_checkpoint",
    "read_records",
]


def __dir__() -> list[str]:
    return __all__
