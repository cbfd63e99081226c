"""Scores of texts, held against the plain model's logits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_model.errors import UserError
from hf_model.scoring import score, score_text
from hf_model.tokenizer import convert_tokenizer, format_prompt
from hf_model_cli import generate as generate_command
from tests.learnt.test_diagnosis import SMALL
from tests.test_cli import EXAMPLE, Result, call  # noqa: F401
from tests.tiny import CAPITALS, TOKENIZER, gpt, save_tokenizer, twin


@pytest.mark.parametrize("prompt", [None, "What is it?"])
def test_a_text_s_score_is_the_sum_of_its_tokens_by_the_plain_model(prompt: str | None) -> None:
    tokenizer, model = convert_tokenizer(TOKENIZER, model_max_length=64), gpt(**SMALL)
    scored = score_text(twin(model), tokenizer, "Paris lies in France", prompt=prompt, n_candidates=3)
    head = tokenizer("" if prompt is None else format_prompt(prompt)).input_ids
    ids = head + tokenizer(("" if prompt is None else " ") + "Paris lies in France", add_special_tokens=False).input_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0][0].log_softmax(dim=-1)
    assert [token.id for token in scored.tokens] == ids[len(head) :]
    each = [float(expected[i - 1, ids[i]]) for i in range(len(head), len(ids))]
    assert [token.log_probability for token in scored.tokens] == pytest.approx(each, rel=1e-4)
    assert scored.log_probability == pytest.approx(sum(each), rel=1e-4)
    assert scored.perplexity == pytest.approx(float(torch.tensor(each).mean().neg().exp()), rel=1e-3)
    likeliest = expected[len(head) - 1].topk(3)
    assert [text for text, _ in scored.tokens[0].candidates] == [tokenizer.decode([i]) for i in likeliest.indices]


@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
def test_past_the_context_each_token_has_at_least_half_of_it_before_it(block_size: int, tmp_path: Path) -> None:
    tokenizer = convert_tokenizer(save_tokenizer(tmp_path / "tokenizer.json"), model_max_length=block_size)
    model = gpt(block_size=block_size)
    ids = torch.randint(4, len(tokenizer), (40,)).tolist()
    scored = score(twin(model), tokenizer, ids, 1)
    assert [token.id for token in scored] == ids[1:]
    for i, token in enumerate(scored, start=1):
        possible = []
        for seen in range(min(i, max(1, block_size // 2)), min(i, block_size) + 1):
            with torch.no_grad():
                possible.append(float(model(torch.tensor([ids[i - seen : i]]))[0][0, -1].log_softmax(0)[ids[i]]))
        assert min(abs(token.log_probability - value) for value in possible) < 1e-4
        if i <= block_size:
            assert token.log_probability == pytest.approx(possible[-1], abs=1e-4)


def test_logits_that_are_no_numbers_are_the_user_s_error() -> None:
    model = twin(gpt(**SMALL))
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        score_text(model, convert_tokenizer(TOKENIZER, model_max_length=64), "Paris")


class TestCommand:
    def test_prints_the_score(self, call: Callable[..., Result]) -> None:  # noqa: F811
        result = call(generate_command, *EXAMPLE, "--score", "Paris", "--prompt", "What is the capital of France?")
        assert result.status == 0
        perplexity = float(result.out.splitlines()[-1].removeprefix("perplexity"))
        assert 1 <= perplexity < 1.1  # the example knows it

    def test_as_json_is_one_object(self, call: Callable[..., Result]) -> None:  # noqa: F811
        result = call(generate_command, *EXAMPLE, "--score", "Paris", "--json", "--top_candidates", "2")
        found = json.loads(result.out)
        assert sum(token["log_probability"] for token in found["tokens"]) == pytest.approx(found["log_probability"])
        assert all(len(token["candidates"]) == 2 for token in found["tokens"])

    def test_shows_what_it_would_have_said_instead(self, call: Callable[..., Result]) -> None:  # noqa: F811
        question = ("--prompt", "What is the capital of France?", "--temperature", "0")
        result = call(generate_command, *EXAMPLE, *question, "--top_candidates", "3")
        plain = call(generate_command, *EXAMPLE, *question)
        answer = "[BOS]Instruction: What is the capital of France? Response: Paris[EOS]"
        assert answer in plain.out and answer in result.out
        table = result.out.split(answer)[1].strip().splitlines()[:4]
        assert ["' P'" in table[0], "'[EOS]'" in table[3]] == [True, True]
        assert all(line.count("%") == 4 for line in table)

    def test_what_else_could_have_come_is_in_the_json(self, call: Callable[..., Result]) -> None:  # noqa: F811
        question = ("--prompt", "What is the capital of France?", "--temperature", "0", "--json", "--quiet")
        result = call(generate_command, *EXAMPLE, *question, "--top_candidates", "3")
        tokens = json.loads(result.out)["top_candidates"]
        assert "".join(token["text"] for token in tokens) == " Paris[EOS]"
        for token in tokens:  # greedy: the token that came is the likeliest
            assert len(token["candidates"]) == 3
            assert token["candidates"][0]["text"] == token["text"]
            assert token["candidates"][0]["log_probability"] == pytest.approx(token["log_probability"])
        assert "top_candidates" not in json.loads(call(generate_command, *EXAMPLE, *question).out)

    @pytest.mark.parametrize(
        "arguments, said",
        [
            (("--prompt", "a", "--top_candidates", "2", "--quiet"), "--quiet would hide what it shows"),
            (("--score", ""), "--score: must not be empty"),
            (("--score", "a", "--prompts_file", str(CAPITALS / "README.md")), "not allowed with argument --score"),
            (("--score", "a", "--input_text", "b"), "needs the --prompt"),
            (("--prompt", "a", "--top_candidates", "-1"), "--top_candidates"),
        ],
    )
    def test_refuses_in_one_line(self, arguments: tuple, said: str, call: Callable[..., Result]) -> None:  # noqa: F811
        result = call(generate_command, *EXAMPLE, *arguments)
        assert result.status == 2
        assert said in result.err and result.err.count("\n") == 1
