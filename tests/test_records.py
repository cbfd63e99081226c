"""Records are read as lines or as an array; a journal's whole lines are answers; the user's files are not touched."""

import json
import os
import threading
from pathlib import Path

import pytest

from hf_model.errors import UserError
from hf_model.output_dir import WRITER
from hf_model.records import Record, journal_path, open_journal, read_records

OPTIONS, OTHER = {"temperature": 0, "stop": ("a",)}, {"temperature": 1, "stop": ("a",)}
RECORDS: list[Record] = [{"prompt": f"prompt {index}"} for index in range(10)]
KEYS = [f"key {index}" for index in range(10)]


def lines_of(records: list[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


class TestReading:
    @pytest.mark.parametrize(
        "form",
        [
            lines_of,
            json.dumps,
            lambda records: json.dumps(records, indent=2) + "\n",
            lambda records: "\ufeff" + lines_of(records),
            lambda records: "\n  \n" + lines_of(records).replace("\n", "\r\n\r\n"),
            lambda records: lines_of(records).rstrip("\n"),
        ],
        ids=["lines", "an array", "an indented array", "a byte order mark", "blank lines", "no last newline"],
    )
    def test_takes_lines_and_arrays(self, form: object, tmp_path: Path) -> None:
        records = [{"instruction": "one\u2028line\x85of text", "id": [1, None]}, {"instruction": "a", "input": ""}]
        (tmp_path / "in").write_bytes(form(records).encode())  # type: ignore[operator]
        assert read_records(tmp_path / "in") == records

    @pytest.mark.parametrize("content", ["", "\n\n", "[]"])
    def test_takes_a_file_without_records(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "in").write_text(content)
        assert read_records(tmp_path / "in") == []

    def test_takes_either_kind_while_the_model_is_unknown(self, tmp_path: Path) -> None:
        records = [{"prompt": "hello"}, {"instruction": "hello", "input": "x"}, {"prompt": 7, "instruction": "hello"}]
        (tmp_path / "in").write_text(lines_of(records))
        assert read_records(tmp_path / "in", raw=None) == records

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_takes_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "in")
        writer = threading.Thread(target=(tmp_path / "in").write_text, args=(lines_of([{"instruction": "hello"}]),))
        writer.start()
        assert read_records(tmp_path / "in") == [{"instruction": "hello"}]
        writer.join()

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("Instruction: hello", "is not a JSON object with an 'instruction'"),
            ('"instruction"', "is not a JSON object with an 'instruction'"),
            ('{"prompt": "hello"}', "is not a JSON object with an 'instruction'"),
            ('{"instruction": ["hello"]}', "must be strings"),
            ('{"instruction": "hello", "input": 3}', "must be strings"),
            ('{"instruction": "hello", "id": 1e999}', "too large"),
            ('{"instruction": "hello", "id": NaN}', "NaN"),
            ('{"instruction": "hello", "id": ' + "[" * 10**5, "nested deeper than 100"),
        ],
    )
    def test_names_the_line_that_is_not_a_record(self, line: str, problem: str, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text(f'\n{{"instruction": "hello"}}\n{line}\n')
        with pytest.raises(UserError, match=f"in.jsonl, line 3: .*{problem}"):
            read_records(tmp_path / "in.jsonl")

    @pytest.mark.parametrize(
        ("line", "raw", "problem"),
        [
            ('{"instruction": "hello"}', True, "has an 'instruction', but this model's prompts are raw text"),
            ('{"text": "hello"}', None, "is not a JSON object with a 'prompt' or an 'instruction'"),
            ('["prompt"]', None, "is not a JSON object with a 'prompt' or an 'instruction'"),
            ('{"prompt": 7}', None, "'prompt' and 'input' must be strings"),
            ('{"instruction": 7}', None, "'instruction' and 'input' must be strings"),
            ('{"instruction": 7, "prompt": ""}', None, "must be strings"),
        ],
    )
    def test_names_the_line_of_the_wrong_kind(self, line: str, raw: bool | None, problem: str, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text(f'{{"prompt": "hello"}}\n{line}\n')
        with pytest.raises(UserError, match=f"in.jsonl, line 2: .*{problem}"):
            read_records(tmp_path / "in.jsonl", raw)

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ('[{"instruction": "a"}, {"prompt": "b"}]', "in, record 2: is not a JSON object with an 'instruction'"),
            ('[{"instruction": "a"}, ["instruction"]]', "in, record 2: is not a JSON object"),
            ('[\n{"instruction": "a"},\n{"instruction" "b"}]', r"in, line 3: .*Expecting ':'"),
            ('[{"instruction": "a"}', "in, line 1: .*Expecting"),
        ],
    )
    def test_names_the_place_in_an_array(self, content: str, problem: str, tmp_path: Path) -> None:
        (tmp_path / "in").write_text(content)
        with pytest.raises(UserError, match=problem):
            read_records(tmp_path / "in")

    def test_names_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="in: there is no such file"):
            read_records(tmp_path / "in")
        (tmp_path / "in").write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="in: is not UTF-8"):
            read_records(tmp_path / "in")

    def test_ends_at_a_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hf_model.records.MAX_BYTES", 100)
        (tmp_path / "in").write_text(lines_of(10 * [{"instruction": "What is the capital of France?"}]))
        with pytest.raises(UserError, match="in: is larger than 100 bytes"):
            read_records(tmp_path / "in")


def begun(output: Path, responses: dict[int, str], options: dict = OPTIONS) -> Path:
    """The journal of a run that was killed after these answers."""
    with open_journal(output, options) as journal:
        for index, response in responses.items():
            journal.append([(KEYS[index], response)])
    return journal_path(output)


def answers(output: Path, options: dict = OPTIONS) -> dict[int, str]:
    with open_journal(output, options) as journal:
        return journal.responses(KEYS)


def finish(output: Path, options: dict = OPTIONS) -> None:
    with open_journal(output, options) as journal:
        journal.finish(RECORDS[:1], {0: "content"}, overwrite=False)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


class TestJournal:
    def test_goes_on_with_what_it_had(self, output: Path) -> None:
        begun(output, {3: "Paris", 0: "漢字\n\u2028\ud83d"})
        begun(output, {5: "Lima"})
        assert answers(output) == {3: "Paris", 0: "漢字\n\u2028\ud83d", 5: "Lima"}

    def test_gives_each_answer_to_one_record(self, output: Path) -> None:
        with open_journal(output, OPTIONS) as journal:
            journal.append([("same", "first"), ("other", "x"), ("same", "second")])
        with open_journal(output, OPTIONS) as journal:
            assert journal.responses(["same", "same", "same"]) == {0: "first", 1: "second"}

    def test_is_gone_when_the_output_is_there(self, output: Path) -> None:
        finish(output)
        assert json.loads(output.read_text()) == {"prompt": "prompt 0", "response": "content"}
        assert list(output.parent.iterdir()) == [output]

    def test_is_a_journal_up_to_any_byte(self, output: Path) -> None:
        path = begun(output, {0: "one", 1: "two"})
        whole = path.read_bytes()
        header, first, _ = whole.splitlines(keepends=True)
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            n_whole = (length >= len(header + first) - 1) + (length == len(whole) - 1)  # whole but for the newline
            assert answers(output) == dict([(0, "one"), (1, "two")][:n_whole])
            begun(output, {2: "three"})
            assert answers(output) == dict([(0, "one"), (1, "two")][:n_whole]) | {2: "three"}

    @pytest.mark.parametrize(
        "line",
        [
            "null",
            "[]",
            "{}",
            '{"record": "key 0"}',
            '{"record": "key 0", "response": "x"}',
            '{"record": "key 0", "response": "x", "crc32": 1}',
            '{"record": 0, "response": "x", "crc32": 1}',
            '{"record": "key 0", "response": null, "crc32": 1}',
            "[" * 10**5,
            "ÿ",
            "",
            '{"record": "key 0", "response": 1e999, "crc32": 1}',
        ],
    )
    def test_skips_a_line_that_is_no_answer(self, line: str, output: Path) -> None:
        path = begun(output, {1: "one"})
        with path.open("ab") as file:
            file.write(line.encode("latin-1") + b"\n")
        begun(output, {2: "two"})
        assert answers(output) == {1: "one", 2: "two"}

    @pytest.mark.parametrize("old, new", [("Paris", "Pariz"), ("key 1", "key 2"), ('"response"', '"Response"')])
    def test_skips_a_damaged_answer(self, old: str, new: str, output: Path) -> None:
        path = begun(output, {1: "Paris"})
        changed = path.read_text().replace(old, new)
        assert changed != path.read_text()
        path.write_text(changed)
        assert answers(output) == {}

    def test_keeps_answers_made_with_other_options_until_told(self, output: Path) -> None:
        before = begun(output, {1: "Paris", 2: "Lima"}).read_bytes()
        with pytest.raises(UserError, match=r"partial: holds 2 answers .*temperature=0 \(now 1\).*--overwrite"):
            answers(output, OTHER)
        assert journal_path(output).read_bytes() == before
        with open_journal(output, OTHER, overwrite=True) as journal:
            assert journal.responses(KEYS) == {}
        assert answers(output, OTHER) == {}

    def test_without_answers_takes_any_options(self, output: Path) -> None:
        begun(output, {})
        begun(output, {1: "Paris"}, OTHER)
        assert answers(output, OTHER) == {1: "Paris"}

    @pytest.mark.parametrize(
        "content",
        [
            "mine\n",
            '{"run": "x"}\n',
            "\n" * 1000,
            json.dumps({"written_by": "me"}) + "\n",
            json.dumps({"written_by": WRITER, "options": 7}) + "\n",
        ],
    )
    def test_leaves_a_file_of_the_user_s_alone(self, content: str, output: Path) -> None:
        journal_path(output).write_text(content)
        for overwrite in (False, True):
            with (
                pytest.raises(UserError, match=r"out\.jsonl\.partial: is not a journal"),
                open_journal(output, OPTIONS, overwrite),
            ):
                pass
        assert journal_path(output).read_text() == content
        assert list(output.parent.iterdir()) == [journal_path(output)]

    def test_does_not_follow_a_link(self, output: Path, tmp_path: Path) -> None:
        elsewhere = begun(tmp_path / "elsewhere", {1: "Paris"})
        content = elsewhere.read_bytes()
        journal_path(output).symlink_to(elsewhere)
        with pytest.raises(UserError, match=r"out\.jsonl\.partial: is a symbolic link"):
            answers(output)
        assert elsewhere.read_bytes() == content

    @pytest.mark.parametrize("kind", [os.mkdir, os.mkfifo])
    def test_is_never_a_folder_or_a_pipe(self, kind: object, output: Path) -> None:
        kind(journal_path(output))  # type: ignore[operator]
        with pytest.raises(UserError, match=r"out\.jsonl"):
            answers(output)

    def test_leaves_names_alone_that_an_output_could_be_written_by(self, output: Path) -> None:
        for name in ("out.jsonl.complete", ".out.jsonl.new", "out.jsonl.tmp"):
            (output.parent / name).write_text("mine")
        finish(output)
        assert sorted(path.read_text() for path in output.parent.iterdir())[:3] == ["mine", "mine", "mine"]

    def test_does_not_replace_an_output_that_appears_meanwhile(self, output: Path) -> None:
        begun(output, {1: "Paris"})
        output.write_text("mine")
        with pytest.raises(UserError, match=r"out\.jsonl: exists already"):
            finish(output)
        assert output.read_text() == "mine"
        assert answers(output) == {1: "Paris"}

    def test_tells_a_second_run_of_the_first(self, output: Path) -> None:
        with open_journal(output, OPTIONS) as journal:
            for options in (OPTIONS, OTHER):
                with pytest.raises(UserError, match=r"out\.jsonl: another run is writing it"):
                    answers(output, options)
            journal.append([(KEYS[1], "Paris")])
        assert answers(output) == {1: "Paris"}
