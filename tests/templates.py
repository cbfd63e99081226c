"""For prompts of other formats: byte-level tokenizers with special tokens, and a model that says what it was told."""

from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors

from examples.plain_gpt import GPT, GPTConfig
from tests import relatives

TEXT = "Below is an instruction. Write a response. What is the capital of France? Paris. system user assistant"
GPT2_LIKE = ("<|endoftext|>",)
CHATML_LIKE = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIZE = 300
BLOCK = 256


def save_tokenizer(path: Path, *special: str, begin: str | None = None) -> Path:
    """Write a byte-level tokenizer; with `begin`, its post-processor puts that token in front of a text."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT] * 2, vocab_size=SIZE, special_tokens=list(special), show_progress=False)
    if begin is not None:
        number = tokenizer.token_to_id(begin)
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, number)]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def save_speaker(folder: Path, tokenizer_path: Path, *texts: str) -> Path:
    """Write a nanoGPT checkpoint of a model that goes on with these texts, each token by the one before it alone.

    A text begins with the token after which the model says it.
    """
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=SIZE, block_size=BLOCK, vocab_size=SIZE)).eval()
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    model.transformer.ln_f.weight.data.fill_(1)
    model.transformer.wte.weight.data = torch.eye(SIZE)
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        for now, following in pairwise(ids):
            model.lm_head.weight.data[following, now] = 3
    return relatives.save_nanogpt(folder, model)
