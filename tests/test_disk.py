"""A folder appears whole or not at all, and only where nothing of the user's is in its place."""

from pathlib import Path

import pytest

from hf_model.disk import check_target, whole_folder
from hf_model.errors import UserError


def write(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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
    target = write(tmp_path / "hf", "config.json", "model-00001-of-00002.safetensors")
    with whole_folder(target, overwrite=True) as work:
        write(work, "config.json", "model.safetensors")
    assert names_in(target) == {"config.json", "model.safetensors"}
    assert names_in(tmp_path) == {"hf"}


def test_an_older_model_survives_a_block_that_fails(tmp_path: Path) -> None:
    target = write(tmp_path / "hf", "config.json", "model.safetensors")
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


@pytest.mark.parametrize(
    "files, overwrite, message",
    [
        (("config.json",), False, "exists already; choose another --output_dir or add --overwrite"),
        (("thesis.tex",), False, "exists already"),
        (("thesis.tex",), True, r"holds no model \(no config\.json\), so --overwrite does not replace it"),
        (("config.json", "thesis.tex"), True, "holds 'thesis.tex', which --overwrite would delete: move it away first"),
    ],
)
def test_a_folder_that_is_there_is_refused(
    files: tuple[str, ...], overwrite: bool, message: str, tmp_path: Path
) -> None:
    target = write(tmp_path / "hf", *files)
    with pytest.raises(UserError, match=f"{target}: {message}"):
        check_target(target, overwrite)


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
