"""The commands of a page run as the page has them. (`python docs/run_commands.py` runs all the pages'.)"""

import subprocess
import sys

import pytest

from tests.tiny import ROOT


@pytest.mark.parametrize("page", ["README.md", "docs/diagnosis.md"])
def test_every_command_of_a_page_runs(page: str) -> None:
    command = [sys.executable, str(ROOT / "docs" / "run_commands.py"), str(ROOT / page)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    assert "FAILED" not in process.stdout and " ran in " in process.stdout
