"""Each system call that writes fails, is the last one, or is followed by a loss of power. Nothing is lost.

POWER_LOSSES sets how many random sets of lost writes are tried after each call, in addition to the fixed ones. With
ALL_ERRORS each call fails with each of three errors, instead of one.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="stands between Linux programs and their library")
def test_the_old_or_the_new_is_there_whole_or_a_journal_goes_on(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path / "syscalls.so"
    source = ROOT / "tests" / "reliability" / "syscalls.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True, timeout=60)
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.faults"],
        env=os.environ | {"LD_PRELOAD": str(library)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert done.stdout.count(" losses of power") == 7
