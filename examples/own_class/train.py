"""Train a GPT of a class of its own on characters for a minute, and convert it.

python examples/own_class/train.py input.txt my-gpt-hf
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_model import convert

CONTEXT, WIDTH, HEADS, LAYERS = 64, 96, 4, 3
STEPS, ROWS = 400, 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.expand, self.shrink = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        u = self.before(x)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.attention(u, u, u, attn_mask=future, need_weights=False)[0]
        return x + self.shrink(F.relu(self.expand(self.between(x))))


class Scribe(nn.Module):
    def __init__(self, n_characters: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(n_characters, WIDTH)
        self.places = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.stack = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.guess = nn.Linear(WIDTH, n_characters)

    def forward(self, ids: Tensor) -> Tensor:
        return self.guess(self.stack(self.letters(ids) + self.places[: ids.shape[1]]))


def main(text_path: str, folder: str) -> None:
    text = Path(text_path).read_text(encoding="utf-8")
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    data = torch.tensor([number[character] for character in text])
    model = Scribe(len(number))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        starts = torch.randint(len(data) - CONTEXT - 1, (ROWS, 1))
        batch = data[starts + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.2f}")
    convert(model, None, folder, characters_of=text_path, overwrite=True, report=print)


if __name__ == "__main__":
    main(*sys.argv[1:])
