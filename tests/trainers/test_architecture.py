"""The table of shapes: what it reads from the weights, and what it refuses."""

from dataclasses import asdict

import pytest
import torch

from hf_model.errors import UserError
from hf_model.trainers.architecture import infer_architecture
from tests.tiny import SIZES, gpt

MODEL_ARGS = {**SIZES, "bias": True, "dropout": 0.1}


def weights(**changes) -> dict[str, torch.Tensor]:
    return dict(gpt(**changes).state_dict())


class TestInferArchitecture:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_the_weights_tell_everything_but_heads_and_dropout(self, bias: bool, tied: bool) -> None:
        sizes = {"n_layer": 3, "n_embd": 24, "block_size": 10, "vocab_size": 40}
        state_dict = weights(**sizes, n_head=2, bias=bias, tied=tied)
        told = {"bias": bias, "tie_word_embeddings": tied, "n_inner": None, "head_bias": False}
        assert asdict(infer_architecture(state_dict, {}, n_head=2)) == sizes | told | {"n_head": 2, "dropout": 0.1}

    def test_the_file_tells_heads_and_dropout(self) -> None:
        architecture = infer_architecture(weights(), MODEL_ARGS | {"n_head": 8, "dropout": 0.25})
        assert (architecture.n_head, architecture.dropout) == (8, 0.25)

    def test_the_number_of_heads_that_is_given_wins(self) -> None:
        assert infer_architecture(weights(), MODEL_ARGS, n_head=2).n_head == 2

    def test_biases_in_the_weights_win_over_model_args(self) -> None:
        assert infer_architecture(weights(bias=False), MODEL_ARGS | {"bias": True}).bias is False
        assert infer_architecture(weights(bias=True), MODEL_ARGS | {"bias": False}).bias is True

    def test_a_head_is_tied_by_memory_by_absence_or_by_equal_values(self) -> None:
        tied = weights(tied=True)
        equal = tied | {"lm_head.weight": tied["lm_head.weight"].clone()}
        headless = {name: weight for name, weight in tied.items() if name != "lm_head.weight"}
        assert infer_architecture(tied, MODEL_ARGS).tie_word_embeddings
        assert infer_architecture(headless, MODEL_ARGS).tie_word_embeddings
        assert infer_architecture(equal, MODEL_ARGS).tie_word_embeddings
        equal["lm_head.weight"][3, 1] += 1e-6
        assert not infer_architecture(equal, MODEL_ARGS).tie_word_embeddings

    @pytest.mark.parametrize("bias, tied", [(True, False), (False, True)])
    def test_the_shapes_are_those_of_the_model(self, bias: bool, tied: bool) -> None:
        state_dict = weights(bias=bias, tied=tied)
        shapes = infer_architecture(state_dict, MODEL_ARGS).shapes()
        expected = {name: tuple(weight.shape) for name, weight in state_dict.items()}
        if tied:
            del expected["lm_head.weight"]
        assert shapes == expected

    @pytest.mark.parametrize(
        "model_args, message",
        [
            ({"n_layer": 3}, "model_args says n_layer=3, but the weights say 2: one of them belongs to another model"),
            ({"n_embd": 64}, "model_args says n_embd=64, but the weights say 32"),
            ({"block_size": 1024}, "model_args says block_size=1024, but the weights say 16"),
            ({"vocab_size": 32000}, "model_args says vocab_size=32000, but the weights say 300"),
            ({"n_head": None}, "do not tell the number of attention heads: give it with --n_head"),
            ({"n_head": 5}, "n_head=5 does not divide n_embd=32: give the right number with --n_head"),
            ({"n_head": 0}, "n_head=0 does not divide"),
            ({"n_head": -4}, "n_head=-4 does not divide"),
            ({"n_head": True}, "n_head=True is a bool, not a whole number"),
            ({"n_head": "4"}, "n_head='4' is a str, not a whole number"),
            ({"dropout": 1.0}, r"model_args says dropout=1.0, which is not in \[0, 1\)"),
            ({"dropout": -0.1}, "model_args says dropout=-0.1"),
            ({"dropout": float("nan")}, "model_args says dropout=nan"),
            ({"dropout": "0.1"}, "model_args says dropout='0.1'"),
        ],
        ids=str,
    )
    def test_model_args_that_cannot_be_are_refused(self, model_args: dict, message: str) -> None:
        with pytest.raises(UserError, match=message):
            infer_architecture(weights(), MODEL_ARGS | model_args)

    @pytest.mark.parametrize("n_embd, says", [(64, ""), (192, ""), (256, "which makes 4 here"), (250, "")])
    def test_a_number_of_heads_is_proposed_only_where_it_is_likely(self, n_embd: int, says: str) -> None:
        sizes = {"n_embd": n_embd, "n_head": 2}
        with pytest.raises(UserError, match=f"give it with --n_head.*{says}") as raised:
            infer_architecture(weights(**sizes), {})
        assert ("heads of 64" in str(raised.value)) == bool(says)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"transformer.wte.weight": None}, "it lacks 'transformer.wte.weight'"),
            ({"transformer.wpe.weight": None}, "it lacks 'transformer.wpe.weight'"),
            ({"transformer.wte.weight": torch.ones(300)}, r"'transformer.wte.weight' has shape \(300,\), not that of"),
            ({"transformer.wpe.weight": torch.ones(0, 32)}, r"'transformer.wpe.weight' has shape \(0, 32\), not that"),
            ({"transformer.ln_f.weight": None}, "it lacks 'transformer.ln_f.weight'"),
            ({"transformer.ln_f.bias": None}, "it lacks 'transformer.ln_f.bias'"),
            ({"lm_head.bias": torch.ones(299)}, r"'lm_head.bias' has shape \(299,\), expected \(300,\)"),
            (
                {f"transformer.h.5.{name}": torch.ones(1) for name in "abcdefg"},
                r"it lacks 'transformer\.h\.2\.ln_1\.weight', .* and 7 more",
            ),
            (
                {f"extra.{name}": torch.ones(1) for name in "abcdefg"},
                r"it holds 'extra\.a', 'extra\.b', 'extra\.c', 'extra\.d', 'extra\.e' and 2 more",
            ),
            (
                {"transformer.h.1.attn.c_attn.weight": torch.ones(32, 96)},
                r"'transformer.h.1.attn.c_attn.weight' has shape \(32, 96\), expected \(96, 32\)",
            ),
            ({"lm_head.weight": torch.ones(299, 32)}, "its head has 299 rows, and its embedding has 300: .*classifier"),
        ],
    )
    def test_weights_that_are_not_this_model_s_are_refused(self, change: dict, message: str) -> None:
        state_dict = {name: weight for name, weight in (weights() | change).items() if weight is not None}
        with pytest.raises(UserError, match=message):
            infer_architecture(state_dict, {"n_head": 4})
