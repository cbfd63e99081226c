"""The original's way of answering, as one process: `python -m benchmarks.plain_generate CKPT TOKENIZER NEW`.

It loads the checkpoint with `torch.load`, and computes the whole context anew for every token.
"""

import sys

import torch
from tokenizers import Tokenizer

from examples.plain_gpt import GPT, GPTConfig


def main(checkpoint_path: str, tokenizer_path: str, new: str) -> None:
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**checkpoint["model_args"])).eval()
    model.load_state_dict(checkpoint["model_state_dict"])
    tokenizer = Tokenizer.from_file(tokenizer_path)
    ids = [
        tokenizer.token_to_id("[BOS]"),
        *tokenizer.encode("Instruction: What is the capital of France? Response:").ids,
    ]
    torch.manual_seed(1337)
    output = model.generate(torch.tensor([ids]), int(new), eos_id=tokenizer.token_to_id("[EOS]"))
    print(tokenizer.decode(output[0].tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
