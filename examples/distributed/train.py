"""Fine-tune a converted folder on the example's questions: `accelerate launch ... -m examples.distributed.train`.

The batch is spread over the processes that accelerate starts, so their number changes the speed and not the result.
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import hf_model  # noqa: F401 (registers the Auto classes)
from examples.evaluation.questions import QUESTIONS
from hf_model.records import Record, read_records
from hf_model.tokenizer import format_example, format_prompt

BATCH_SIZE = 8


def encode(tokenizer: PreTrainedTokenizerBase, record: Record) -> dict[str, list[int]]:
    """A record as the original's fine-tuning text, with labels on the answer."""
    text = format_example(record["instruction"], record["output"], record["input"])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    n_prompt = len(tokenizer(format_prompt(record["instruction"], record["input"])).input_ids)
    return {"input_ids": ids, "labels": [-100] * n_prompt + ids[n_prompt:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="converted folder")
    parser.add_argument("--out_dir", type=Path, required=True, help="folder of the fine-tuned model")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    # Dropout would draw different numbers in every process.
    model = AutoModelForCausalLM.from_pretrained(args.model, dropout=0.0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    arguments = TrainingArguments(
        output_dir=str(args.out_dir),
        max_steps=args.steps,
        use_cpu=not torch.cuda.is_available(),  # where it is not said, the processes do not find each other
        ddp_find_unused_parameters=False,
        save_strategy="no",
        report_to=[],
    )
    arguments.per_device_train_batch_size = BATCH_SIZE // arguments.world_size
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[encode(tokenizer, record) for record in read_records(QUESTIONS)],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"{arguments.world_size} processes, {arguments.distributed_state.backend}: {args.out_dir} written")


if __name__ == "__main__":
    main()
