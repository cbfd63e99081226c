"""`python -m hf_model`: what there is."""

from hf_model import __version__

print(f"""custom-gpt-hf {__version__}: a GPT trained in plain PyTorch as a Hugging Face model

custom-gpt-convert --help    a checkpoint and its tokenizer to a Hugging Face folder
custom-gpt-generate --help   text from a checkpoint or from a converted folder
python -c "import hf_model; help(hf_model)"    the same from Python

In a clone, convert_checkpoint.py and generate.py are the same two commands.""")
