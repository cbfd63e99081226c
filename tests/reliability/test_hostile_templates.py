"""A chat template from a stranger is tried out in a process of its own before this one renders it."""

import json
import shutil
from pathlib import Path

import pytest

from hf_model.errors import UserError
from hf_model.loading import load
from hf_model.tokenizer import prompt_text
from tests.reliability.files import bounded

SAYS = "{{ messages[-1].content }}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
HOSTILE = {
    "an endless loop": (SAYS + LOOP, "rendering a question takes longer than a few seconds"),
    "a loop for long questions": (
        SAYS + "{% if messages[0].content|length > 9999 %}" + LOOP + "{% endif %}",
        "takes longer than a few seconds",
    ),
    "a text that doubles": (SAYS + DOUBLES, "takes too much memory"),
    "a long string": (SAYS + "{{ ('a' * 10**11)|length }}", "takes too much memory"),
    "a loop for a short word": (
        SAYS + "{% if ' ' not in messages[0].content and messages[0].content|length < 99 %}" + LOOP + "{% endif %}",
        "rendering a question in random words takes longer than a few seconds",
    ),
    "a huge output": (SAYS + "{{ 'a' * 3000000 }}", r"makes 3,000,030 bytes out of a question"),
    "attributes of Python": (SAYS + "{{ ''.__class__.__mro__ }}", "reaches for what no template needs"),
    "attributes, for some only": (
        SAYS + "{% if messages|length > 1 %}{{ cycler.__init__.__globals__ }}{% endif %}",
        "reaches for what no template needs",
    ),
    "a file of the disk": ("{% include '/etc/passwd' %}", "cannot be rendered: no loader"),
    "endless recursion": (SAYS + "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
    "no Jinja": ("{% for %}", "cannot be rendered: Expected an expression"),
    "no question": ("Hello!", "leaves out the user's question"),
    "a refusal of everything": ("{{ raise_exception('not today') }}", "cannot be rendered: not today"),
}
HONEST = {
    "a refusal of system messages": "{% if messages[0].role == 'system' %}{{ raise_exception('x') }}{% endif %}" + SAYS,
    "a demand for alternation": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    ),
    "a long preamble": "{{ 'You are helpful. ' * 5000 }}" + SAYS,
    "today's date": "{{ strftime_now('%d %b %Y') }} " + SAYS,
    "tools": "{% if tools %}{{ tools|tojson }}{% endif %}" + SAYS,
    "loop controls": "{% for m in messages %}{% break %}{% endfor %}" + SAYS,
    "a generation block": SAYS + "{% for m in messages %}{% generation %}{% endgeneration %}{% endfor %}",
}


@pytest.fixture
def folder(capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to spoil, and a cache in which no template has passed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(capitals, tmp_path / "folder")


@pytest.mark.parametrize("template, said", HOSTILE.values(), ids=HOSTILE)
def test_is_refused_in_one_line_that_names_the_folder(template: str, said: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with bounded(seconds=60), pytest.raises(UserError, match=rf"^{folder}: its chat template .*{said}.*; --raw"):
        load(folder)


def test_is_left_out_when_another_is_chosen(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(HOSTILE["a refusal of everything"][0], encoding="utf-8")
    assert prompt_text(load(folder, raw=True)[1], "Who?") == "Who?"
    assert prompt_text(load(folder, chat_template="alpaca")[1], "Who?").startswith("Below is an instruction")


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("template", HONEST.values(), ids=HONEST)
def test_an_honest_one_is_used(template: str, place: str, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    if place.endswith(".json"):
        config = json.loads((folder / place).read_text(encoding="utf-8"))
        template = json.dumps(config | {"chat_template": template})
    (folder / place).write_text(template, encoding="utf-8")
    assert prompt_text(load(folder)[1], "Who?").endswith("Who?")


def test_is_not_tried_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "chat_template.jinja").write_text(SAYS, encoding="utf-8")
    load(folder)
    monkeypatch.setattr("subprocess.run", None)
    load(folder)


def test_ours_is_not_tried_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    monkeypatch.setattr("subprocess.run", None)
    for name in (None, "alpaca"):
        load(folder, chat_template=name)


@pytest.mark.parametrize("template, said", [HOSTILE["attributes of Python"], HOSTILE["no Jinja"]])
def test_a_file_that_the_user_names_is_tried_too(template: str, said: str, folder: Path) -> None:
    (folder / "my.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(UserError, match=rf"my\.jinja: its chat template .*{said}"):
        load(folder, chat_template=folder / "my.jinja")
