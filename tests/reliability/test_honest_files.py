"""Honest files are read, bit for bit, or refused with a line that says what to do."""

from pathlib import Path

import pytest

from tests.reliability.honest_files import Honest, honest_files, is_as_told, is_here, outcome


@pytest.mark.filterwarnings("ignore")  # the libraries' own, about what is old
@pytest.mark.parametrize("honest", honest_files(), ids=lambda honest: honest.name)
def test_an_honest_file_is_read_or_refused_with_a_remedy(honest: Honest, tmp_path: Path) -> None:
    if not is_here(honest.needs):
        pytest.skip(f"{honest.needs} is not installed")
    honest.write(tmp_path / honest.path)
    said = outcome(tmp_path / honest.path, honest)
    assert is_as_told(honest, said), said
