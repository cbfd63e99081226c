"""A folder appears whole or not at all, and nothing of the user's is deleted for it."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from hf_model import output_dir
from hf_model.errors import UserError
from hf_model.output_dir import MANIFEST, check_target, whole_folder


def write(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def written(folder: Path, *names: str) -> Path:
    """A folder that this program wrote."""
    with whole_folder(folder) as work:
        write(work, *names)
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {MANIFEST}


def test_the_folder_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "hf"
    with whole_folder(target) as work:
        write(work, "config.json")
        assert not target.exists()
    assert names_in(target) == {"config.json"}
    assert names_in(target.parent) == {"hf"}


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "hf") as work:
        write(work, "config.json")
        raise ZeroDivisionError
    assert names_in(tmp_path) == set()


def test_an_older_model_is_replaced_when_told(tmp_path: Path) -> None:
    target = written(tmp_path / "hf", "config.json", "model-00001-of-00002.safetensors")
    with whole_folder(target, overwrite=True) as work:
        write(work, "config.json", "model.safetensors")
    assert names_in(target) == {"config.json", "model.safetensors"}
    assert names_in(tmp_path) == {"hf"}


def test_an_older_model_survives_a_block_that_fails(tmp_path: Path) -> None:
    target = written(tmp_path / "hf", "config.json", "model.safetensors")
    with pytest.raises(ZeroDivisionError), whole_folder(target, overwrite=True) as work:
        write(work, "config.json")
        raise ZeroDivisionError
    assert names_in(target) == {"config.json", "model.safetensors"}
    assert names_in(tmp_path) == {"hf"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_as_good_as_none(overwrite: bool, tmp_path: Path) -> None:
    target = write(tmp_path / "hf")
    with whole_folder(target, overwrite) as work:
        write(work, "config.json")
    assert names_in(target) == {"config.json"}


@pytest.mark.parametrize("name", ["config.json", "thesis.tex"])
def test_a_folder_that_is_there_stays_unless_told(name: str, tmp_path: Path) -> None:
    target = write(tmp_path / "hf", name)
    with pytest.raises(UserError, match=f"{target}: exists already; .* --overwrite"):
        check_target(target, overwrite=False)
    check_target(target, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "hf").touch()
    with pytest.raises(UserError, match="hf: is a file, not a folder"):
        check_target(tmp_path / "hf", overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["there", "nowhere"])
def test_a_symbolic_link_is_refused_wherever_it_leads(name: str, overwrite: bool, tmp_path: Path) -> None:
    write(tmp_path / "there", "config.json")
    (tmp_path / "hf").symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="hf: is a symbolic link; name the folder itself"):
        check_target(tmp_path / "hf", overwrite)


class TestWhatThisProgramDidNotWriteIsKept:
    """A checksum for every file shows what a person has added or changed."""

    @staticmethod
    def replace(target: Path, said: list[str]) -> None:
        with whole_folder(target, overwrite=True, say=said.append) as work:
            write(work, "config.json")
        assert names_in(target) == {"config.json"}

    @pytest.mark.parametrize("name", ["train.py", "README.md", "config.json.orig", "runs/1.log", ".git/HEAD", "empty/"])
    def test_a_file_or_folder_that_was_added(self, name: str, tmp_path: Path) -> None:
        target, said = written(tmp_path / "hf", "config.json"), []
        added = target / name
        if name.endswith("/"):
            added.mkdir()
        else:
            added.parent.mkdir(exist_ok=True)
            added.write_text("mine")
        self.replace(target, said)
        kept = tmp_path / "hf.1"
        assert (kept / name).is_dir() if name.endswith("/") else (kept / name).read_text() == "mine"
        assert (kept / "config.json").read_text() == "config.json"
        assert said == [f"kept          {kept} (the old folder: {name.rstrip('/')} was added)"]
        assert names_in(tmp_path) == {"hf", "hf.1"}

    def test_a_file_that_was_edited(self, tmp_path: Path) -> None:
        target, said = written(tmp_path / "hf", "config.json", "README.md"), []
        (target / "README.md").write_text("README.MD")  # of the same size
        self.replace(target, said)
        assert (tmp_path / "hf.1" / "README.md").read_text() == "README.MD"
        assert said == [f"kept          {tmp_path / 'hf.1'} (the old folder: README.md was changed)"]

    def test_a_link_to_the_same_content(self, tmp_path: Path) -> None:
        target, said = written(tmp_path / "hf", "config.json"), []
        (target / "config.json").rename(tmp_path / "mine")
        (target / "config.json").symlink_to(tmp_path / "mine")
        self.replace(target, said)
        assert (tmp_path / "hf.1" / "config.json").is_symlink()
        assert (tmp_path / "mine").read_text() == "config.json"

    def test_a_folder_of_somebody_else_s_making(self, tmp_path: Path) -> None:
        target, said = write(tmp_path / "hf", "thesis.tex"), []
        self.replace(target, said)
        assert names_in(tmp_path / "hf.1") == {"thesis.tex"}
        reason = f"no conversion wrote it, or its {MANIFEST} is damaged"
        assert f"kept          {tmp_path / 'hf.1'} (the old folder: {reason})" in said

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"written_by": 1, "sha256": []}', "[" * 10**5, "\xff"])
    def test_a_folder_whose_list_of_files_is_damaged(self, content: str, tmp_path: Path) -> None:
        target = written(tmp_path / "hf", "config.json")
        (target / MANIFEST).write_text(content, encoding="latin-1")
        self.replace(target, [])
        assert (tmp_path / "hf.1" / MANIFEST).read_text(encoding="latin-1") == content

    def test_under_the_first_name_that_is_free(self, tmp_path: Path) -> None:
        write(tmp_path / "hf.1", "mine")
        (tmp_path / "hf.2").symlink_to("nowhere")
        for number in (3, 4):
            target = write(tmp_path / "hf", f"thesis-{number}.tex")
            self.replace(target, [])
        assert names_in(tmp_path) == {"hf", "hf.1", "hf.2", "hf.3", "hf.4"}
        assert names_in(tmp_path / "hf.1") == {"mine"}
        assert "thesis-3.tex" in names_in(tmp_path / "hf.3") and "thesis-4.tex" in names_in(tmp_path / "hf.4")

    def test_a_file_that_appears_while_the_new_folder_is_written(self, tmp_path: Path) -> None:
        target = written(tmp_path / "hf", "config.json", "model.safetensors")
        with pytest.warns(UserWarning, match=r"hf\.1"), whole_folder(target, overwrite=True) as work:
            write(work, "config.json")
            (target / "thesis.tex").write_text("mine")
        assert names_in(target) == {"config.json"}
        assert names_in(tmp_path / "hf.1") == {"config.json", "model.safetensors", "thesis.tex"}

    def test_but_a_missing_file_is_no_reason(self, tmp_path: Path) -> None:
        target, said = written(tmp_path / "hf", "config.json", "README.md"), []
        (target / "README.md").unlink()
        self.replace(target, said)
        assert names_in(tmp_path) == {"hf"} and said == []

    def test_and_nothing_is_kept_when_the_block_fails(self, tmp_path: Path) -> None:
        target = write(tmp_path / "hf", "thesis.tex")
        with pytest.raises(ZeroDivisionError), whole_folder(target, overwrite=True):
            raise ZeroDivisionError
        assert names_in(tmp_path) == {"hf"} and names_in(target) == {"thesis.tex"}


class TestNamesThatLookLikeOurs:
    """A folder beside the target is cleared only if it has this program's mark in it."""

    @pytest.mark.parametrize("name", [".hf.partial", ".hf.replaced", ".hf.lock", ".hf.0123456789abcdef.partial"])
    @pytest.mark.parametrize("kind", ["folder", "file", "link"])
    def test_what_is_the_user_s_stays(self, name: str, kind: str, tmp_path: Path) -> None:
        mine, outside = tmp_path / name, write(tmp_path / "outside", "thesis.tex")
        if kind == "folder":
            write(mine, "thesis.tex")
        elif kind == "file":
            mine.write_text("mine")
        else:
            mine.symlink_to(outside)
        for _ in range(2):
            with whole_folder(tmp_path / "hf", overwrite=True) as work:
                write(work, "config.json")
        assert names_in(tmp_path) == {"hf", "outside", name}
        assert names_in(outside) == {"thesis.tex"}
        assert mine.read_text() == "mine" if kind == "file" else names_in(mine) == {"thesis.tex"}


class TestLinksInWhatAKilledRunLeft:
    """A link that somebody put there is not followed, and does not become the target."""

    @pytest.fixture
    def precious(self, tmp_path: Path) -> Path:
        return written(tmp_path / "precious", "config.json", "model.safetensors")

    def left_over(self, tmp_path: Path) -> Path:
        return write(tmp_path / ".hf.0123456789abcdef.partial", output_dir.MARK)

    @pytest.mark.parametrize("name", ["new", "old"])
    @pytest.mark.parametrize("leads_to", ["precious", "nowhere", "../precious/config.json"])
    def test_a_link_for_a_folder(self, leads_to: str, name: str, precious: Path, tmp_path: Path) -> None:
        link = self.left_over(tmp_path) / name
        link.symlink_to(leads_to if leads_to.startswith("..") else tmp_path / leads_to)
        said: list[str] = []
        with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "hf", say=said.append):
            raise ZeroDivisionError
        assert said == [f"warning: {link.parent}: is left alone: '{name}' in it is not a folder"]
        assert link.is_symlink()
        assert names_in(precious) == {"config.json", "model.safetensors"}
        assert names_in(tmp_path) == {"precious", link.parent.name}

    @pytest.mark.parametrize("name", ["new", "old"])
    def test_a_link_in_a_folder(self, name: str, precious: Path, tmp_path: Path) -> None:
        folder = self.left_over(tmp_path) / name
        shutil.copytree(precious, folder)
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(precious / "config.json")
        (folder / "folder").symlink_to(precious)
        with whole_folder(tmp_path / "hf", overwrite=True, say=lambda line: None) as work:
            write(work, "config.json")
        assert names_in(precious) == {"config.json", "model.safetensors"}
        assert (tmp_path / "hf" / "config.json").read_text() == "config.json"

    @pytest.mark.parametrize("kind", ["link", "pipe"])
    def test_a_mark_that_is_no_file(self, kind: str, precious: Path, tmp_path: Path) -> None:
        place = write(tmp_path / ".hf.0123456789abcdef.partial")
        write(place / "new", "thesis.tex")
        if kind == "link":
            (place / output_dir.MARK).symlink_to(precious / "config.json")
        else:
            os.mkfifo(place / output_dir.MARK)
        written(tmp_path / "hf", "config.json")
        assert names_in(place / "new") == {"thesis.tex"}


class TestTheFolderIsWhereItsPathLeads:
    @pytest.mark.parametrize(
        "path, place",
        [
            ("link/hf", "far/away/hf"),
            ("link/../hf", "far/hf"),
            ("link/hf/..", "far/away"),
            ("nowhere/../hf", "hf"),
            ("link/.././hf", "far/hf"),
        ],
    )
    def test_by_way_of_links(self, path: str, place: str, tmp_path: Path) -> None:
        (tmp_path / "far" / "away").mkdir(parents=True)
        (tmp_path / "link").symlink_to("far/away")
        written(tmp_path / path, "config.json")
        assert list(tmp_path.glob("**/config.json")) == [tmp_path / place / "config.json"]
        assert not (tmp_path / "nowhere").exists()

    @pytest.mark.parametrize("leads_to", ["nowhere", "link"])
    @pytest.mark.parametrize("path", ["link/hf", "link/../hf", "link/there/hf"])
    def test_but_not_by_a_link_to_nowhere(self, path: str, leads_to: str, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(leads_to)
        with pytest.raises(UserError, match="link is a symbolic link that leads nowhere"):
            written(tmp_path / path, "config.json")
        assert list(tmp_path.iterdir()) == [tmp_path / "link"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_parents_that_a_failed_run_made_go_again(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "there" / "a" / "b" / "hf", overwrite):
        raise ZeroDivisionError
    assert names_in(tmp_path) == {"there"}
    assert names_in(tmp_path / "there") == set()


def test_a_folder_that_cannot_be_tidied_up_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, said = written(tmp_path / "hf", "config.json"), []

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with whole_folder(target, overwrite=True, say=said.append) as work:
        write(work, "model.safetensors")
    assert names_in(target) == {"model.safetensors"}
    (line,) = said
    assert line.endswith(".partial: is left over and cannot be deleted (Permission denied)")
    monkeypatch.undo()
    with whole_folder(target, overwrite=True) as work:
        write(work, "model.safetensors")
    assert names_in(tmp_path) == {"hf"}


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "fork"), reason="changes the user of a process")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_folder_of_another_user_is_left_as_it_is(tmp_path_factory: pytest.TempPathFactory) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    parent = Path(tempfile.mkdtemp())
    target = written(parent / "hf", "config.json")
    parent.chmod(0o777)
    target.chmod(0o755)
    process = os.fork()
    if process == 0:
        os.setuid(12345)
        try:
            with whole_folder(target, overwrite=True) as work:
                write(work, "config.json")
        except UserError as error:
            os._exit(7 if "cannot be written" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7
    assert names_in(parent) == {"hf"}
    assert names_in(target) == {"config.json"}
    shutil.rmtree(parent)
