"""`example.py`, a program that travels with a model and asks it a prompt by the format's engine."""

from pathlib import Path

from jinja2 import Template

from hf_model.formats.cards import python_literal
from hf_model.formats.target import Options
from hf_model.loading import Loaded
from hf_model.tokenizer import end_ids, takes_instructions

FILE = "example.py"
TRY_EXAMPLE = "python {script} {prompt}"
USE_EXAMPLE = """\
In this folder:

```console
$ python example.py "A prompt"
```

This is `example.py`:

```python
{{ script }}
```"""
ENCODE = """\
prompt = sys.argv[1] if len(sys.argv) > 1 else {{ prompt }}
{% if takes_instructions -%}
messages = [{"role": "user", "content": prompt}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids
{%- else -%}
ids = tokenizer(prompt).input_ids
{%- endif %}"""


def write_example(template: str, loaded: Loaded, folder: Path, options: Options) -> str:
    """Write the program and return its text.

    Args:
        template: a Jinja template with the fields `encode`, the lines that make `ids` of the prompt, `block_size`, and
            `ends`, the ids that end an answer if there are several.
    """
    prompt = python_literal(options.card.about.examples(loaded.tokenizer)[0])
    encode = Template(ENCODE).render(prompt=prompt, takes_instructions=takes_instructions(loaded.tokenizer))
    ends = end_ids(loaded.tokenizer)
    text = Template(template).render(
        encode=encode, block_size=loaded.model.config.block_size, ends=ends if len(ends) > 1 else []
    )
    (folder / FILE).write_text(f"{text}\n", encoding="utf-8")
    return text
