"""nanoGPT's, build-nanogpt's and minGPT's checkpoints convert, and generate as their own models do."""

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from examples.plain_gpt import GPT
from hf_model.conversion import convert
from hf_model.errors import UserError
from hf_model.generation import Sampling, encode, generate
from hf_model.loading import load
from hf_model.tokenizer import takes_instructions
from tests import relatives
from tests.relatives import CHARACTERS, TEXT
from tests.tiny import load_plain

KINDS = ["nanoGPT of characters", "nanoGPT of BPE", "build-nanogpt", "minGPT"]


@dataclass
class Relative:
    """A trainer's model, the folder made of its files, and what the conversion said."""

    model: GPT
    path: Path
    folder: Path
    said: str


def nano_characters(root: Path, **how) -> tuple[GPT, Path, dict]:
    model = relatives.nano_character_model()
    relatives.save_meta(root / "data" / "tiny_char" / "meta.pkl")
    return model, relatives.save_nanogpt(root, model), {"tokenizer_path": "auto"}


def nano_bpe(root: Path) -> tuple[GPT, Path, dict]:
    model = relatives.gpt(vocab_size=320, tied=True, bias=False)  # padded past the vocabulary of 300
    relatives.save_gpt2_pair(root / "gpt2")
    return model, relatives.save_nanogpt(root, model, "openwebtext"), {"tokenizer_path": root / "gpt2"}


def build(root: Path) -> tuple[GPT, Path, dict]:
    model = relatives.gpt(tied=True, activation="gelu_pytorch_tanh")
    relatives.save_gpt2_pair(root / "gpt2", ("encoder.json", "vocab.bpe"))
    return model, relatives.save_build_nanogpt(root, model), {"tokenizer_path": root / "gpt2" / "vocab.bpe"}


def mingpt(root: Path) -> tuple[GPT, Path, dict]:
    model = relatives.mingpt_model()
    (root / "input.txt").write_text(TEXT, encoding="utf-8")
    how = {"tokenizer_path": None, "characters_of": root / "input.txt"}
    return model, relatives.save_mingpt(root / "out", model), how


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Relative]:
    """One checkpoint of each trainer, converted from its project's folder; not to be written to."""
    made = {}
    for kind, make in zip(KINDS, (nano_characters, nano_bpe, build, mingpt), strict=True):
        torch.manual_seed(0)
        root = tmp_path_factory.mktemp("relative")
        model, path, how = make(root)
        lines: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            folder = convert(path, output_dir=root / "hf", report=lines.append, **how)
        made[kind] = Relative(model, path, folder, "\n".join(lines))
    return made


@pytest.fixture(params=KINDS)
def relative(request: pytest.FixtureRequest, family: dict[str, Relative]) -> Relative:
    return family[request.param]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


class TestModel:
    def test_logits_equal_the_trainer_s(self, relative: Relative) -> None:
        ids = torch.randint(len(CHARACTERS), (2, 16))
        expected = relative.model(ids)[0]
        logits = AutoModelForCausalLM.from_pretrained(relative.folder)(ids).logits
        if "masked" in type(relative.model.transformer.h[0].attn).__name__.lower():
            assert (logits - expected).abs().max() < 5e-6 * max(1, expected.abs().max())
        else:
            assert torch.equal(logits, expected)

    def test_stock_generate_gives_the_trainer_s_tokens_past_the_context_too(self, relative: Relative) -> None:
        model = AutoModelForCausalLM.from_pretrained(relative.folder)
        model.generation_config.suppress_tokens = None  # the trainers sample padding ids too
        prompt = torch.tensor([[3, 1, 4]])
        how = {"max_new_tokens": 40, "temperature": 0.8, "top_k": 20}
        torch.manual_seed(7)
        expected = relative.model.generate(prompt, **how)
        torch.manual_seed(7)
        assert model.generate(prompt, **how, eos_token_id=None).tolist() == expected.tolist()

    def test_it_trains_and_what_was_saved_is_read_again(self, family: dict[str, Relative], tmp_path: Path) -> None:
        from transformers import Trainer, TrainingArguments

        folder = family["nanoGPT of characters"].folder
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(TEXT[:16]).input_ids
        data = [{"input_ids": ids, "labels": ids}] * 4
        arguments = TrainingArguments(tmp_path / "run", max_steps=150, learning_rate=1e-2, report_to=[], use_cpu=True)
        # Without a tokenizer: Trainer would have it pad these rows of one length, and it has nothing to pad with.
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        trainer.save_model(tmp_path / "trained")
        tokenizer.save_pretrained(tmp_path / "trained")
        trained, tokenizer = load(tmp_path / "trained", device="cpu")
        greedy = Sampling(temperature=0, max_new_tokens=13)
        assert generate(trained, tokenizer, encode(tokenizer, TEXT[:3]), greedy).texts == [TEXT[:16]]


class TestChoices:
    @pytest.mark.parametrize(
        "kind, activation, why",
        [
            ("nanoGPT of characters", "gelu", "nanoGPT's default since June 2023"),
            ("build-nanogpt", "gelu_pytorch_tanh", "build-nanogpt's default: a config object, step and val_loss"),
            ("minGPT", "gelu_new", "minGPT's default: a bare state dict with causal masks and biases"),
        ],
    )
    def test_the_activation_is_told_by_the_file(
        self, kind: str, activation: str, why: str, family: dict[str, Relative]
    ) -> None:
        assert read_json(family[kind].folder / "config.json")["activation_function"] == activation
        assert f"activation    {activation} ({why}" in family[kind].said

    def test_a_nanogpt_of_before_the_bias_option_had_the_tanh_form(self, tmp_path: Path) -> None:
        model = relatives.nano_character_model(activation="gelu_new")
        path = relatives.save_nanogpt(tmp_path, model)
        content = torch.load(path, weights_only=True)
        del content["model_args"]["bias"], content["model_args"]["dropout"]
        torch.save(content, path)
        loaded, _ = load_plain(path, relatives.save_meta(tmp_path / "meta.pkl"))
        ids = torch.randint(len(CHARACTERS), (2, 16))
        assert torch.equal(loaded(ids).logits, model(ids)[0])

    def test_where_nothing_tells_it_is_said(self, tmp_path: Path) -> None:
        model = relatives.nano_character_model()
        torch.save({"state_dict": model.state_dict(), "model_args": model.model_args()}, tmp_path / "ckpt.pt")
        lines: list[str] = []
        meta = relatives.save_meta(tmp_path / "meta.pkl")
        convert(tmp_path / "ckpt.pt", meta, tmp_path / "hf", report=lines.append)
        assert any(re.match(r"warning: nothing in the file tells the activation", line) for line in lines)

    def test_the_user_s_word_is_the_last(self, family: dict[str, Relative]) -> None:
        meta = family["nanoGPT of characters"].path.parent.parent / "data" / "tiny_char" / "meta.pkl"
        path = family["nanoGPT of characters"].path
        model, _ = load_plain(path, meta, activation="gelu_pytorch_tanh")
        assert model.config.activation_function == "gelu_pytorch_tanh"

    def test_heads_are_told_by_mingpt_s_config(self, family: dict[str, Relative]) -> None:
        assert read_json(family["minGPT"].folder / "config.json")["n_head"] == 3
        assert "heads         3 (" in family["minGPT"].said
        assert "config.json says gpt-nano)" in family["minGPT"].said

    def test_a_mingpt_config_of_another_model_is_refused(self, tmp_path: Path) -> None:
        path = relatives.save_mingpt(tmp_path, relatives.mingpt_model(), "gpt-mini")
        with pytest.raises(UserError, match=r"says gpt-mini \(6 layers, 192 wide\), but the weights have 3 layers"):
            load_plain(path, relatives.save_meta(tmp_path / "meta.pkl"))

    @pytest.mark.parametrize(
        "sizes, heads",
        [
            ({"n_head": 3, "n_layer": 3}, 3),
            ({"n_layer": 3, "n_head": 4, "n_embd": 48}, 4),
            ({"model_type": "gpt-nano", "n_head": 6}, 6),
        ],
    )
    def test_heads_are_told_by_a_config_of_sizes(self, sizes: dict, heads: int, tmp_path: Path) -> None:
        path = relatives.save_mingpt(tmp_path, relatives.mingpt_model())
        path.with_name("config.json").write_text(json.dumps({"model": sizes}), encoding="utf-8")
        assert load_plain(path, relatives.save_meta(tmp_path / "meta.pkl"))[0].config.n_head == heads

    @pytest.mark.parametrize("other", [{"n_layer": 4}, {"n_embd": 96}])
    def test_a_config_of_other_sizes_is_refused(self, other: dict, tmp_path: Path) -> None:
        path = relatives.save_mingpt(tmp_path, relatives.mingpt_model())
        sizes = {"model_type": None, "n_layer": 3, "n_head": 3, "n_embd": 48} | other
        path.with_name("config.json").write_text(json.dumps({"model": sizes}), encoding="utf-8")
        with pytest.raises(UserError, match=r"says n_head=3 \(.*\), but the weights have 3 layers and are 48 wide"):
            load_plain(path, relatives.save_meta(tmp_path / "meta.pkl"))

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 1}', '{"model": {"model_type": "none"}}'])
    def test_a_config_that_tells_nothing_leaves_the_question(self, content: str, tmp_path: Path) -> None:
        path = relatives.save_mingpt(tmp_path, relatives.mingpt_model())
        path.with_name("config.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="give it with --n_head"):
            load_plain(path, relatives.save_meta(tmp_path / "meta.pkl"))

    def test_build_nanogpt_has_no_dropout(self, family: dict[str, Relative]) -> None:
        assert read_json(family["build-nanogpt"].folder / "config.json")["dropout"] == 0.0


class TestFolder:
    def test_says_once_that_its_prompts_are_raw(self, relative: Relative) -> None:
        assert read_json(relative.folder / "tokenizer_config.json")["prompt_format"] == "raw"
        assert not (relative.folder / "chat_template.jinja").exists()
        assert not takes_instructions(AutoTokenizer.from_pretrained(relative.folder))
        assert "Instruction:" not in (relative.folder / "README.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        "kind, ids",
        [("nanoGPT of characters", (None, None, None)), ("nanoGPT of BPE", (None, 299, 299))],
    )
    def test_has_the_special_tokens_of_its_vocabulary(self, kind: str, ids: tuple, family: dict[str, Relative]) -> None:
        folder = family[kind].folder
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        for holder in (tokenizer, model.config, model.generation_config):
            assert tuple(getattr(holder, name) for name in names) == ids

    def test_padding_rows_are_never_sampled(self, family: dict[str, Relative]) -> None:
        generation = read_json(family["nanoGPT of BPE"].folder / "generation_config.json")
        assert generation["suppress_tokens"] == list(range(300, 320))

    def test_a_generation_of_characters_ends_at_its_length_only(self, family: dict[str, Relative]) -> None:
        model, tokenizer = load(family["nanoGPT of characters"].folder, device="cpu")
        output = generate(model, tokenizer, encode(tokenizer, "\n"), Sampling(max_new_tokens=60, temperature=3.0))
        assert output.new_tokens == 60

    def test_bpe_stops_at_the_end_of_text(self, family: dict[str, Relative]) -> None:
        model, tokenizer = load(family["build-nanogpt"].folder, device="cpu")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        ids = encode(tokenizer, "To be")
        model.lm_head.weight.data[299] = 100 * model.transformer(ids).last_hidden_state[0, -1]
        output = generate(model, tokenizer, ids, Sampling(temperature=0))
        assert (output.texts, output.new_tokens) == (["To be<|endoftext|>"], 1)

    def test_the_card_s_example_runs(
        self, relative: Relative, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.chdir(relative.folder.parent)
        card = (relative.folder / "README.md").read_text(encoding="utf-8")
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        exec(code, {})
        assert len(capsys.readouterr().out) > 100

    def test_works_in_a_pipeline(self, relative: Relative) -> None:
        write = pipeline("text-generation", model=str(relative.folder), device="cpu")
        (result,) = write("To be", max_new_tokens=5, do_sample=False)
        assert result["generated_text"].startswith("To be")
        assert len(result["generated_text"]) >= len("To be")

    def test_the_trainer_s_prompt_is_continued_as_the_trainer_does(self, family: dict[str, Relative]) -> None:
        relative = family["nanoGPT of characters"]
        model, tokenizer = load(relative.folder, device="cpu")
        for prompt in ("\n", " \n ", "To be, or"):
            output = generate(model, tokenizer, encode(tokenizer, prompt), Sampling(max_new_tokens=30, seed=5))
            torch.manual_seed(5)
            ids = relative.model.generate(relatives.encode(prompt), 30)[0].tolist()
            assert output.texts == ["".join(CHARACTERS[number] for number in ids)]


class TestFinding:
    """Where no tokenizer is named."""

    @pytest.fixture
    def model(self) -> GPT:
        return relatives.nano_character_model()

    def taken(self, path: Path) -> str:
        said: dict[str, str] = {}
        load(path, "auto", device="cpu", report=said.__setitem__)
        return said["tokenizer"]

    def test_beside_the_checkpoint_first(self, model: GPT, tmp_path: Path) -> None:
        path = relatives.save_nanogpt(tmp_path, model)
        relatives.save_meta(tmp_path / "data" / "tiny_char" / "meta.pkl")
        beside = relatives.save_meta(tmp_path / "out" / "meta.pkl")
        assert self.taken(path) == f"{beside} (found beside the checkpoint)"

    @pytest.mark.parametrize("cwd", [".", "elsewhere"])
    def test_in_the_data_folder_that_the_checkpoint_names(
        self, cwd: str, model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = relatives.save_nanogpt(tmp_path, model)
        relatives.save_meta(tmp_path / "data" / "tiny_char" / "meta.pkl")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / cwd)
        assert self.taken(path).endswith("meta.pkl (the checkpoint names this data)")

    @pytest.mark.parametrize("dataset", ["../../secret", "/secret"])
    def test_a_name_that_leads_elsewhere_is_not_followed(self, dataset: str, model: GPT, tmp_path: Path) -> None:
        path = relatives.save_nanogpt(tmp_path / "a", model, dataset.replace("/secret", f"{tmp_path}/secret", 1))
        relatives.save_meta(tmp_path / "secret" / "meta.pkl")
        with pytest.raises(UserError, match="there is no tokenizer beside it"):
            self.taken(path)

    @pytest.mark.parametrize("vocab_size", [50257, 50304])
    def test_gpt2_s_by_the_size_of_the_vocabulary(
        self, vocab_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        relatives.save_gpt2_pair(tmp_path / "cache")
        pair = tmp_path / "cache" / "vocab.json", tmp_path / "cache" / "merges.txt"
        monkeypatch.setattr("hf_model.tokenizer.find.tiktoken_pair", lambda: pair)
        path = relatives.save_nanogpt(tmp_path, relatives.gpt(vocab_size=vocab_size, n_embd=4, n_head=1), "openwebtext")
        expected = f"gpt2, from tiktoken's cache (a vocabulary of {vocab_size} is GPT-2's)"
        assert self.taken(path) == expected

    def test_else_the_original_s_default(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = relatives.save_nanogpt(tmp_path, relatives.gpt(), "other")
        (tmp_path / "data" / "tokenizer").mkdir(parents=True)
        from tests.tiny import save_tokenizer

        save_tokenizer(tmp_path / "data" / "tokenizer" / "custom_gpt_tokenizer.json")
        monkeypatch.chdir(tmp_path)
        assert self.taken(path) == "data/tokenizer/custom_gpt_tokenizer.json"

    def test_where_there_is_none_the_error_says_what_to_give(self, model: GPT, tmp_path: Path) -> None:
        path = relatives.save_nanogpt(tmp_path, model)
        with pytest.raises(UserError, match=r"no tokenizer beside it, nor .*meta\.pkl, .*--characters_of") as raised:
            self.taken(path)
        assert "\n" not in str(raised.value)

    def test_fewer_characters_than_the_model_has_are_noted(self, model: GPT, tmp_path: Path) -> None:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0, "b": 1}}))
        lines: list[str] = []
        convert(relatives.save_nanogpt(tmp_path, model), tmp_path / "meta.pkl", tmp_path / "hf", report=lines.append)
        assert any("these may be the characters of another text" in line for line in lines)


class TestPretrainedOriginal:
    """The original's base models: raw text after [BOS], when asked for."""

    def test_raw_text_goes_after_bos(self, tmp_path: Path) -> None:
        from tests.tiny import save_files

        checkpoint_path, tokenizer_path = save_files(tmp_path, model := relatives.gpt())
        folder = convert(checkpoint_path, tokenizer_path, tmp_path / "hf", raw=True)
        loaded, tokenizer = load(folder, device="cpu")
        ids = encode(tokenizer, " the cat")
        assert tokenizer.decode(ids[0]) == "[BOS] the cat"
        assert not takes_instructions(tokenizer)
        assert tokenizer.chat_template is None
        torch.manual_seed(3)
        expected = model.generate(ids, 10, eos_id=3)
        output = generate(loaded, tokenizer, ids, Sampling(max_new_tokens=10, seed=3))
        assert output.texts == [tokenizer.decode(expected[0])]

    def test_a_pre_training_file_is_noted(self, tmp_path: Path) -> None:
        from examples.plain_gpt import save_checkpoint
        from tests.tiny import save_tokenizer

        save_checkpoint(tmp_path / "best_model.pt", relatives.gpt(), 7, loss=2.5)
        tokenizer_path = save_tokenizer(tmp_path / "custom_gpt_tokenizer.json")
        for raw in (False, True):
            lines: list[str] = []
            convert(tmp_path / "best_model.pt", tokenizer_path, tmp_path / f"{raw}", raw=raw, report=lines.append)
            assert any(line.startswith("note: this is a pre-training file") for line in lines) is not raw
