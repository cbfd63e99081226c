"""Files with a trainer's own names give the trainer's own logits; what a file leaves open is not guessed."""

import functools
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_model import convert, load
from hf_model.descriptions import describe_source
from hf_model.errors import UserError
from hf_model.loading import Source
from hf_model.trainers import Checkpoint, read_checkpoint
from hf_model.trainers.names import TABLE
from tests import relatives
from tests.tiny import ROOT, gpt, save_tokenizer
from tests.trainers.trainer_models import (
    HEADS,
    Book,
    C,
    D,
    Lecture,
    T,
    TrainLLM,
    V,
    moved,
    trained,
)

PREFIXES = ["", "model.", "gpt.", "module.", "_orig_mod.", "_orig_mod._orig_mod.module.", "module._orig_mod.a.net."]
LICENSE = (ROOT / "LICENSE").read_text(encoding="utf-8")
CHARACTERS = sorted(set(LICENSE))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text whose characters are the vocabulary of these models."""
    path = tmp_path / "input.txt"
    path.write_text("".join(map(chr, range(0x4E00, 0x4E00 + V))), encoding="utf-8")
    return path


@torch.no_grad()
def assert_same_logits(model: nn.Module, converted: nn.Module, vocab_size: int = V, length: int = T) -> None:
    for n in (1, 5, length):
        ids = torch.randint(vocab_size, (2, n), generator=torch.Generator().manual_seed(n))
        got, expected = converted(ids).logits, logits_of(model, ids)
        assert (got - expected).abs().max() < 1e-4 * expected.std()


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out[0]


BOOKS = {
    "the book": {},
    "the book, started from GPT-2": {"qkv_bias": True},
    "the faster variant": {"fast": True},
    "the faster variant, started from GPT-2": {"fast": True, "qkv_bias": True},
}


class TestLLMsFromScratch:
    @pytest.mark.parametrize("variant", BOOKS.values(), ids=BOOKS)
    @pytest.mark.parametrize("key", [None, "model_state_dict"], ids=["bare", "beside an optimizer"])
    def test_its_files_give_its_logits(self, variant: dict, key: str | None, text: Path, saved: Callable) -> None:
        model = moved(Book(**variant))
        weights = model.state_dict()
        path = saved(weights if key is None else {key: weights, "optimizer_state_dict": {}})
        loaded = Source(path, None, characters_of=text, n_head=HEADS).load()
        assert_same_logits(model, loaded.model)
        assert ("names", "those of LLMs-from-scratch") in [(kind, what.split("'")[0]) for kind, what in loaded.choices]

    def test_the_number_of_heads_is_asked_for(self, text: Path, saved: Callable) -> None:
        path = saved(moved(Book()).state_dict())
        with pytest.raises(UserError, match="--n_head"):
            Source(path, None, characters_of=text).load()

    @pytest.mark.parametrize(
        ("width", "n_layer", "rows", "heads"),
        [(768, 12, 50257, 12), (1600, 48, 50257, 25), (768, 12, 4000, None), (768, 8, 50257, None)],
        ids=["GPT-2 small", "GPT-2 XL", "another vocabulary", "another depth"],
    )
    def test_only_gpt2_s_sizes_have_gpt2_s_heads(self, width: int, n_layer: int, rows: int, heads: int | None) -> None:
        weights = {"transformer.wte.weight": torch.empty(rows, width, device="meta")}
        weights |= {f"transformer.h.{i}.ln_1.weight": torch.empty(width, device="meta") for i in range(n_layer)}
        names = next(names for names in TABLE if names.trainer == "LLMs-from-scratch")
        told = Checkpoint(Path("model.pth"), weights, {}, weights_key="model_state_dict", names=names).told_heads()
        assert (told and told[0]) == heads

    @pytest.mark.parametrize("name", ["out_head.weight", "tok_emb.weight", "final_norm.shift"])
    def test_what_the_book_s_models_always_have_is_missed(self, name: str, saved: Callable) -> None:
        weights = moved(Book()).state_dict()
        del weights[name]
        with pytest.raises(UserError, match=rf"lacks '{name.rpartition('.')[0]}"):
            read_checkpoint(saved(weights))

    def test_a_bias_that_one_layer_lacks_is_missed(self, saved: Callable) -> None:
        weights = moved(Book(qkv_bias=True)).state_dict()
        del weights["trf_blocks.1.att.W_query.bias"]
        with pytest.raises(UserError, match=r"lacks 'trf_blocks\.1\.att\.W_query\.bias'"):
            read_checkpoint(saved(weights))


class TestTrainLLMFromScratch:
    def test_its_files_give_its_logits(self, text: Path, saved: Callable) -> None:
        model = moved(TrainLLM())
        content = {"model_state_dict": model.state_dict(), "config": {"n_embed": C}, "version": torch.__version__}
        loaded = Source(saved(content), None, characters_of=text).load()
        assert_same_logits(model, loaded.model)
        assert loaded.model.config.n_head == HEADS

    def test_a_config_of_another_number_of_heads_is_refused(self, text: Path, saved: Callable) -> None:
        content = {"model_state_dict": moved(TrainLLM()).state_dict(), "config": {"n_head": 2}}
        with pytest.raises(UserError, match=r"n_head=2, but .* 4"):
            Source(saved(content), None, characters_of=text).load()

    @pytest.mark.parametrize("scale", [D**-0.5, C**-0.5], ids=["until June 2026", "until March 2025"])
    def test_its_older_models_have_no_output_projection(self, scale: float, saved: Callable, tmp_path: Path) -> None:
        model = learnt(TrainLLM, scale=scale, projects=False)
        path = saved({"model_state_dict": model.state_dict(), "losses": [], "steps": 300})
        lines: list[str] = []
        folder = convert(path, None, tmp_path / "hf", characters_of=ROOT / "LICENSE", report=lines.append)
        assert_same_logits(model, load(folder)[0], len(CHARACTERS))
        assert any(line.startswith("attention ") and "the identity is written" in line for line in lines)

    def test_which_scale_an_older_model_has_is_not_guessed(self, saved: Callable, tmp_path: Path) -> None:
        path = saved({"model_state_dict": moved(TrainLLM(projects=False)).state_dict()})
        relatives.save_meta(tmp_path / "meta.pkl")
        with pytest.raises(UserError, match=r"two scales of attention.*--training_data"):
            Source(path, tmp_path / "meta.pkl").load()

    def test_a_projection_that_one_layer_lacks_is_missed(self, saved: Callable) -> None:
        weights = moved(TrainLLM()).state_dict()
        del weights["attn_blocks.1.attn.proj.weight"]
        with pytest.raises(UserError, match=r"lacks '.*h\.1\.attn\.c_proj\.weight'"):
            read_checkpoint(saved({"model_state_dict": weights})).architecture()


class TestTransformersGPT2:
    """A state dict of the library's own class, whose linear weights are transposed."""

    @pytest.mark.parametrize("inner", [False, True], ids=["with head", "without head"])
    def test_it_gives_the_library_s_logits(self, inner: bool, text: Path, saved: Callable) -> None:
        config = GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_layer=2, n_head=HEADS, attn_pdrop=0.0)
        model = moved(GPT2LMHeadModel(config))
        weights = (model.transformer if inner else model).state_dict()
        loaded = Source(saved(weights), None, characters_of=text, n_head=HEADS).load()
        assert_same_logits(model, loaded.model)


class TestLlmC:
    @pytest.mark.parametrize(("version", "dtype"), [(3, torch.float32), (5, torch.bfloat16)])
    def test_its_bin_files_give_its_logits(self, version: int, dtype: torch.dtype, tmp_path: Path) -> None:
        model = gpt(tied=True, activation="gelu_new")
        path = tmp_path / "model.bin"
        self.write(path, model, version, dtype, n_rows=305)
        loaded = Source(path, save_tokenizer(tmp_path / "tokenizer.json"), dtype="float32").load()
        for weight in model.parameters():
            weight.data = weight.data.to(dtype).float()
        ids = torch.randint(300, (1, 16), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(loaded.model(ids).logits, logits_of(model, ids))
        assert loaded.dtype == dtype
        assert describe_source(path, loaded.checkpoint, is_module=False) == f"{path} (llm.c's format)"

    def test_its_tokenizer_is_named(self, saved: Callable, tmp_path: Path) -> None:
        path = tmp_path / "gpt2_tokenizer.bin"
        path.write_bytes(struct.pack("<3i", 20240328, 2, 50257).ljust(1024, b"\0"))
        with pytest.raises(UserError, match=r"is a tokenizer of llm\.c.*--tokenizer_path gpt2"):
            Source(saved({"model": gpt().state_dict()}), path, n_head=4).load()

    def test_its_state_dict_has_its_activation_and_a_warning(self, text: Path, saved: Callable) -> None:
        model = gpt(vocab_size=V, tied=True, activation="gelu_new")
        masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
        loaded = Source(saved(model.state_dict() | masks), None, characters_of=text, n_head=4).load()
        assert_same_logits(model, loaded.model, length=16)
        assert any(kind == "warning" and "--activation" in what for kind, what in loaded.choices)

    @pytest.mark.parametrize(
        ("header", "told"),
        [((20240520, 1), "training data"), ((20240326, 9), "version 9"), ((20240326, 3, 8, 9, 2, 2, 8, 9), "its end")],
    )
    def test_other_files_of_its_are_named(self, header: tuple, told: str, tmp_path: Path) -> None:
        path = tmp_path / "model.bin"
        path.write_bytes(struct.pack(f"<{len(header)}i", *header).ljust(1024, b"\0"))
        with pytest.raises(UserError, match=told):
            read_checkpoint(path)

    @staticmethod
    def write(path: Path, model: nn.Module, version: int, dtype: torch.dtype, n_rows: int) -> None:
        config, weights = model.config, model.state_dict()
        sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, n_rows)
        layered = [f"{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj") for kind in ("weight", "bias")]
        layered += [f"{part}.{kind}" for part in ("ln_2", "mlp.c_fc", "mlp.c_proj") for kind in ("weight", "bias")]
        embedding = weights["transformer.wte.weight"]
        tensors = [torch.cat([embedding, embedding.new_zeros(n_rows - config.vocab_size, config.n_embd)])]
        tensors.append(weights["transformer.wpe.weight"])
        tensors += [weights[f"transformer.h.{i}.{name}"] for name in layered for i in range(config.n_layer)]
        tensors += [weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]]
        with path.open("wb") as file:
            file.write(struct.pack("<8i", 20240326, version, *sizes).ljust(1024, b"\0"))
            for tensor in tensors:
                file.write(
                    tensor.to(dtype).view(torch.int32 if dtype == torch.float32 else torch.int16).numpy().tobytes()
                )


@pytest.mark.parametrize("prefix", PREFIXES)
class TestPrefixes:
    def test_what_stands_in_front_of_all_names_is_left_out(self, prefix: str, saved: Callable) -> None:
        weights = gpt().state_dict()
        checkpoint = read_checkpoint(saved({"state_dict": {prefix + name: w for name, w in weights.items()}}))
        assert list(checkpoint.state_dict) == list(weights)

    def test_lightning_s_hyper_parameters_are_the_model_s(self, prefix: str, saved: Callable) -> None:
        weights = {prefix + name: weight for name, weight in gpt().state_dict().items()}
        content = {"state_dict": weights, "hyper_parameters": {"n_head": 8, "learning_rate": 1e-3, "num_workers": 4}}
        assert read_checkpoint(saved(content)).architecture().n_head == 8


def test_wrappers_inside_a_name_are_left_out(saved: Callable) -> None:
    weights = gpt().state_dict()
    wrapped = {name.replace(".h.0.", ".h.0._orig_mod."): weight for name, weight in weights.items()}
    assert list(read_checkpoint(saved({"model": wrapped})).state_dict) == list(weights)


def test_two_names_for_one_weight_are_refused(saved: Callable) -> None:
    weights = gpt().state_dict()
    twice = weights | {"module.lm_head.weight": weights["lm_head.weight"] + 1}
    with pytest.raises(UserError, match=r"'lm_head\.weight' and 'module\.lm_head\.weight' are both"):
        read_checkpoint(saved({"model": twice}))


def test_hyper_parameters_inside_others_are_found(saved: Callable) -> None:
    content = {"state_dict": gpt().state_dict(), "hyper_parameters": {"lr": 1e-3, "config": {"n_head": 2}}}
    assert read_checkpoint(saved(content)).architecture().n_head == 2


def test_heads_that_contradict_the_file_are_taken_with_a_warning(text: Path, saved: Callable) -> None:
    content = {"model": gpt(vocab_size=V).state_dict(), "model_args": {"n_head": 4}}
    loaded = Source(saved(content), None, characters_of=text, n_head=8).load()
    assert loaded.model.config.n_head == 8
    assert any(kind == "warning" and "the file says 4" in what for kind, what in loaded.choices)


def test_two_models_in_one_state_dict_are_refused(saved: Callable) -> None:
    weights = gpt().state_dict()
    both = {f"model.{name}": w for name, w in weights.items()} | {f"ema.{name}": w + 1 for name, w in weights.items()}
    with pytest.raises(UserError, match=r"two models, .*'model\.' and 'ema\.'"):
        read_checkpoint(saved({"state_dict": both}))


class TestBuffers:
    """What modules keep beside their weights is left out by its values, whatever it is called."""

    @pytest.mark.parametrize(
        "buffer",
        [
            torch.ones(16, 16).tril(),
            torch.ones(16, 16).triu(1).bool(),
            torch.full((1, 1, 16, 16), float("-inf")).triu(1),
            torch.arange(16),
            torch.arange(16)[None],
        ],
        ids=["tril", "triu", "infinite", "positions", "rows of positions"],
    )
    def test_masks_and_positions_are_left_out(self, buffer: Tensor, saved: Callable) -> None:
        weights = gpt().state_dict()
        path = saved({"model": weights | {"transformer.h.0.attn.anything": buffer}, "model_args": {"n_head": 4}})
        assert list(read_checkpoint(path).state_dict) == list(weights)

    @pytest.mark.parametrize(
        "buffer",
        [
            torch.ones(16, 16).tril().triu(-3),
            torch.ones(16, 16),
            torch.ones(16, 16).tril(1),
            torch.rand(16, 16).tril(),
            torch.tensor([0, 2, 1]),
            torch.rand(16),
            torch.tensor([[0.7]]),
            torch.tensor([[0.7, 0.1], [0.7, 0.7]]),
            torch.tensor(4),
        ],
        ids=[
            *("a sliding window", "no mask", "sees the next token", "a matrix", "an order", "numbers"),
            *("a gate", "a learned mask", "a window"),
        ],
    )
    def test_anything_else_is_refused(self, buffer: Tensor, saved: Callable) -> None:
        weights = gpt().state_dict() | {"transformer.h.0.attn.anything": buffer}
        with pytest.raises(UserError, match=r"attn\.anything"):
            read_checkpoint(saved({"model": weights}))


def test_the_counter_of_an_averaged_model_is_left_out(saved: Callable) -> None:
    weights = {f"module.{name}": weight for name, weight in gpt().state_dict().items()}
    assert "n_averaged" not in read_checkpoint(saved({"model": weights | {"n_averaged": torch.tensor(3)}})).state_dict


def test_a_learned_scale_beside_a_weight_is_refused(saved: Callable) -> None:
    weights = gpt().state_dict() | {"transformer.h.0.attn.c_proj.scale": torch.rand(32)}
    with pytest.raises(UserError, match=r"c_proj\.scale"):
        read_checkpoint(saved({"model": weights}))


def test_a_layer_that_has_two_numbers_is_refused(saved: Callable) -> None:
    weights = gpt().state_dict()
    twice = weights | {"transformer.h.00.ln_1.weight": weights["transformer.h.0.ln_1.weight"] + 1}
    with pytest.raises(UserError, match="are the same weight"):
        read_checkpoint(saved({"model": twice}))


def test_a_head_outside_of_the_body_belongs_to_it(saved: Callable) -> None:
    weights = gpt().state_dict()
    apart = {name.replace("transformer.", "gpt."): weight for name, weight in weights.items()}
    assert set(read_checkpoint(saved({"model": apart})).state_dict) == set(weights)


def test_a_missing_head_is_not_a_tied_one_if_the_file_says_so(saved: Callable) -> None:
    weights = dict(gpt().state_dict())
    del weights["lm_head.weight"]
    with pytest.raises(UserError, match=r"lacks 'lm_head\.weight'"):
        read_checkpoint(saved({"model": weights, "model_args": {"n_head": 4, "tie_weights": False}}))


class TestForksOfNanoGPT:
    """Shapes tell the MLP's width and the head's bias; a bias that no layer has is zeros."""

    def test_another_width_of_the_mlp(self, saved: Callable) -> None:
        weights = dict(gpt(bias=False).state_dict())
        for i in range(2):
            weights[f"transformer.h.{i}.mlp.c_fc.weight"] = torch.randn(48, 32)
            weights[f"transformer.h.{i}.mlp.c_proj.weight"] = torch.randn(32, 48)
        assert read_checkpoint(saved({"model": weights})).architecture(n_head=4).n_inner == 48

    def test_a_bias_of_the_head(self, saved: Callable) -> None:
        weights = dict(gpt(bias=False).state_dict()) | {"lm_head.bias": torch.randn(300)}
        architecture = read_checkpoint(saved({"model": weights})).architecture(n_head=4)
        assert architecture.head_bias
        assert not architecture.bias

    def test_a_bias_that_no_layer_has_is_zeros_and_said(self, text: Path, saved: Callable) -> None:
        model = gpt(vocab_size=V)
        for name, weight in model.named_parameters():
            if name.endswith(("ln_1.bias", "c_attn.bias")):
                weight.data.zero_()
        weights = {n: w for n, w in model.state_dict().items() if not n.endswith(("ln_1.bias", "c_attn.bias"))}
        loaded = Source(saved({"model": weights}), None, characters_of=text, n_head=4).load()
        assert_same_logits(model, loaded.model, length=16)
        assert any(kind == "biases" and "zeros" in what for kind, what in loaded.choices)

    def test_a_bias_that_only_some_layers_have_is_missing(self, saved: Callable) -> None:
        weights = dict(gpt().state_dict())
        del weights["transformer.h.1.ln_1.bias"]
        with pytest.raises(UserError, match=r"lacks 'transformer\.h\.1\.ln_1\.bias'"):
            read_checkpoint(saved({"model": weights})).architecture(n_head=4)


class TestWholeModules:
    """`torch.save(model)` and `pickle.dump(model)`: tensors and attributes are read, and no code runs."""

    @pytest.mark.parametrize("write", [torch.save, pickle.dump], ids=["torch.save", "pickle.dump"])
    def test_a_known_class_gives_its_logits(self, write: Callable, text: Path, tmp_path: Path) -> None:
        model = moved(TrainLLM())
        path = tmp_path / "model.pkl"
        with path.open("wb") as file:
            write(model, file)
        assert_same_logits(model, Source(path, None, characters_of=text).load().model)

    def test_its_attributes_tell_heads_activation_and_epsilon(self, text: Path, saved: Callable) -> None:
        model = relatives.gpt(vocab_size=V, activation="gelu_pytorch_tanh", tied=True)
        for block in model.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
            block.ln_1.eps = block.ln_2.eps = 1e-6
        model.transformer.ln_f.eps = 1e-6
        checkpoint = read_checkpoint(saved(model))
        assert checkpoint.module_class == "GPT"
        assert checkpoint.trainer.activation == "gelu_pytorch_tanh"
        assert checkpoint.architecture().n_head == 4
        assert checkpoint.options == {"layer_norm_epsilon": 1e-6}

    def test_an_activation_that_is_not_the_mlp_s_is_not_taken(self, saved: Callable) -> None:
        model = gpt()
        model.unused = nn.ReLU()
        assert read_checkpoint(saved(model)).trainer.activation != "relu"

    def test_norms_with_different_epsilons_are_refused(self, saved: Callable) -> None:
        model = moved(TrainLLM())
        model.layer_norm.eps = 0.5
        with pytest.raises(UserError, match=r"different epsilons \(1e-05, 0\.5\)"):
            read_checkpoint(saved(model))

    def test_norms_of_another_kind_are_refused(self, saved: Callable) -> None:
        model = gpt(bias=False)
        model.transformer.ln_f = nn.RMSNorm(32, 1e-5)
        with pytest.raises(UserError, match="its norms are RMSNorm"):
            read_checkpoint(saved(model))

    def test_options_of_its_configuration_are_not_passed_over(self, saved: Callable) -> None:
        model = gpt()
        model.config.mup_enabled = True
        assert read_checkpoint(saved(model)).unknown_args["mup_enabled"] is True

    def test_an_unknown_class_is_told_of_its_code(self, saved: Callable) -> None:
        with pytest.raises(UserError, match=r"--model train\.py:GPT"):
            read_checkpoint(saved(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))

    def test_a_pickle_that_calls_a_function_is_refused(self, tmp_path: Path) -> None:
        class Hostile:
            def __reduce__(self) -> tuple:
                return print, ("this must not be printed",)

        path = tmp_path / "model.pkl"
        path.write_bytes(pickle.dumps({"model": Hostile()}))
        with pytest.raises(UserError, match=r"print.*nothing was run"):
            read_checkpoint(path)


@functools.cache
def learnt(kind: type[nn.Module] = Lecture, steps: int = 300, length: int = T, **form: Any) -> nn.Module:
    """A model with the lecture's names, or another trainer's, that has learnt the licence."""
    torch.manual_seed(0)
    ids = torch.tensor([CHARACTERS.index(character) for character in LICENSE])
    return trained(kind(**form, vocab_size=len(CHARACTERS)), ids, steps, length)


class TestTheLectureSNames:
    """Models of several kinds have them: the loss on the text decides, or nothing is converted."""

    @pytest.mark.parametrize(
        ("form", "config"),
        [
            ({"norm_first": False}, {"norm_first": False, "attention_scale": None}),
            ({"scale": C**-0.5}, {"norm_first": True, "attention_scale": C**-0.5}),
            ({"activation": nn.SiLU}, {"activation_function": "silu"}),
            ({"final_norm": False}, {"final_norm": False}),
        ],
        ids=["post-norm", "scaled by the width", "SiLU", "a final norm that is not called"],
    )
    def test_the_text_tells_which(self, form: dict, config: dict, saved: Callable) -> None:
        model = learnt(**form)
        loaded = Source(saved(model.state_dict()), None, characters_of=ROOT / "LICENSE").load()
        assert {name: getattr(loaded.model.config, name) for name in config} == config
        assert_same_logits(model, loaded.model, len(CHARACTERS))
        assert any(kind == "form" and "standard errors" in what for kind, what in loaded.choices)
        assert any(kind == "warning" and "--model train.py:GPT" in what for kind, what in loaded.choices)

    @pytest.mark.parametrize(
        "length, steps, scale",
        [(8, 600, D**-0.5), (8, 600, C**-0.5), (3, 400, D**-0.5)],
        ids=["by the heads' width", "by the width", "three positions"],
    )
    def test_only_the_positions_that_were_trained_tell_which(
        self, length: int, steps: int, scale: float, saved: Callable
    ) -> None:
        """Some trainers use the beginning of the context only. With the rest, a wrong form may have the lower loss."""
        model = learnt(steps=steps, length=length, scale=scale)
        loaded = Source(saved(model.state_dict()), None, characters_of=ROOT / "LICENSE").load()
        assert_same_logits(model, loaded.model, len(CHARACTERS))
        (told,) = [what for kind, what in loaded.choices if kind == "warning" and "badly after" in what]
        assert abs(int(re.search(r"about (\d+) tokens", told)[1]) - length) <= 1  # type: ignore[index]

    def test_a_final_norm_that_is_not_called_is_not_written(self, saved: Callable, tmp_path: Path) -> None:
        path = saved(learnt(final_norm=False).state_dict())
        lines: list[str] = []
        folder = convert(path, None, tmp_path / "hf", characters_of=ROOT / "LICENSE", report=lines.append)
        assert "transformer.ln_f.weight" not in load_file(folder / "model.safetensors")
        assert any(line.startswith("verified") for line in lines)

    def test_a_loss_above_the_stated_one_is_refused(self, saved: Callable) -> None:
        model = learnt(norm_first=False)
        path = saved({"model": model.state_dict(), "val_loss": 0.5})
        with pytest.raises(UserError, match=r"has a loss of 2\.\d+ on .*the checkpoint states a loss of 0\.5"):
            Source(path, None, characters_of=ROOT / "LICENSE").load()
        path = saved({"model": model.state_dict(), "val_loss": 2.0})
        assert not Source(path, None, characters_of=ROOT / "LICENSE").load().model.config.norm_first

    def test_a_loss_that_token_frequencies_reach_is_refused(self, saved: Callable, tmp_path: Path) -> None:
        path = saved(learnt(norm_first=False).state_dict())
        (tmp_path / "other.txt").write_text(LICENSE[::-1])
        with pytest.raises(UserError, match="guessing by the frequency of each token alone has 3"):
            Source(path, None, characters_of=tmp_path / "other.txt").load()

    def test_without_a_text_it_is_asked_for(self, text: Path, saved: Callable, tmp_path: Path) -> None:
        path = saved(moved(Lecture()).state_dict())
        relatives.save_meta(tmp_path / "meta.pkl")
        with pytest.raises(UserError, match=r"--characters_of.*--training_data.*--model"):
            Source(path, tmp_path / "meta.pkl").load()

    def test_a_model_that_learnt_nothing_is_not_guessed(self, saved: Callable) -> None:
        torch.manual_seed(0)
        model = Lecture(vocab_size=len(CHARACTERS)).eval()
        with pytest.raises(UserError, match="has not learnt this text"):
            Source(saved(model.state_dict()), None, characters_of=ROOT / "LICENSE").load()

    def test_a_text_that_is_too_short_is_said(self, text: Path, saved: Callable) -> None:
        with pytest.raises(UserError, match=r"has \d+ tokens, and 385 are needed to choose\. Give more text"):
            Source(saved(moved(Lecture()).state_dict()), None, characters_of=text).load()


LLAMA = {
    "Llama's": "model.layers.0.mlp.gate_proj.weight",
    "llama2.c's": "layers.0.feed_forward.w3.weight",
    "with rotary positions": "blocks.0.attn.rotary.inv_freq",
}


@pytest.mark.parametrize("name", LLAMA.values(), ids=LLAMA)
def test_llama_s_shape_is_named_with_its_converters(name: str, saved: Callable) -> None:
    with pytest.raises(UserError, match=r"Llama's shape .*llama2\.c"):
        read_checkpoint(saved({"model": {name: torch.ones(4), "tok_embeddings.weight": torch.ones(4, 4)}}))


def test_a_conversion_says_whose_names_these_are(text: Path, saved: Callable, tmp_path: Path) -> None:
    said: list[str] = []
    convert(saved(moved(TrainLLM()).state_dict()), None, tmp_path / "out", characters_of=text, report=said.append)
    assert any(line.split() == ["names", "those", "of", "train-llm-from-scratch"] for line in said)
