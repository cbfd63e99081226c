"""Whatever a path, an option or a file says: one line on standard error, exit status 2, and nothing written."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_model.output_dir import MANIFEST
from hf_model_cli import convert, generate, run
from tests.reliability.files import save, weights
from tests.tiny import CHECKPOINT, ROOT, TOKENIZER

FILES = ["--checkpoint_path", str(CHECKPOINT), "--tokenizer_path", str(TOKENIZER)]


def call(main: Callable[[], int], name: str, *arguments: str | Path) -> int:
    """A command in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            return main()
        except SystemExit as end:
            return int(end.code or 0)


def converts(*arguments: str | Path) -> int:
    return call(convert.main, "convert_checkpoint.py", *arguments)


def generates(*arguments: str | Path) -> int:
    return call(generate.main, "generate.py", *arguments)


def the_line(capsys: pytest.CaptureFixture) -> str:
    error: str = capsys.readouterr().err
    assert error.count("\n") == 1 and error[:-1].isprintable(), error
    assert "error: " in error and len(error) < 1000
    return error


LONG, NEWLINE, NOT_UTF8 = "x" * 5000, "a\nTraceback (most recent call last):\nb", os.fsdecode(b"caf\xe9")


class TestPaths:
    @pytest.mark.parametrize("name", [LONG, "x" * 300, NEWLINE, NOT_UTF8, "\x1b[2J", "a/" * 2500, " ", "nowhere/x"])
    @pytest.mark.parametrize("option", ["--checkpoint_path", "--tokenizer_path"])
    def test_that_are_not_there(self, option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        for command in (converts, generates):
            prompt = ["--prompt", "a"] if command is generates else ["--output_dir", str(tmp_path / "hf")]
            assert command(*FILES, *prompt, option, str(tmp_path / name)) == 2
            assert option in the_line(capsys)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", [LONG, "x" * 300, NOT_UTF8, "file/hf", "\ud800"])
    def test_that_cannot_be_written(self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        (tmp_path / "file").write_text("mine")
        assert converts(*FILES, "--output_dir", str(tmp_path / name)) == 2
        assert str(tmp_path)[:5] in the_line(capsys)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]

    @pytest.mark.parametrize("name", [NEWLINE, NOT_UTF8, "-x", "a b", "ü", "%s{}"])
    def test_that_are_odd_are_read(self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        odd = tmp_path / name
        odd.write_bytes(CHECKPOINT.read_bytes())
        how = ["--prompt", "What is the capital of France?", "--temperature", "0", "--max_new_tokens", "5"]
        assert generates(*FILES, *how, "--checkpoint_path", odd) == 0
        assert "Response: Paris" in capsys.readouterr().out

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may enter every folder")
    def test_in_a_folder_that_may_not_be_entered(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0)
        for option in ("--checkpoint_path", "--tokenizer_path"):
            assert converts(*FILES, option, closed / "x") == 2
            assert "cannot be reached (Permission denied)" in the_line(capsys)

    @pytest.mark.parametrize("name", ["prompts.jsonl", "out.jsonl"])
    def test_of_a_batch_run(self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        prompts, output = tmp_path / "in", tmp_path / "out"
        prompts.write_text('{"instruction": "a"}\n')
        for path in (LONG, "nowhere/x", "in/x"):
            files = (tmp_path / path, output) if name.startswith("prompts") else (prompts, tmp_path / path)
            assert generates(*FILES, "--prompts_file", files[0], "--output_file", files[1]) == 2
            the_line(capsys)
        assert list(tmp_path.iterdir()) == [prompts]

    def test_of_a_current_folder_that_is_gone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        assert converts(*FILES, "--output_dir", "hf") == 2
        assert "the current folder is gone" in the_line(capsys)


@pytest.mark.parametrize(
    "size", ["5", "0GB", "5 GB", "-5GB", "1e3GB", "9" * 400 + "GB", "GB", "", "5GiBs", "inf", "5XB"]
)
def test_a_shard_size_needs_a_unit(size: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert converts(*FILES, "--output_dir", tmp_path / "hf", f"--max_shard_size={size}") == 2
    assert "must be a size such as 500MB or 5GB" in the_line(capsys)


@pytest.mark.parametrize("size", ["100KB", "1.5MB", "1gb", "999999TB"])
def test_a_shard_size_with_one_is_taken(size: str, tmp_path: Path) -> None:
    assert converts(*FILES, "--output_dir", tmp_path / "hf", f"--max_shard_size={size}") == 0


@pytest.mark.parametrize("value", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (2, 2)], ids=str)
def test_a_tensor_of_any_type_as_the_number_of_heads(
    value: torch.dtype, shape: tuple, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = {"model": weights(vocab_size=1024), "model_args": {"n_head": torch.zeros(shape).to(value)}}
    path = save(tmp_path / "ckpt.pt", content)
    assert converts(*FILES, "--checkpoint_path", path, "--output_dir", tmp_path / "hf") == 2
    assert "n_head=" in the_line(capsys)


@pytest.mark.parametrize(
    "line", ["[" * 10**5, '{"instruction": "a", "x": 1e999}', '{"instruction": "a", "x": -Infinity}']
)
def test_a_record_that_is_no_json_for_others(line: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "in").write_text(line + "\n")
    assert generates(*FILES, "--prompts_file", tmp_path / "in", "--output_file", tmp_path / "out") == 2
    assert "in, line 1: " in the_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_panic_of_the_tokenizer_s_library_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    arguments = [*FILES, "--tokenizer_path", tmp_path / "tokenizer.json", "--output_dir", tmp_path / "hf"]
    assert converts(*arguments) == 2
    assert "loading it crashes the library (Precompiled: " in the_line(capfd)


class TestSignals:
    """They are sent as soon as the program can have begun, and later: in its imports, in its work."""

    @pytest.mark.parametrize("seconds", [0.15, 0.6, 2.5])
    @pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
    def test_end_it_without_a_traceback(self, number: int, status: int, seconds: float, tmp_path: Path) -> None:
        command = [sys.executable, ROOT / "convert_checkpoint.py", *FILES, "--output_dir", tmp_path / "deep" / "hf"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
        if (tmp_path / "deep" / "hf" / MANIFEST).exists():
            return  # a fast machine had done the work before the signal came
        # Python itself, before it comes to this program, ends by the signal or shows where in its own start it was.
        assert process.returncode in (status, -number) or "site" in error
        assert "Traceback" not in error or "<frozen" in error
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"]], ids=str)
def test_a_full_disk_behind_the_output_is_an_error_that_says_so(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "convert_checkpoint.py", *FILES, "--output_dir", tmp_path / "hf", *arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "convert_checkpoint.py: error: the output cannot be written (No space left on device)\n"
    assert list(tmp_path.iterdir()) == []


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture) -> None:
    def warn(args: object) -> None:
        warnings.warn("a\nb", stacklevel=1)

    assert run.run_command(warn, lambda: None) == 0  # type: ignore[arg-type,return-value]
    assert capsys.readouterr().err == "warning: a\\nb\n"


def test_a_variable_that_the_libraries_cannot_read_is_one_line() -> None:
    command = [sys.executable, ROOT / "generate.py", *FILES, "--prompt", "a"]
    done = subprocess.run(
        command, env=os.environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "rubbish"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "error: the libraries cannot be loaded (" in done.stderr and "variable of the environment" in done.stderr


def test_deep_json_and_huge_numbers_are_refused_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    for text in ("[" * 10**5, '{"model": ' * 10**5, json.dumps({"model": {"type": "BPE", "x": 1}})[:-2] + "e999}}"):
        tokenizer.write_text(text)
        assert converts("--checkpoint_path", CHECKPOINT, "--tokenizer_path", tokenizer) == 2
        assert "is not the JSON of a `tokenizers` tokenizer" in the_line(capsys)
