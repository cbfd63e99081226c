"""The README that a converted model carries: in the folder of transformers, and in another engine's format."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_model.configuration_custom_gpt import CustomGPTConfig
from hf_model.formats.card_facts import CardFacts
from hf_model.formats.target import Options
from hf_model.loading import Loaded, describe_architecture
from hf_model.tokenizer import format_example, format_prompt, is_of_characters, prompt_text, takes_instructions

FOLDER_CARD = """\
# {{ facts.title }}

A GPT-2 style language model ({{ n_layer }} layers, {{ n_head }} heads, {{ n_embd }} wide, context {{ block_size }},
vocabulary {{ vocab_size }}), trained in plain PyTorch and converted for Hugging Face transformers {{ how }}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# The folder's path, or its name on the Hub. The model's code is in it (modeling_custom_gpt.py): read it, then trust it.
model = AutoModelForCausalLM.from_pretrained("{{ facts.hub_name }}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{{ facts.hub_name }}", trust_remote_code=True)

{{ code }}
```

{{ prompt }}`generate` samples with temperature 0.8 and top_k 50 unless told otherwise (`generation_config.json`), and
goes on past the context of {{ block_size }} with the last {{ block_size }} tokens.
"""

INSTRUCTION_CODE = """\
messages = [{{"role": "user", "content": {prompt}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1]:], skip_special_tokens=True))"""

INSTRUCTION_PROMPT = f"""\
The prompt that it was fine-tuned on, with and without an input; the tokenizer's chat template makes it
(`"input"` is an optional field of a user message), and `tokenizer(text)` puts `[BOS]` in front:

```
[BOS]{format_prompt("{instruction}")}
[BOS]{format_prompt("{instruction}", "{input}")}
```

In training an answer and `[EOS]` follow:
`{format_example("What is the capital of France?", "Paris")}`.

"""

RAW_CODE = """\
inputs = tokenizer({prompt!r}, return_tensors="pt")
output = model.generate(**inputs)
print(tokenizer.decode(output[0]))"""

CHARACTERS = """\
The vocabulary is {vocab_size} characters. A text with any other is an error in `tokenizer(text)` ("Unk token …").
There are no special tokens: a text ends at `max_new_tokens` only, and there is none to pad with. For a batch of prompts
of unlike length, let a character fill them up under the attention mask, whichever it is:
`tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)`. In training use rows of one length instead: a padding token
is left out of the loss, and this one is a character of the text.
"""

ENGINE_CARD = """\
# {{ facts.title }}

A GPT-2 style language model ({{ architecture }}), trained in plain PyTorch and converted to {{ what }}{{ rounded }}.

## Use

{{ use }}

## What to know

{% for note in notes -%}
- {{ note }}
{% endfor %}"""


def model_card(config: CustomGPTConfig, facts: CardFacts, tokenizer: PreTrainedTokenizerBase, rounded: str = "") -> str:
    """The Markdown text of the card of a model.

    Args:
        facts: what there is to say beside its sizes.
        rounded: what became of the weights, if they were rounded.
    """
    sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    takes, examples = takes_instructions(tokenizer), facts.about.examples(tokenizer)
    if takes:
        code, prompt = INSTRUCTION_CODE.format(prompt=json.dumps(examples[0], ensure_ascii=False)), INSTRUCTION_PROMPT
    else:
        code, prompt = RAW_CODE.format(prompt=examples[0]), _raw_prompt(tokenizer)
    how = f"with its weights {rounded}" if rounded else "without changing a weight"
    data = facts.metadata("transformers", widget(examples, takes))
    return facts.render(data, FOLDER_CARD, how=how, code=code, prompt=prompt, **sizes)


def widget(examples: Sequence[str], takes_instructions: bool) -> list[dict[str, Any]]:
    """Example prompts for the model's page on the Hub."""
    if takes_instructions:
        return [{"messages": [{"role": "user", "content": text}]} for text in examples]
    return [{"text": text} for text in examples]


def _raw_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """What there is to know of prompts of raw text."""
    text = "Its prompts are raw text, which it goes on with: there is no format around them, and no chat template.\n"
    if is_of_characters(tokenizer):
        text += CHARACTERS.format(vocab_size=len(tokenizer))
    if tokenizer.bos_token:
        text += f"`tokenizer(text)` puts `{tokenizer.bos_token}` in front.\n"
    if tokenizer.eos_token:
        text += f"A text ends at `{tokenizer.eos_token}`.\n"
    return f"{text}\n"


def write_card(
    folder: Path, loaded: Loaded, options: Options, what: str, use: str, *notes: str, library: str = "transformers"
) -> None:
    """Write the card of a model: `use` is how it is run, `notes` what its engine does otherwise than transformers."""
    config, facts = loaded.model.config, options.card
    # Only transformers finds a repository of the Hub by its name.
    name = facts.hub_name if library == "transformers" else facts.place
    fields = {"name": name, "block_size": config.block_size, "prompt": repr(_example(loaded, options))}
    card = facts.render(
        facts.metadata(library),
        ENGINE_CARD,
        block_size=config.block_size,
        architecture=describe_architecture(config),
        what=what,
        rounded=f", its weights {options.rounded}" if options.rounded else "",
        use=use.format(**fields),
        notes=[note.format(**fields) for note in notes if note],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _example(loaded: Loaded, options: Options) -> str:
    """The text of a prompt that this model understands; "" where no tokenizer tells."""
    if loaded.found is None:
        return ""
    return prompt_text(loaded.tokenizer, options.card.about.examples(loaded.tokenizer)[0])
