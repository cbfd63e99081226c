"""The page: what it shows of each kind of model, that nothing gets out of it, and that a browser opens it."""

import copy
import errno
import html.parser
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

import convert_checkpoint
import hf_model
from examples.plain_gpt import GPT, GPTConfig
from hf_model.errors import UserError
from hf_model.learnt.content import Head, Words, gather
from hf_model.learnt.inspection import Inspection, examine
from hf_model.learnt.page import render, write_page
from hf_model.loading import Loaded, Source
from hf_model.tokenizer import FoundTokenizer, convert_tokenizer
from tests.learnt.test_diagnosis import SMALL, characters, copier
from tests.tiny import CHECKPOINT, ROOT, TOKENIZER, gpt, load_plain, twin

QUESTIONS = ROOT / "examples" / "evaluation" / "questions.jsonl"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def examined(model, tokenizer, name: str = "ckpt.pt", training_data: Path | None = None) -> Inspection:
    vocabulary = FoundTokenizer(tokenizer, "tokenizer.json", lambda text: tokenizer(text).input_ids)
    return examine(Source(Path(name)), Loaded(model, vocabulary, model.dtype), training_data)


def page_of(model, tokenizer, path: Path, name: str = "ckpt.pt", training_data: Path | None = None) -> str:
    inspection = examined(model, tokenizer, name, training_data)
    write_page(inspection, model, tokenizer, path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(params=["sane", "stutterer", "untrained", "raw", "no numbers"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, Path]:
    """A kind of model, its page and where that is."""
    path = tmp_path / "report.html"
    tokenizer = convert_tokenizer(TOKENIZER, model_max_length=64)
    questions, data = tmp_path / "questions.jsonl", None
    questions.write_text("".join(QUESTIONS.open(encoding="utf-8").readlines()[:20]), encoding="utf-8")
    if request.param == "sane":
        model, tokenizer = load_plain(CHECKPOINT, TOKENIZER)
        data = questions
    elif request.param == "raw":
        tokenizer = characters("to be or not to be\n")
        model = twin(gpt(**SMALL | {"vocab_size": len(tokenizer)}))
    elif request.param == "stutterer":
        model, data = twin(copier(SMALL)), questions
    else:
        model = twin(GPT(GPTConfig(**SMALL)))
        if request.param == "no numbers":
            model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    return request.param, page_of(model, tokenizer, path, training_data=data), path


class Outline(html.parser.HTMLParser):
    """Every tag of a page with its attributes, and the tags that are open at its end."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_kind_of_model_has_a_page_that_says_what_it_is(kind: tuple[str, str, Path]) -> None:
    name, page, _ = kind
    verdict = re.search("<strong>(.*?)</strong>", page)[1]
    assert {
        "sane": "Healthy",
        "stutterer": "It stutters",
        "untrained": "It is untrained",
        "no numbers": "It cannot work: NaN or infinite weights",
    }.get(name, verdict) == verdict
    assert ("mlp.c_fc of layer 0: NaN or infinite values" in page) == (name == "no numbers")
    assert ("Compared with its training data" in page) == (name in ("sane", "stutterer"))
    assert ('class="t copy" tabindex' in page) or name != "stutterer"


def test_the_page_is_whole_and_loads_nothing(kind: tuple[str, str, Path]) -> None:
    _, page, _ = kind
    outline = Outline(page)
    assert outline.open == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in outline.tags}
    assert not any(name == "src" or name.startswith("on") for _, found in outline.tags for name in found)
    places = {f"#{found['id']}" for _, found in outline.tags if "id" in found}
    links = [(tag, found["href"]) for tag, found in outline.tags if "href" in found]
    assert links
    assert all(tag == "a" and (link in places or link.startswith("https://")) for tag, link in links)
    assert "url(" not in page and "@import" not in page
    assert len(page) < 2_000_000


def test_what_files_and_models_hold_stays_text(tmp_path: Path) -> None:
    evil = ["<script>alert(1)</script>", "</style><img src=x onerror=alert(1)>", "'\"><b>", "\u202e\x00\x1b[31m"]
    tokenizer = characters("to be or not to be\n")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in evil])
    sizes = SMALL | {"vocab_size": len(tokenizer)}
    model = copier(sizes)
    model.lm_head.weight.data[-4:] *= 3  # so that they are what it answers
    data = tmp_path / "data.txt"
    data.write_text("to be <script>alert(2)</script> " * 20, encoding="utf-8")
    page = page_of(twin(model), tokenizer, tmp_path / "report.html", name="<script>ckpt\udcff.pt", training_data=data)
    assert "&lt;script&gt;ckpt" in page
    assert "alert(1)" in page
    outline = Outline(page)
    assert not {"script", "img", "b onerror"} & {tag for tag, _ in outline.tags}
    assert not any(name.startswith("on") for _, found in outline.tags for name in found)
    assert not set("\u202e\x00\x1b") & set(page)


def test_the_answer_is_what_greedy_decoding_gives(tmp_path: Path) -> None:
    model, tokenizer = load_plain(CHECKPOINT, TOKENIZER)
    content = gather(examined(model, tokenizer), model, tokenizer)
    for answer in content.answers:
        ids = tokenizer(answer.prompt, add_special_tokens=False, return_tensors="pt").input_ids
        if answer.prompt.startswith("[BOS]"):
            greedy = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
            assert "".join(token.text for token in answer.tokens) == tokenizer.decode(greedy)
    with torch.no_grad():
        first = model(ids).logits[0, -1].softmax(dim=-1).max()
    assert content.answers[-1].tokens[0].probability == pytest.approx(float(first), abs=1e-4)


def test_the_attention_is_the_model_s(tmp_path: Path) -> None:
    model, tokenizer = load_plain(CHECKPOINT, TOKENIZER)
    before = model.config._attn_implementation
    content = gather(examined(model, tokenizer), model, tokenizer)
    assert model.config._attn_implementation == before
    assert len(content.attention) == 3 * 3
    for head in content.attention:
        assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in head.weights)


def test_of_many_heads_the_distinctive_ones_are_drawn_and_the_others_are_folded() -> None:
    model, tokenizer = load_plain(CHECKPOINT, TOKENIZER)
    content = gather(examined(model, tokenizer), model, tokenizer)
    heads = [Head(i // 12, i % 12, ((1.0,), (0.2, 0.8)), "looks here and there", 0.0) for i in range(144)]
    for i in range(20):
        heads[7 * i] = replace(heads[7 * i], habit="looks one back", share=0.6 + 0.01 * i)
    drawn, _, folded = render(replace(content, attention=tuple(heads))).partition("The other 140 heads")
    assert len(re.findall("<figcaption>", folded)) == 140
    assert re.findall(r"looks one back \((\d+)%\)", drawn) == ["76", "77", "78", "79"]  # the clearest ones


def test_a_chart_of_nothing_is_not_drawn(tmp_path: Path) -> None:
    model, tokenizer = load_plain(CHECKPOINT, TOKENIZER)
    inspection = examined(model, tokenizer, training_data=QUESTIONS)
    content = gather(inspection, model, tokenizer)
    for loss, is_drawn in ((0.0, False), (3.0, True)):
        flat = replace(inspection.measurement, by_position=((0, loss), (4, loss)))
        page = render(replace(content, inspection=replace(inspection, measurement=flat)))
        assert ("Loss by position" in page) == is_drawn


def test_a_token_that_is_a_part_of_a_character_is_shown_by_its_bytes(tmp_path: Path) -> None:
    tokenizer = convert_tokenizer(TOKENIZER, model_max_length=64)
    parts = tokenizer("—", add_special_tokens=False).input_ids
    assert "".join(Words(tokenizer)(token) for token in parts) == r"\xe2\x80\x94"


def test_the_prompts_of_a_raw_model_come_from_its_training_text(tmp_path: Path) -> None:
    text = "to be or not to be, that is the question\n" * 8
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = characters(text)
    model = twin(gpt(**SMALL | {"vocab_size": len(tokenizer)}))
    content = gather(examined(model, tokenizer, training_data=tmp_path / "text.txt"), model, tokenizer)
    assert content.answers
    assert all(answer.prompt + answer.expected in text for answer in content.answers)


def test_the_page_ends_with_its_date_version_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/convert_checkpoint.py", "--report", "my page.html"])
    page = page_of(twin(gpt(**SMALL)), convert_tokenizer(TOKENIZER, model_max_length=64), tmp_path / "report.html")
    footer = page[page.index("<footer>") :]
    assert re.search(r"Made on \d{4}-\d\d-\d\d by", footer)
    assert hf_model.__version__ in footer
    assert "convert_checkpoint.py --report &#39;my page.html&#39;" in footer


def test_dead_and_exploded_layers_are_named(tmp_path: Path) -> None:
    model = twin(gpt(n_layer=4))
    model.transformer.h[1].attn.c_proj.weight.data.zero_()
    model.transformer.h[2].mlp.c_fc.weight.data *= 100
    tokenizer = characters("to be or not to be\n")
    faults = {
        (weight.kind, weight.layer): weight.fault
        for weight in gather(examined(model, tokenizer), model, tokenizer).weights
        if weight.fault
    }
    assert set(faults) == {("attn.c_proj", 1), ("mlp.c_fc", 2)}
    assert faults["attn.c_proj", 1] == "dead: all zeros"
    assert faults["mlp.c_fc", 2].startswith("exploded: ")


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("n_tokens", [1, 2, 12])
def test_the_smallest_models_have_a_page_too(block_size: int, n_tokens: int, tmp_path: Path) -> None:
    tokenizer = characters("abcdefghijkl"[:n_tokens])
    model = gpt(**SMALL | {"vocab_size": n_tokens, "block_size": block_size})
    assert "<strong>" in page_of(twin(model), tokenizer, tmp_path / "report.html")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_of_any_dtype_has_the_page_of_its_values(dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokenizer = gpt(vocab_size=1024, block_size=64).to(dtype), load_plain(CHECKPOINT, TOKENIZER)[1]
    same = twin(model).to(dtype)
    content = gather(examined(same, tokenizer, "ckpt.pt"), same, tokenizer)
    assert content.embeddings is not None and "</html>" in page_of(same, tokenizer, tmp_path / "report.html")
    lengths = model.transformer.wte.weight.double().norm(dim=1)
    assert content.embeddings.high == pytest.approx(lengths.max().item(), rel=1e-3)


def test_a_page_is_replaced_and_another_file_is_not(tmp_path: Path) -> None:
    model, tokenizer = twin(gpt(**SMALL)), convert_tokenizer(TOKENIZER, model_max_length=64)
    path = tmp_path / "report.html"
    assert page_of(copy.deepcopy(model), tokenizer, path) == page_of(model, tokenizer, path)
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is no report"):
        page_of(model, tokenizer, path)


def test_a_page_appears_whole_or_the_old_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = twin(gpt(**SMALL)), convert_tokenizer(TOKENIZER, model_max_length=64)
    before = page_of(model, tokenizer, tmp_path / "report.html")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"report\.html: cannot be written \(No space left on device\)"):
        page_of(model, tokenizer, tmp_path / "report.html", name="other.pt")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("leads_to", ["a page", "nothing", "itself"])
def test_a_link_is_neither_replaced_nor_followed(leads_to: str, tmp_path: Path) -> None:
    model, tokenizer = twin(gpt(**SMALL)), convert_tokenizer(TOKENIZER, model_max_length=64)
    other, link = tmp_path / "other.html", tmp_path / "report.html"
    before = page_of(model, tokenizer, other, name="other.pt") if leads_to == "a page" else None
    link.symlink_to(link if leads_to == "itself" else other)
    with pytest.raises(UserError, match=r"report\.html: is a symbolic link; name the file itself"):
        page_of(model, tokenizer, link)
    assert link.is_symlink()
    assert (other.read_text(encoding="utf-8") if other.exists() else None) == before


@pytest.mark.parametrize("work", [["--inspect"], []], ids=["inspection", "conversion"])
def test_a_place_that_cannot_be_written_is_found_before_the_work_begins(
    work: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine.html").write_text("mine", encoding="utf-8")
    (tmp_path / "ckpt.pt").write_text("never read", encoding="utf-8")
    arguments = ["--checkpoint_path", str(tmp_path / "ckpt.pt"), "--tokenizer_path", str(TOKENIZER), *work]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *arguments, "--report", str(tmp_path / "mine.html")])
    assert convert_checkpoint.main() == 2
    assert "mine.html: exists already and is no report" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "mine.html"]


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_a_browser_draws_it_without_a_complaint(kind: tuple[str, str, Path], tmp_path: Path) -> None:
    name, _, path = kind
    headless = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--window-size=390,2000",
    ]
    shot = tmp_path / "shot.png"
    seen = subprocess.run(
        [*headless, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert "CONSOLE" not in seen.stderr  # nothing was refused by the page's own policy
    dom = subprocess.run(
        [*headless, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert dom.count('class="t') >= (9 if name in ("sane", "stutterer", "untrained", "raw") else 0)
    assert "</footer>" in dom
