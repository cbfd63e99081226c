"""A file of records is answered in batches. The answers and their order are the same, whatever happens on the way."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from generate import main
from hf_model import batch, loading
from hf_model.batch import answer_file
from hf_model.errors import UserError
from hf_model.generation import Sampling, continue_prompts, encode, generate
from hf_model.loading import load
from hf_model.processes import Processes, join
from hf_model.tokenizer import format_prompt
from tests import relatives
from tests.tiny import ROOT

GREEDY = Sampling(temperature=0, max_new_tokens=12)
# Of mixed lengths, so that the batches, which are sorted by length, are not in the file's order.
RECORDS = [
    {"instruction": "Name the continent of the country.", "input": "Kenya"},
    {"instruction": "What is the capital of France?"},
    {"instruction": "Name the capital of the country.", "input": "Bosnia and Herzegovina", "output": "Sarajevo"},
    {"instruction": "On which continent is Peru?", "input": "", "id": 7},
    {"instruction": "Which country has the capital Tokyo?", "input": None, "tags": ["Asia", "漢字"]},
]
# What a launcher sets, and an earlier job may leave behind in a shell.
LEFT_BEHIND = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599"}
ANSWERS = ["Africa", "Paris", "Sarajevo", "South America", "Japan"]


@pytest.fixture(scope="module")
def model_and_tokenizer(capitals: Path) -> tuple:
    return load(capitals, None, device=torch.device("cpu"))


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write_records(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def interrupt() -> None:
    raise KeyboardInterrupt


def killed_after(n_batches: int, monkeypatch: pytest.MonkeyPatch, stop: Callable[[], None] = interrupt) -> None:
    """Let the model answer that many batches, then stop it: as Ctrl-C does, or in another way."""
    answered = []

    def continue_prompts(*args) -> list[str]:
        if len(answered) == n_batches:
            stop()
        answered.append(args)
        return original(*args)

    original = batch.continue_prompts
    monkeypatch.setattr(batch, "continue_prompts", continue_prompts)


class TestAnswers:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
    def test_every_record_gets_its_answer_in_the_order_of_the_file(
        self, model_and_tokenizer: tuple, tmp_path: Path, batch_size: int
    ) -> None:
        assert answer_file(*model_and_tokenizer, RECORDS, tmp_path / "out.jsonl", batch_size, GREEDY) == len(RECORDS)
        assert [record["response"] for record in written(tmp_path / "out.jsonl")] == ANSWERS

    def test_fields_of_the_record_are_kept(self, model_and_tokenizer: tuple, tmp_path: Path) -> None:
        answer_file(*model_and_tokenizer, RECORDS, tmp_path / "out.jsonl", 2, GREEDY)
        assert [{k: v for k, v in r.items() if k != "response"} for r in written(tmp_path / "out.jsonl")] == RECORDS

    def test_greedy_answers_equal_those_of_one_by_one_runs(self, model_and_tokenizer: tuple, tmp_path: Path) -> None:
        model, tokenizer = model_and_tokenizer
        # Long enough to run past the context of 64, with prompts that the model was not trained on.
        sampling = Sampling(temperature=0, max_new_tokens=80)
        records = [{"instruction": "the " * n} for n in (1, 70, 9, 30)] + RECORDS
        answer_file(model, tokenizer, records, tmp_path / "out.jsonl", 3, sampling)
        one_by_one = []
        for record in records:
            prompt = encode(tokenizer, format_prompt(record["instruction"], record.get("input") or ""))
            one_by_one += generate(model, tokenizer, prompt, sampling, response_only=True).texts
        assert [record["response"] for record in written(tmp_path / "out.jsonl")] == one_by_one

    @pytest.mark.parametrize("penalty", [1.3, 4.0])
    def test_a_repetition_penalty_counts_no_padding(self, penalty: float, tmp_path: Path) -> None:
        original = relatives.nano_character_model()
        original.transformer.wte.weight.data[0] = 2 * original.transformer.ln_f.bias  # the id 0 has large logits
        path = relatives.save_nanogpt(tmp_path, original)
        model, tokenizer = load(path, relatives.save_meta(tmp_path / "meta.pkl"), device=torch.device("cpu"))
        sampling = Sampling(temperature=0, max_new_tokens=20, repetition_penalty=penalty)
        prompts = [encode(tokenizer, text) for text in ("To be", "t", "not to be", "so", "that is", "be")]
        alone = [generate(model, tokenizer, prompt, sampling, response_only=True).texts[0] for prompt in prompts]
        assert continue_prompts(model, tokenizer, prompts, sampling) == alone

    def test_a_special_token_in_a_record_is_text_unless_parsed(
        self, model_and_tokenizer: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts = []
        monkeypatch.setattr(batch, "continue_prompts", lambda *args: [prompts.extend(args[2]) or ""])
        for name, parse in (("text", False), ("token", True)):
            answer_file(
                *model_and_tokenizer,
                [{"instruction": "a[EOS]b"}],
                tmp_path / name,
                1,
                GREEDY,
                parse_special_tokens=parse,
            )
        eos = model_and_tokenizer[1].eos_token_id
        assert [eos in prompt for prompt in prompts] == [False, True]

    def test_no_records_give_an_empty_file(self, model_and_tokenizer: tuple, tmp_path: Path) -> None:
        assert answer_file(*model_and_tokenizer, [], tmp_path / "out.jsonl", 2, GREEDY) == 0
        assert written(tmp_path / "out.jsonl") == []

    def test_an_unpaired_surrogate_in_a_record_is_written_as_it_came(
        self, model_and_tokenizer: tuple, tmp_path: Path
    ) -> None:
        records = [{"instruction": "What is the capital of France?", "note": "\ud83d"}]
        answer_file(*model_and_tokenizer, records, tmp_path / "out.jsonl", 1, GREEDY)
        assert written(tmp_path / "out.jsonl") == [{**records[0], "response": "Paris"}]


class TestResuming:
    def test_a_killed_run_goes_on_where_it_stopped(
        self, model_and_tokenizer: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out.jsonl"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            killed_after(1, patch)
            answer_file(*model_and_tokenizer, RECORDS, out, 2, GREEDY)
        assert not out.exists()
        assert answer_file(*model_and_tokenizer, RECORDS, out, 2, GREEDY) == len(RECORDS) - 2
        assert [record["response"] for record in written(out)] == ANSWERS
        assert list(tmp_path.iterdir()) == [out]  # no journal is left

    @pytest.mark.parametrize("lost", [2, 10, 25])
    def test_a_half_written_line_is_answered_again(
        self, model_and_tokenizer: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
    ) -> None:
        out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            killed_after(1, patch)
            answer_file(*model_and_tokenizer, RECORDS, out, 2, GREEDY)
        journal.write_bytes(journal.read_bytes()[:-lost])
        assert answer_file(*model_and_tokenizer, RECORDS, out, 2, GREEDY) == len(RECORDS) - 1
        assert [record["response"] for record in written(out)] == ANSWERS

    def unfinished(self, loaded: tuple, records: list[dict], sampling: Sampling, out: Path) -> None:
        """Leave the journal of a run that was stopped after a batch of two."""
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            killed_after(1, patch)
            answer_file(*loaded, records, out, 2, sampling)

    @pytest.mark.parametrize(
        ("records", "n_kept"),
        [
            ([*RECORDS, {"instruction": "What is the capital of Peru?"}], 2),
            ([{"instruction": "What is the capital of Peru?"}, *RECORDS], 2),
            (list(reversed(RECORDS)), 2),
            ([{**record, "id": index} for index, record in enumerate(RECORDS)], 2),
            ([*RECORDS[:2], {**RECORDS[2], "input": "Peru"}, *RECORDS[3:]], 1),
        ],
        ids=["appended", "inserted", "reordered", "with another field", "edited"],
    )
    def test_answers_are_kept_for_records_that_are_unchanged(
        self, model_and_tokenizer: tuple, tmp_path: Path, records: list[dict], n_kept: int
    ) -> None:
        out = tmp_path / "out.jsonl"
        self.unfinished(model_and_tokenizer, RECORDS, GREEDY, out)  # the longest two: one is the record that is edited
        assert answer_file(*model_and_tokenizer, records, out, 2, GREEDY) == len(records) - n_kept
        answer_file(*model_and_tokenizer, records, tmp_path / "at once.jsonl", 2, GREEDY)
        assert out.read_text() == (tmp_path / "at once.jsonl").read_text()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"max_new_tokens": 11}, r"max_new_tokens=12 \(now 11\)"),
            ({"temperature": 0.5}, r"temperature=0 \(now 0\.5\)"),
            ({"stop": ("a", "b")}, r"stop=\[\] \(now \['a', 'b'\]\)"),
        ],
        ids=str,
    )
    def test_other_options_are_an_error_that_names_the_choice(
        self, model_and_tokenizer: tuple, tmp_path: Path, options: dict, said: str
    ) -> None:
        out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
        self.unfinished(model_and_tokenizer, RECORDS, GREEDY, out)
        before = journal.read_bytes()
        sampling = dataclasses.replace(GREEDY, **options)
        with pytest.raises(UserError, match=rf"holds 2 answers .*{said}.* --overwrite .* --output_file"):
            answer_file(*model_and_tokenizer, RECORDS, out, 2, sampling)
        assert journal.read_bytes() == before
        assert answer_file(*model_and_tokenizer, RECORDS, out, 2, sampling, overwrite=True) == len(RECORDS)
        assert list(tmp_path.iterdir()) == [out]

    @pytest.mark.parametrize("options", [{"seed": 1}, {"top_k": 1}, {"cache_implementation": "static"}], ids=str)
    def test_options_that_greedy_answers_do_not_depend_on_may_change(
        self, model_and_tokenizer: tuple, tmp_path: Path, options: dict
    ) -> None:
        out = tmp_path / "out.jsonl"
        self.unfinished(model_and_tokenizer, RECORDS, GREEDY, out)
        assert answer_file(*model_and_tokenizer, RECORDS, out, 2, dataclasses.replace(GREEDY, **options)) == 3

    def test_another_model_is_an_error(self, model_and_tokenizer: tuple, tmp_path: Path) -> None:
        out, (model, tokenizer) = tmp_path / "out.jsonl", model_and_tokenizer
        other = copy.deepcopy(model)
        other.transformer.h[1].mlp.c_fc.weight.data[3, 4] += 1
        self.unfinished((other, tokenizer), RECORDS, GREEDY, out)
        with pytest.raises(UserError, match=r"holds 2 answers .*another model"):
            answer_file(model, tokenizer, RECORDS, out, 2, GREEDY)

    def test_an_interrupted_overwrite_goes_on(self, model_and_tokenizer: tuple, tmp_path: Path) -> None:
        out = tmp_path / "out.jsonl"
        answer_file(*model_and_tokenizer, RECORDS[:1], out, 2, GREEDY)
        before = out.read_bytes()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            killed_after(1, patch)
            answer_file(*model_and_tokenizer, RECORDS, out, 2, GREEDY, overwrite=True)
        assert out.read_bytes() == before
        assert answer_file(*model_and_tokenizer, RECORDS, out, 2, GREEDY, overwrite=True) == 3
        assert [record["response"] for record in written(out)] == ANSWERS

    def test_the_program_resumes_after_sigkill(
        self, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        prompts = write_records(tmp_path / "in.jsonl", RECORDS * 100)
        out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
        arguments = [
            *("generate.py", "--checkpoint_path", str(capitals), "--device", "cpu"),
            *(
                "--prompts_file",
                str(prompts),
                "--output_file",
                str(out),
                "--temperature",
                "0",
                "--max_new_tokens",
                "12",
            ),
        ]
        process = subprocess.Popen(
            [sys.executable, *arguments, "--batch_size", "1"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (journal.exists() and journal.read_text().count("\n") > 3):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not out.exists()
        # The batch size may change: greedy answers do not depend on it.
        monkeypatch.setattr(sys, "argv", [*arguments, "--batch_size", "64"])
        assert main() == 0
        answered_now = int(capsys.readouterr().out.split(" of them answered now")[0].split()[-1])
        assert answered_now < len(RECORDS) * 100 - 2
        assert [record["response"] for record in written(out)] == ANSWERS * 100

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_the_program_says_what_is_kept_when_it_is_stopped(
        self,
        capitals: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
        number: int,
        status: int,
    ) -> None:
        arguments = program(capitals, write_records(tmp_path / "in.jsonl", RECORDS), tmp_path / "out.jsonl")
        monkeypatch.setattr(sys, "argv", [*arguments, "--batch_size", "2"])
        with monkeypatch.context() as patch:
            killed_after(1, patch, lambda: os.kill(os.getpid(), number))
            assert main() == status
        kept = (
            f"2 of 5 records answered and kept in {tmp_path / 'out.jsonl.partial'}: the same command goes on from there"
        )
        assert kept in capsys.readouterr().err
        assert main() == 0
        assert "5 records, 3 of them answered now" in capsys.readouterr().out
        assert [record["response"] for record in written(tmp_path / "out.jsonl")] == ANSWERS

    @staticmethod
    def will_fail(how: str, capitals: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Prepare a call of the program with five records that fails after the first batch of two."""

        def fail() -> None:
            raise RuntimeError(how)

        arguments = program(capitals, write_records(folder / "in.jsonl", RECORDS), folder / "out.jsonl")
        monkeypatch.setattr(sys, "argv", [*arguments, "--batch_size", "2"])
        killed_after(1, monkeypatch, fail)

    def test_the_program_says_what_is_kept_when_it_fails(
        self, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        self.will_fail("CUDA error: device-side assert triggered", capitals, tmp_path, monkeypatch)
        with pytest.raises(RuntimeError):
            main()
        assert "2 of 5 records answered and kept" in capsys.readouterr().err

    def test_too_large_a_batch_is_told_from_other_trouble(
        self, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        self.will_fail("CUDA out of memory", capitals, tmp_path, monkeypatch)
        assert main() == 2
        error = capsys.readouterr().err
        assert "not enough memory to generate: free some, or choose a smaller --batch_size" in error
        assert "2 of 5 records answered and kept" in error

    def test_nothing_is_said_to_be_kept_of_another_s_run(
        self, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        (tmp_path / "out.jsonl.partial").write_text("mine")
        arguments = program(capitals, write_records(tmp_path / "in.jsonl", RECORDS), tmp_path / "out.jsonl")
        monkeypatch.setattr(sys, "argv", arguments)
        assert main() == 2
        assert "kept" not in capsys.readouterr().err


def program(model: Path, prompts: Path, output: Path) -> list[str]:
    files = ("--checkpoint_path", str(model), "--prompts_file", str(prompts), "--output_file", str(output))
    return ["generate.py", *files, "--device", "cpu", "--temperature", "0", "--max_new_tokens", "12"]


class TestProcesses:
    @pytest.mark.parametrize("n_items", range(8))
    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    def test_each_item_is_one_process_s(self, count: int, n_items: int) -> None:
        items = list(range(n_items))
        states = [
            SimpleNamespace(num_processes=count, process_index=index, is_main_process=index == 0)
            for index in range(count)
        ]
        shares = [Processes(state).share(items) for state in states]  # type: ignore[arg-type]
        assert sorted(item for share in shares for item in share) == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

    @pytest.mark.parametrize(
        ("trouble", "said"),
        [("CUDA out of memory. Tried", "not enough memory"), ("Connection closed by peer", "another process")],
    )
    def test_a_lack_of_memory_is_not_another_s_end(
        self, trouble: str, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(items: list) -> None:
            raise RuntimeError(trouble)

        monkeypatch.setattr("hf_model.processes.gather_object", fail)
        with pytest.raises(UserError, match=said):
            Processes(SimpleNamespace(num_processes=2, is_main_process=True)).gather([1])  # type: ignore[arg-type]

    LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")

    def test_two_share_the_records_and_go_on_where_they_were_killed(self, capitals: Path, tmp_path: Path) -> None:
        prompts, out = write_records(tmp_path / "in.jsonl", RECORDS * 60), tmp_path / "out.jsonl"
        arguments = [*self.LAUNCH, *program(capitals, prompts, out)]
        first = subprocess.Popen(
            [*arguments, "--batch_size", "1"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        journal = tmp_path / "out.jsonl.partial"
        while not (journal.exists() and journal.read_text().count("\n") > 5):
            assert first.poll() is None
            time.sleep(0.01)
        launched = psutil.Process(first.pid).children(recursive=True)
        for process in (first, *launched):  # they do not end with the launcher
            process.kill()
        psutil.wait_procs(launched)
        first.wait()
        assert not out.exists()
        second = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        assert second.returncode == 0, second.stderr
        assert second.stdout.count("device      cpu, 2 processes") == 1  # one of them speaks
        answered_now = int(second.stdout.split(" of them answered now")[0].split()[-1])
        assert 0 < answered_now < len(RECORDS) * 60 - 4
        assert [record["response"] for record in written(out)] == ANSWERS * 60
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({}, r"WORLD_SIZE=2, .* the other processes did not come within .*: unset WORLD_SIZE"),
            ({"RANK": "1", "LOCAL_RANK": "1"}, r"RANK=1, .* did not come within .*: unset WORLD_SIZE"),
            ({"RANK": "0", "MASTER_ADDR": "gone.invalid"}, "MASTER_ADDR=gone.invalid .*: unset WORLD_SIZE"),
            ({"RANK": "one"}, "is not a number .*: unset WORLD_SIZE"),
            ({"RANK": "2"}, "RANK=2, .* fit no process: unset WORLD_SIZE"),
        ],
    )
    def test_variables_that_an_earlier_job_left_are_named(
        self, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], said: str
    ) -> None:
        for name, value in (LEFT_BEHIND | changes).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("hf_model.processes.PATIENCE", 1.0)
        monkeypatch.setattr("hf_model.processes.A_WHILE", 0.2)
        lines: list[str] = []
        with pytest.raises(UserError, match=said):
            join(torch.device("cpu"), lines.append)
        assert len(lines) == ("fit" not in said and "number" not in said)

    def test_a_few_of_these_variables_start_a_run_of_one_process(
        self, monkeypatch: pytest.MonkeyPatch, capitals: Path, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "0")
        prompts, out = write_records(tmp_path / "in.jsonl", RECORDS), tmp_path / "out.jsonl"
        monkeypatch.setattr(sys, "argv", program(capitals, prompts, out))
        assert main() == 0
        assert [record["response"] for record in written(out)] == ANSWERS

    @pytest.mark.parametrize("also", [("--prompt", "What is the capital of France?"), ("--interactive",)])
    def test_several_answer_nothing_but_a_file(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, also: tuple[str, ...]
    ) -> None:
        for name, value in LEFT_BEHIND.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["generate.py", *also])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert "several processes share the records of a --prompts_file" in capsys.readouterr().err


class TestFinished:
    """A complete output file is left as it is, so that loops and `make` work."""

    @pytest.fixture
    def finished(self, model_and_tokenizer: tuple, tmp_path: Path) -> Path:
        answer_file(*model_and_tokenizer, RECORDS, tmp_path / "out.jsonl", 2, GREEDY)
        return tmp_path / "out.jsonl"

    def test_nothing_is_done_for_the_same_records(self, finished: Path, model_and_tokenizer: tuple) -> None:
        before = finished.read_bytes(), finished.stat().st_mtime_ns
        assert answer_file(*model_and_tokenizer, RECORDS, finished, 2, GREEDY) == 0
        assert (finished.read_bytes(), finished.stat().st_mtime_ns) == before
        assert list(finished.parent.iterdir()) == [finished]

    @pytest.mark.parametrize(
        "records", [RECORDS[:-1], [*RECORDS, RECORDS[0]], [{**RECORDS[0], "id": 8}, *RECORDS[1:]], []]
    )
    def test_other_records_are_an_error_that_names_the_choice(
        self, records: list[dict], finished: Path, model_and_tokenizer: tuple
    ) -> None:
        before = finished.read_bytes()
        with pytest.raises(
            UserError, match=r"out.jsonl: exists already, .*other records.* --output_file .*--overwrite"
        ):
            answer_file(*model_and_tokenizer, records, finished, 2, GREEDY)
        assert finished.read_bytes() == before
        assert answer_file(*model_and_tokenizer, records, finished, 2, GREEDY, overwrite=True) == len(records)
        assert [{k: v for k, v in r.items() if k != "response"} for r in written(finished)] == records

    def test_the_same_records_are_answered_again_when_told(self, finished: Path, model_and_tokenizer: tuple) -> None:
        short = dataclasses.replace(GREEDY, max_new_tokens=1)
        assert answer_file(*model_and_tokenizer, RECORDS, finished, 2, short, overwrite=True) == len(RECORDS)
        assert [record["response"] for record in written(finished)] != ANSWERS

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("content", ["mine", '{"instruction": "hello"}\n', '{"response": 7}\n', "[]", "\n", "\xff"])
    def test_a_file_that_holds_no_answers_stays(
        self, content: str, overwrite: bool, model_and_tokenizer: tuple, tmp_path: Path
    ) -> None:
        (tmp_path / "out.jsonl").write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=r"out.jsonl: exists already"):
            answer_file(*model_and_tokenizer, RECORDS, tmp_path / "out.jsonl", 2, GREEDY, overwrite=overwrite)
        assert (tmp_path / "out.jsonl").read_text(encoding="latin-1") == content
        assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("leads_to", ["elsewhere.jsonl", "nowhere"])
    def test_a_link_is_neither_followed_nor_replaced(
        self, leads_to: str, overwrite: bool, model_and_tokenizer: tuple, tmp_path: Path
    ) -> None:
        answer_file(*model_and_tokenizer, RECORDS[:1], tmp_path / "elsewhere.jsonl", 2, GREEDY)
        before = (tmp_path / "elsewhere.jsonl").read_bytes()
        (tmp_path / "out.jsonl").symlink_to(leads_to)
        with pytest.raises(UserError, match=r"out.jsonl: is a symbolic link"):
            answer_file(*model_and_tokenizer, RECORDS, tmp_path / "out.jsonl", 2, GREEDY, overwrite=overwrite)
        assert (tmp_path / "out.jsonl").is_symlink()
        assert (tmp_path / "elsewhere.jsonl").read_bytes() == before


class TestErrors:
    @pytest.mark.parametrize("record", [{"prompt": "hello"}, {"instruction": None}, "hello"])
    def test_a_record_from_python_is_checked_too(
        self, model_and_tokenizer: tuple, tmp_path: Path, record: dict
    ) -> None:
        with pytest.raises(UserError, match="record 2: "):
            answer_file(*model_and_tokenizer, [RECORDS[0], record], tmp_path / "out.jsonl", 2, GREEDY)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("content", ["hello", '{"instruction": 7}', '{"text": "a"}', "\x00"])
    def test_the_program_finds_a_bad_file_before_it_loads_the_model(
        self,
        capitals: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
        content: str,
    ) -> None:
        monkeypatch.setattr(loading, "load", lambda *args, **options: pytest.fail("the model was loaded"))
        (tmp_path / "in.jsonl").write_text(content)
        monkeypatch.setattr(sys, "argv", program(capitals, tmp_path / "in.jsonl", tmp_path / "out.jsonl"))
        assert main() == 2
        assert "in.jsonl, line 1: " in capsys.readouterr().err

    def test_an_output_place_that_cannot_be_written_is_named(self, model_and_tokenizer: tuple, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"out.jsonl: cannot be written \(No such file or directory\)"):
            answer_file(*model_and_tokenizer, RECORDS, tmp_path / "missing" / "out.jsonl", 2, GREEDY)

    def test_an_error_of_the_device_is_not_one_of_the_output(
        self, model_and_tokenizer: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def continue_prompts(*args) -> None:
            raise OSError("the driver is gone")

        monkeypatch.setattr(batch, "continue_prompts", continue_prompts)
        with pytest.raises(OSError, match=r"^the driver is gone$"):
            answer_file(*model_and_tokenizer, RECORDS, tmp_path / "out.jsonl", 2, GREEDY)

    def test_the_program_reports_a_bad_line_and_exits_with_2(
        self, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        (tmp_path / "in.jsonl").write_text("hello\n")
        arguments = ["generate.py", "--checkpoint_path", str(capitals), "--prompts_file", str(tmp_path / "in.jsonl")]
        monkeypatch.setattr(sys, "argv", [*arguments, "--output_file", str(tmp_path / "out.jsonl")])
        assert main() == 2
        error = capsys.readouterr().err
        assert error.startswith("generate.py: error: ") and error.count("\n") == 1
