"""The README that a converted folder carries."""

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.vocabulary import format_example, format_prompt

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A GPT-2 style language model ({n_layer} layers, {n_head} heads, {n_embd} wide, context {block_size}, vocabulary
{vocab_size}), trained in plain PyTorch and converted for Hugging Face transformers {how}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# The model's code is in this folder (modeling_custom_gpt.py): read it, then trust it.
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)

messages = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1]:], skip_special_tokens=True))
```

The prompt that it was fine-tuned on, with and without an input; the tokenizer's chat template makes it
(`"input"` is an optional field of a user message), and `tokenizer(text)` puts `[BOS]` in front:

```
[BOS]{prompt}
[BOS]{prompt_with_input}
```

In training an answer and `[EOS]` follow: `{example}`. `generate` samples with temperature 0.8 and top_k 50 unless told
otherwise (`generation_config.json`), and goes on past the context of {block_size} tokens with the last {block_size}.
"""


def model_card(config: CustomGPTConfig, name: str, rounded: str = "") -> str:
    """The Markdown text of the card of a model in a folder called `name`; `rounded` says what became of its weights."""
    return CARD.format(
        name=name,
        how=f"with its weights {rounded}" if rounded else "without changing a weight",
        prompt=format_prompt("{instruction}"),
        prompt_with_input=format_prompt("{instruction}", "{input}"),
        example=format_example("What is the capital of France?", "Paris"),
        **{key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")},
    )
