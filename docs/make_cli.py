"""Write docs/cli.md, the options of both commands, from their parsers.

python -m docs.make_cli            # write the page
python -m docs.make_cli --check    # exit with status 1 if the page differs
"""

import argparse
import sys
from pathlib import Path

from hf_model_cli import convert, generate
from hf_model_cli.options import Parser

PAGE = Path(__file__).with_name("cli.md")
HEAD = """\
# The options of the two commands

<!-- Written by `python -m docs.make_cli`. Change the help texts in hf_model_cli/, not this page. -->

An installation has the commands as `custom-gpt-convert` and `custom-gpt-generate`; in a clone they are
`python convert_checkpoint.py` and `python generate.py`. Both exit with status 0 if all went well, 2 after an error that
you can mend (one line on standard error), 130 after Ctrl-C, and 143 after SIGTERM.
"""
COMMANDS = {"convert_checkpoint.py": convert.make_parser, "generate.py": generate.make_parser}


def page() -> str:
    return "\n".join([HEAD, *(part for name, make in COMMANDS.items() for part in command(name, make()))])


def command(name: str, parser: Parser) -> list[str]:
    """The lines about one command: a table for each group of its options."""
    lines = [f"## {name}", "", f"{parser.description}", ""]
    for group in parser._action_groups:  # argparse has no public way to list them
        if rows := [row(action) for action in group._group_actions]:
            title = (group.title or "").capitalize()
            lines += [f"### {title}", "", *([f"{group.description}", ""] if group.description else [])]
            lines += ["| option | |", "|---|---|", *rows, ""]
    return lines


def row(action: argparse.Action) -> str:
    value, text = action.metavar or "NAME", (action.help or "") % vars(action)
    choices = list(action.choices or ())
    if len(choices) == 1:
        value = choices[0]
    elif choices:
        text += f"; one of {', '.join(f'`{choice}`' for choice in choices)}"
    name = ", ".join(action.option_strings)
    if action.nargs != 0:
        name += f" {value}" + (" …" if action.nargs == "+" else "")
    return f"| `{name}` | {text.replace('|', '&#124;')} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the page with the parsers; write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE}: differs from the options: run python -m docs.make_cli", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
