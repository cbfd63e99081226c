"""What stands beside the weights is read, is known to change nothing, or stops the conversion by its name."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from hf_model.errors import UserError
from hf_model.loading import Source
from hf_model.trainers import read_checkpoint
from tests.tiny import SIZES, gpt
from tests.trainers.trainer_models import TrainLLM, moved

STATE = dict(gpt().state_dict())


class TestOptionsOfTheModel:
    @pytest.mark.parametrize(
        "option",
        [
            *({"scale_attn_weights": False}, {"causal": False}, {"norm_first": False}, {"final_norm": False}),
            *({"pre_norm": False}, {"use_pos_emb": False}, {"pos_emb": "none"}, {"activation_name": "swiglu"}),
            *({"norm_name": "rmsnorm"}, {"pos_emb_name": "rope"}, {"mlp_name": "swiglu"}, {"batch_norm": True}),
            *({"swish_beta": 2.0}, {"init_scale_residual": 0.5}, {"flash_attention_window": 8}, {"window_size": 32}),
            *({"sliding_window_size": 32}, {"rotary_dim": 32}, {"n_kv_heads": 2}, {"n_experts": 2}, {"useRope": True}),
        ],
        ids=str,
    )
    def test_one_that_makes_another_model_is_named(self, option: dict, saved: Callable) -> None:
        path = saved({"model": STATE, "model_args": {"n_head": 4, **option}})
        assert read_checkpoint(path).unknown_args == option

    @pytest.mark.parametrize("key", ["config", "hyper_parameters"])
    def test_it_is_named_among_the_training_s_too(self, key: str, saved: Callable) -> None:
        options = {"parallel_residual": True, "norm_type": "rms", "attn_type": "linear", "residual_scale": 0.5}
        options |= {"softmax_one": True, "embed_norm": True, "talking_heads": True, "arch": "rope", "causal": False}
        training = {"n_head": 4, "lr": 1e-3, "eps": 1e-8, "patience": 3, "data_parallel": True, "eval_window": 100}
        assert read_checkpoint(saved({"model": STATE, key: training | options})).unknown_args == options

    @pytest.mark.parametrize(
        "options",
        [
            {"norm_first": True, "causal": True, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
            {"norm_type": "LayerNorm", "pos_emb": "learned", "attn_type": "flash", "rope": False, "n_kv_heads": 4},
            {"qkv_bias": True, "head_dim": 8, "num_hidden_layers": 2, "d_model": 32, "max_seq_len": 16, "nlayers": 2},
            {
                "resid_pdrop": 0.1,
                "flash_attention": True,
                "batch_size": 12,
                "learning_rate": 1e-3,
                "betas": (0.9, 0.95),
            },
            {
                "grad_clip": 1.0,
                "max_iters": 100,
                "warmup_iters": 10,
                "out_dir": "out",
                "wandb_run_name": "a",
                "seed": 1,
            },
            {
                "model_name": "llama-like",
                "init_from": "scratch",
                "device_type": "cuda",
                "activation_checkpointing": True,
            },
            {"dtype": "bfloat16", "compile": True, "always_save_checkpoint": True, "decay_lr": True, "min_lr": 1e-4},
            {"reorder_and_upcast_attn": True, "output_hidden_states": True, "return_dict": True, "use_cache": True},
            {
                "gradient_accumulation_steps": 40,
                "eval_interval": 5,
                "backend": "nccl",
                "weight_decay": 0.1,
                "beta2": 0.9,
            },
        ],
        ids=lambda options: ", ".join(options),
    )
    def test_those_of_the_training_and_of_this_model_are_known(self, options: dict, saved: Callable) -> None:
        path = saved({"model": STATE, "model_args": {"n_head": 4, **options}})
        assert read_checkpoint(path).unknown_args == {}


class TestWhatIsRead:
    @pytest.mark.parametrize("key", ["model_args", "config"])
    @pytest.mark.parametrize("name", ["activation", "activation_function", "act", "hidden_act"])
    def test_the_activation(self, name: str, key: str, saved: Callable) -> None:
        checkpoint = read_checkpoint(saved({"model": STATE, key: {"n_head": 4, name: "SiLU"}}))
        assert (checkpoint.trainer.activation, checkpoint.trainer.why) == ("silu", f"{key} says so")
        assert not checkpoint.unknown_args

    def test_but_not_two_activations(self, saved: Callable) -> None:
        options = {"activation": "relu", "hidden_act": "silu"}
        assert read_checkpoint(saved({"model": STATE, "model_args": options})).unknown_args == options

    def test_nor_another_one_than_the_trainer_s_class_has(self, saved: Callable) -> None:
        content = {"model_state_dict": moved(TrainLLM()).state_dict(), "config": {"n_embed": 32, "activation": "gelu"}}
        checkpoint = read_checkpoint(saved(content))
        assert checkpoint.trainer.activation == "relu"
        assert checkpoint.unknown_args == {"activation": "gelu"}

    @pytest.mark.parametrize("name", ["layer_norm_epsilon", "layer_norm_eps", "norm_eps", "eps"])
    def test_the_epsilon(self, name: str, saved: Callable) -> None:
        checkpoint = read_checkpoint(saved({"model": STATE, "model_args": {"n_head": 4, name: 1e-6}}))
        assert checkpoint.options == {"layer_norm_epsilon": 1e-6}
        assert not checkpoint.unknown_args

    def test_but_not_the_optimizer_s(self, saved: Callable) -> None:
        checkpoint = read_checkpoint(saved({"model": STATE, "config": {"n_head": 4, "eps": 1e-8}}))
        assert not checkpoint.options


class TestConfigBeside:
    @pytest.fixture
    def beside(self, saved: Callable) -> Callable[..., Path]:
        def save(fields: dict, weights: dict = STATE) -> Path:
            path = saved(weights)
            path.with_name("config.json").write_text(json.dumps(fields))
            return path

        return save

    def test_of_this_model_is_read_and_its_place_is_told(self, beside: Callable) -> None:
        fields = {"model_type": "gpt2", "n_head": 8, "n_positions": 16, "activation_function": "relu"}
        checkpoint = read_checkpoint(beside(fields | {"layer_norm_epsilon": 1e-6}))
        told = checkpoint.told_heads()
        assert told is not None and told[0] == 8 and "config.json says n_head=8" in told[1]
        assert checkpoint.trainer.activation == "relu"
        assert checkpoint.options == {"layer_norm_epsilon": 1e-6}

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"model_type": "gpt_neo", "n_head": 8, "activation_function": "relu"}, "type gpt_neo"),
            ({"n_head": 8, "activation_function": "relu"}, "states no size of the weights"),
            ({"n_head": 8, "d_model": 64}, "64 wide"),
            ({"n_head": 8, "model_type": ["gpt2"]}, "states no size"),
            ({"n_head": 8, "n_layer": 2, "vocab_size": 99}, "vocab_size=99"),
        ],
    )
    def test_of_another_model_is_not_believed(self, fields: dict, why: str, beside: Callable) -> None:
        checkpoint = read_checkpoint(beside(fields))
        with pytest.raises(UserError, match=rf"{why}.*--n_head"):
            checkpoint.architecture()
        assert checkpoint.architecture(n_head=4).n_head == 4
        assert checkpoint.trainer.activation == "gelu"

    def test_never_gives_another_activation_than_the_trainer_s(self, beside: Callable) -> None:
        fields = {"n_head": 4, "n_layer": 3, "activation_function": "gelu"}
        checkpoint = read_checkpoint(beside(fields, moved(TrainLLM()).state_dict()))
        assert checkpoint.trainer.activation == "relu"
        assert checkpoint.unknown_args == {"activation_function": "gelu"}


class TestMetadata:
    def test_of_the_training_is_left_out(self, tmp_path: Path) -> None:
        metadata = {"epoch": "3", "step": "1000", "val_loss": "3.21", "author": "7", "n_head": "4"}
        save_file(STATE, tmp_path / "a.safetensors", metadata)
        checkpoint = read_checkpoint(tmp_path / "a.safetensors")
        assert checkpoint.unknown_args == {}
        assert checkpoint.architecture().n_head == 4

    def test_of_the_model_is_read_or_named(self, tmp_path: Path) -> None:
        save_file(STATE, tmp_path / "a.safetensors", {"activation": "relu", "arch": "rope"})
        checkpoint = read_checkpoint(tmp_path / "a.safetensors")
        assert checkpoint.trainer.activation == "relu"
        assert checkpoint.unknown_args == {"arch": "rope"}


def test_a_text_for_the_heads_is_called_one(saved: Callable) -> None:
    checkpoint = read_checkpoint(saved({"model": STATE, "model_args": SIZES | {"n_head": "4"}}))
    with pytest.raises(UserError, match="n_head='4' is a str, not a whole number"):
        checkpoint.architecture()


def test_numpy_s_arrays_are_called_so(saved: Callable) -> None:
    with pytest.raises(UserError, match=r"holds NumPy arrays: save torch's tensors"):
        read_checkpoint(saved({"model": {name: np.ones(2) for name in STATE}}))


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000])
def test_a_name_that_no_file_has_is_one_plain_line(name: str) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Source.of(name, "auto").load()


def test_an_activation_that_a_folder_cannot_have_is_one_plain_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "custom_gpt", "activation_function": "sWiGlU"}))
    with pytest.raises(UserError, match=r"config\.json: `activation_function` 'sWiGlU' is not one of gelu"):
        Source.of(tmp_path).load(needs_tokenizer=False)
