"""What a model's card says beside its sizes and its code: the user's words, the checkpoint's, and the diagnosis."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedTokenizerBase

from hf_model.errors import one_line
from hf_model.learnt.inspection import Inspection
from hf_model.tokenizer import example_prompt
from hf_model.trainers import Checkpoint

MISSING = "[More Information Needed]"  # what the Hub's own template has where its author is to write
STAGES = ("finetune", "pretrain", "sft")  # a folder of this name says how, and the one above it what
# Folders that say nothing of the model in them.
PLACES = (
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
)
NAMELESS = "custom-gpt"
GPT2_OWNER = "openai-community"

SECTIONS = """\

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

The model sees the last {{ block_size }} tokens of a text and no more, and knows what stood in its training data.

{{ missing }}
"""


@dataclass(frozen=True)
class About:
    """What the user says of a model; the names are those of the Hub's metadata."""

    model_name: str | None = None
    license: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    tags: tuple[str, ...] = ()
    example_prompts: tuple[str, ...] = ()
    repo: str | None = None
    """The repository of the Hub that the folder goes to."""

    def examples(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Prompts to try, one at least."""
        return self.example_prompts or (example_prompt(tokenizer),)


@dataclass(frozen=True)
class CardFacts:
    """What the cards of all formats have in common."""

    title: str = NAMELESS
    place: str = NAMELESS
    """The folder as the card's code calls it."""
    about: About = field(default_factory=About)
    base_model: str | None = None
    learnt: tuple[str, ...] = ()
    data: str = MISSING
    evaluation: str = MISSING

    @property
    def hub_name(self) -> str:
        """What `from_pretrained` is to be given: the repository, if its owner is known."""
        return self.about.repo if self.about.repo and "/" in self.about.repo else self.place

    def metadata(self, library: str, example: Any = None, *tags: str) -> ModelCardData:
        """The card's header; `example` is an entry of the widget on the model's page."""
        about = self.about
        return ModelCardData(
            license=about.license,
            language=list(about.language) or None,
            library_name=library,
            pipeline_tag="text-generation",
            tags=["custom_gpt", *tags, *about.tags],
            base_model=about.base_model or self.base_model,
            datasets=list(about.datasets) or None,
            widget=example,
        )

    def render(self, data: ModelCardData, template: str, **fields: Any) -> str:
        """The Markdown text of a card: the template, and the sections that all cards have."""
        header = "---\n{{ card_data }}\n---\n"
        template = f"{header}{template}{SECTIONS}"
        card = ModelCard.from_template(data, template_str=template, facts=self, missing=MISSING, **fields)
        return f"{str(card).rstrip()}\n"


def card_facts(
    checkpoint: Checkpoint | None, inspection: Inspection | None, source: Path, folder: Path, about: About
) -> CardFacts:
    """Gather what there is to say of a model that was read from `source` and goes into `folder`.

    Args:
        checkpoint: the trainer's file, if it came from one.
        inspection: what was found in the model, if it was looked at.
    """
    trained, started_from, progress = None, None, {}
    if checkpoint is not None:
        trained, started_from, progress = checkpoint.dataset, checkpoint.started_from, checkpoint.progress
    data = [f"[{name}](https://huggingface.co/datasets/{name})" for name in about.datasets]
    if trained:
        name = one_line(trained).replace("`", "")
        data.append(f"The checkpoint names its data `{name}`.")
    numbers = {name: number if isinstance(number, int) else f"{number:.6g}" for name, number in progress.items()}
    reached = ", ".join(f"{name} {number}" for name, number in numbers.items())
    return CardFacts(
        title=one_line(about.model_name or (about.repo or "").rpartition("/")[2] or title_of(folder, source)),
        place=json.dumps(place_of(folder), ensure_ascii=False)[1:-1],
        about=about,
        base_model=f"{GPT2_OWNER}/{started_from}" if started_from else None,
        learnt=tuple(_learnt(inspection)) if inspection else (),
        data="\n\n".join([*data, MISSING]),
        evaluation="\n\n".join([*([f"What the checkpoint tells: {reached}."] if reached else []), MISSING]),
    )


def _learnt(inspection: Inspection) -> list[str]:
    """The diagnosis and what the training data told; the data's own name, but not its place."""
    if inspection.measurement is not None:
        name = Path(inspection.measurement.path).name
        inspection = replace(inspection, measurement=replace(inspection.measurement, path=name))
    lines = [str(finding) for finding in inspection.findings()]
    if inspection.diagnosis is not None and not inspection.diagnosis.is_harm:
        lines.insert(0, str(inspection.diagnosis))
    return [one_line(line) for line in lines]


def title_of(folder: Path, source: Path) -> str:
    """A name for the model: its folder's, or, if that says nothing, the name of where its checkpoint lies."""
    if not _says_nothing(folder.name):
        return folder.name
    stage = ""
    for place in source.absolute().parents:
        if place in (Path.home(), Path(place.anchor)):
            break
        if place.name in STAGES and not stage:
            stage = f"-{place.name}"
        elif not _says_nothing(place.name):
            return f"{place.name.removeprefix('out-')}{stage}"
    return f"{NAMELESS}{stage}"


def place_of(folder: Path) -> str:
    """The folder as a command calls it where the conversion ran, or beside the folder; never a path from the root."""
    folder = folder.absolute()
    if folder.is_relative_to(Path.cwd()) and folder != Path.cwd():
        return folder.relative_to(Path.cwd()).as_posix()
    return f"{folder.parent.name}/{folder.name}".lstrip("/") if _says_nothing(folder.name) else folder.name


def _says_nothing(name: str) -> bool:
    return all(part in PLACES for part in name.split("-"))
