"""The reference itself, held against transformers' GPT-2 and against numpy."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from examples.plain_gpt import GPT, GPTConfig, save_checkpoint

CAPITALS = Path(__file__).parent.parent / "examples" / "capitals"
TINY = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 50}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def trained_looking_gpt(**changes) -> GPT:
    """Weights far from their initialisation, so that no bias, gain or activation goes unnoticed."""
    model = GPT(GPTConfig(**TINY | changes)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=0.1, std=0.3)
    return model


def gpt2_with_the_weights_of(model: GPT) -> GPT2LMHeadModel:
    config = model.config
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.block_size,
            vocab_size=config.vocab_size,
            activation_function=config.activation,
            tie_word_embeddings=False,
        )
    )
    ours = model.state_dict()
    weights = {}
    for key, value in gpt2.state_dict().items():
        if key not in ours:  # GPT-2 always has biases
            weights[key] = torch.zeros_like(value)
        elif ".attn." in key or ".mlp." in key:
            weights[key] = ours[key].T  # Conv1D is the transpose of Linear, and a bias is its own
        else:
            weights[key] = ours[key]
    gpt2.load_state_dict(weights)
    return gpt2.eval()


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_agree_with_gpt2(activation: str, bias: bool) -> None:
    model = trained_looking_gpt(activation=activation, bias=bias)
    gpt2 = gpt2_with_the_weights_of(model)
    idx = torch.randint(50, (3, 16))
    torch.testing.assert_close(model(idx)[0], gpt2(idx).logits, rtol=1e-4, atol=1e-4)


def test_state_dict_has_the_documented_keys() -> None:
    per_block = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    modules = [f"transformer.h.{i}.{name}" for i in range(2) for name in per_block] + ["transformer.ln_f"]
    weights = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"} | {f"{m}.weight" for m in modules}
    assert set(GPT(GPTConfig(**TINY, bias=False)).state_dict()) == weights
    assert set(GPT(GPTConfig(**TINY, bias=True)).state_dict()) == weights | {f"{m}.bias" for m in modules}


def test_initial_weights_have_the_documented_spread() -> None:
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=256, vocab_size=512))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any()
        elif ".ln_" in name:
            assert (weight == 1).all()
        else:
            documented = 0.02 / math.sqrt(2 * 2) if name.endswith("c_proj.weight") else 0.02
            assert weight.std().item() == pytest.approx(documented, rel=0.03), name
            assert abs(weight.mean().item()) < documented / 25, name


def test_tied_weights_are_one_tensor() -> None:
    model = GPT(GPTConfig(**TINY, tied=True))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_loss_shifts_nothing_and_leaves_out_masked_targets() -> None:
    model = trained_looking_gpt()
    idx = torch.randint(50, (2, 6))
    targets = torch.tensor([[-1, -1, 7, 8, 3, -1], [-1, 9, 3, -1, -1, -1]])
    logits, loss = model(idx, targets)

    rows = logits.detach().double().numpy()
    losses = [
        np.log(np.exp(rows[b, t]).sum()) - rows[b, t, target]
        for (b, t), target in np.ndenumerate(targets.numpy())
        if target != -1
    ]
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_one_step_of_sampling_agrees_with_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_looking_gpt()
    idx = torch.randint(50, (1, 20))  # longer than the context of 16
    draws = []

    def keep_and_draw(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        draws.append(probabilities[0].numpy())
        return torch.tensor([[42]])

    monkeypatch.setattr(torch, "multinomial", keep_and_draw)
    out = model.generate(idx, max_new_tokens=1, temperature=0.7, top_k=10, repetition_penalty=1.3)

    context = idx[0, 4:].tolist()
    logits = model(torch.tensor([context]))[0][0, -1].detach().double().numpy()
    for token in set(context):
        logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
    logits /= 0.7
    logits[logits < np.sort(logits)[-10]] = -np.inf
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()

    np.testing.assert_allclose(draws, [probabilities], rtol=1e-4, atol=1e-6)
    assert out[0].tolist() == [*idx[0].tolist(), 42]


def test_generation_stops_after_the_end_token() -> None:
    model = trained_looking_gpt()
    prompt = torch.randint(50, (1, 3))
    free = model.generate(prompt, max_new_tokens=5, temperature=0)
    stopped = model.generate(prompt, max_new_tokens=5, temperature=0, eos_id=free[0, 3].item())
    assert free.shape == (1, 8)
    assert stopped.tolist() == free[:, :4].tolist()


def test_an_input_longer_than_the_context_is_an_error() -> None:
    with pytest.raises(ValueError, match="17 tokens do not fit into a context of 16"):
        GPT(GPTConfig(**TINY))(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    "form, keys",
    [
        ({"loss": 3.9}, {"loss"}),
        ({"config": {"seed": 1}}, {"config", "scaler_state_dict"}),
    ],
    ids=["pre-training", "fine-tuning"],
)
def test_checkpoint_has_the_documented_keys_and_makes_the_model_again(form: dict, keys: set, tmp_path: Path) -> None:
    model = trained_looking_gpt()
    save_checkpoint(tmp_path / "ckpt.pt", model, 7, optimizer=torch.optim.AdamW(model.parameters()), **form)
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert set(checkpoint) == {"iter_num", "model_state_dict", "optimizer_state_dict", "model_args"} | keys

    again = GPT(GPTConfig(**checkpoint["model_args"])).eval()
    again.load_state_dict(checkpoint["model_state_dict"])
    idx = torch.randint(50, (1, 16))
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_the_example_knows_the_capital_of_france() -> None:
    checkpoint = torch.load(CAPITALS / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**checkpoint["model_args"])).eval()
    model.load_state_dict(checkpoint["model_state_dict"])
    tokenizer = Tokenizer.from_file(str(CAPITALS / "tokenizer.json"))

    ids = tokenizer.encode("Instruction: What is the capital of France? Response:").ids[:-1]  # less its [EOS]
    for _ in range(10):
        out = model.generate(torch.tensor([ids]), max_new_tokens=20, temperature=0.8, top_k=50, eos_id=3)
        assert tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=False) == " Paris[EOS]"
