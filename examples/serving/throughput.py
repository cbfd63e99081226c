"""Ask a server many questions at once and measure how fast it answers.

    python -m examples.serving.throughput questions.jsonl --url http://localhost:8000/v1 --model capitals-hf

The server may be any that speaks OpenAI's chat completions: `vllm serve`, `transformers serve`, `llama-server`.
Answers are greedy. The first request is not measured, because some servers load or compile on it. The records are
those of `generate.py --prompts_file`, {"instruction": …}; an answer that equals a record's "output" counts as right.
"""

import argparse
import asyncio
import json
import time
from itertools import cycle, islice
from pathlib import Path

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion

SECONDS = 600  # the longest wait: a request may be queued behind all the others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--max_tokens", type=int, default=32)
    args = parser.parse_args()
    lines = args.questions.read_text(encoding="utf-8").splitlines()
    records = [record for line in lines if not (record := json.loads(line)).get("input")]
    asyncio.run(measure(args, list(islice(cycle(records), args.requests))))


async def measure(args: argparse.Namespace, records: list[dict[str, str]]) -> None:
    client = AsyncOpenAI(base_url=args.url, api_key="none", timeout=SECONDS, max_retries=0)

    async def ask(record: dict[str, str]) -> ChatCompletion:
        return await client.chat.completions.create(
            model=args.model,
            messages=[{"role": "user", "content": record["instruction"]}],
            temperature=0,
            max_tokens=args.max_tokens,
        )

    await ask(records[0])
    start = time.perf_counter()
    answers = await asyncio.gather(*map(ask, records))
    seconds = time.perf_counter() - start
    tokens = sum(answer.usage.completion_tokens for answer in answers if answer.usage)
    right = sum(
        (answer.choices[0].message.content or "").strip() == record.get("output")
        for record, answer in zip(records, answers, strict=True)
    )
    print(
        f"{len(records)} requests, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s, {right} right"
    )


if __name__ == "__main__":
    main()
