"""Record a session, convert → ask → report, as a picture: `python docs/session.py` writes docs/session.svg; needs rich.

The commands are run as they are shown. Of long output the middle is left out.
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
COMMANDS = [
    "python convert_checkpoint.py --checkpoint_path ckpt.pt --tokenizer_path tokenizer.json --output_dir capitals-hf",
    'python generate.py --checkpoint_path capitals-hf --quiet --prompt "What is the capital of France?"',
    "python convert_checkpoint.py --checkpoint_path capitals-hf --inspect --report report.html",
]
MOST_LINES = 9


def main() -> None:
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123 (until the end)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("convert_checkpoint.py", "generate.py"):
            (Path(folder) / name).symlink_to(ROOT / name)
        for name in ("ckpt.pt", "tokenizer.json"):
            (Path(folder) / name).symlink_to(ROOT / "examples" / "capitals" / name)
        for command in COMMANDS:
            said = subprocess.run(
                ["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            lines = said.partition("\nTry it:")[0].strip().splitlines()
            if len(lines) > MOST_LINES:
                lines = [*lines[: MOST_LINES - 3], "              …", *lines[-2:]]
            console.print(Text(f"$ {command}", style="bold green"))
            console.print(Text("\n".join(lines) + "\n"))
    svg = console.export_svg(title="a checkpoint, as a Hugging Face model", theme=MONOKAI)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # a picture loads nothing: the reader's own font
    (ROOT / "docs" / "session.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
