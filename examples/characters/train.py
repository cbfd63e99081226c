"""Train a small GPT on characters and leave nanoGPT's files: `python -m examples.characters.train`."""

import argparse
import pickle
from pathlib import Path

import torch

from examples.plain_gpt import GPT, GPTConfig

BATCH_SIZE = 16
DATASET = "license_char"


def train(model: GPT, data: torch.Tensor, steps: int) -> tuple[torch.optim.Optimizer, float]:
    """Train on random stretches of `data`, one id for each character, and return the optimizer and the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    length = model.config.block_size
    last = 0.0
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(len(data) - length, (BATCH_SIZE,))
        rows = torch.stack([data[start : start + length + 1] for start in starts])  # (B, T + 1)
        _, loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        last = loss.item()
        if step % 300 == 0:
            print(f"  step {step:4d}  loss {last:.3f}")
    model.eval()
    return optimizer, last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path("LICENSE"))
    parser.add_argument("--root", type=Path, default=Path(), help="where out/ and data/ are made")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    text = args.text.read_text(encoding="utf-8")
    characters = sorted(set(text))
    stoi = {character: number for number, character in enumerate(characters)}
    config = GPTConfig(
        n_layer=3, n_head=3, n_embd=96, block_size=64, vocab_size=len(characters), bias=False, dropout=0.0, tied=True
    )
    model = GPT(config)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(text):,} characters, {len(characters)} different; {n_parameters:,} parameters")
    optimizer, loss = train(model, torch.tensor([stoi[character] for character in text]), args.steps)

    meta = args.root / "data" / DATASET / "meta.pkl"
    meta.parent.mkdir(parents=True, exist_ok=True)
    meta.write_bytes(pickle.dumps({"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}))
    checkpoint = args.root / "out" / "ckpt.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": model.model_args(),
        "iter_num": args.steps,
        "best_val_loss": torch.tensor(loss),  # of the training text: there is no other
        "config": {"out_dir": "out", "dataset": DATASET},
    }
    torch.save(content, checkpoint)
    print(f"written {checkpoint} and {meta}")


if __name__ == "__main__":
    main()
