"""A folder appears whole or not at all, whatever happens while it is written. What was there before is never lost.

Processes that only write files are forked from this one. A fork takes milliseconds, so hundreds of them can be killed.
WRITING_KILLS sets the number.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from hf_model import output_dir
from hf_model.conversion import convert
from hf_model.errors import UserError
from hf_model.output_dir import MANIFEST, whole_folder
from tests.tiny import CHECKPOINT, ROOT, TOKENIZER

KILLS = int(os.environ.get("WRITING_KILLS", "100"))
FILES = ("config.json", *(f"model-{i}.safetensors" for i in range(8)))


@pytest.fixture(params=["in one step", "in two steps"])
def replaced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a folder is replaced: on a system that can exchange two folders, and on one that cannot."""
    if request.param == "in two steps":
        monkeypatch.setattr(output_dir, "rename_exactly", lambda one, other, flags: False)
    elif sys.platform != "linux":
        pytest.skip("only Linux exchanges folders")
    return request.param


def write(target: Path, content: str) -> None:
    """Write a folder whose files all have the same content."""
    with whole_folder(target, overwrite=True) as work:
        for name in FILES:
            (work / name).write_text(content)


def content_of(target: Path) -> str:
    """The content of the files in a folder, which must be whole."""
    assert {file.name for file in target.iterdir()} == {*FILES, MANIFEST}
    contents = {(target / name).read_text() for name in FILES}
    assert len(contents) == 1
    return contents.pop()


def start(work: Callable[[], None]) -> int:
    """Start a child process that does some work. Its exit status is 1 if the work fails."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return process


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_killed_run_loses_nothing_and_leaves_nothing_after_the_next(replaced: str, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    write(target, "0")
    chosen = random.Random(0)
    started = time.perf_counter()
    write(target, "0")
    duration = time.perf_counter() - started

    def rewrite() -> None:
        for turn in range(10**6):
            write(target, str(turn))

    gone = 0
    for _ in range(KILLS):
        process = start(rewrite)
        time.sleep(chosen.uniform(0, 5 * duration))
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        if replaced == "in one step":
            content_of(target)  # at no moment is there no folder
        gone += not target.exists()
        with suppress(ZeroDivisionError), whole_folder(target, overwrite=True):
            raise ZeroDivisionError  # a next run that writes nothing
        assert list(tmp_path.iterdir()) == [target]
        content_of(target)
    print(f"{KILLS} runs killed, {gone} between the two steps, 0 folders lost")


@pytest.mark.filterwarnings("ignore:.*fork")
def test_many_runs_on_one_target_take_turns_or_are_refused(replaced: str, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    write(target, "0")

    def rewrite() -> None:
        for _ in range(30):
            with suppress(UserError):
                write(target, str(os.getpid()))

    children = [start(rewrite) for _ in range(6)]
    assert [os.waitpid(process, 0)[1] for process in children] == [0] * len(children)
    assert int(content_of(target)) in {0, *children}
    assert list(tmp_path.iterdir()) == [target]


def test_a_second_run_on_one_target_is_told_of_the_first(tmp_path: Path) -> None:
    target = tmp_path / "hf"
    with whole_folder(target) as work:
        with pytest.raises(UserError, match="hf: another conversion is writing it"), whole_folder(target):
            pass
        (work / "config.json").write_text("first")
    assert (target / "config.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


class TestWhatIsThere:
    def test_is_not_overwritten_unasked(self, tmp_path: Path) -> None:
        write(tmp_path / "hf", "old")
        with pytest.raises(UserError, match="hf: exists already; choose another --output_dir or add --overwrite"):
            convert(CHECKPOINT, TOKENIZER, tmp_path / "hf")
        assert content_of(tmp_path / "hf") == "old"

    @pytest.mark.parametrize(
        "name", ["ckpt.pt", "notes.txt", "checkpoint-500/weights.bin", "config.json.orig", ".git/x"]
    )
    def test_is_kept_where_it_holds_anything_else(self, name: str, tmp_path: Path) -> None:
        write(tmp_path / "hf", "old")
        added = tmp_path / "hf" / name
        added.parent.mkdir(exist_ok=True)
        added.write_text("mine")
        lines: list[str] = []
        convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", overwrite=True, report=lines.append)
        assert (tmp_path / "hf" / "model.safetensors").is_file()
        assert (tmp_path / "hf.1" / name).read_text() == "mine"
        assert any(f"{tmp_path / 'hf.1'} (the old folder: {name} was added)" in line for line in lines)

    def test_is_replaced_when_asked(self, replaced: str, tmp_path: Path) -> None:
        write(tmp_path / "hf", "old")
        write(tmp_path / "hf", "new")
        assert content_of(tmp_path / "hf") == "new"
        assert list(tmp_path.iterdir()) == [tmp_path / "hf"]

    def test_an_empty_folder_may_be_filled(self, replaced: str, tmp_path: Path) -> None:
        (tmp_path / "hf").mkdir()
        with whole_folder(tmp_path / "hf") as work:
            (work / "config.json").write_text("new")
        assert (tmp_path / "hf" / "config.json").read_text() == "new"

    def test_a_file_is_not_taken_for_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "hf").write_text("mine")
        with pytest.raises(UserError, match="hf: is a file, not a folder"):
            convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", overwrite=True)
        assert (tmp_path / "hf").read_text() == "mine"

    def test_a_folder_that_appears_meanwhile_stays(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="hf: exists already"), whole_folder(tmp_path / "hf"):
            (tmp_path / "hf").mkdir()
            (tmp_path / "hf" / "notes.txt").write_text("mine")
        assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"
        assert list(tmp_path.iterdir()) == [tmp_path / "hf"]


class TestLinks:
    @pytest.fixture
    def outside(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        outside = tmp_path_factory.mktemp("outside")
        (outside / "config.json").write_text("mine")
        return outside

    def test_a_link_is_not_written_through(self, outside: Path, tmp_path: Path) -> None:
        (tmp_path / "hf").symlink_to(outside)
        with pytest.raises(UserError, match="hf: is a symbolic link; name the folder itself"):
            convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", overwrite=True)
        assert [file.read_text() for file in outside.iterdir()] == ["mine"]

    def test_a_folder_with_a_link_in_it_is_kept(self, outside: Path, tmp_path: Path) -> None:
        write(tmp_path / "hf", "old")
        (tmp_path / "hf" / "model.safetensors").symlink_to(outside / "config.json")
        with pytest.warns(UserWarning, match=r"model\.safetensors was added"):
            write(tmp_path / "hf", "new")
        assert content_of(tmp_path / "hf") == "new"
        assert (tmp_path / "hf.1" / "model.safetensors").is_symlink()
        assert [file.read_text() for file in outside.iterdir()] == ["mine"]


class TestPlacesThatCannotBeWritten:
    @pytest.mark.parametrize(
        "place", ["/dev/null/hf", "/proc/hf", "/proc/self/fdinfo/x/hf", f"/tmp/{'x' * 250}", f"/tmp/{'x' * 5000}"]
    )
    def test_are_named(self, place: str) -> None:
        with pytest.raises(UserError, match=r"/\w+/.*: cannot be written \("):
            convert(CHECKPOINT, TOKENIZER, place)

    @pytest.mark.parametrize("size", [100, 10_000, 1_000_000, 2_140_000])
    @pytest.mark.parametrize("format", ["transformers", "checkpoint"])
    def test_a_file_that_grows_past_the_limit_keeps_the_old_folder(
        self, format: str, size: int, tmp_path: Path
    ) -> None:
        write(tmp_path / "hf", "old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(UserError, match=r"hf: cannot be written \(.*[Ff]ile too large"):
                convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", format=format, overwrite=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert content_of(tmp_path / "hf") == "old"
        assert list(tmp_path.iterdir()) == [tmp_path / "hf"]

    def test_a_full_and_a_read_only_disk_are_named(self, tmp_path: Path) -> None:
        """Runs in a mount namespace of its own, in which a small disk can be mounted."""
        unshare = shutil.which("unshare")
        mount = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", str(tmp_path)]
        if unshare is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs a namespace of mounts")
        convert_it = (
            f"{sys.executable} {ROOT / 'convert_checkpoint.py'} --checkpoint_path {CHECKPOINT} "
            f"--tokenizer_path {TOKENIZER} --output_dir {tmp_path}/hf >/dev/null; echo exit $?; ls -A {tmp_path}"
        )
        script = (
            f"mount -t tmpfs -o size=600k none {tmp_path}; {convert_it}; "
            f"mount -o remount,ro {tmp_path}; {convert_it}; umount {tmp_path}"
        )
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
        process = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert process.stdout == "exit 2\nexit 2\n"
        full, read_only = process.stderr.splitlines()
        assert "hf: cannot be written (" in full
        assert "No space left on device" in full
        assert read_only.endswith("hf: cannot be written (Read-only file system)")


@pytest.mark.parametrize(
    "signal_number, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["SIGINT", "SIGKILL"]
)
def test_a_conversion_that_is_stopped_keeps_the_old_folder(signal_number: int, status: int, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    write(target, "old")
    command = [sys.executable, "convert_checkpoint.py", "--overwrite", "--checkpoint_path", CHECKPOINT]
    command += ["--tokenizer_path", TOKENIZER, "--output_dir", target]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # Once the weights are written they are verified; only then does the folder take its place.
    while not list(tmp_path.glob(".hf.*.partial/**/model.safetensors")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal_number)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == status
    assert stderr == ("interrupted\n" if signal_number == signal.SIGINT else "")
    assert content_of(target) == "old"

    convert(CHECKPOINT, TOKENIZER, target, overwrite=True)
    assert (target / "model.safetensors").is_file()
    assert list(tmp_path.iterdir()) == [target]
