"""What vLLM's Transformers backend asks of a model with code of its own, as far as it shows without vLLM and a GPU.

By the backend's source in vLLM 0.30 (vllm/model_executor/models/transformers). Pipeline stages have their tests in
tests/test_pipeline_plan.py.
"""

import ast
import inspect
import json
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

# Linears of other styles become replicas.
STYLES = {"colwise", "rowwise", "colwise_gather_output", "rowwise_split_input"}


@pytest.fixture
def base_model(capitals: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(capitals)


def test_the_folder_names_a_base_model_that_takes_any_attention_backend(capitals: Path) -> None:
    auto_map = json.loads((capitals / "config.json").read_text())["auto_map"]
    assert list(auto_map)[:2] == ["AutoConfig", "AutoModel"]  # in this order, vLLM imports them
    base_model = get_class_from_dynamic_module(auto_map["AutoModel"], str(capitals))
    assert issubclass(base_model, PreTrainedModel)
    assert base_model.is_backend_compatible()
    assert base_model._supports_attention_backend


def test_the_causal_model_is_the_base_model_and_one_linear(model: PreTrainedModel, base_model: PreTrainedModel) -> None:
    ids = torch.randint(4, model.config.vocab_size, (2, 9))
    hidden_states = base_model(ids).last_hidden_state
    assert torch.equal(hidden_states @ model.lm_head.weight.T, model(ids).logits)
    assert model.lm_head.bias is None


def test_attention_goes_through_the_interface_of_whoever_runs_the_model(
    capitals: Path, base_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def vllm(module, query, key, value, attention_mask, scaling, **kwargs):
        """As vLLM's: it looks up a layer's cache by its index, and gives back one row for each token."""
        calls.append((module.layer_idx, attention_mask, scaling, kwargs["attention_instances"][module.layer_idx]))
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return output.transpose(1, 2).reshape(query.shape[2], -1), None  # (T, C)

    monkeypatch.setitem(AttentionInterface._global_mapping, "vllm", vllm)
    config = AutoConfig.from_pretrained(capitals)
    config._attn_implementation = "vllm"
    model = AutoModel.from_config(config).eval()
    model.load_state_dict(base_model.state_dict())

    ids = torch.randint(4, config.vocab_size, (1, 9))
    (hidden_states,) = model(
        input_ids=ids,
        position_ids=torch.arange(9)[None],
        use_cache=False,
        return_dict=False,
        attention_instances={layer: f"cache of layer {layer}" for layer in range(config.n_layer)},
    )
    head_size = config.n_embd // config.n_head
    assert calls == [(layer, None, head_size**-0.5, f"cache of layer {layer}") for layer in range(config.n_layer)]
    torch.testing.assert_close(hidden_states, base_model(ids).last_hidden_state)


def test_one_projection_is_split_into_three_sizes_that_sharding_could_replace(base_model: PreTrainedModel) -> None:
    """vLLM looks for a linear whose output is split at once, and puts its own fused projection there."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(type(base_model.h[0].attn).forward)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    split = next(call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "split")
    assert isinstance(split.func.value, ast.Call)
    assert ast.unparse(split.func.value.func) == "self.c_attn"
    sizes = split.args[0]
    assert isinstance(sizes, ast.Tuple) and len(sizes.elts) == 3


def test_the_plan_shards_every_linear_in_a_style_that_vllm_knows(base_model: PreTrainedModel) -> None:
    linears = {
        name.replace(f"h.{layer}.", "h.*.")
        for layer in range(base_model.config.n_layer)
        for name, module in base_model.h[layer].named_modules(prefix=f"h.{layer}")
        if isinstance(module, nn.Linear)
    }
    plan = base_model.config.base_model_tp_plan
    assert linears == plan.keys() - {"wte"}
    assert {plan[name] for name in linears} <= STYLES
    assert (plan["h.*.mlp.c_fc"], plan["h.*.mlp.c_proj"]) == ("colwise", "rowwise")
