"""The library's common tokenizer tests, on a converted tokenizer."""

import tempfile
import unittest
from pathlib import Path

from tests.test_tokenization_common import TokenizerTesterMixin
from tests.test_tokenizers_backend_mixin import TokenizersBackendTesterMixin
from tiny_models import EXAMPLE_TOKENIZER, converted_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hf_model.tokenizer import save_tokenizer


class ConvertedTokenizerTest(TokenizersBackendTesterMixin, TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = PreTrainedTokenizerFast
    # Only for classes that know how to split text: it makes one of a bare vocabulary and merges. This one takes that
    # from tokenizer.json.
    test_tokenizer_from_extractor = False

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        save_tokenizer(converted_tokenizer(), Path(folder.name))
        cls.from_pretrained_id = folder.name
        super().setUpClass()
        # What the original's own tokenizer makes of their text.
        original = Tokenizer.from_file(str(EXAMPLE_TOKENIZER)).encode(
            cls.integration_test_input_string, add_special_tokens=False
        )
        cls.integration_expected_tokens = original.tokens
        cls.integration_expected_token_ids = original.ids
        cls.integration_expected_decoded_text = cls.integration_test_input_string

    @unittest.skip("the class takes the prefix space from tokenizer.json: add_prefix_space=True sets an attribute only")
    def test_rust_tokenizer_add_prefix_space_0(self) -> None: ...
