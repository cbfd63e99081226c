"""`--seed_like_original` gives the text of a script that seeds before it builds its model."""

import pytest
import torch

from examples.plain_gpt import GPT, GPTConfig
from hf_model import convert
from hf_model.errors import UserError
from hf_model.generation import Sampling, encode, generate, replay_initialisation
from hf_model.loading import load
from tests import relatives
from tests.tiny import SIZES, gpt, twin
from tests.trainers.trainer_models import TrainLLM, V, moved

SHAPES = [{}, {"bias": False}, {"tied": True}, {"n_layer": 3, "n_embd": 12, "vocab_size": 301}, {"block_size": 1}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_generator_is_left_as_building_the_model_leaves_it(shape: dict) -> None:
    model = twin(gpt(**shape))
    torch.manual_seed(1337)
    GPT(GPTConfig(**SIZES | shape))
    expected = torch.get_rng_state()
    torch.manual_seed(1337)
    replay_initialisation(model.config)
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_trainer_whose_draws_are_not_known_is_refused(tmp_path) -> None:
    torch.save(moved(TrainLLM()).state_dict(), tmp_path / "model.pt")
    (tmp_path / "input.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + V))), encoding="utf-8")
    folder = convert(tmp_path / "model.pt", None, tmp_path / "hf", characters_of=tmp_path / "input.txt")
    model, tokenizer = load(folder, device="cpu")
    with pytest.raises(UserError, match="that train-llm-from-scratch draws are not known"):
        generate(model, tokenizer, encode(tokenizer, chr(0x4E00)), Sampling(seed_like_original=True))


def test_the_text_is_the_script_s(tmp_path) -> None:
    trained = relatives.nano_character_model()
    path = relatives.save_nanogpt(tmp_path, trained)
    # As nanoGPT's sample.py: seed, build, load, sample.
    torch.manual_seed(1337)
    model = GPT(trained.config)
    model.load_state_dict(trained.state_dict())
    ids = model.eval().generate(relatives.encode("\n"), 40, temperature=0.8, top_k=50)[0].tolist()
    loaded, tokenizer = load(path, relatives.save_meta(tmp_path / "meta.pkl"), device="cpu")
    texts = {
        like: generate(
            loaded, tokenizer, encode(tokenizer, "\n"), Sampling(max_new_tokens=40, seed_like_original=like)
        ).texts[0]
        for like in (True, False)
    }
    assert texts[True] == "".join(relatives.CHARACTERS[number] for number in ids) != texts[False]
