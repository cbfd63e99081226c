"""Record a session of a nanoGPT user as a picture: `python docs/session.py` writes docs/session.svg; needs rich.

The example of characters is trained first, for a minute, out of sight. The commands are run as they are shown. Of long
output the middle is left out.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).parents[1]
COLUMNS = 110
TRAIN = [sys.executable, "-m", "examples.characters.train", "--root"]
COMMANDS = [
    "python convert_checkpoint.py --checkpoint_path out/ckpt.pt",
    'python generate.py --checkpoint_path out/hf --quiet --prompt "Licensed" --temperature 0 --max_new_tokens 120',
    "python convert_checkpoint.py --checkpoint_path out/hf --inspect",
]
MOST_LINES = 11


def main() -> None:
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123 (until the end)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*TRAIN, folder], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        for name in ("convert_checkpoint.py", "generate.py"):
            (Path(folder) / name).symlink_to(ROOT / name)
        for command in COMMANDS:
            said = subprocess.run(
                ["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            lines = said.partition("\nTry it:")[0].strip().splitlines()
            if len(lines) > MOST_LINES:
                lines = [*lines[: MOST_LINES - 3], "              …", *lines[-2:]]
            console.print(Text(f"$ {command}", style="bold green"))
            console.print(Text("\n".join(lines) + "\n"))
    svg = console.export_svg(title="a nanoGPT checkpoint, as a Hugging Face model", theme=MONOKAI)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # a picture loads nothing: the reader's own font
    (ROOT / "docs" / "session.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
