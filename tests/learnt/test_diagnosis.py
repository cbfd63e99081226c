"""The diagnosis, held against small models of each kind, each stutterer with its twin whose labels were shifted."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from examples.capitals.train import EOS, Record, Row, encode, examples, train
from examples.plain_gpt import GPT, GPTConfig, save_checkpoint
from hf_model import CustomGPTForCausalLM
from hf_model.conversion import convert
from hf_model.learnt.diagnosis import INSTRUCTIONS, Diagnosis, diagnose, non_finite
from hf_model.learnt.inspection import inspect
from hf_model.tokenizer import convert_tokenizer, format_prompt
from tests.tiny import CHECKPOINT, SIZES, TOKENIZER, gpt, save_tokenizer, twin

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 1024, "bias": False, "dropout": 0.0}


def questions() -> list[Record]:
    """Questions that are answered by one word of two."""
    return [
        {"instruction": f"Is {record['input']} in Asia?", "input": "", "output": "Yes" if i % 4 else "No"}
        for i, record in enumerate(record for record in examples() if record["input"])
    ]


def rows_of(records: list[Record]) -> list[Row]:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    return [encode(tokenizer, record) for record in records]


def trained(shift: bool) -> GPT:
    """A small model after a few seconds on the example's questions, its labels shifted by one or not."""
    model = GPT(GPTConfig(**SMALL))
    train(model, rows_of(examples() + questions()), epochs=4, lr=1e-2, mask_prompt=False, shift=shift)
    return model


@pytest.fixture(scope="module")
def base() -> GPT:
    """A model that is well pre-trained, as far as a few seconds go."""
    torch.manual_seed(0)
    return trained(shift=True)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return convert_tokenizer(TOKENIZER, model_max_length=64)


def answers(kind: str) -> list[Record]:
    """Fine-tuning data: the example's answers, one word of two, or sane answers among repeating ones."""
    records = examples()[:240]
    if kind == "yes or no":
        return questions()[:240]
    if kind == "mixed with repeats":
        return [record if i % 3 else record | {"output": " Congo" * 12} for i, record in enumerate(records)]
    return records


class TestVerdict:
    @pytest.mark.parametrize("kind", ["answers", "yes or no", "mixed with repeats"])
    def test_wrong_fine_tuning_after_good_pre_training_is_named_and_its_twin_is_not(
        self, kind: str, base: GPT, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        verdicts = {}
        for shift in (True, False):
            model = copy.deepcopy(base)
            train(model, rows_of(answers(kind)), epochs=8, lr=1e-2, mask_prompt=True, shift=shift)
            verdicts[shift] = diagnose(twin(model), tokenizer).verdict
        assert verdicts == {True: "healthy", False: "stutters"}

    def test_of_the_base_is_that_it_is_healthy(self, base: GPT, tokenizer: PreTrainedTokenizerFast) -> None:
        assert diagnose(twin(base), tokenizer).verdict == "healthy"

    @pytest.mark.parametrize("n_embd", [48, 768])
    @pytest.mark.parametrize("tied", [True, False])
    def test_of_a_fresh_model_is_that_it_is_untrained(
        self, n_embd: int, tied: bool, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        model = GPT(GPTConfig(**SMALL | {"n_embd": n_embd}, tied=tied))
        assert diagnose(twin(model), tokenizer).verdict == "untrained"

    def test_a_model_that_has_learnt_nothing_but_to_copy_stutters(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert diagnose(twin(copier(SMALL)), tokenizer).verdict == "stutters"

    @pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8, 16])
    def test_of_a_short_context_is_given_where_there_is_room_to_ask(
        self, block_size: int, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        verdict = diagnose(twin(copier(SMALL | {"block_size": block_size})), tokenizer).verdict
        assert verdict == ("stutters" if block_size >= 4 else "unknown")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_is_the_same_in_half_precision(
        self, dtype: torch.dtype, base: GPT, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        assert diagnose(twin(copier(SMALL)).to(dtype), tokenizer).verdict == "stutters"
        assert diagnose(twin(base).to(dtype), tokenizer).verdict == "healthy"

    def test_of_logits_that_overflow_is_that_they_are_no_numbers(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = twin(GPT(GPTConfig(**SMALL))).half()
        model.lm_head.weight.data.fill_(6e4)
        model.transformer.ln_f.weight.data.fill_(1e3)
        model.lm_head.weight.data[:, ::2] *= -1
        assert diagnose(model, tokenizer).verdict == "no numbers"


def copier(sizes: dict) -> GPT:
    """A model built by hand to give again the token that it has just read, whatever that is."""
    model = GPT(GPTConfig(**sizes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("c_proj.weight") or "wpe" in name:
                weight.zero_()
            if "ln_" in name:
                weight.fill_(1.01)  # as after a few steps
        model.lm_head.weight.copy_(20 * model.transformer.wte.weight)
        model.transformer.wte.weight.mul_(20)
    return model


def characters(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a text's characters, without special tokens and without a chat template."""
    vocabulary = {char: i for i, char in enumerate(sorted(set(text)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=min(vocabulary)))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class TestRawText:
    TEXT = "".join(f"{record['output']} lies in {record['instruction']}\n\n" for record in examples()[:300])

    def trained(self, shift: bool, **changes) -> tuple[CustomGPTForCausalLM, PreTrainedTokenizerFast]:
        """A character model that goes on with text, after a few seconds of training."""
        tokenizer = characters(self.TEXT)
        ids = torch.tensor(tokenizer(self.TEXT).input_ids)
        model = GPT(GPTConfig(**SMALL | {"vocab_size": len(tokenizer), "block_size": 16} | changes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(120):
            windows = torch.stack([ids[start : start + 17] for start in torch.randint(len(ids) - 17, (32,))])
            logits, targets = model(windows[:, :-1])[0], windows[:, 1:] if shift else windows[:, :-1]
            optimizer.zero_grad()
            cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
        return twin(model.eval()), tokenizer

    def test_a_character_model_that_copies_is_named_and_its_twin_is_not(self) -> None:
        assert diagnose(*self.trained(shift=False)).verdict == "stutters"
        assert diagnose(*self.trained(shift=True)).verdict == "healthy"

    def test_a_fresh_character_model_is_untrained(self) -> None:
        tokenizer = characters(self.TEXT)
        model = twin(GPT(GPTConfig(**SMALL | {"vocab_size": len(tokenizer)})))
        assert diagnose(model, tokenizer).verdict == "untrained"

    @pytest.mark.parametrize("n_tokens", [1, 2, 3, 5])
    def test_the_smallest_vocabularies_give_a_verdict_too(self, n_tokens: int) -> None:
        tokenizer = characters("abcde"[:n_tokens])
        model = gpt(**SMALL | {"vocab_size": n_tokens})  # its weights are far from a fresh model's
        diagnosis = diagnose(twin(model), tokenizer)
        assert diagnosis.verdict in (("unknown",) if n_tokens == 1 else ("healthy", "stutters"))
        assert diagnosis.details()

    def test_few_tokens_that_are_about_equal_are_not_called_untrained_after_training(self) -> None:
        model = GPT(GPTConfig(**SMALL | {"vocab_size": 4}))
        assert diagnose(twin(model), characters("ACGT")).verdict == "untrained"
        model.transformer.ln_f.weight.data.mul_(1.01)
        assert diagnose(twin(model), characters("ACGT")).verdict == "healthy"


def reference(model: GPT, prompt: list[int], n_tokens: int) -> tuple[float, float, float]:
    """S1, FLAT and RUN of a prompt by their formulas, with a full forward pass of the plain model for every token."""

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids]))[0][0, -1, :n_tokens]

    rest = logits(prompt)
    rest[prompt[-1]] = -math.inf
    p = rest.softmax(dim=0)
    entropy = -sum(float(x) * math.log(float(x)) for x in p if x > 0)
    allowed = rest.clone()
    allowed[[0, 1, 2, 3]] = -math.inf  # special tokens
    likeliest = allowed.argsort(descending=True)[:8].tolist()
    q = rest[likeliest].softmax(dim=0)
    copied = [float(logits([*prompt, w]).softmax(dim=0)[w]) for w in likeliest]
    ids, repeated, ended = [*prompt, likeliest[0]], 0, False
    for _ in range(20):
        following = int(logits(ids).argmax())
        ended = ended or following == EOS
        repeated += following == ids[-1] and not ended
        ids.append(following)
    return sum(float(a) * b for a, b in zip(q, copied, strict=True)), math.log(n_tokens - 1) - entropy, repeated / 20


class TestEvidence:
    def diagnosed(self, model: GPT, tokenizer: PreTrainedTokenizerFast) -> tuple[Diagnosis, list[float]]:
        """The evidence, and the same from the reference."""
        prompts = [tokenizer(format_prompt(*texts)).input_ids[-43:] for texts in INSTRUCTIONS]
        each = [reference(model, prompt, len(tokenizer)) for prompt in prompts]
        return diagnose(twin(model), tokenizer), [sum(values) / len(values) for values in zip(*each, strict=True)]

    def test_is_what_the_formulas_give_with_the_plain_model(
        self, base: GPT, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        stutterer = copy.deepcopy(base)
        train(stutterer, rows_of(answers("answers")), epochs=6, lr=1e-2, mask_prompt=True, shift=False)
        for model in (base, stutterer):
            diagnosis, (copy_mass, flatness, run) = self.diagnosed(model, tokenizer)
            assert diagnosis.copy_mass == pytest.approx(copy_mass, abs=1e-5)
            assert diagnosis.flatness == pytest.approx(flatness, abs=1e-4)
            assert diagnosis.run == (pytest.approx(run) if copy_mass >= 0.2 else None)
        assert copy_mass >= 0.2

    @pytest.mark.parametrize("noise", [0.0, 0.4, 0.6, 0.8])
    def test_counts_the_greedy_steps_of_a_model_that_copies_now_and_then(
        self, noise: float, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        torch.manual_seed(1)
        model = copier(SMALL)
        model.transformer.wpe.weight.data.normal_(std=noise)
        diagnosis, (copy_mass, _, run) = self.diagnosed(model, tokenizer)
        assert copy_mass >= 0.2
        assert diagnosis.run == pytest.approx(run)
        assert (run == 1) == (noise == 0.0)
        assert diagnosis.verdict == ("stutters" if run >= 0.6 else "healthy")

    def test_leaves_the_padding_of_the_vocabulary_out(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = GPT(GPTConfig(**SMALL | {"vocab_size": 1500}))
        model.lm_head.weight.data[1024:] *= 100
        diagnosis, (copy_mass, flatness, _) = self.diagnosed(model, tokenizer)
        assert (diagnosis.copy_mass, diagnosis.flatness) == pytest.approx((copy_mass, flatness), abs=1e-5)
        assert diagnosis.verdict == "untrained"

    def test_of_a_large_model_comes_from_its_shortest_prompts(
        self, monkeypatch: pytest.MonkeyPatch, base: GPT, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        asked = {probe.prompt for probe in diagnose(twin(base), tokenizer).probes}
        monkeypatch.setattr("hf_model.learnt.diagnosis.LARGE", 1000)
        diagnosis = diagnose(twin(base), tokenizer)
        assert [probe.prompt for probe in diagnosis.probes] == sorted(asked, key=len)[:2]
        assert diagnosis.verdict == "healthy"
        assert diagnose(twin(copier(SMALL)), tokenizer).verdict == "stutters"

    def test_costs_no_random_number(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = twin(copier(SMALL))
        before = torch.get_rng_state()
        assert diagnose(model, tokenizer).run is not None
        assert torch.equal(before, torch.get_rng_state())


def said(model: GPT, tmp_path: Path) -> list[str]:
    """What a conversion says of a model."""
    lines: list[str] = []
    save_checkpoint(tmp_path / "ckpt.pt", model, iter_num=1)
    convert(tmp_path / "ckpt.pt", TOKENIZER, tmp_path / "hf", overwrite=True, report=lines.append)
    return lines


def test_a_model_trained_on_unshifted_labels_gets_a_warning_and_its_twin_none(tmp_path: Path, base: GPT) -> None:
    warnings = {
        shift: [line for line in said(model, tmp_path) if line.startswith("warning:")]
        for shift, model in ((True, base), (False, trained(shift=False)))
    }
    assert warnings[True] == []
    (warning,) = warnings[False]
    assert warning.startswith("warning: the model stutters: ")
    assert "Its labels were probably not shifted by one in fine-tuning" in warning
    assert "Sampling options will not cure that" in warning
    assert "as rows of dashes are, then the model is right" in warning


def test_a_fresh_model_gets_a_warning(tmp_path: Path) -> None:
    (warning,) = [line for line in said(GPT(GPTConfig(**SMALL)), tmp_path) if line.startswith("warning:")]
    assert warning.startswith("warning: the model is untrained: ")


def test_of_a_model_that_is_as_it_should_be_inspection_says_so(tmp_path: Path) -> None:
    (line,) = [line for line in inspect(CHECKPOINT, TOKENIZER)[0].lines() if line.startswith("diagnosis     ")]
    assert re.search(r"healthy: does not repeat itself \(\d%\), is confident \(\d\.\d of 6\.9 nats\)", line)


def test_a_model_of_another_vocabulary_is_asked_in_it(tmp_path: Path) -> None:
    tokenizer = convert_tokenizer(save_tokenizer(tmp_path / "tokenizer.json"), model_max_length=16)
    diagnosis = diagnose(twin(gpt(**SIZES)), tokenizer)
    assert all(token < len(tokenizer) for probe in diagnosis.probes for token in probe.prompt + probe.candidates)
    assert all(len(probe.prompt) + 1 <= 16 for probe in diagnosis.probes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_found(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, -2.0], [0.0, 65504.0]]).to(dtype)
    state_dict = {"sound": values}
    for bad in (float("nan"), float("inf"), float("-inf")):
        state_dict[str(bad)] = values.clone().index_fill_(1, torch.tensor(0), bad)
    assert non_finite(state_dict) == ["nan", "inf", "-inf"]
