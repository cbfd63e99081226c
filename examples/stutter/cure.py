"""Cure a checkpoint that stutters, by fine-tuning it with the labels shifted: `python -m examples.stutter.cure`.

Such a checkpoint comes from `python -m examples.capitals.train --unshifted_labels --out_dir out/stutter`.
"""

import argparse
import time
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from examples.capitals.train import Record, examples
from hf_model.generation import Sampling, continue_prompts, encode
from hf_model.learnt.diagnosis import diagnose
from hf_model.loading import Source
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import format_prompt, save_tokenizer


def conversation(record: Record) -> dict[str, list[dict[str, str]]]:
    """A record as the chat that the tokenizer's template turns into the original's fine-tuning text."""
    user = {"role": "user", "content": record["instruction"], "input": record["input"]}
    return {"messages": [user, {"role": "assistant", "content": record["output"]}]}


def share_right(model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]) -> float:
    """Share of the questions whose answer, and nothing but it, greedy decoding gives."""
    prompts = [encode(tokenizer, format_prompt(record["instruction"], record["input"])) for record in records]
    answers = continue_prompts(model.eval(), tokenizer, prompts, Sampling(temperature=0, max_new_tokens=20))
    return sum(answer == record["output"] for answer, record in zip(answers, records, strict=True)) / len(records)


def fine_tune(
    model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], epochs: int, out_dir: Path
) -> None:
    """Train on the answers alone. The stock trainer gives the labels to the model, which shifts them."""
    arguments = SFTConfig(
        output_dir=str(out_dir),
        assistant_only_loss=True,  # by the chat template's generation blocks
        max_length=model.config.block_size,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        warmup_steps=0.1,
        bf16=False,
        save_strategy="no",
        logging_strategy="epoch",
        disable_tqdm=True,
        report_to=[],
    )
    dataset = Dataset.from_list([conversation(record) for record in records])
    SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, default=Path("out/stutter/ckpt.pt"))
    parser.add_argument("--tokenizer_path", type=Path, default=Path("out/stutter/tokenizer.json"))
    parser.add_argument("--out_dir", type=Path, default=Path("out/cured"), help="folder of the cured model")
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    loaded = Source(args.checkpoint_path, args.tokenizer_path).load()
    model, tokenizer = loaded.model, loaded.tokenizer
    records = examples()

    def report(when: str) -> None:
        found, right = diagnose(model, tokenizer), share_right(model, tokenizer, records)
        goes_on = "" if found.run is None else f" and goes on {found.run:.0%}"
        copies = f"repeats its answers {found.copy_mass:.0%}{goes_on}"
        print(f"{when:<6}  {found.verdict:<8}  {copies}   answered right {right:.1%}", flush=True)

    report("before")
    start = time.perf_counter()
    fine_tune(model, tokenizer, records, args.epochs, args.out_dir)
    seconds = time.perf_counter() - start
    report("after")
    print(f"fine-tuned in {seconds:.0f} s")
    model.save_pretrained(args.out_dir)
    save_tokenizer(tokenizer, args.out_dir)


if __name__ == "__main__":
    main()
