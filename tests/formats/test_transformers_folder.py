"""What the folder holds, and that it is noticed when what was written is not what was read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.plain_gpt import GPT, GPTConfig
from hf_model.conversion import convert
from hf_model.errors import UserError
from hf_model.formats import transformers_folder
from tests.tiny import BOS, CHECKPOINT, EOS, PAD, ROOT, gpt, save_files


def converted(tmp_path: Path, **how) -> list[str]:
    """What the conversion of a reference model said."""
    lines: list[str] = []
    convert(*save_files(tmp_path, gpt()), tmp_path / "hf", report=lines.append, **how)
    return lines


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


class TestTheExampleFolder:
    def test_holds_these_files(self, capitals: Path) -> None:
        assert {file.name for file in capitals.iterdir()} == {
            ".manifest.json",
            "README.md",
            "chat_template.jinja",
            "config.json",
            "configuration_custom_gpt.py",
            "generation_config.json",
            "model.safetensors",
            "modeling_custom_gpt.py",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }

    def test_gives_the_logits_of_the_original_bit_for_bit(self, capitals: Path) -> None:
        checkpoint = torch.load(CHECKPOINT, weights_only=True)
        original = GPT(GPTConfig(**checkpoint["model_args"])).eval()
        original.load_state_dict(checkpoint["model_state_dict"])
        ids = torch.randint(4, original.config.vocab_size, (2, 64))
        assert torch.equal(AutoModelForCausalLM.from_pretrained(capitals)(ids).logits, original(ids)[0])

    def test_configuration_is_the_checkpoint_s(self, capitals: Path) -> None:
        config = read_json(capitals / "config.json")
        assert torch.load(CHECKPOINT, weights_only=True)["model_args"].items() <= config.items()
        assert {
            "model_type": "custom_gpt",
            "architectures": ["CustomGPTForCausalLM"],
            "dtype": "float32",
            "activation_function": "gelu",
            "tie_word_embeddings": False,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }.items() <= config.items()
        assert {
            "AutoConfig": "configuration_custom_gpt.CustomGPTConfig",
            "AutoModel": "modeling_custom_gpt.CustomGPTModel",
            "AutoModelForCausalLM": "modeling_custom_gpt.CustomGPTForCausalLM",
        }.items() <= config["auto_map"].items()

    def test_generation_has_the_original_script_s_defaults(self, capitals: Path) -> None:
        generation_config = read_json(capitals / "generation_config.json")
        del generation_config["transformers_version"]
        assert generation_config == {
            "do_sample": True,
            "temperature": 0.8,
            "top_k": 50,
            "repetition_penalty": 1.0,
            "max_new_tokens": 150,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }

    @pytest.mark.parametrize("name", ["configuration_custom_gpt.py", "modeling_custom_gpt.py"])
    def test_carries_the_model_s_code(self, name: str, capitals: Path) -> None:
        assert (capitals / name).read_bytes() == (ROOT / "hf_model" / name).read_bytes()

    def test_may_be_read_by_whom_its_other_files_may(self, capitals: Path) -> None:
        assert {file.stat().st_mode for file in capitals.iterdir()} == {(capitals / "config.json").stat().st_mode}

    def test_brings_its_tokenizer(self, capitals: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(capitals)
        assert tokenizer.decode(tokenizer("the capital").input_ids) == "[BOS]the capital"
        assert tokenizer.model_max_length == 64


class TestVerification:
    @pytest.fixture
    def tampering(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], None]:
        """Let a function loose on the folder between its writing and its verification."""

        def install(tamper: Callable[[Path], None]) -> None:
            verify = transformers_folder.verify

            def tamper_and_verify(folder: Path, *sources: Path) -> str:
                tamper(folder)
                return verify(folder, *sources)

            monkeypatch.setattr(transformers_folder, "verify", tamper_and_verify)

        return install

    @staticmethod
    def flip_the_last_bit(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    @staticmethod
    def swap_two_tokens(folder: Path) -> None:
        tokenizer = read_json(folder / "tokenizer.json")
        vocab = tokenizer["model"]["vocab"]
        vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")

    def test_a_flipped_bit_is_noticed_and_no_folder_appears(self, tampering: Callable, tmp_path: Path) -> None:
        tampering(self.flip_the_last_bit)
        with pytest.raises(UserError, match=r"[\w.]+\.weight differs from .*ckpt\.pt: the disk or the memory is"):
            converted(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "tokenizer.json"}

    def test_nothing_is_said_to_be_written_that_is_not_there(self, tampering: Callable, tmp_path: Path) -> None:
        tampering(self.flip_the_last_bit)
        lines: list[str] = []
        with pytest.raises(UserError, match="differs from"):
            convert(*save_files(tmp_path, gpt()), tmp_path / "hf", report=lines.append)
        assert lines and not any(line.startswith(("written", "verified")) for line in lines)

    def test_another_tokenizer_is_noticed(self, tampering: Callable, tmp_path: Path) -> None:
        tampering(self.swap_two_tokens)
        with pytest.raises(UserError, match=r"the tokenizer encodes .* differently from .*tokenizer\.json"):
            converted(tmp_path)

    def test_it_can_be_left_out(self, tampering: Callable, tmp_path: Path) -> None:
        tampering(self.flip_the_last_bit)
        lines = converted(tmp_path, verify=False)
        assert not any(line.startswith("verified") for line in lines)
