"""Write the example's questions where the harness's task finds them: `python -m examples.evaluation.questions`."""

import json
from pathlib import Path

from examples.capitals.train import examples

QUESTIONS = Path(__file__).with_name("questions.jsonl")


def main() -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in examples()]
    QUESTIONS.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
