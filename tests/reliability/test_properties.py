"""Whatever an honest trainer writes gives exactly its model; whatever contradicts itself gives a clear error."""

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from examples.plain_gpt import GPT, GPTConfig
from hf_model.errors import UserError
from tests.tiny import load_plain

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "100"))
PREFIXES = ("", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.")
EXTRAS = {"loss": 3.9, "best_val_loss": torch.tensor(1.5), "optimizer_state_dict": {"state": {}}, "run": ["a", None]}
SIZES = ("n_layer", "n_embd", "block_size", "vocab_size")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As few tokens as a tokenizer of this family can have, so that it goes with every vocabulary."""
    tokenizer = Tokenizer(models.BPE(vocab={}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("[UNK]", "[PAD]", "[BOS]", "[EOS]")])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@dataclass
class Written:
    """A model and what a trainer writes of it."""

    model: GPT
    content: dict[str, Any]
    weights: dict[str, torch.Tensor]
    """The state dict in the content; without the content where there is no wrapper."""
    is_zip: bool

    def load(self, tokenizer: Path) -> Any:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "ckpt.pt"
            torch.save(self.content, path, _use_new_zipfile_serialization=self.is_zip)
            is_stated = "n_head" in self.content.get("model_args", {})
            heads = None if is_stated else self.model.config.n_head
            return load_plain(path, tokenizer, n_head=heads, activation="gelu")[0]  # a bare file with masks says tanh


@st.composite
def written(draw: st.DrawFn) -> Written:
    n_head = draw(st.integers(1, 4))
    config = GPTConfig(
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_embd=n_head * draw(st.integers(1, 6)),
        block_size=draw(st.integers(1, 12)),
        vocab_size=draw(st.integers(4, 40)),
        bias=draw(st.booleans()),
        tied=draw(st.booleans()),
    )
    torch.manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    model = GPT(config).eval().to(dtype)
    weights = model.state_dict()
    if config.tied and draw(st.booleans()):
        del weights["lm_head.weight"]
    if draw(st.booleans()):
        weights = weights | {
            f"transformer.h.{i}.attn.bias": torch.ones(2, 2).tril()[None, None] for i in range(config.n_layer)
        }
    names = draw(st.permutations(list(weights))) if draw(st.booleans()) else list(weights)
    prefix = draw(st.sampled_from(PREFIXES))
    saved = draw(st.sampled_from([dict, OrderedDict]))({prefix + name: weights[name] for name in names})

    key = draw(st.sampled_from(["model_state_dict", "model", "state_dict", None]))
    if key is None:
        return Written(model, saved, saved, draw(st.booleans()))
    model_args = model.model_args()
    stated = draw(st.sets(st.sampled_from(sorted(model_args))))
    extras = draw(st.sets(st.sampled_from(sorted(EXTRAS))))
    content = {key: saved, "model_args": {name: model_args[name] for name in stated}}
    return Written(model, content | {name: EXTRAS[name] for name in extras}, saved, draw(st.booleans()))


some = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)


@some
@given(written())
def test_an_honest_file_gives_exactly_its_model(tokenizer: Path, written: Written) -> None:
    loaded = written.load(tokenizer)
    expected = written.model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, weight in expected.items():
        assert loaded.state_dict()[name].dtype == weight.dtype
        assert torch.equal(loaded.state_dict()[name], weight)
    if loaded.dtype == torch.float32:
        idx = torch.randint(written.model.config.vocab_size, (2, written.model.config.block_size))
        assert torch.equal(loaded(idx).logits, written.model(idx)[0])


@some
@given(written(), st.data())
def test_a_missing_weight_is_an_error(tokenizer: Path, written: Written, data: st.DataObject) -> None:
    # Of a tied pair one name is enough, a causal mask is no weight, and a bias that no layer has is zero.
    only_layer = written.model.config.n_layer == 1
    spare = ("lm_head.weight", "transformer.wte.weight", ".attn.bias", "ln_f.bias", *([".bias"] if only_layer else []))
    needed = [name for name in written.weights if not name.endswith(spare)]
    del written.weights[data.draw(st.sampled_from(needed))]
    with pytest.raises(UserError):
        written.load(tokenizer)


@some
@given(written(), st.text(min_size=1))
def test_an_extra_weight_is_an_error(tokenizer: Path, written: Written, name: str) -> None:
    written.weights[f"transformer.{name}.weight"] = torch.ones(2)
    with pytest.raises(UserError):
        written.load(tokenizer)


@some
@given(written(), st.data())
def test_a_weight_of_another_shape_is_an_error(tokenizer: Path, written: Written, data: st.DataObject) -> None:
    names = [name for name in written.weights if not name.endswith(".attn.bias")]
    name = data.draw(st.sampled_from(names))
    weight = written.weights[name]
    shape = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=3))
    if tuple(shape) == tuple(weight.shape):
        shape.append(1)
    written.weights[name] = torch.ones(shape, dtype=weight.dtype)
    # More or fewer rows of an embedding are another context or vocabulary, which only model_args can contradict.
    for embedding, size in (("wpe.weight", "block_size"), ("wte.weight", "vocab_size")):
        if name.endswith(embedding):
            written.content.setdefault("model_args", {})[size] = weight.shape[0]
    with pytest.raises(UserError):
        written.load(tokenizer)


@some
@given(written(), st.sampled_from(SIZES), st.integers(-1, 50) | st.floats() | st.text() | st.lists(st.none()))
def test_a_size_that_contradicts_the_weights_is_an_error(
    tokenizer: Path, written: Written, name: str, size: Any
) -> None:
    assume(written.content is not written.weights and size != getattr(written.model.config, name))
    written.content["model_args"][name] = size
    with pytest.raises(UserError, match=f"model_args says {name}="):
        written.load(tokenizer)
