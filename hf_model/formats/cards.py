"""The README beside a model in another engine's format."""

from pathlib import Path

from hf_model.description import describe_architecture
from hf_model.formats.target import Options
from hf_model.source import Loaded
from hf_model.vocabulary import prompt_text

CARD = """\
# {{ facts.title }}

A GPT-2 style language model ({{ architecture }}), trained in plain PyTorch and converted to {{ what }}{{ rounded }}.

## Use

{{ use }}

## What to know

{% for note in notes -%}
- {{ note }}
{% endfor %}"""


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
        CARD,
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
    if loaded.tokenizer is None:
        return ""
    return prompt_text(loaded.tokenizer, options.card.about.examples(loaded.tokenizer)[0])
