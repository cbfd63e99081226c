"""nanoGPT-family checkpoints as Hugging Face models. Importing this package registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.modeling_custom_gpt import (
    CustomGPTForCausalLM,
    CustomGPTForSequenceClassification,
    CustomGPTForTokenClassification,
    CustomGPTModel,
)

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

__all__ = [
    "CustomGPTConfig",
    "CustomGPTForCausalLM",
    "CustomGPTForSequenceClassification",
    "CustomGPTForTokenClassification",
    "CustomGPTModel",
]
