"""The two command lines: what they print and where, their exit status, and one line for everything that is wrong."""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from safetensors.torch import save_file

import convert_checkpoint
import generate
import hf_model
from hf_model import Sampling, devices
from hf_model_cli import convert as convert_command
from hf_model_cli import generate as generate_command
from tests.tiny import CAPITALS, CHECKPOINT, EOS, ROOT, TOKENIZER, gpt, save_files

EXAMPLE = ("--checkpoint_path", str(CHECKPOINT), "--tokenizer_path", str(TOKENIZER))
FRANCE = ("--prompt", "What is the capital of France?")


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Result]:
    """Call a script's `main` in this process, which spares the seconds of its imports."""

    def call_main(script: ModuleType, *arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        try:
            status = script.main()
        except SystemExit as stop:
            status = stop.code
        return Result(status, *capsys.readouterr())

    return call_main


def run(script: str, *arguments: str) -> Result:
    """Run a script as a process of its own, from another folder."""
    command = [sys.executable, str(ROOT / script), *arguments]
    process = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT.parent, timeout=300)
    return Result(process.returncode, process.stdout, process.stderr)


class TestArguments:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--prompt", ""), "--prompt: must not be empty"),
            (("--prompt", " \n"), "--prompt: must not be empty"),
            (("--temperature", "-0.1"), "--temperature: must be at least 0, got -0.1"),
            (("--temperature", "nan"), "--temperature: must be at least 0, got nan"),
            (("--temperature", "inf"), "--temperature: must be at least 0, got inf"),
            (("--temperature", "hot"), "--temperature: invalid float value: 'hot'"),
            (("--top_k", "-1"), "--top_k: must be at least 0, got -1"),
            (("--top_k", "1.5"), "--top_k: invalid int value: '1.5'"),
            (("--top_p", "0"), "--top_p: must be above 0 and at most 1, got 0"),
            (("--top_p", "1.1"), "--top_p: must be above 0 and at most 1, got 1.1"),
            (("--repetition_penalty", "0"), "--repetition_penalty: must be above 0, got 0"),
            (("--repetition_penalty", "-1"), "--repetition_penalty: must be above 0, got -1"),
            (("--max_new_tokens", "0"), "--max_new_tokens: must be at least 1 and at most 1000000000, got 0"),
            (("--num_return_sequences", "0"), "--num_return_sequences: must be at least 1 and at most 1000000, got 0"),
            (("--num_return_sequences", str(2**63)), "--num_return_sequences: must be at least 1 and at most 1000000"),
            (("--max_new_tokens", str(10**30)), "--max_new_tokens: must be at least 1 and at most 1000000000, got 1"),
            (("--batch_size", str(10**30)), "--batch_size: must be at least 1 and at most 1000000, got 1"),
            (("--n_head", "0"), "--n_head: must be at least 1, got 0"),
            (("--seed", "lucky"), "--seed: invalid int value: 'lucky'"),
            (("--seed", str(2**64)), "--seed: must be at least -9223372036854775808 and at most 18446744073709551615"),
            (("--dtype", "int8"), "--dtype: invalid choice: 'int8'"),
            (("--activation", "rely"), "--activation: invalid choice: 'rely'"),
            (("--checkpoint_path", "no/ckpt.pt"), "--checkpoint_path: there is no no/ckpt.pt"),
            (("--tokenizer_path", "no.json"), "--tokenizer_path: there is no file no.json"),
            (("--colour", "red"), "there is no option --colour\n"),
        ],
        ids=" ".join,
    )
    def test_generate_refuses_in_one_line(
        self, arguments: tuple[str, ...], message: str, call: Callable[..., Result]
    ) -> None:
        result = call(generate, *EXAMPLE, *FRANCE, *arguments)
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith("generate.py: error: ")
        assert message in result.err
        assert result.err.count("\n") == 1

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--dtype", "int8"), "--dtype: invalid choice: 'int8'"),
            (("--activation", "rely"), "--activation: invalid choice: 'rely'"),
            (("--max_shard_size", "big"), "--max_shard_size: must be a size such as 500MB or 5GB, got big"),
            (("--max_shard_size", "0GB"), "--max_shard_size: must be a size such as 500MB or 5GB, got 0GB"),
            (("--n_head", "0"), "--n_head: must be at least 1, got 0"),
            (("--checkpoint_path", "no/ckpt.pt"), "--checkpoint_path: there is no no/ckpt.pt"),
            (("--checkpoint_path", str(ROOT / "docs")), f"{ROOT / 'docs'}: holds no model"),
            (("--tokenizer_path", "no.json"), "--tokenizer_path: there is no file no.json"),
            (("--format", "tf"), "--format: invalid choice: 'tf'"),
            (("--format", "gguf", "--gguf_type", "q4"), "--gguf_type: invalid choice: 'q4'"),
            (("--gguf_type", "f16"), "--gguf_type: goes with --format gguf"),
            (("--format", "gguf", "--quantization", "int8"), "--quantization: goes with --format ctranslate2"),
            (("--format", "gpt2", "--like", "nanogpt"), "--like: goes with --format checkpoint"),
            (("--colour", "red"), "there is no option --colour\n"),
        ],
        ids=" ".join,
    )
    def test_convert_refuses_in_one_line(
        self, arguments: tuple[str, ...], message: str, call: Callable[..., Result]
    ) -> None:
        result = call(convert_checkpoint, *EXAMPLE, *arguments)
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith("convert_checkpoint.py: error: ")
        assert message in result.err
        assert result.err.count("\n") == 1

    def test_the_choices_are_those_of_the_formats(self) -> None:
        from hf_model import formats, loading
        from hf_model.formats import gguf, target, trainer_checkpoint
        from hf_model_cli import options

        assert tuple(formats.FORMATS) == options.FORMATS
        assert tuple(gguf.ALLOWED) == target.GGUF_TYPES == options.GGUF_TYPES
        assert tuple(trainer_checkpoint.USE) == target.TRAINERS == options.TRAINERS
        assert target.SHARD_SIZE == options.SHARD_SIZE
        assert loading.ACTIVATIONS == ("auto", *options.ACTIVATIONS)
        assert set(options.DTYPES) <= {"auto", *devices.DTYPES}
        defaults = {field.name: field.default for field in fields(Sampling)}
        assert {name: defaults[name] for name in options.SAMPLING} == {
            name: option.default for name, option in options.SAMPLING.items()
        }

    @pytest.mark.parametrize(
        "source, format, output",
        [
            ("out/ckpt.pt", "transformers", "out/hf"),
            ("out/ckpt.pt", "gguf", "out/gguf"),
            ("", "gguf", "-gguf"),
        ],
    )
    def test_convert_has_an_output_beside_the_source(
        self, source: str, format: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / source if source else tmp_path
        path.parent.mkdir(parents=True, exist_ok=True)
        (path / "config.json" if path.is_dir() else path).touch()
        arguments = ["--checkpoint_path", str(path), "--tokenizer_path", str(TOKENIZER), "--format", format]
        expected = tmp_path / output if source else Path(f"{tmp_path}{output}")
        assert convert_command.parse_arguments(arguments).output_dir == expected

    def test_a_prompt_is_needed(self, call: Callable[..., Result]) -> None:
        result = call(generate, *EXAMPLE)
        assert result.status == 2
        assert "--prompt" in result.err

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--promt", "hi"), "there is no option --promt; did you mean --prompt?\n"),
            (("--promt=hi",), "there is no option --promt; did you mean --prompt?\n"),
            (("--max-new-tokens", "5"), "there is no option --max-new-tokens; did you mean --max_new_tokens?\n"),
            (("--Temprature", "0"), "there is no option --Temprature; did you mean --temperature?\n"),
            (("What", "is", "it?"), "unrecognized arguments: What is it? (a text of more than one word needs quotes"),
            (("--prompt", "What", "is", "it?"), "unrecognized arguments: is it? (a text of more than one word needs"),
            (("-5",), "there is no option -5\n"),
            (
                ("model.pth", "--max-new-token", "5"),
                "there is no option --max-new-token; did you mean --max_new_tokens?",
            ),
        ],
        ids=" ".join,
    )
    def test_a_word_that_is_no_argument_is_named_first(
        self, arguments: tuple[str, ...], message: str, call: Callable[..., Result]
    ) -> None:
        result = call(generate, *arguments)
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith(f"generate.py: error: {message}")
        assert result.err.count("\n") == 1

    @pytest.mark.parametrize(
        ("script", "typed", "meant"),
        [
            (generate, "--start", "--prompt"),
            (generate, "--num_samples=3", "--num_return_sequences"),
            (generate, "--out_dir=out", "--checkpoint_path"),
            (generate, "--temp", "--temperature"),
            (convert_checkpoint, "--outtype", "--gguf_type"),
            (convert_checkpoint, "--upload", "--push_to_hub"),
            (convert_checkpoint, "--out_dir", "--output_dir"),
        ],
    )
    def test_another_program_s_name_of_an_option_is_answered_with_ours(
        self, script: ModuleType, typed: str, meant: str, call: Callable[..., Result]
    ) -> None:
        result = call(script, typed, "x")
        assert result.status == 2 and f"; did you mean {meant}?\n" in result.err

    def test_a_path_alone_is_the_checkpoint(self, capitals: Path) -> None:
        for folder in (str(capitals), f"{capitals}{os.sep}"):
            assert Path(convert_command.parse_arguments([folder]).checkpoint_path) == capitals

    @pytest.mark.parametrize("script", [generate, convert_checkpoint], ids=lambda script: script.__name__)
    @pytest.mark.parametrize("ending", [".pt", ".pth", ".ckpt", ".bin", ".safetensors"])
    def test_a_mistyped_path_is_answered_with_the_nearest_name_first(
        self, ending: str, script: ModuleType, tmp_path: Path, call: Callable[..., Result]
    ) -> None:
        meant, newer, note = (tmp_path / name for name in (f"model{ending}", "optimizer.pt", f"modle{ending}.txt"))
        for path in (meant, newer, note):
            path.touch()
        os.utime(meant, (0, 0))
        typed = tmp_path / f"modle{ending}"
        for name in ((str(typed),), ("--checkpoint_path", str(typed))):
            result = call(script, *name, *(FRANCE if script is generate else ()))
            assert (result.status, result.err.count("\n")) == (2, 1)
            assert f"there is no {typed}; there is {meant}, {newer}" in result.err and str(note) not in result.err

    def test_a_folder_with_one_checkpoint_is_that_checkpoint(self, tmp_path: Path, call: Callable[..., Result]) -> None:
        checkpoint, _ = save_files(tmp_path, gpt())
        assert call(convert_checkpoint, "--checkpoint_path", str(tmp_path)).status == 0
        assert (tmp_path / "hf" / "config.json").is_file()
        shutil.copy(checkpoint, tmp_path / "best.pt")
        for path in (tmp_path, tmp_path / "no.pt"):
            result = call(generate, "--checkpoint_path", str(path), *FRANCE)
            assert result.status == 2 and result.err.count("\n") == 1
            assert all(str(tmp_path / name) in result.err for name in ("ckpt.pt", "best.pt"))

    def test_the_weights_of_a_converted_folder_are_that_folder(
        self, capitals: Path, call: Callable[..., Result]
    ) -> None:
        path = str(capitals / "model.safetensors")
        assert call(generate, "--checkpoint_path", path, "--response_only", "--quiet", *FRANCE).out == "Paris\n"

    def test_a_name_on_the_hub_is_answered_with_how_to_download_it(self, call: Callable[..., Result]) -> None:
        for name in (("--checkpoint_path", "someone/capitals"), ("someone/capitals",)):
            result = call(generate, *name, *FRANCE)
            assert result.status == 2 and "hf download someone/capitals --local-dir capitals" in result.err

    def test_weights_alone_need_the_number_of_heads(self, tmp_path: Path, call: Callable[..., Result]) -> None:
        state = torch.load(CHECKPOINT, weights_only=True)["model_state_dict"]
        save_file(state, tmp_path / "ema.safetensors")
        path = ("--checkpoint_path", str(tmp_path / "ema.safetensors"), "--tokenizer_path", str(TOKENIZER), *FRANCE)
        refused = call(generate, *path)
        assert refused.status == 2 and "give it with --n_head" in refused.err
        assert call(generate, *path, "--n_head", "3", "--response_only", "--quiet").out == "Paris\n"

    def test_a_prompt_may_stand_in_a_file(self, tmp_path: Path, call: Callable[..., Result]) -> None:
        (tmp_path / "q.txt").write_bytes("\ufeffWhat is the capital of France?\r\n".encode())
        arguments = (*EXAMPLE, "--prompt", f"FILE:{tmp_path / 'q.txt'}", "--response_only", "--quiet")
        assert call(generate, *arguments) == Result(0, "Paris\n", "")

    def test_a_pipe_that_is_not_utf_8_is_an_error(
        self, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
        result = call(generate, *EXAMPLE)
        assert result.status == 2 and "standard input is not UTF-8 text (byte 0xe9 in position 3)" in result.err

    def test_the_package_says_which_command_was_meant(self) -> None:
        command = [sys.executable, "-m", "hf_model", "generate", "--prompt", "a b"]
        process = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=300)
        assert process.returncode == 2 and "custom-gpt-generate --prompt 'a b'" in process.stderr

    def test_the_prompt_is_one_or_a_file_of_them(self, call: Callable[..., Result]) -> None:
        result = call(generate, *EXAMPLE, *FRANCE, "--prompts_file", str(TOKENIZER))
        assert result.err == "generate.py: error: argument --prompt: not allowed with argument --prompts_file\n"

    @pytest.mark.parametrize("script", [generate, convert_checkpoint], ids=lambda script: script.__name__)
    def test_the_version_names_the_libraries_too(self, script: ModuleType, call: Callable[..., Result]) -> None:
        result = call(script, "--version")
        assert result.status == 0
        assert result.out.startswith(f"custom-gpt-hf {hf_model.__version__} (transformers {transformers.__version__}")

    def test_generate_has_the_user_document_s_defaults(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out" / "finetune").mkdir(parents=True)
        (tmp_path / "out" / "finetune" / "ckpt.pt").touch()
        monkeypatch.chdir(tmp_path)
        args = vars(generate_command.parse_arguments(["--prompt", "Hello"]))
        assert {
            "checkpoint_path": "out/finetune/ckpt.pt",
            "tokenizer_path": "auto",  # where the original keeps it, too
            "prompt": "Hello",
            "input_text": "",
            "max_new_tokens": 150,
            "temperature": 0.8,
            "top_k": 50,
            "repetition_penalty": 1.0,
            "device": None,
            "seed": [1337],
        }.items() <= args.items()

    def test_the_page_of_options_is_the_parsers_own(self) -> None:
        page = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))["page"]()
        assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == page, "run python -m docs.make_cli"
        for parser in (generate_command.make_parser(), convert_command.make_parser()):
            assert all(f"| `{name}" in page for name in vars(parser.parse_args([])) for name in [f"--{name}"])

    def test_convert_writes_beside_the_checkpoint_unless_told_otherwise(self) -> None:
        assert convert_command.parse_arguments([*EXAMPLE]).output_dir == CAPITALS / "hf"
        assert convert_command.parse_arguments([*EXAMPLE, "--output_dir", "out"]).output_dir == Path("out")

    def test_a_process_refuses_before_the_slow_imports(self) -> None:
        arguments = [*EXAMPLE, *FRANCE, "--temperature", "-1"]
        command = [sys.executable, "-X", "importtime", str(ROOT / "generate.py"), *arguments]
        process = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
        *imports, error = process.stderr.splitlines()
        assert (process.returncode, process.stdout) == (2, "")
        assert error == "generate.py: error: argument --temperature: must be at least 0, got -1"
        imported = {line.rpartition("|")[2].strip() for line in imports}
        assert "argparse" in imported
        assert not {"torch", "transformers", "tokenizers"} & imported

    @pytest.mark.parametrize(
        ("script", "typed", "offered"),
        [
            ("generate.py", "--te", ["--temperature"]),
            ("generate.py", "--dtype f", ["float16", "float32"]),
            ("convert_checkpoint.py", "--format gg", ["gguf"]),
            ("convert_checkpoint.py", "--zz", []),
        ],
    )
    def test_the_tab_key_completes_arguments_and_their_values(
        self, tmp_path: Path, script: str, typed: str, offered: list[str]
    ) -> None:
        pytest.importorskip("argcomplete")
        line, found = f"{script} {typed}", tmp_path / "found"
        asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
        environment = {**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(found)}
        subprocess.run([sys.executable, str(ROOT / script)], env=environment, check=True, timeout=60)
        assert sorted(found.read_text().split()) == offered


class TestGenerate:
    def test_prints_the_user_document_s_items_in_its_order(self, call: Callable[..., Result]) -> None:
        result = call(generate, *EXAMPLE, *FRANCE, "--device", "cpu")
        *lines, speed = result.out.splitlines()
        assert (result.status, result.err) == (0, "")
        assert lines == [
            "device      cpu",
            f"checkpoint  {CHECKPOINT}",
            f"tokenizer   {TOKENIZER}",
            "model       3 layers, 3 heads, 96 wide, context 64, vocabulary 1024, no biases, head untied, gelu",
            "parameters  535,200 in float32",
            "content     Instruction: What is the capital of France? Response:",
            "",
            "[BOS]Instruction: What is the capital of France? Response: Paris[EOS]",
            "",
        ]
        n_tokens, tokens, _, seconds, _, rate, unit = speed.replace(",", "").split()
        assert (tokens, unit) == ("tokens", "tokens/s")
        assert int(n_tokens) / (float(seconds) + 0.006) <= float(rate)  # the seconds are rounded to hundredths
        assert float(rate) * (float(seconds) - 0.006) <= int(n_tokens)

    def test_the_input_goes_into_the_content(self, call: Callable[..., Result]) -> None:
        result = call(generate, *EXAMPLE, "--prompt", "Name the capital of the country.", "--input_text", "Peru")
        assert "content     Instruction: Name the capital of the country. Input: Peru Response:\n" in result.out
        assert "\n[BOS]Instruction: Name the capital of the country. Input: Peru Response: Lima[EOS]\n" in result.out

    def test_response_only_prints_just_the_answer_to_standard_output(self, call: Callable[..., Result]) -> None:
        result = call(generate, *EXAMPLE, *FRANCE, "--response_only")
        assert (result.status, result.out) == (0, "Paris\n")
        assert [line.split()[0] for line in result.err.splitlines() if line][:6] == [
            "device",
            "checkpoint",
            "tokenizer",
            "model",
            "parameters",
            "content",
        ]
        assert result.err.endswith("tokens/s\n")

    @pytest.mark.parametrize("also", [(), ("--response_only",)], ids=["whole text", "response only"])
    @pytest.mark.parametrize("prompt", ["What is the capital of France?", "Sing!"])
    def test_streamed_text_is_the_text(self, prompt: str, also: tuple[str, ...], call: Callable[..., Result]) -> None:
        arguments = (*EXAMPLE, "--prompt", prompt, "--temperature", "2", "--max_new_tokens", "100", *also)
        streamed, whole = call(generate, *arguments).out, call(generate, *arguments, "--no_stream").out
        assert whole
        assert re.sub(r"\d+ tokens in .*", "", streamed) == re.sub(r"\d+ tokens in .*", "", whole)

    def test_a_converted_folder_needs_no_tokenizer(self, capitals: Path, call: Callable[..., Result]) -> None:
        result = call(generate, "--checkpoint_path", str(capitals), *FRANCE, "--response_only")
        assert (result.status, result.out) == (0, "Paris\n")
        assert f"checkpoint  {capitals}\ntokenizer   {capitals}\n" in result.err

    def test_temperature_0_takes_the_likeliest_token_whatever_the_seed(self, call: Callable[..., Result]) -> None:
        arguments = (*EXAMPLE, "--prompt", "Sing!", "--response_only", "--max_new_tokens", "30")
        greedy = {call(generate, *arguments, "--temperature", "0", "--seed", str(seed)).out for seed in range(3)}
        top_1 = call(generate, *arguments, "--temperature", "5", "--top_k", "1").out
        assert greedy == {top_1}

    def test_a_static_cache_gives_the_same_text(
        self, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = []

        class Spy(transformers.StaticCache):
            def __init__(self, **how: object):
                made.append(how)
                super().__init__(**how)

        monkeypatch.setattr("transformers.generation.utils.StaticCache", Spy)
        arguments = (*EXAMPLE, "--prompt", "Sing!", "--response_only", "--temperature", "0", "--device", "cpu")
        static = call(generate, *arguments, "--cache_implementation", "static").out
        assert made[0]["max_cache_len"] == 64  # the context: 150 new tokens are asked for
        assert static == call(generate, *arguments).out

    def test_the_seed_makes_a_run_repeatable(self, call: Callable[..., Result]) -> None:
        arguments = (*EXAMPLE, "--prompt", "Sing!", "--response_only", "--temperature", "3")
        first, again, other = (call(generate, *arguments, "--seed", seed).out for seed in ("1", "1", "2"))
        assert first == again != other

    def test_several_sequences_are_printed_one_after_the_other(self, call: Callable[..., Result]) -> None:
        result = call(generate, *EXAMPLE, *FRANCE, "--response_only", "--num_return_sequences", "3")
        assert result.out == "Paris\nParis\nParis\n"

    def test_samples_of_seeds_are_labelled(self, call: Callable[..., Result]) -> None:
        result = call(generate, *EXAMPLE, *FRANCE, "--seed", "1", "2", "--num_return_sequences", "2")
        lines = result.out.splitlines()[7:-2]
        text = "[BOS]Instruction: What is the capital of France? Response: Paris[EOS]"
        assert lines == [
            *("--- seed 1, answer 1 of 2", text, "--- seed 1, answer 2 of 2", text),
            *("--- seed 2, answer 1 of 2", text, "--- seed 2, answer 2 of 2", text),
        ]

    def test_json_is_an_object_a_line_for_programs(self, call: Callable[..., Result]) -> None:
        arguments = (*EXAMPLE, "--prompt", "Name the capital of the country.", "--input_text", "Peru", "--json")
        result = call(generate, *arguments, "--seed", "1", "2")
        first, second = map(json.loads, result.out.splitlines())
        assert first.pop("seconds") > 0
        assert first.pop("prompt_tokens") == first.pop("prompt_tokens_seen") > 10
        assert first == {
            "prompt": "Name the capital of the country.",
            "input": "Peru",
            "text": "[BOS]Instruction: Name the capital of the country. Input: Peru Response: Lima[EOS]",
            "response": "Lima",
            "tokens": first["tokens"],
            "finish_reason": "stop",
            "seed": 1,
        }
        assert second["seed"] == 2
        assert "device" in result.err
        cut = json.loads(call(generate, *arguments, "--max_new_tokens", "1", "--quiet").out)
        assert (cut["tokens"], cut["finish_reason"]) == (1, "length")

    def test_json_is_right_on_a_console_that_is_not_utf_8(
        self, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        monkeypatch.setattr(sys, "stdout", console)
        assert call(generate, *EXAMPLE, "--prompt", "漢字 é", "--json", "--max_new_tokens", "1").status == 0
        assert json.loads(console.buffer.getvalue())["prompt"] == "漢字 é"

    def test_a_terminal_gets_escapes_for_what_would_control_it(
        self, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompt = "a\x1b[2J\rb\u202ec"
        assert prompt in call(generate, *EXAMPLE, "--prompt", prompt, "--max_new_tokens", "1", "--quiet").out
        terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stdout", terminal)
        assert call(generate, *EXAMPLE, "--prompt", prompt, "--max_new_tokens", "1").status == 0
        shown = terminal.buffer.getvalue().decode()
        assert r"a\x1b[2J\x0db\u202ec" in shown.replace("\\r", "\\x0d") and "\x1b" not in shown

    def test_a_prompt_longer_than_the_context_is_said_to_be_cut(self, call: Callable[..., Result]) -> None:
        arguments = (*EXAMPLE, "--prompt", "France " * 100, "--max_new_tokens", "1")
        result = call(generate, *arguments, "--json")
        fields = json.loads(result.out)
        assert fields["prompt_tokens"] > 100 and fields["prompt_tokens_seen"] == 64
        assert f"note: the prompt is {fields['prompt_tokens']} tokens long; the model sees the last 64" in result.err
        assert call(generate, *arguments, "--quiet").err == ""

    def test_of_a_very_long_prompt_the_end_is_encoded_and_this_is_said(
        self, call: Callable[..., Result], tmp_path: Path
    ) -> None:
        (tmp_path / "long.txt").write_text("France " * 100_000)
        arguments = (*EXAMPLE, "--prompt", f"FILE:{tmp_path / 'long.txt'}", "--max_new_tokens", "1")
        result = call(generate, *arguments, "--json")
        fields = json.loads(result.out)
        assert fields["prompt_tokens"] is None and fields["prompt_tokens_seen"] == 64
        assert "characters long; the model sees the last 64 tokens of it" in result.err
        assert "longer than the context" in call(generate, *arguments, "--score", " Paris").err

    def test_records_longer_than_the_context_are_counted(self, call: Callable[..., Result], tmp_path: Path) -> None:
        texts = ("France " * 100, "What is the capital of France?")
        (tmp_path / "in.jsonl").write_text("".join(json.dumps({"instruction": text}) + "\n" for text in texts))
        files = ("--prompts_file", f"{tmp_path}/in.jsonl", "--output_file", f"{tmp_path}/out.jsonl")
        result = call(generate, *EXAMPLE, *files, "--max_new_tokens", "4")
        assert "1 of 2 prompts; the model sees their last 64 tokens" in result.err

    def test_a_batch_run_says_a_line_a_minute_where_there_is_no_terminal(
        self, call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "in.jsonl").write_text('{"instruction": "What is the capital of France?"}\n' * 3)
        files = ("--prompts_file", f"{tmp_path}/in.jsonl", "--output_file")
        options = ("--batch_size", "1", "--max_new_tokens", "2")
        assert "records answered" not in call(generate, *EXAMPLE, *files, f"{tmp_path}/1.jsonl", *options).err
        monkeypatch.setattr("hf_model_cli.answers.A_MINUTE", 0.0)
        assert "2 of 3 records answered\n" in call(generate, *EXAMPLE, *files, f"{tmp_path}/2.jsonl", *options).err
        assert call(generate, *EXAMPLE, *files, f"{tmp_path}/3.jsonl", *options, "--quiet").err == ""

    def test_a_long_conversion_names_its_steps(
        self, call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "writing" not in call(convert_checkpoint, *EXAMPLE, "--output_dir", f"{tmp_path}/1").err
        monkeypatch.setattr("hf_model_cli.run.A_FEW_SECONDS", 0.0)
        monkeypatch.setattr("hf_model_cli.run.LOOK_AGAIN", 0.001)
        result = call(convert_checkpoint, *EXAMPLE, "--output_dir", f"{tmp_path}/2")
        assert result.status == 0
        assert f"writing {tmp_path / '2'} …\n" in result.err
        assert "comparing what was written with its source …\n" in result.err

    def test_an_answer_that_repeats_one_token_has_a_hint(self, tmp_path: Path, call: Callable[..., Result]) -> None:
        model = gpt(vocab_size=1000)
        model.lm_head.weight.data.zero_()
        model.lm_head.weight.data[40] = model.transformer.ln_f.weight.data.sign()
        checkpoint, tokenizer = save_files(tmp_path, model)
        arguments = ("--checkpoint_path", str(checkpoint), "--tokenizer_path", str(tokenizer), "--temperature", "0")
        arguments += ("--prompt", "Sing!", "--max_new_tokens", "30")
        unknown, repeats = call(generate, *arguments).err.splitlines()
        assert "the tokenizer has 300 tokens and the model 1,000" in unknown and "--inspect" in unknown
        assert "repeats the token" in repeats and "--inspect" in repeats
        assert call(generate, *arguments, "--quiet").err == ""

    def test_quiet_is_the_text_alone(self, call: Callable[..., Result]) -> None:
        text = "[BOS]Instruction: What is the capital of France? Response: Paris[EOS]\n"
        assert call(generate, *EXAMPLE, *FRANCE, "--quiet") == Result(0, text, "")
        assert call(generate, *EXAMPLE, *FRANCE, "--quiet", "--response_only") == Result(0, "Paris\n", "")

    @pytest.mark.parametrize("arguments", [(), ("--prompt", "-")], ids=["a pipe", "a dash"])
    def test_the_prompt_may_come_by_a_pipe(
        self, arguments: tuple[str, ...], call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is the capital of France?\n")))
        assert call(generate, *EXAMPLE, *arguments, "--response_only", "--quiet").out == "Paris\n"

    def test_an_empty_pipe_is_no_prompt(self, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        assert "one of the arguments --prompt, --prompts_file and --interactive is" in call(generate, *EXAMPLE).err
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
        assert "--prompt: must not be empty" in call(generate, *EXAMPLE, "--prompt", "-").err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--json",), "argument --json: needs a --prompt, or standard input from a pipe"),
            (("--top_candidates", "2"), "argument --top_candidates: needs a --prompt, or standard input from a pipe"),
            (("--seed", "1", "2"), "argument --seed: more than one needs a --prompt, or standard input from a pipe"),
            (("--num_return_sequences", "2"), "argument --num_return_sequences: more than one needs a --prompt"),
            (("--output_file", "x"), "arguments --prompts_file and --output_file: go together"),
            (("--interactive", "--json"), "argument --json: needs a --prompt, or standard input from a pipe"),
            (("--interactive", "--seed", "1", "2"), "argument --seed: a conversation gives one answer at a time"),
        ],
    )
    def test_what_a_prompt_line_has_no_use_for_is_refused_in_the_user_s_own_words(
        self,
        arguments: tuple[str, ...],
        said: str,
        call: Callable[..., Result],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        terminal = io.TextIOWrapper(io.BytesIO(b""))
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stdin", terminal)
        assert said in call(generate, *EXAMPLE, *arguments).err

    @pytest.mark.parametrize("arguments", [(), ("--prompt", "-"), ("--interactive", "--quiet")])
    def test_a_pipe_that_never_ends_is_one_line(
        self, arguments: tuple[str, ...], call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Path("/dev/zero").open(encoding="utf-8") as zeros:
            monkeypatch.setattr(sys, "stdin", zeros)
            result = call(generate, *EXAMPLE, *arguments)
        assert result.status == 2
        assert "standard input" in result.err and "more than 64 Mi" in result.err
        assert result.err.count("\n") == 1

    def test_a_file_of_prompts_that_never_ends_is_one_line(self, call: Callable[..., Result], tmp_path: Path) -> None:
        files = ("--prompts_file", "/dev/zero", "--output_file", str(tmp_path / "out.jsonl"))
        result = call(generate, *EXAMPLE, *files)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert "/dev/zero: is larger than" in result.err

    def test_a_finished_file_of_prompts_is_done_and_replaced_only_when_told(
        self, capitals: Path, call: Callable[..., Result], tmp_path: Path
    ) -> None:
        (tmp_path / "in.jsonl").write_text('{"instruction": "What is the capital of France?"}\n')
        output = tmp_path / "out.jsonl"
        arguments = ("--checkpoint_path", str(capitals), "--prompts_file", str(tmp_path / "in.jsonl"))
        arguments += ("--output_file", str(output), "--temperature", "0")
        assert call(generate, *arguments).status == 0
        again = call(generate, *arguments)
        assert (again.status, again.err, again.out.count("\n")) == (0, "", 1) and str(output) in again.out
        assert call(generate, *arguments, "--max_new_tokens", "1", "--overwrite").status == 0
        assert json.loads(output.read_text())["response"] != "Paris"
        (tmp_path / "in.jsonl").write_text('{"instruction": "What is the capital of Peru?"}\n')
        refused = call(generate, *arguments)
        assert refused.status == 2 and "--overwrite" in refused.err

    @pytest.mark.skipif(not Path("/dev/stdin").exists(), reason="needs /dev/stdin")
    def test_a_file_of_prompts_may_come_by_a_pipe(self, capitals: Path, tmp_path: Path) -> None:
        command = [sys.executable, str(ROOT / "generate.py"), "--checkpoint_path", str(capitals), "--temperature", "0"]
        command += ["--prompts_file", "-", "--output_file", str(tmp_path / "out.jsonl")]
        record = '{"instruction": "What is the capital of France?"}\n'
        subprocess.run(command, input=record, encoding="utf-8", check=True, timeout=300)
        assert json.loads((tmp_path / "out.jsonl").read_text())["response"] == "Paris"

    @pytest.mark.parametrize("also", [(), ("--no_stream",), ("--num_beams", "2")], ids=["streamed", "whole", "beams"])
    @pytest.mark.parametrize("stop, answer", [("ri", "Pa"), ("P", ""), ("s", "Pari"), ("xyz", "Paris")])
    def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(
        self, stop: str, answer: str, also: tuple[str, ...], call: Callable[..., Result]
    ) -> None:
        arguments = (*EXAMPLE, *FRANCE, "--quiet", "--temperature", "0", "--stop", "zzz", "--stop", stop, *also)
        assert call(generate, *arguments, "--response_only").out == f"{answer}\n"
        whole = call(generate, *arguments).out
        assert whole.startswith(f"[BOS]Instruction: What is the capital of France? Response: {answer}")
        assert whole.endswith(f"Response: {answer}" + ("[EOS]\n" if answer == "Paris" else "\n"))

    def test_a_stop_string_may_be_escaped(self) -> None:
        arguments = [*EXAMPLE, *FRANCE, "--stop", r"\n", "--stop", r"\\n", "--stop", r"a\tb"]
        assert generate_command.parse_arguments(arguments).stop == ["\n", "\\n", "a\tb"]

    def test_the_dtype_can_be_chosen(self, call: Callable[..., Result]) -> None:
        result = call(generate, *EXAMPLE, *FRANCE, "--response_only", "--dtype", "bfloat16")
        assert result.out == "Paris\n"
        assert "parameters  535,200 in bfloat16\n" in result.err

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--device", "abacus"), "--device abacus: there is no such device here; there is "),
            (("--checkpoint_path", str(TOKENIZER)), f"{TOKENIZER}: is a JSON file, not a checkpoint"),
            (("--tokenizer_path", str(CHECKPOINT)), f"{CHECKPOINT}: is not the JSON of a `tokenizers` tokenizer"),
            (("--n_head", "7"), f"{CHECKPOINT}: n_head=7 does not divide n_embd=96"),
        ],
    )
    def test_what_only_loading_tells_is_one_line_too(
        self, arguments: tuple[str, ...], message: str, call: Callable[..., Result]
    ) -> None:
        result = call(generate, *EXAMPLE, *FRANCE, "--response_only", *arguments)
        *_, error = result.err.splitlines()
        assert (result.status, result.out) == (2, "")
        assert error.startswith(f"generate.py: error: {message}")

    @pytest.mark.parametrize("error", [OSError("libcuda.so.1: cannot open"), BrokenPipeError("the driver is gone")])
    def test_a_system_error_that_is_not_of_the_output_is_not_called_one(
        self, error: OSError, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def pick_device(name: str | None) -> None:
            raise error

        monkeypatch.setattr(devices, "pick_device", pick_device)
        assert call(generate, *EXAMPLE, *FRANCE) == Result(2, "", f"generate.py: error: {error}\n")

    @pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
    def test_ctrl_c_ends_the_text_and_exits_with_130(self, tmp_path: Path) -> None:
        model = gpt()
        model.lm_head.weight.data[EOS] = 0  # greedy decoding never takes it
        checkpoint_path, tokenizer_path = save_files(tmp_path, model)
        files = ["--checkpoint_path", str(checkpoint_path), "--tokenizer_path", str(tokenizer_path)]
        endless = [*files, "--prompt", "Sing!", "--temperature", "0", "--max_new_tokens", "1000000"]
        command = [sys.executable, str(ROOT / "generate.py"), *endless]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as process:
            for line in process.stdout:
                if line == "\n":  # after it the text begins
                    break
            assert process.stdout.read(20) == "[BOS]Instruction: Si"
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "")
        assert rest.endswith("\n")


@pytest.fixture(scope="module")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The example, copied elsewhere and converted by a process, and what that said."""
    folder = tmp_path_factory.mktemp("my model")
    checkpoint_path = shutil.copy(CHECKPOINT, folder)
    arguments = ("--checkpoint_path", str(checkpoint_path), "--tokenizer_path", str(TOKENIZER))
    return folder, run("convert_checkpoint.py", *arguments)


class TestConvert:
    def test_says_what_it_read_wrote_and_verified(self, conversion: tuple[Path, Result]) -> None:
        folder, result = conversion
        assert (result.status, result.err) == (0, "")
        items = [line.split()[0] for line in result.out.splitlines() if line and not line.startswith(" ")]
        assert items == ["source", "architecture", "parameters", "tokenizer", "written", "verified", "Try"]
        assert f"\nwritten       {folder / 'hf'}\n" in result.out

    @pytest.mark.parametrize("how", [(), ("--inspect",)], ids=["convert", "inspect"])
    def test_a_token_s_name_makes_no_line_of_the_report(
        self, how: tuple, tmp_path: Path, call: Callable[..., Result]
    ) -> None:
        files = save_files(tmp_path, gpt())
        name = json.dumps("x\nverified      all of it\r\x1b[2J")[1:-1]
        files[1].write_text(files[1].read_text("utf-8").replace("[EOS]", name), "utf-8")
        arguments = ("--checkpoint_path", str(files[0]), "--tokenizer_path", str(files[1]), "--raw")
        result = call(convert_checkpoint, *arguments, *how, *(() if how else ("--output_dir", f"{tmp_path}/hf")))
        assert r"x\nverified      all of it\r\x1b[2J" in result.out
        assert not any(line.startswith("verified      all of it") for line in result.out.splitlines())

    def test_the_command_that_it_suggests_answers(self, conversion: tuple[Path, Result]) -> None:
        _, result = conversion
        _, _, suggestions = result.out.partition("Try it:\n")
        python, script, *arguments = shlex.split(suggestions.splitlines()[0])
        assert python == "python"
        answer = run(script, *arguments, "--response_only")
        assert (answer.status, answer.out) == (0, "Paris\n")

    def test_the_help_gives_each_default_once(self, call: Callable[..., Result]) -> None:
        for script in (generate, convert_checkpoint):
            text = " ".join(call(script, "--help").out.split())
            for argument in re.split(r" (?=--\w+ )", text):
                assert argument.count("default") <= 1, argument
            assert "None" not in text

    def test_a_failed_conversion_is_one_line(self, tmp_path: Path, call: Callable[..., Result]) -> None:
        checkpoint_path, _ = save_files(tmp_path, gpt(vocab_size=299))
        arguments = ("--checkpoint_path", str(checkpoint_path), "--tokenizer_path", str(tmp_path / "tokenizer.json"))
        result = call(convert_checkpoint, *arguments)
        assert result.status == 2
        assert result.err.startswith(f"convert_checkpoint.py: error: {tmp_path / 'tokenizer.json'}: has 300 tokens")
        assert result.err.count("\n") == 1

    def test_what_it_suggests_is_quoted_for_a_shell_and_is_no_name_on_the_hub(
        self, tmp_path: Path, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        prompt = "It's $(touch x) > `y`\n\\"
        result = call(convert_checkpoint, *EXAMPLE, "--output_dir", "a/b", "--example_prompt", prompt, "--no_verify")
        words = shlex.split(result.out.partition("Try it:\n")[2])
        assert words[words.index("--prompt") + 1] == prompt
        assert words[words.index("--checkpoint_path") + 1] == words[words.index("serve") + 1] == "./a/b"

    def test_what_is_there_is_replaced_only_when_told(self, tmp_path: Path, call: Callable[..., Result]) -> None:
        checkpoint_path, tokenizer_path = save_files(tmp_path, gpt())
        arguments = ("--checkpoint_path", str(checkpoint_path), "--tokenizer_path", str(tokenizer_path))
        assert [call(convert_checkpoint, *arguments, *also).status for also in ((), (), ("--overwrite",))] == [0, 2, 0]

    def test_the_options_reach_the_conversion(self, tmp_path: Path, call: Callable[..., Result]) -> None:
        checkpoint_path, tokenizer_path = save_files(tmp_path, gpt())
        result = call(
            convert_checkpoint,
            *("--checkpoint_path", str(checkpoint_path), "--tokenizer_path", str(tokenizer_path)),
            *("--output_dir", str(tmp_path / "elsewhere"), "--dtype", "bfloat16", "--max_shard_size", "30kb"),
            *("--n_head", "2", "--activation", "gelu_new", "--no_verify"),
        )
        assert result.status == 0
        assert "2 layers, 2 heads, " in result.out
        assert "gelu_new\n" in result.out
        assert " in bfloat16\n" in result.out
        assert "verified" not in result.out
        assert len(list((tmp_path / "elsewhere").glob("*.safetensors"))) > 1
