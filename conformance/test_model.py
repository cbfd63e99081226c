"""The library's common tests of models, training and parallelism, on our classes."""

import unittest

import tests.test_fsdp_mixin as fsdp
import tests.test_tensor_parallel_mixin as tensor_parallel
import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from tiny_models import MODEL_CLASSES, tiny_config
from transformers.models.auto import modeling_auto

from hf_model import CustomGPTConfig, CustomGPTForCausalLM, CustomGPTModel

# They know by its name what labels a class takes, from lists of the library's own classes.
for names, model_class in zip(
    (
        modeling_auto.MODEL_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    MODEL_CLASSES,
    strict=True,
):
    names[CustomGPTConfig.model_type] = model_class.__name__

# None stands for every model; otherwise a few of the library's own are run.
fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class CustomGPTModelTester:
    base_model_class = CustomGPTModel
    causal_lm_class = CustomGPTForCausalLM
    is_training = True
    batch_size, seq_length = 13, 7

    def __init__(self) -> None:
        config = tiny_config()
        self.hidden_size = config.n_embd
        self.num_hidden_layers = config.n_layer
        self.num_attention_heads = config.n_head

    def get_config(self) -> CustomGPTConfig:
        return tiny_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[CustomGPTConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        special_tokens = 4
        input_ids = torch.randint(special_tokens, config.vocab_size, (self.batch_size, self.seq_length))
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril()}


class CustomGPTModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    tensor_parallel.TensorParallelTesterMixin,
    fsdp.FSDPTesterMixin,
    unittest.TestCase,
):
    model_tester = CustomGPTModelTester()
    all_model_classes = MODEL_CLASSES
    test_can_init_all_missing_weights_before_2023 = True  # they take a file without a copyright line for an old one

    def test_config(self) -> None:
        ConfigTester(self, config_class=CustomGPTConfig, n_embd=36).run_common_tests()
