"""The model card (README.md) that every converted model carries: what the model is, how to run it, what is known."""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCardData
from jinja2 import Template
from transformers import PreTrainedTokenizerBase

from hf_model.descriptions import describe_architecture
from hf_model.errors import one_line
from hf_model.learnt.inspection import Inspection
from hf_model.loading import Loaded, Source
from hf_model.tokenizer import (
    OURS,
    chat_template,
    end_of_answer,
    example_prompt,
    example_texts,
    is_of_characters,
    prompt_format,
    render,
    takes_instructions,
    user_message,
)

MISSING = "[More Information Needed]"  # the Hub's own mark for what the author has still to write
STAGES = ("finetune", "pretrain", "sft")  # folder names that tell a stage of training; the folder above names the model
# Folder names that do not tell which model is inside.
PLACES = {
    "out",
    "log",
    "logs",
    "checkpoints",
    "hf",
    "transformers",
    "gpt2",
    "gguf",
    "ctranslate2",
    "onnx",
    "checkpoint",
}
NAMELESS = "custom-gpt"
GPT2_OWNER = "openai-community"

CARD = """\
---
{{ metadata }}
---

# {{ title }}

A GPT-2 style language model ({{ architecture }}), trained in plain PyTorch and converted {{ what }}
{{ weights }}.

## Use

{{ use }}

## Prompts

{{ prompts }}

## What to know

{% for note in notes -%}
- {{ note }}
{% endfor %}
## What it has learnt

{% for line in facts.learnt -%}
- {{ line }}
{% else -%}
{{ missing }}
{% endfor %}
## Training data

{{ facts.data }}

## Evaluation

{{ facts.evaluation }}

## Limits

The model sees only the last {{ block_size }} tokens of a text, and knows only what its training data taught it.

{{ missing }}
"""

COMPARED = "The conversion compares its result with the {name}, not with the model inside its trainer."
COMPARED_WITH_IT = "The converted files were then compared with this model."
NOT_COMPARED = "The converted files were not compared with their source."

# How transformers answers the card's example prompt: part of the `use` of two formats.
GENERATE = """\
{% if takes_instructions -%}
messages = [{"role": "user", "content": {{ prompt }}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1]:], skip_special_tokens=True))
{%- else -%}
inputs = tokenizer({{ prompt }}, return_tensors="pt")
output = model.generate(**inputs)
print(tokenizer.decode(output[0]))
{%- endif %}"""

INSTRUCTIONS = """\
The model was fine-tuned on this prompt{with_input}{begin}:

{prompts}

In training, the answer{end} follow{s}:
{example}{dot}"""
WITH_INPUT = """\
, with and without an input. The tokenizer's chat template writes it (a user
message may have a field `"input"`)"""
WITHOUT_INPUT = ". The tokenizer's chat template writes it"
TURNS = "The chat template has several turns: what was said before stays in the prompt."
ONE_TURN = "One question at a time: earlier turns{and_system} are left out."

RAW = "A prompt is raw text, which the model continues. There is no prompt format and no chat template."
CHARACTERS = """\
The vocabulary is {n_characters} characters. `tokenizer(text)` raises an error for any other character
("Unk token …"). There are no special tokens: a text ends at `max_new_tokens` only, and no token is for padding. For a
batch of prompts of different lengths, any character can pad under the attention mask:
`tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)`. For training, use rows of one length: the loss leaves
padding tokens out, and this one is a character of the text."""


@dataclass(frozen=True)
class About:
    """What the user tells about a model. The names are those of the Hub's metadata."""

    model_name: str | None = None
    license: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    tags: tuple[str, ...] = ()
    example_prompts: tuple[str, ...] = ()
    repo: str | None = None
    """The repository of the Hub that the folder is uploaded to."""

    def examples(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Prompts to try, at least one."""
        return self.example_prompts or (example_prompt(tokenizer),)


@dataclass(frozen=True)
class CardFacts:
    """What the cards of all formats have in common. `data`, `evaluation` and `learnt` are Markdown."""

    title: str = NAMELESS
    place: str = f"./{NAMELESS}"
    """The folder's path as the card's code writes it. It is never a name on the Hub."""
    about: About = field(default_factory=About)
    base_model: str | None = None
    learnt: tuple[str, ...] = ()
    data: str = MISSING
    evaluation: str = MISSING
    compared: str = COMPARED_WITH_IT
    """The sentence of `evaluation` that says what the files were compared with."""
    rounded: str = ""
    """How the weights were rounded, as `describe_rounding` tells; "" if they were not."""

    @property
    def name(self) -> str:
        """What `from_pretrained` is given: the repository where its owner is known, otherwise the path."""
        return self.about.repo if self.about.repo and "/" in self.about.repo else self.place


def card_facts(loaded: Loaded, inspection: Inspection | None, source: Source, folder: Path, about: About) -> CardFacts:
    """Gather what is known of a model that was read from `source` and goes into `folder`.

    Args:
        loaded: the model as it was read.
        inspection: what was found in the model; None if it was not inspected.
    """
    checkpoint = loaded.checkpoint
    data = [f"[{markdown(name)}](https://huggingface.co/datasets/{quote(name, safe='/')})" for name in about.datasets]
    started_from, progress = None, ""
    if checkpoint is not None:
        started_from = checkpoint.started_from
        numbers = {name: n if isinstance(n, int) else f"{n:.6g}" for name, n in checkpoint.progress.items()}
        progress = ", ".join(f"{name} {number}" for name, number in numbers.items())
        if checkpoint.dataset:
            data.append(f"The checkpoint names its data {code(checkpoint.dataset)}.")
    evaluation = [f"The checkpoint tells: {markdown(progress)}."] if progress else []
    compared = COMPARED.format(name="source folder" if source.is_folder else "checkpoint file")
    compared = COMPARED_WITH_IT if loaded.evidence else compared
    return CardFacts(
        title=about.model_name or (about.repo or "").rpartition("/")[2] or title_of(folder, source.path),
        place=place_of(folder),
        about=about,
        base_model=f"{GPT2_OWNER}/{started_from}" if started_from else None,
        learnt=tuple(map(markdown, _learnt(inspection))) if inspection else (),
        data="\n\n".join([*data, MISSING]),
        evaluation="\n\n".join([*evaluation, _evidence(loaded, inspection, compared), MISSING]),
        compared=compared,
    )


def _learnt(inspection: Inspection) -> list[str]:
    """Warnings, diagnosis and measurement, without the place of the training data on the user's disk."""
    if inspection.measurement is not None:
        name = Path(inspection.measurement.path).name
        inspection = replace(inspection, measurement=replace(inspection.measurement, path=name))
    lines = [str(finding) for finding in inspection.findings()]
    if inspection.diagnosis is not None and not inspection.diagnosis.is_harm:
        lines.insert(0, str(inspection.diagnosis))
    return [*(text for item, text in inspection.choices if item == "warning"), *lines]


def _evidence(loaded: Loaded, inspection: Inspection | None, compared: str) -> str:
    """How far the conversion was checked; the strongest check that there is."""
    only = compared
    if loaded.evidence:
        only = f"The model's logits, compared with those of its own trainer's code: {loaded.evidence}. {compared}"
    if inspection is None or inspection.measurement is None:
        return only
    name = code(Path(inspection.measurement.path).name)
    return f"{only} The loss on {name}, measured with the converted weights, is {inspection.measurement.loss:.3f}."


def state_not_compared(folder: Path, facts: CardFacts) -> None:
    """Say in a card that the files were not compared, where it says that they were."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(facts.compared, NOT_COMPARED), encoding="utf-8")


def title_of(folder: Path, source: Path) -> str:
    """A name for the model: that of its folder, or of the first folder above its source that tells something."""
    if not _is_place(folder.name):
        return folder.name
    stage = ""
    for parent in source.absolute().parents:
        if parent in (Path.home(), Path(parent.anchor)):
            break
        if parent.name in STAGES and not stage:
            stage = f"-{parent.name}"
        elif not _is_place(parent.name):
            return f"{parent.name.removeprefix('out-')}{stage}"
    return f"{NAMELESS}{stage}"


def place_of(folder: Path) -> str:
    """The folder's path from the current directory, or from the folder beside it; it begins with "./".

    A path from the root would tell a reader of the card about the user's disk. A path without "./" could be read as the
    name of somebody else's repository on the Hub.
    """
    folder = folder.absolute()
    if folder.is_relative_to(Path.cwd()) and folder != Path.cwd():
        return f"./{folder.relative_to(Path.cwd()).as_posix()}"
    return f"./{folder.parent.name}/{folder.name}" if _is_place(folder.name) else f"./{folder.name}"


def _is_place(name: str) -> bool:
    return all(part in PLACES for part in name.split("-"))


def write_card(
    folder: Path,
    loaded: Loaded,
    facts: CardFacts,
    *,
    what: str,
    library: str,
    use: str,
    notes: Sequence[str] = (),
    quantized: str = "",
    **fields: Any,
) -> None:
    """Write a model's card.

    Args:
        what: the format, as in "converted {what} without changing a weight".
        library: the Hub's name of the library that reads the format.
        use: how the model is run, as a Jinja template. Its fields are `name`, `prompt` (both Python literals),
            `takes_instructions` and those of `fields`.
        notes: what a user must know, as Markdown.
        quantized: how the format rounds the weights further, such as "rounded to q8_0".
    """
    config = loaded.model.config
    tokenizer = None if loaded.found is None else loaded.tokenizer
    examples = () if tokenizer is None else facts.about.examples(tokenizer)
    is_instructed = tokenizer is not None and takes_instructions(tokenizer)
    fields |= {
        "name": python_literal(facts.name),
        "prompt": python_literal(examples[0] if examples else ""),
        "takes_instructions": is_instructed,
    }
    metadata = ModelCardData(
        license=facts.about.license,
        language=list(facts.about.language) or None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["custom_gpt", *facts.about.tags],
        base_model=facts.about.base_model or facts.base_model,
        datasets=list(facts.about.datasets) or None,
        widget=_widget(examples, is_instructed) if library == "transformers" else None,
    )
    changes = [change for change in (facts.rounded, quantized) if change]
    text = Template(CARD).render(
        metadata=metadata.to_yaml(),
        facts=facts,
        title=markdown(facts.title),
        architecture=describe_architecture(config),
        block_size=config.block_size,
        what=what,
        weights=f"with its weights {' and '.join(changes)}" if changes else "without changing a weight",
        use=Template(use).render(fields),
        prompts=MISSING if tokenizer is None else _prompts(tokenizer),
        notes=notes,
        missing=MISSING,
    )
    (folder / "README.md").write_text(f"{text.rstrip()}\n", encoding="utf-8")


def _widget(examples: Sequence[str], is_instructed: bool) -> list[dict[str, Any]]:
    """Example prompts for the model's page on the Hub."""
    if is_instructed:
        return [{"messages": [{"role": "user", "content": text}]} for text in examples]
    return [{"text": text} for text in examples]


def _prompts(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a prompt of this model looks like."""
    if takes_instructions(tokenizer):
        return _instructions(tokenizer)
    lines = [RAW]
    if is_of_characters(tokenizer):
        lines.append(CHARACTERS.format(n_characters=len(tokenizer)))
    if tokenizer.bos_token:
        lines.append(f"`tokenizer(text)` puts {code(tokenizer.bos_token)} in front.")
    if tokenizer.eos_token:
        lines.append(f"A text ends at {code(tokenizer.eos_token)}.")
    return "\n".join(lines)


def _instructions(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template makes of a prompt, and of an example of the training."""
    form = prompt_format(tokenizer)
    inputs = ("", "{input}") if form.takes_input else ("",)
    prompts = [render(tokenizer, [user_message("{instruction}", text)]) for text in inputs]
    example = "".join(example_texts(tokenizer, "Paris", "What is the capital of France?"))
    end = end_of_answer(tokenizer)
    is_line = "\n" not in example
    puts_begin = tokenizer.bos_token and prompts[0].startswith(tokenizer.bos_token)
    text = INSTRUCTIONS.format(
        with_input=WITH_INPUT if form.takes_input else WITHOUT_INPUT,
        begin=f", and `tokenizer(text)` puts {code(tokenizer.bos_token)} in front" if puts_begin else "",
        prompts=fenced("\n".join(prompts)) if is_line else "\n\n".join(map(fenced, prompts)),
        end=f" and {code(end)}" if end else "",
        s="" if end else "s",
        example=code(example) if is_line else f"\n{fenced(example)}",
        dot="." if is_line else "",
    )
    and_system = " and a system message" if chat_template(tokenizer) in OURS else ""  # another template may keep it
    return f"{text}\n\n{TURNS if form.has_turns else ONE_TURN.format(and_system=and_system)}"


# Texts from files and users are quoted before they go into a card: none can add a heading, HTML or a line of code.


def markdown(text: str) -> str:
    r"""A text that Markdown shows as it is.

    >>> markdown("# <b>my_model</b>")
    '\\# &lt;b&gt;my_model&lt;/b&gt;'
    """
    escaped = re.sub(r"([\\`*\[\]#|~]|(?<!\w)_|_(?!\w))", r"\\\1", one_line(text))
    return html.escape(escaped, quote=False)


def code(text: str) -> str:
    """A text as inline code of Markdown, whatever backticks it holds.

    >>> code("<|end|>"), code("a`b")
    ('`<|end|>`', '``a`b``')
    """
    text = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def fenced(text: str) -> str:
    """A text as a block of code of Markdown, whatever backticks it holds. Control characters become escapes."""
    text = "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def python_literal(text: str) -> str:
    """A text as Python code, in printable characters on one line."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)
