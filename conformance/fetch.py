"""Fetches the library's own common tests: the `tests` folder of the source distribution of the installed version."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

HERE = Path(__file__).parent
CACHE = HERE.parent / "build" / "conformance"


def fetch() -> Path:
    """A folder with `tests`, the library's own with our stand-ins beside them, and `src`, the installed library.

    Raises:
        RuntimeError: the package registry cannot be reached, or has no source distribution of this version.
    """
    root = CACHE / f"transformers-{transformers.__version__}"
    if not root.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            # In one step, so that a run that was cut off leaves nothing half done.
            _unpack(_download(Path(folder))).rename(root)
    shutil.copytree(HERE / "stand_ins", root / "tests", dirs_exist_ok=True)
    # Some of the tests look for the library's source beside them. It is to be the one that they test.
    source = root / "src" / "transformers"
    source.parent.mkdir(exist_ok=True)
    source.unlink(missing_ok=True)
    source.symlink_to(Path(transformers.__file__).parent)
    return root


def _download(folder: Path) -> Path:
    requirement = f"transformers=={transformers.__version__}"
    command = ["pip", "download", "--quiet", "--no-deps", "--no-binary=transformers", requirement]
    result = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if result.returncode or not archives:
        raise RuntimeError(f"`{' '.join(command)}` brought no source distribution:\n{result.stderr.strip()}")
    return archives[0]


def _unpack(archive: Path) -> Path:
    root = archive.with_name(archive.name.removesuffix(".tar.gz"))
    with tarfile.open(archive) as tar:
        tests = [member for member in tar if member.name.startswith(f"{root.name}/tests/")]
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python has none before 3.11.4 and 3.10.12
        tar.extractall(root.parent, members=tests)
    if not tests:
        raise RuntimeError(f"{archive.name} holds no tests.")
    return root


if __name__ == "__main__":
    print(fetch())
