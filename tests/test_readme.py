"""The README is short, its listings are what the programs print, and no page has a dead link."""

import re
import sys
from pathlib import Path

import pytest

import convert_checkpoint
import generate
from tests.tiny import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SIZE = re.compile(r" +([\d.]+) (B|kB|MB|GB)$", re.MULTILINE)
FOLDERS = (".", "docs", "benchmarks", "conformance", "examples/*")
PAGES = [page for folder in FOLDERS for page in sorted(ROOT.glob(f"{folder}/*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")
UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def listing(*words: str) -> str:
    """What the README shows under the command that has these words."""
    for block in re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        command, shown = re.fullmatch(r"((?:\$ [^\n]*\n|(?<=\\\n)[^\n]*\n)*)(.*)", block, re.DOTALL).groups()  # type: ignore
        if all(word in command for word in words):
            return shown
    raise AssertionError(f"the README has no command with {words}")


def printed(script: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])  # type: ignore[attr-defined]
    assert script.main() == 0  # type: ignore[attr-defined]
    return capsys.readouterr().out


def test_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    files = ("--checkpoint_path", "examples/capitals/ckpt.pt", "--tokenizer_path", "examples/capitals/tokenizer.json")
    out = printed(convert_checkpoint, monkeypatch, capsys, *files, "--output_dir", "capitals-hf")
    shown = listing("--output_dir capitals-hf", "source .venv")
    assert SIZE.sub("", out).replace("custom-gpt-generate", "python generate.py") == SIZE.sub("", shown)
    for (number, unit), (told, told_unit) in zip(SIZE.findall(out), SIZE.findall(shown), strict=True):
        size, size_shown = float(number) * UNITS[unit], float(told) * UNITS[told_unit]
        assert size_shown == pytest.approx(size, rel=0.25), f"the README says {told} {told_unit} of {number} {unit}"


def test_the_first_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    files = ("--checkpoint_path", "examples/capitals/ckpt.pt", "--tokenizer_path", "examples/capitals/tokenizer.json")
    question = ("--prompt", "What is the capital of France?", "--device", "cpu")
    out = printed(generate, monkeypatch, capsys, *files, *question)
    shown = listing("--prompt", "pip install", "What is the capital of France?")
    time = re.compile(r"in [\d.]+ s, [\d.]+ tokens/s")
    assert time.search(shown)
    assert time.sub("", out) == time.sub("", shown)


def test_the_readme_is_read_in_a_minute() -> None:
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path.replace("\\", "")).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}, which is not there"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {path}#{anchor}, a heading that is not there"
