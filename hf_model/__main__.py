"""`python -m hf_model`: what there is."""

import argparse

from hf_model_cli.common import Parser

parser = Parser(
    prog="python -m hf_model",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    description="""\
A GPT trained in plain PyTorch (nanoGPT and its relatives) as a Hugging Face model. There are two commands:

  custom-gpt-convert --help     a checkpoint and its tokenizer to a Hugging Face folder
  custom-gpt-generate --help    text from a checkpoint or from a converted folder

In a clone, convert_checkpoint.py and generate.py are the same two. From Python: import hf_model; help(hf_model)""",
)
parser.parse_args()
parser.print_help()
