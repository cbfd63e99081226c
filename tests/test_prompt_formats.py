"""Chosen prompt formats by the two commands: prompts, conversations, batches, scores, training data, folders."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_model.conversion import convert
from hf_model.errors import UserError
from hf_model.generation import Sampling, encode_prompt, generate
from hf_model.learnt.training_data import measure
from hf_model.loading import load
from hf_model.tokenizer import TEMPLATES
from hf_model_cli import convert as convert_command
from hf_model_cli import generate as generate_command
from hf_model_cli.options import CHAT_TEMPLATES
from tests.templates import CHATML_LIKE, GPT2_LIKE, save_speaker, save_tokenizer
from tests.test_cli import Result, call  # noqa: F401
from tests.tiny import CHECKPOINT, TOKENIZER

QUESTION = "What is the capital of France?"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    f"\n\n### Instruction:\n{QUESTION}\n\n### Response:\n"
)
CHATML = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For each format, a checkpoint whose model says Paris, and its tokenizer."""
    found = {}
    for name, special, end in (("alpaca", GPT2_LIKE, "<|endoftext|>"), ("chatml", CHATML_LIKE, "<|im_end|>")):
        folder = tmp_path_factory.mktemp(name)
        tokenizer = save_tokenizer(folder / "tokenizer.json", *special)
        found[name] = save_speaker(folder, tokenizer, f"\nParis{end}\n"), tokenizer
    return found


@pytest.fixture
def options(files: dict[str, tuple[Path, Path]]) -> Callable[..., list[str]]:
    def of(name: str) -> list[str]:
        checkpoint, tokenizer = files[name]
        paths = ["--checkpoint_path", str(checkpoint), "--tokenizer_path", str(tokenizer)]
        return [*paths, "--chat_template", name, "--device", "cpu", "--temperature", "0"]

    return of


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[list[dict], str]]:
    """The JSON answers to lines from a pipe, and what standard error has."""

    def say(options: list[str], *lines: str) -> tuple[list[dict], str]:
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        monkeypatch.setattr(sys, "argv", ["generate.py", *options, "--interactive", "--json"])
        assert generate_command.main() == 0
        said, errors = capsys.readouterr()
        return [json.loads(line) for line in said.splitlines()], errors

    return say


def test_the_command_lists_the_names_of_the_package() -> None:
    assert CHAT_TEMPLATES == tuple(TEMPLATES)


class TestAPrompt:
    @pytest.mark.parametrize(
        "name, prompt, end", [("alpaca", ALPACA, "<|endoftext|>"), ("chatml", CHATML, "<|im_end|>")]
    )
    def test_is_shown_and_answered_in_its_format(
        self,
        name: str,
        prompt: str,
        end: str,
        options: Callable,
        call: Callable[..., Result],  # noqa: F811
    ) -> None:
        result = call(generate_command, *options(name), "--prompt", QUESTION)
        assert result.status == 0
        assert f"content     {prompt!r}\n\n{prompt}Paris{end}\n\n3 tokens in" in result.out
        bare = call(generate_command, *options(name), "--prompt", QUESTION, "--response_only", "--quiet")
        assert bare.out == "Paris\n"

    def test_with_an_input(self, options: Callable, call: Callable[..., Result]) -> None:  # noqa: F811
        result = call(generate_command, *options("alpaca"), "--prompt", "Where?", "--input_text", "France", "--json")
        assert "### Instruction:\nWhere?\n\n### Input:\nFrance\n\n### Response:\n" in json.loads(result.out)["text"]
        result = call(generate_command, *options("chatml"), "--prompt", "Where?", "--input_text", "France")
        assert result.status == 2
        assert re.search(r"--input_text: .* no place for it: put it into the prompt\n", result.err)

    @pytest.mark.parametrize("name", ["alpaca", "chatml"])
    def test_a_score_shows_it(self, name: str, options: Callable, call: Callable[..., Result]) -> None:  # noqa: F811
        prompt = {"alpaca": ALPACA, "chatml": CHATML}[name]
        result = call(generate_command, *options(name), "--score", "Paris", "--prompt", QUESTION)
        assert f"content     {prompt!r}\n" in result.out
        assert result.out.endswith("perplexity  1.00\n")
        result = call(generate_command, *options(name), "--score", "Paris", "--prompt", QUESTION, "--json")
        assert json.loads(result.out)["content"] == prompt

    def test_stays_raw_when_asked(
        self,
        files: dict,
        tmp_path: Path,
        call: Callable[..., Result],  # noqa: F811
    ) -> None:
        folder = convert(*files["alpaca"], tmp_path / "hf", chat_template="alpaca")
        result = call(
            generate_command, "--checkpoint_path", str(folder), "--raw", "--prompt", "x\n", "--temperature", "0"
        )
        assert "content     'x\\n'\n\nx\nParis<|endoftext|>" in result.out

    @pytest.mark.parametrize(
        "arguments, said",
        [
            (["--chat_template", "alpaka"], r"--chat_template: 'alpaka' is none of alpaca, chatml, nor a file"),
            (["--chat_template", "alpaca", "--raw"], r"--chat_template: not allowed with argument --raw"),
            (["--chat_template", "alpaca", "--instructions"], r"not allowed with argument --instructions"),
            (["--chat_template", "chatml"], r"the tokenizer has no <\|im_start\|>"),
        ],
    )
    def test_wrong_choices_are_one_line(
        self,
        arguments: list,
        said: str,
        files: dict,
        call: Callable[..., Result],  # noqa: F811
    ) -> None:
        checkpoint, tokenizer = files["alpaca"]
        paths = ("--checkpoint_path", str(checkpoint), "--tokenizer_path", str(tokenizer))
        for script in (generate_command, convert_command):
            more = ["--prompt", "x"] if script is generate_command else ["--inspect"]
            result = call(script, *paths, *arguments, *more)
            assert (result.status, result.err.count("\n")) == (2, 1)
            assert re.search(said, result.err)

    def test_python_refuses_both_too(self, files: dict) -> None:
        with pytest.raises(UserError, match="--chat_template and --raw contradict"):
            load(*files["alpaca"], chat_template="alpaca", raw=True)

    @pytest.mark.parametrize("n_beams", [1, 2])
    def test_an_answer_ends_at_the_text_that_the_format_ends_it_with(
        self,
        n_beams: int,
        tmp_path: Path,
        call: Callable[..., Result],  # noqa: F811
    ) -> None:
        tokenizer = save_tokenizer(tmp_path / "tokenizer.json", *GPT2_LIKE)
        checkpoint = save_speaker(tmp_path, tokenizer, "\nParis(stop)\n")
        template = tmp_path / "my.jinja"
        template.write_text("{% for m in messages %}{{ m.role }}:\n{{ m.content }}(stop)\n{% endfor %}assistant:\n\n")
        paths = ("--checkpoint_path", str(checkpoint), "--tokenizer_path", str(tokenizer))
        how = ("--chat_template", str(template), "--prompt", QUESTION, "--num_beams", str(n_beams))
        result = call(generate_command, *paths, *how, "--temperature", "0", "--json")
        answer = json.loads(result.out)
        assert (answer["response"], answer["finish_reason"]) == ("Paris", "stop")
        assert answer["text"] == f"user:\n{QUESTION}(stop)\nassistant:\nParis"


class TestAConversation:
    def test_keeps_its_turns_until_it_begins_again(self, options: Callable, talk: Callable) -> None:
        answers, errors = talk(options("chatml"), "One?", "Two?", "/again", "/new", "Three?", "/again")
        one = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>\n"
        two, three = one.replace("One", "Two"), one.replace("One", "Three")
        assert [answer["text"] + "\n" for answer in answers] == [one, one + two, one + two, three, three]
        assert "A new conversation." in errors

    def test_asks_each_question_alone_where_the_format_has_one_turn(self, options: Callable, talk: Callable) -> None:
        answers, errors = talk(options("alpaca"), "One?", QUESTION, "/new")
        assert answers[1]["text"] == f"{ALPACA}Paris<|endoftext|>"
        assert "there is nothing to forget" in errors

    def test_drops_the_oldest_turns_when_the_context_is_full(self, options: Callable, talk: Callable) -> None:
        questions = [f"{number} {'x' * 50}" for number in range(8)]
        answers, errors = talk(options("chatml"), *questions)
        last = answers[-1]["text"]
        assert all(answer["response"] == "Paris" and answer["prompt_tokens"] <= 256 - 32 for answer in answers)
        assert last.startswith("<|im_start|>user\n")
        assert questions[-1] in last and questions[-2] in last
        assert questions[0] not in last
        assert (
            "turns, the question and an answer of 32 tokens do not fit the context of 256: the oldest turn is" in errors
        )

    def test_keeps_turns_that_leave_room_for_a_short_answer(self, options: Callable, talk: Callable) -> None:
        answers, errors = talk(options("chatml"), "1 " + "x" * 100, "2")
        assert 128 < answers[1]["prompt_tokens"] <= 256 - 32
        assert answers[1]["text"].startswith("<|im_start|>user\n1 ")
        assert "left out" not in errors

    def test_the_answer_is_that_of_the_turns_that_are_left(self, files: dict) -> None:
        model, tokenizer = load(*files["chatml"], chat_template="chatml", device="cpu")
        turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Paris"}]
        ids = encode_prompt(tokenizer, "Two?", turns=turns)
        stock = tokenizer.apply_chat_template(
            [*turns, {"role": "user", "content": "Two?"}], add_generation_prompt=True, return_tensors="pt"
        )
        assert ids.tolist() == stock.input_ids.tolist()
        assert generate(model, tokenizer, ids, Sampling(temperature=0)).responses == ["Paris"]


@pytest.mark.parametrize("name", ["alpaca", "chatml"])
@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_a_batch_gives_what_single_prompts_give(
    batch_size: str,
    name: str,
    options: Callable,
    tmp_path: Path,
    call: Callable[..., Result],  # noqa: F811
) -> None:
    questions = [QUESTION, "Who?", f"Is {QUESTION} a question?"]
    single = [
        json.loads(call(generate_command, *options(name), "--prompt", question, "--json", "--max_new_tokens", "2").out)
        for question in questions
    ]
    source, output = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"instruction": question}) + "\n" for question in questions))
    how = ("--prompts_file", str(source), "--output_file", str(output), "--batch_size", batch_size)
    assert call(generate_command, *options(name), *how, "--max_new_tokens", "2").status == 0
    answers = [json.loads(line)["response"] for line in output.read_text().splitlines()]
    assert answers == [answer["response"] for answer in single]


def test_a_record_with_an_input_that_has_no_place_is_named(
    options: Callable,
    tmp_path: Path,
    call: Callable[..., Result],  # noqa: F811
) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text('{"instruction": "a"}\n{"instruction": "a", "input": "b"}\n')
    how = ("--prompts_file", str(source), "--output_file", str(tmp_path / "a.jsonl"))
    result = call(generate_command, *options("chatml"), *how)
    assert result.status == 2
    assert "record 2: the model's chat template has no place for an input" in result.err


class TestTrainingData:
    @pytest.mark.parametrize(
        "name, prompt, answer",
        [
            ("alpaca", ALPACA, "Lyon<|endoftext|>"),
            ("chatml", CHATML, "Lyon<|im_end|>"),
            ("chatml", CHATML, "\n a <|im_end|>"),
        ],
    )
    def test_the_loss_is_on_the_answer_and_its_end_alone(
        self, name: str, prompt: str, answer: str, files: dict, tmp_path: Path
    ) -> None:
        model, tokenizer = load(*files[name], chat_template=name, device="cpu")
        model.lm_head.weight.data += 0.1 * torch.randn(model.lm_head.weight.shape)
        output = answer.partition("<|")[0]
        data = tmp_path / "data.jsonl"
        data.write_text(json.dumps({"instruction": QUESTION, "output": output}) + "\n")
        start = tokenizer(prompt, add_special_tokens=False).input_ids
        ids = tokenizer(prompt + answer, add_special_tokens=False).input_ids
        first = next((n for n, (a, b) in enumerate(zip(ids, start, strict=False)) if a != b), len(start))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        expected = cross_entropy(logits[first - 1 : -1], torch.tensor(ids[first:]))
        measured = measure(model, tokenizer, data)
        assert measured.loss == pytest.approx(float(expected), rel=1e-4)
        assert measured.n_tokens == len(ids)

    def test_a_model_knows_its_own(self, options: Callable, tmp_path: Path, call: Callable[..., Result]) -> None:  # noqa: F811
        data, page = tmp_path / "data.jsonl", tmp_path / "report.html"
        data.write_text(json.dumps({"instruction": QUESTION, "output": "Paris"}) + "\n")
        arguments = options("chatml")[:6]
        result = call(convert_command, *arguments, "--inspect", "--training_data", str(data), "--report", str(page))
        assert re.search(r"exact answers 1 of 1", result.out)
        assert "prompt        chatml, of several turns; an answer ends at <|im_end|> or <|endoftext|>" in result.out
        assert "&lt;|im_start|&gt;user⏎What is the capital of France?&lt;|im_end|&gt;" in page.read_text(
            encoding="utf-8"
        )


class TestAFolder:
    def test_needs_nothing_but_transformers(self, files: dict, tmp_path: Path) -> None:
        folder = convert(*files["chatml"], tmp_path / "hf", chat_template="chatml")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.generation_config.eos_token_id == [2, 0]
        messages = [{"role": "user", "content": QUESTION}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=20)
        assert tokenizer.decode(output[0]) == f"{CHATML}Paris<|im_end|>"

    @pytest.mark.parametrize("format", ["transformers", "gpt2"])
    def test_keeps_its_prompts_when_it_is_converted_again(self, format: str, files: dict, tmp_path: Path) -> None:
        folder = convert(*files["chatml"], tmp_path / "hf", chat_template="chatml")
        again = convert(folder, None, tmp_path / "again", format=format)
        assert (again / "chat_template.jinja").read_bytes() == (folder / "chat_template.jinja").read_bytes()
        assert json.loads((again / "generation_config.json").read_text())["eos_token_id"] == [2, 0]

    def test_can_be_given_other_prompts(self, files: dict, tmp_path: Path) -> None:
        folder = convert(*files["chatml"], tmp_path / "hf")
        assert not (folder / "chat_template.jinja").exists()
        again = convert(folder, None, tmp_path / "again", chat_template="chatml")
        assert json.loads((again / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
        assert AutoTokenizer.from_pretrained(again).chat_template is not None

    def test_to_which_a_trainer_added_a_template_follows_it(self, files: dict, tmp_path: Path) -> None:
        """A folder of raw text that was fine-tuned on chats: an answer ends where the new format ends it."""
        folder = convert(*files["chatml"], tmp_path / "hf")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
        tokenizer.save_pretrained(folder)
        model, tokenizer = load(folder, device="cpu")
        ids = encode_prompt(tokenizer, QUESTION)
        assert tokenizer.decode(ids[0]) == f"<|im_start|>{QUESTION}<|im_end|>\n"
        output = generate(model, tokenizer, ids, Sampling(temperature=0))
        assert (output.responses, output.finish_reasons) == (["Paris"], ["stop"])

    def test_s_card_shows_the_prompt(self, files: dict, tmp_path: Path) -> None:
        folder = convert(*files["chatml"], tmp_path / "hf", chat_template="chatml")
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "```\n<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n" in card
        assert "the answer and `<|im_end|>` follow:" in card

    def test_of_the_original_is_what_it_was(self, tmp_path: Path) -> None:
        """The default has no `--chat_template`: nothing but its own format is written."""
        folder = convert(CHECKPOINT, TOKENIZER, tmp_path / "hf")
        assert json.loads((folder / "tokenizer_config.json").read_text())["prompt_format"] == "instruction"
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 3
