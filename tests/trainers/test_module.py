"""A GPT of any class is read by what it computes: the same logits and tokens, or a refusal that names the step."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_model import convert, load
from hf_model.errors import UserError
from tests.trainers.own_models import (
    HONEST,
    REFUSED,
    LogProbabilities,
    Own,
    SeparateHeads,
    V,
    last_unless_targets,
    moved,
    only_last,
)

CHARACTERS = "".join(chr(33 + i) for i in range(V))


def untrained(model: nn.Module) -> nn.Module:
    """Weights as before the first step of training: gains of one, biases of zero, and small matrices."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, 0.02)
        else:
            is_gain = any(word in name for word in ("norm", "final", "p.g")) and "bias" not in name
            nn.init.constant_(parameter, float(is_gain and "shift" not in name))
    return model


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "input.txt"
    path.write_text(CHARACTERS)
    return path


def converted(model: nn.Module, text: Path, **options: Any) -> Any:
    folder = convert(model, None, text.parent / "hf", characters_of=text, **options)
    return load(folder, device="cpu")[0]


@torch.no_grad()
def continued(everything: Callable[[Tensor], Tensor], ids: Tensor, n: int, sample: bool) -> list[int]:
    """Greedy or sampled tokens from all logits, without a cache."""
    torch.manual_seed(7)
    for _ in range(n):
        logits = everything(ids)[:, -1]
        chosen = torch.multinomial(logits.softmax(-1), 1) if sample else logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, chosen], dim=1)
    return ids[0].tolist()


def generated(model: Any, ids: Tensor, n: int, sample: bool) -> list[int]:
    torch.manual_seed(7)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, **how)[0].tolist()


@torch.no_grad()
def check_same(model: nn.Module, own: Any) -> None:
    context = own.config.block_size
    model.eval()
    for length in (1, min(5, context), context):
        ids = torch.randint(V, (2, length), generator=torch.Generator().manual_seed(length))
        expected = model.everything(ids)
        assert (own(ids).logits - expected).abs().max() <= 1e-5 * expected.std()
    prompt = torch.tensor([[3, 1, 4]])
    for sample in (False, True):
        n = min(12, context - 3)
        assert generated(own, prompt, n, sample) == continued(model.everything, prompt, n, sample)


@pytest.mark.parametrize("name", HONEST)
def test_a_converted_folder_computes_what_the_own_model_computes(name: str, text: Path) -> None:
    model = moved(HONEST[name]())
    check_same(model, converted(model, text, verify=False))


@pytest.mark.parametrize("name", HONEST)
def test_an_untrained_model_is_read_as_well(name: str, text: Path) -> None:
    model = untrained(HONEST[name]())
    own, _ = load(model, None, characters_of=text, device="cpu")
    ids = torch.randint(V, (2, own.config.block_size))
    with torch.no_grad():
        expected = model.eval().everything(ids)
        assert (own(ids).logits - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("weights", [moved, untrained])
def test_another_architecture_is_refused_and_nothing_is_written(name: str, weights: Callable, text: Path) -> None:
    make, says = REFUSED[name]
    with pytest.raises(UserError, match=says):
        convert(weights(make()), None, text.parent / "hf", characters_of=text)
    assert not (text.parent / "hf").exists()


def test_the_written_folder_is_verified_and_the_report_says_how_near_it_is(text: Path) -> None:
    lines: list[str] = []
    converted(moved(Own()), text, report=lines.append)
    assert any("your model's own logits: equal bit for bit" in line for line in lines)
    assert any("compared with your model: " in line for line in lines)
    assert "those of its own trainer's code: equal bit for bit" in (text.parent / "hf" / "README.md").read_text()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_become_logits_with_the_same_probabilities(temperature: float, text: Path) -> None:
    lines: list[str] = []
    model = moved(LogProbabilities(temperature)).eval()
    own = converted(model, text, report=lines.append)
    assert any("log-probabilities" in line and line.startswith("note") for line in lines)
    for length in (1, 5, 40):
        ids = torch.randint(V, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = model.everything(ids)
            assert (own(ids).logits.log_softmax(-1) - expected).abs().max() <= 1e-5 * expected.std()
    prompt = torch.tensor([[3, 1, 4]])
    for sample in (False, True):
        assert generated(own, prompt, 12, sample) == continued(model.everything, prompt, 12, sample)


@pytest.mark.parametrize(
    "name", ["an attention mask by its name", "a padding mask of ones", "positions and a padding mask of True"]
)
def test_a_mask_by_its_name_is_no_token_ids(name: str, text: Path) -> None:
    """With token ids in place of the mask, token 0 would seem to be apart."""
    lines: list[str] = []
    converted(moved(HONEST[name]()), text, report=lines.append)
    assert not any("padding" in line for line in lines)


@pytest.mark.parametrize(
    "name, says",
    [
        ("unused parameters", "no logit depends on it: token_type.weight"),
        ("one layer that runs three times", "its one layer runs 3 times"),
        ("layers that run twice", "its 2 layers run 4 times in all"),
        ("scaled logits", r"factor 0\.3 became part of the head$"),
        ("scaled logits, tied", "no longer tied to the embedding"),
        ("learned scales", "it became a factor of a matrix, or no logit depends on it: .*factor"),
        ("token types and scaled positions", "became part of the table of positions, or .*kinds.weight"),
    ],
)
def test_what_was_folded_or_left_out_is_noted(name: str, says: str, text: Path) -> None:
    said: list[tuple[str, str]] = []
    model = moved(HONEST[name]())
    load(model, None, characters_of=text, device="cpu", report=lambda *line: said.append(line))
    assert any(item == "note" and re.search(says, line) for item, line in said)


@pytest.mark.parametrize("refused", [False, True])
def test_the_module_is_left_as_it_was(refused: bool, text: Path) -> None:
    model = moved(REFUSED["half a residual"][0]() if refused else HONEST["a cache in buffers"]())
    model.train()
    model.blocks[0].eval()
    ids = torch.randint(V, (2, 7))
    model.everything(ids).sum().backward()
    model.head.register_forward_hook(lambda *_: None)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    before = {name: (tensor, tensor.data_ptr(), tensor.clone()) for name, tensor in tensors.items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes, random, hooks = [m.training for m in model.modules()], torch.get_rng_state(), dict(model.head._forward_hooks)
    if refused:
        with pytest.raises(UserError):
            convert(model, None, text.parent / "hf", characters_of=text)
    else:
        convert(model, None, text.parent / "hf", characters_of=text)
    for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
        same, place, value = before[name]
        assert tensor is same and tensor.data_ptr() == place and torch.equal(tensor, value)
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if n in gradients)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.head._forward_hooks == hooks


class FailsLate(Own):
    """Counts its calls in an attribute, keeps its last input, and runs on short inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.n_calls, self.block_size = 0, 30
        self.register_buffer("last", None, persistent=False)

    def everything(self, ids: Tensor) -> Tensor:
        self.n_calls += 1
        self.last = ids.float()
        return super().everything(ids)


def test_a_module_that_fails_midway_is_left_as_it_was(text: Path) -> None:
    model = moved(FailsLate())
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.pos = nn.Embedding(20, 32)  # fewer positions than its own limit
    weights |= {"pos.weight": model.pos.weight.clone()}
    del model.block_size
    with pytest.raises(UserError, match="does not run on"):
        load(model, None, characters_of=text)
    assert model.training and model.n_calls == 0 and model.last is None
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


class KeepsAll(Own):
    """Keeps what it saw in a list and a dict, and is interrupted at a call."""

    def __init__(self, interrupted_at: int):
        super().__init__()
        self.interrupted_at, self.seen, self.sizes = interrupted_at, [1, 2], {"a": 1}

    def everything(self, ids: Tensor) -> Tensor:
        self.seen.append(ids)
        self.sizes[str(ids.shape)] = len(self.seen)
        self.head.weight.requires_grad_()
        if len(self.seen) == self.interrupted_at:
            raise KeyboardInterrupt
        return super().everything(ids)


@pytest.mark.parametrize("interrupted_at", [3, 4, 5, 6, 7, 1000])
def test_an_interrupted_module_and_its_lists_are_left_as_they_were(interrupted_at: int, text: Path) -> None:
    model = moved(KeepsAll(interrupted_at))
    before = {name: (tensor, tensor.data_ptr(), tensor.clone()) for name, tensor in model.named_parameters()}
    random = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt) if interrupted_at < 1000 else nullcontext():
        load(model, None, characters_of=text, device="cpu")
    assert model.training and model.seen == [1, 2] and model.sizes == {"a": 1}
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()
    for name, tensor in model.named_parameters():
        same, place, value = before[name]
        assert tensor is same and tensor.data_ptr() == place and torch.equal(tensor, value)


def train(text: Path | None) -> list[float]:
    """The losses of some steps of training, with dropout; with a text, the model is converted after each step."""
    torch.manual_seed(0)
    model = Own(returns=last_unless_targets)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(3):
        ids = torch.randint(V, (4, 9))
        loss = torch.nn.functional.cross_entropy(model.everything(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if text is not None:
            own = converted(model, text, overwrite=True)
            assert torch.equal(own.transformer.wte.weight, model.tok.weight)
    return losses


def test_a_conversion_after_each_step_of_training_does_not_change_the_training(text: Path) -> None:
    assert train(text) == train(None)


def test_a_loaded_model_shares_no_weights_with_the_own_one(text: Path) -> None:
    model = moved(Own())
    before = model.tok.weight.clone()
    own, _ = load(model, None, characters_of=text, device="cpu")
    with torch.no_grad():
        own.transformer.wte.weight.zero_()
    assert torch.equal(model.tok.weight, before)


class HidesPadding(Own):
    """The embedding of one token is zeros."""

    def __init__(self, padding: int, **parts: Any):
        super().__init__(**parts)
        self.padding = padding

    def embedded(self, ids: Tensor) -> Tensor:
        return super().embedded(ids) * (ids != self.padding)[..., None]


@pytest.mark.parametrize(
    "model, says",
    [
        (HidesPadding(0), "token 0 apart, as padding"),
        (HidesPadding(3), "token 3 apart, as padding"),
        (HidesPadding(66), "token 66 apart, as padding"),
        (HidesPadding(2, returns=only_last), "one of the tokens 0, 1, 2, 3 and 66 apart, as padding"),
    ],
)
def test_a_token_that_is_padding_to_the_own_model_is_noted(model: nn.Module, says: str, text: Path) -> None:
    said: list[str] = []
    load(moved(model), None, characters_of=text, device="cpu", report=lambda _, line: said.append(line))
    assert any(says in line and "only with an attention_mask" in line for line in said)


def test_positions_that_are_computed_without_end_ask_for_their_number(text: Path) -> None:
    model = moved(Own(positions="computed"))
    del model.block_size
    model.forward = model.everything  # type: ignore[method-assign, assignment]
    for block in model.blocks:  # type: ignore[union-attr]
        block.att = SeparateHeads()
        for head in block.att.heads:
            del head.tril
    with pytest.raises(UserError, match=r"set one, such as model\.block_size"):
        load(moved(model), None, characters_of=text)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(dtype: torch.dtype, text: Path) -> None:
    model = moved(HONEST["interleaved by head"]()).to(dtype)
    own = converted(model, text, verify=False)
    assert own.dtype == dtype
    assert torch.equal(own.transformer.wte.weight, model.tok.weight)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model.eval().float().everything(ids)
        assert (own.float()(ids).logits - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("name", ["scaled logits", "learned scales", "token types and scaled positions"])
def test_factors_are_exact_in_float64(name: str, text: Path) -> None:
    model = moved(HONEST[name]()).double().eval()
    own = converted(model, text)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model.everything(ids)
        assert (own(ids).logits - expected).abs().max() <= 1e-12 * expected.std()


def test_a_module_without_a_tokenizer_asks_for_one() -> None:
    with pytest.raises(UserError, match="needs a tokenizer"):
        load(moved(Own()))
