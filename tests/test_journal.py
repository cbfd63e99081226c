"""The journal of a batch run: whole lines count, what is the user's is not touched, two runs do not mix."""

import json
import os
from pathlib import Path

import pytest

from hf_model import journal
from hf_model.errors import UserError
from hf_model.reading import parse_json

RUN, OTHER = "a" * 64, "b" * 64


def begun(output: Path, responses: dict[int, str], run: str = RUN) -> Path:
    """The journal of a run that was killed after these answers."""
    with journal.opened(output, run, 10) as answered:
        for index, response in responses.items():
            answered.append({index: response})
    return journal.path_of(output)


def answers(output: Path, run: str = RUN) -> dict[int, str]:
    with journal.opened(output, run, 10) as answered:
        return answered.responses


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_run_goes_on_with_what_it_had(output: Path) -> None:
    begun(output, {3: "Paris", 0: "漢字\n\u2028\ud83d"})
    begun(output, {5: "Lima"})
    assert answers(output) == {3: "Paris", 0: "漢字\n\u2028\ud83d", 5: "Lima"}


def test_the_output_appears_whole_and_alone(output: Path) -> None:
    with journal.opened(output, RUN, 10) as answered:
        answered.finish(b"content")
    assert output.read_bytes() == b"content"
    assert list(output.parent.iterdir()) == [output]


def test_every_prefix_of_a_journal_is_a_journal(output: Path) -> None:
    path = begun(output, {0: "one", 1: "two"})
    whole = path.read_bytes()
    header, first, _ = whole.splitlines(keepends=True)
    for length in range(len(header), len(whole)):
        path.write_bytes(whole[:length])
        expected = {0: "one"} if length >= len(header + first) else {}
        assert answers(output) == expected
        begun(output, {1: "two again"})
        assert answers(output) == expected | {1: "two again"}


@pytest.mark.parametrize(
    "line",
    [
        "null",
        "[]",
        "{}",
        '{"index": 0}',
        '{"index": "0", "response": "x"}',
        '{"index": 0, "response": null}',
        '{"index": true, "response": "x"}',
        '{"index": 99, "response": "x"}',
        '{"index": -1, "response": "x"}',
        "[" * 10**5,
        "ÿ",
        "",
        '{"index": 1e999, "response": "x"}',
    ],
)
@pytest.mark.parametrize("has_checksum", [False, True], ids=["forged", "with a checksum"])
def test_a_line_that_is_no_answer_is_no_answer(line: str, has_checksum: bool, output: Path) -> None:
    path = begun(output, {1: "one"})
    body = line.encode("latin-1")
    with path.open("ab") as file:
        file.write((journal._checksum(RUN, body) + b" " if has_checksum else b"") + body + b"\n")
    assert answers(output) == {1: "one"}


@pytest.mark.parametrize("old, new", [("Paris", "Pariz"), ('"index": 1', '"index": 2'), ('"response"', '"Response"')])
def test_an_answer_that_was_changed_is_no_answer(old: str, new: str, output: Path) -> None:
    path = begun(output, {1: "Paris"})
    changed = path.read_text().replace(old, new)
    assert changed != path.read_text()
    path.write_text(changed)
    assert answers(output) == {}


def test_the_journal_does_not_tell_the_key_of_its_checksums(output: Path) -> None:
    assert RUN not in begun(output, {1: "Paris"}).read_text()


def test_another_run_starts_anew(output: Path) -> None:
    begun(output, {1: "Paris"})
    assert answers(output, OTHER) == {}
    assert list(output.parent.iterdir()) == [journal.path_of(output)]


@pytest.mark.parametrize(
    "content", ["", "mine\n", '{"run": "x"}\n', "\n" * 1000, json.dumps({"written_by": "me"}) + "\n"]
)
def test_a_file_of_the_user_s_in_its_place_stays(content: str, output: Path) -> None:
    journal.path_of(output).write_text(content)
    with pytest.raises(
        UserError, match=r"out\.jsonl\.partial: is not a journal of this program, but in the place of one"
    ):
        answers(output)
    assert journal.path_of(output).read_text() == content
    assert list(output.parent.iterdir()) == [journal.path_of(output)]


def test_a_link_in_its_place_is_not_followed(output: Path, tmp_path: Path) -> None:
    elsewhere = begun(tmp_path / "elsewhere", {1: "Paris"})
    content = elsewhere.read_bytes()
    journal.path_of(output).symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"out\.jsonl\.partial: is a symbolic link"):
        answers(output)
    assert elsewhere.read_bytes() == content


@pytest.mark.parametrize("kind", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused(kind: object, output: Path) -> None:
    kind(journal.path_of(output))  # type: ignore[operator]
    with pytest.raises(UserError, match=r"out\.jsonl"):
        answers(output)


def test_names_that_the_output_could_be_written_by_are_not_touched(output: Path) -> None:
    for name in ("out.jsonl.complete", ".out.jsonl.new", "out.jsonl.tmp"):
        (output.parent / name).write_text("mine")
    with journal.opened(output, RUN, 10) as answered:
        answered.finish(b"content")
    assert sorted(path.read_text() for path in output.parent.iterdir()) == ["content", "mine", "mine", "mine"]


def test_an_output_that_appears_meanwhile_stays(output: Path) -> None:
    with (
        pytest.raises(UserError, match=r"out\.jsonl: exists already"),
        journal.opened(output, RUN, 10) as answered,
    ):
        answered.append({1: "Paris"})
        output.write_text("mine")
        answered.finish(b"content")
    assert output.read_text() == "mine"
    assert answers(output) == {1: "Paris"}


def test_a_second_run_is_told_of_the_first(output: Path) -> None:
    with journal.opened(output, RUN, 10) as answered:
        for run in (RUN, OTHER):
            with pytest.raises(UserError, match=r"out\.jsonl: another run is writing it"):
                answers(output, run)
        answered.append({1: "Paris"})
    assert answers(output) == {1: "Paris"}


class TestStrictJSON:
    @pytest.mark.parametrize(
        "text, message",
        [
            ("1e999", "too large"),
            ("[NaN]", "not JSON"),
            ("-Infinity", "not JSON"),
            ("9" * 5000, "5000 digits"),
            ("[" * 101 + "]" * 101, "nested more than 100 deep"),
            ('{"a":' * 10**5 + "1" + "}" * 10**5, "nested more than 100 deep"),
            ("{", "Expecting"),
        ],
        ids=str,
    )
    def test_refuses(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_json(text)

    def test_reads_the_rest(self) -> None:
        text = '{"a": [1, -2.5e3, "\\ud83d", null, true, {}], "b": ' + "[" * 98 + "]" * 98 + "}"
        assert parse_json(text) == json.loads(text)
