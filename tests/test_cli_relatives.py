"""The command lines with the family's checkpoints: raw prompts, what is found, and one line for what is wrong."""

import io
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import convert_checkpoint
import generate
from examples.plain_gpt import GPT
from hf_model_cli.generate import parse_arguments
from tests import relatives
from tests.relatives import CHARACTERS, TEXT
from tests.tiny import CHECKPOINT, ROOT, TOKENIZER


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Path]:
    """nanoGPT's folder with a model of characters, and that model."""
    root = tmp_path_factory.mktemp("nano")
    torch.manual_seed(0)
    model = relatives.nano_character_model()
    relatives.save_nanogpt(root, model)
    relatives.save_meta(root / "data" / "tiny_char" / "meta.pkl")
    return model, root


@pytest.fixture
def call(
    nano: tuple[GPT, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """Call a script's `main` in nanoGPT's folder; with `generate` its checkpoint is named unless another one is."""

    def call_main(script: ModuleType, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(nano[1])
        named = () if "--checkpoint_path" in arguments else ("--checkpoint_path", "out/ckpt.pt")
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *named, *arguments])
        try:
            status = script.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call_main


def continued(model: GPT, prompt: str, count: int, seed: int = 1337) -> str:
    """What the trainer's own model makes of a prompt where it is seeded right before sampling."""
    torch.manual_seed(seed)
    ids = model.generate(relatives.encode(prompt), count, temperature=0.8, top_k=50)[0].tolist()
    return "".join(CHARACTERS[number] for number in ids)


class TestGenerate:
    @pytest.mark.parametrize("prompt", ["\n", " ", "To be", "  \n\n", "FILE of"])
    def test_a_raw_prompt_is_continued_as_it_was_typed(self, prompt: str, nano: tuple, call: Callable) -> None:
        prompt = prompt.replace("FILE of", "or not")
        status, out, _ = call(generate, "--prompt", prompt, "--max_new_tokens", "30", "--device", "cpu")
        assert status == 0
        shown = prompt if prompt == prompt.strip() else repr(prompt)  # space is made visible
        assert f"content     {shown}\n\n{continued(nano[0], prompt, 30)}\n" in out
        assert "tokenizer   data/tiny_char/meta.pkl (the checkpoint names this data)\n" in out
        assert "prompt      raw text; a text ends at max_new_tokens only\n" in out

    def test_a_prompt_out_of_a_file(self, nano: tuple, call: Callable, tmp_path: Path) -> None:
        (tmp_path / "start.txt").write_text(TEXT, encoding="utf-8")
        arguments = ("--prompt", f"FILE:{tmp_path / 'start.txt'}", "--max_new_tokens", "9", "--response_only")
        _, out, _ = call(generate, *arguments, "--device", "cpu")
        assert out == continued(nano[0], TEXT, 9)[len(TEXT) :] + "\n"

    @pytest.mark.parametrize("arguments", [(), ("--prompt", "-")], ids=["a pipe", "a dash"])
    def test_piped_text_that_begins_as_the_name_of_a_file_is_text(
        self, nano: tuple, monkeypatch: pytest.MonkeyPatch, arguments: tuple
    ) -> None:
        monkeypatch.chdir(nano[1])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"FILE:start.txt")))
        assert parse_arguments(["--checkpoint_path", "out/ckpt.pt", *arguments]).prompt == "FILE:start.txt"

    @pytest.mark.parametrize("also", [(), ("--no_stream",)])
    def test_nothing_is_stripped_from_the_answer(self, also: tuple, nano: tuple, call: Callable) -> None:
        answers = {seed: continued(nano[0], "To", 8, seed)[2:] for seed in range(60)}
        seed = next(seed for seed, answer in answers.items() if answer != answer.lstrip())
        arguments = ("--prompt", "To", "--max_new_tokens", "8", "--response_only", "--seed", str(seed))
        _, out, _ = call(generate, *arguments, *also, "--device", "cpu")
        assert out == answers[seed] + "\n"

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--prompt", ""), "argument --prompt: must not be empty"),
            (("--prompt", "be", "--input_text", "x"), "argument --input_text: this model's prompts are raw text"),
            (
                ("--prompt", "be", "--raw", "--input_text", "x"),
                "argument --input_text: a raw prompt has no place for it",
            ),
            (("--prompt", "FILE:no.txt"), "argument --prompt: no.txt cannot be read (No such file or directory)"),
            (("--prompt", "FILE:."), "argument --prompt: . cannot be read (Is a directory)"),
            (("--prompt", "FILE:/dev/zero"), "argument --prompt: /dev/zero is more than 64 MiB long"),
            (("--prompt", "FILE:/dev/null"), "argument --prompt: /dev/null is empty"),
            (("--prompt", "no Ж"), "the text holds 'Ж' (U+0416) in position 3: not among the"),
            (("--prompt", "be", "--characters_of", "no.txt"), "argument --characters_of: there is no file no.txt"),
            (
                ("--prompt", "be", "--characters_of", "x", "--tokenizer_path", "y"),
                "argument --characters_of: not allowed with argument --tokenizer_path",
            ),
            (
                ("--prompt", "be", "--tokenizer_path", "data/no/meta.pkl"),
                "--tokenizer_path: there is no file data/no/m",
            ),
            (("--prompt", "be", "--tokenizer_path", "no-such-name"), "no-such-name: there is no such file or folder"),
        ],
    )
    def test_refuses_in_one_line(self, arguments: tuple, message: str, call: Callable) -> None:
        status, _, err = call(generate, *arguments)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1

    def test_raw_text_of_an_instruction_model_goes_after_bos(self, call: Callable) -> None:
        files = ("--checkpoint_path", str(CHECKPOINT), "--tokenizer_path", str(TOKENIZER))
        prompt = "Instruction: What is the capital of France? Response:"
        _, out, _ = call(generate, *files, "--raw", "--prompt", prompt, "--temperature", "0")
        assert f"\n[BOS]{prompt} Paris[EOS]\n" in out
        _, out, _ = call(generate, *files, "--raw", "--prompt", prompt, "--temperature", "0", "--response_only")
        assert out == " Paris\n"

    def test_a_file_of_prompts(self, nano: tuple, call: Callable, tmp_path: Path) -> None:
        prompts = ["\n", "To be", " or "]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts), "utf-8")
        files = ("--prompts_file", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / "out.jsonl"))
        status, _, _ = call(generate, *files, "--temperature", "0", "--max_new_tokens", "12", "--batch_size", "2")
        assert status == 0
        for prompt, line in zip(prompts, (tmp_path / "out.jsonl").read_text("utf-8").splitlines(), strict=True):
            ids = nano[0].generate(relatives.encode(prompt), 12, temperature=0)[0, len(prompt) :].tolist()
            assert json.loads(line) == {"prompt": prompt, "response": "".join(CHARACTERS[number] for number in ids)}

    @pytest.mark.parametrize(
        "record, message",
        [
            ({"text": "be"}, "is not a JSON object with a 'prompt'"),
            ({"prompt": 7}, "'prompt' and 'input' must be strings"),
            ({"prompt": "be", "input": "x"}, "a raw prompt has no place for an 'input'"),
            ({"prompt": ""}, "the prompt is empty"),
        ],
    )
    def test_a_record_that_is_no_prompt(self, record: dict, message: str, call: Callable, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
        files = ("--prompts_file", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / "out.jsonl"))
        status, _, err = call(generate, *files)
        assert status == 2
        assert f"in.jsonl, line 1: {message}" in err


class TestConvert:
    def test_the_command_that_it_suggests_answers(self, nano: tuple, call: Callable, tmp_path: Path) -> None:
        status, out, _ = call(convert_checkpoint, "--output_dir", str(tmp_path / "hf"))
        assert status == 0
        command = out.partition("Try it:\n")[2].splitlines()[0]
        line = f"{shlex.quote(sys.executable)} {ROOT / 'generate.py'} {command.split('generate.py')[1]} --response_only"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}  # a GPU draws otherwise
        process = subprocess.run(
            ["bash", "-c", line], capture_output=True, encoding="utf-8", env=environment, timeout=300, check=True
        )
        assert process.stdout == continued(nano[0], "\n", 150)[1:] + "\n"

    @pytest.mark.parametrize("format", ["transformers", "gpt2", "gguf"])
    def test_it_suggests_to_ask_a_server_for_a_completion_since_there_is_no_chat_template(
        self, format: str, call: Callable, tmp_path: Path
    ) -> None:
        if format == "gguf":
            pytest.importorskip("gguf")
        folder = tmp_path / "my model"
        status, out, _ = call(convert_checkpoint, "--output_dir", str(folder), "--format", format, "--no_verify")
        assert status == 0
        command, body = out.strip().splitlines()[-1].split(" -d ")
        assert command.strip().startswith("curl http://localhost:")
        assert "/v1/completions " in command
        assert "--jinja" not in out
        (sent,) = shlex.split(body)
        request = json.loads(sent)
        assert (request["model"], request["max_tokens"]) == (str(folder), 20)
        assert request["prompt"] and set(request["prompt"]) <= set(CHARACTERS)

    @staticmethod
    def refused_in(
        folder: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> str:
        """What a script says that is called in a folder without a checkpoint."""
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["script.py", *(("--prompt", "x") if script is generate else ())])
        with pytest.raises(SystemExit) as stop:
            script.main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    @pytest.mark.parametrize("script", [generate, convert_checkpoint])
    def test_a_missing_default_names_the_checkpoints_that_are_there(
        self, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        names = ("out/pretrain/best_model.pt", "out/finetune/ckpt_iter_60.pt", "out/finetune/ckpt_final_iter_120.pt")
        for age, name in enumerate(names):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (time.time() + age, time.time() + age))
        err = self.refused_in(tmp_path, script, monkeypatch, capsys)
        assert "out/finetune/ckpt.pt; there is out/finetune/ckpt_final_iter_120.pt, out/finetune/ckpt_iter_60.pt" in err
        assert "out/pretrain/best_model.pt: give one with --checkpoint_path" in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize("script", [generate, convert_checkpoint])
    def test_where_there_is_none_it_says_what_to_give(
        self, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "latest.pt").symlink_to("gone.pt")
        err = self.refused_in(tmp_path, script, monkeypatch, capsys)
        assert "nor another checkpoint in out/ or log/: give one with --checkpoint_path" in err
        assert err.count("\n") == 1
