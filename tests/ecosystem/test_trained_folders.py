"""A folder that Trainer, PEFT or TRL has trained and saved is a source like any other, for every format."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from examples.plain_gpt import GPT, GPTConfig
from hf_model.conversion import convert
from tests.tiny import gpt, save_files

SIZES = {"block_size": 128, "vocab_size": 320}  # a padded vocabulary
TARGETS = {
    "checkpoint": ({"format": "checkpoint"}, []),
    "checkpoint like nanogpt": ({"format": "checkpoint", "like": "nanogpt"}, []),
    "gpt2": ({"format": "gpt2"}, []),
    "gguf": ({"format": "gguf", "gguf_type": "f16"}, ["gguf", "llama_cpp"]),
    "ctranslate2": ({"format": "ctranslate2"}, ["ctranslate2"]),
}
Trained = tuple[PreTrainedModel, Path]


def by_trainer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Trained:
    """With what Trainer leaves in a folder of its own while it runs."""
    from tests.ecosystem.test_trainer import trainer

    run = trainer(model, tokenizer, folder, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    return run.model, folder / "checkpoint-2"


def by_peft(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Trained:
    pytest.importorskip("peft", reason="PEFT is not installed (the `ecosystem` extra)")
    from tests.ecosystem.test_peft import lora, train

    adapted = lora(model)
    train(adapted, tokenizer, steps=2)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return merged, folder


def by_trl(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Trained:
    for package in ("trl", "datasets"):
        pytest.importorskip(package, reason=f"{package} is not installed (the `ecosystem` extra)")
    from tests.ecosystem.test_trl import sft_trainer

    run = sft_trainer(model, tokenizer, folder / "run", max_steps=2)
    run.train()
    run.save_model(folder / "saved")
    return run.model, folder / "saved"


CASES = [(by_trainer, True), (by_trainer, False), (by_peft, True), (by_trl, False)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].__name__}, {'tied' if case[1] else 'untied'}")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model after two steps, and the folder that it was saved to."""
    train, tied = request.param
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    folder = convert(*save_files(root, gpt(**SIZES, tied=tied)), root / "hf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = model.transformer.h[0].mlp.c_fc.weight.clone()
    model, saved = train(model, tokenizer, root / "out")
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.weight, before)
    return model.eval(), saved


@pytest.mark.parametrize("target", TARGETS)
def test_is_written_for_an_engine_and_verified(trained: Trained, target: str, tmp_path: Path) -> None:
    how, packages = TARGETS[target]
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed (an extra of this format)")
    model, folder = trained
    if how.get("like") == "nanogpt" and not model.config.tie_word_embeddings:
        pytest.skip("nanoGPT's heads are tied")
    lines: list[str] = []
    written = convert(folder, None, tmp_path / "out", **how, report=lines.append)
    assert lines[-1].startswith("verified      "), lines[-1]
    if logits := INDEPENDENT.get(how["format"]):
        ids = torch.randint(300, (2, SIZES["block_size"]))
        with torch.inference_mode():
            torch.testing.assert_close(logits(written, ids), model(ids).logits, rtol=1e-5, atol=1e-5)


def of_plain_gpt(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    content = torch.load(folder / "ckpt.pt", weights_only=True)
    weights = content["model"] if "model" in content else content["model_state_dict"]
    is_tied = torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])
    plain = GPT(GPTConfig(**content["model_args"], tied=is_tied)).eval()
    plain.load_state_dict(weights)
    return plain(ids)[0]


def of_stock_gpt2(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)(ids).logits


INDEPENDENT: dict[str, Callable[[Path, torch.Tensor], torch.Tensor]] = {
    "checkpoint": of_plain_gpt,
    "gpt2": of_stock_gpt2,
}
