"""What a conversion makes of the weights and of its options, and what it says."""

import json
import logging
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from examples.plain_gpt import GPT
from hf_model import conversion, inspect, load
from hf_model.conversion import convert, full_repo_name, push
from hf_model.errors import UserError
from hf_model.output_dir import MANIFEST
from tests.tiny import BOS, CHECKPOINT, PAD, SIZES, TOKENIZER, gpt, load_plain, save_files


def converted(tmp_path: Path, model: GPT, **how) -> tuple[Path, list[str]]:
    """The folder made of a reference model, and what the conversion said."""
    lines: list[str] = []
    folder = convert(*save_files(tmp_path, model), tmp_path / "hf", report=lines.append, **how)
    return folder, lines


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


class TestWeights:
    @pytest.mark.parametrize("shape", [{}, {"bias": False}], ids=str)
    def test_are_written_under_their_names_bit_for_bit(self, shape: dict, tmp_path: Path) -> None:
        model = gpt(**shape)
        folder, _ = converted(tmp_path, model)
        written = load_file(folder / "model.safetensors")
        assert written.keys() == model.state_dict().keys()
        assert all(torch.equal(written[name], weight) for name, weight in model.state_dict().items())

    def test_a_tied_head_is_written_once(self, tmp_path: Path) -> None:
        folder, lines = converted(tmp_path, gpt(tied=True))
        written = load_file(folder / "model.safetensors")
        assert len({"lm_head.weight", "transformer.wte.weight"} & written.keys()) == 1
        assert read_json(folder / "config.json")["tie_word_embeddings"] is True
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert "head tied" in "\n".join(lines)

    @pytest.mark.parametrize(
        "original, dtype",
        [
            (torch.float32, "auto"),
            (torch.float16, "auto"),
            (torch.bfloat16, "auto"),
            (torch.float32, "float16"),
            (torch.float32, "bfloat16"),
            (torch.bfloat16, "float32"),
        ],
        ids=str,
    )
    def test_have_the_dtype_that_is_asked_for(self, original: torch.dtype, dtype: str, tmp_path: Path) -> None:
        model = gpt().to(original)
        expected = original if dtype == "auto" else getattr(torch, dtype)
        folder, _ = converted(tmp_path, model, dtype=dtype)
        written = load_file(folder / "model.safetensors")
        for name, weight in model.state_dict().items():
            assert written[name].dtype == expected
            assert torch.equal(written[name], weight.to(expected))
        assert read_json(folder / "config.json")["dtype"] == str(expected).removeprefix("torch.")
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == expected

    @pytest.mark.parametrize(
        "original, dtype, rounded",
        [
            (torch.float32, "auto", None),
            (torch.float16, "float32", None),
            (torch.float32, "float16", "rounded from float32 to float16"),
            (torch.float16, "bfloat16", "rounded from float16 to bfloat16"),
        ],
        ids=str,
    )
    def test_that_are_rounded_are_not_called_unchanged(
        self, original: torch.dtype, dtype: str, rounded: str | None, tmp_path: Path
    ) -> None:
        folder, lines = converted(tmp_path, gpt().to(original), dtype=dtype)
        card = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
        assert ("without changing a weight." in card) == (rounded is None)
        if rounded is not None:
            assert f"transformers with its weights {rounded}." in card
            assert f"equal bit for bit to the source's, {rounded}, " in lines[-1]

    def test_are_split_over_shards_of_the_size_that_is_asked_for(self, tmp_path: Path) -> None:
        model = gpt()
        folder, _ = converted(tmp_path, model, max_shard_size="60KB")
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 2
        assert all(shard.stat().st_size < 64_000 for shard in shards)
        assert {shard.stat().st_mode for shard in shards} == {(folder / "config.json").stat().st_mode}
        index = read_json(folder / "model.safetensors.index.json")["weight_map"]
        assert index == {name: shard.name for shard in shards for name in load_file(shard)}
        loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())

    def test_in_another_memory_layout_are_written_in_order(self, tmp_path: Path) -> None:
        checkpoint_path, tokenizer_path = save_files(tmp_path, model := gpt())
        weights = {name: weight.T.contiguous().T for name, weight in model.state_dict().items() if weight.ndim == 2}
        assert not any(weight.is_contiguous() for weight in weights.values())
        torch.save({"model": model.state_dict() | weights, "model_args": model.model_args()}, checkpoint_path)
        convert(checkpoint_path, tokenizer_path, tmp_path / "hf")
        written = load_file(tmp_path / "hf" / "model.safetensors")
        assert all(torch.equal(written[name], weight) for name, weight in model.state_dict().items())


class TestOptions:
    def test_the_activation_is_the_one_that_is_asked_for(self, tmp_path: Path) -> None:
        model = gpt(activation="gelu_new")
        folder, _ = converted(tmp_path, model, activation="gelu_new")
        ids = torch.randint(SIZES["vocab_size"], (2, 16))
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids)[0])

    def test_the_number_of_heads_can_be_given(self, tmp_path: Path) -> None:
        model = gpt(n_head=8)
        checkpoint_path, tokenizer_path = save_files(tmp_path, model)
        torch.save(model.state_dict(), checkpoint_path)
        with pytest.raises(UserError, match="give it with --n_head"):
            load_plain(checkpoint_path, tokenizer_path)
        converted_model, _ = load_plain(checkpoint_path, tokenizer_path, n_head=8)
        ids = torch.randint(SIZES["vocab_size"], (2, 16))
        assert torch.equal(converted_model(ids).logits, model(ids)[0])

    def test_a_folder_that_is_there_is_replaced_only_when_told(self, tmp_path: Path) -> None:
        folder, _ = converted(tmp_path, gpt())
        before = (folder / "model.safetensors").read_bytes()
        with pytest.raises(UserError, match=r"hf: exists already; choose another --output_dir or add --overwrite"):
            converted(tmp_path, gpt())
        assert (folder / "model.safetensors").read_bytes() == before
        converted(tmp_path, gpt(), overwrite=True)
        assert (folder / "model.safetensors").read_bytes() != before

    def test_nothing_is_left_beside_the_folder(self, tmp_path: Path) -> None:
        converted(tmp_path, gpt())
        assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "tokenizer.json", "hf"}


class TestDiagnosis:
    def test_nothing_is_said_of_a_sane_checkpoint(self, tmp_path: Path) -> None:
        lines: list[str] = []
        convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", report=lines.append)
        assert not [line for line in lines if line.startswith(("note:", "warning:"))]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_values_that_are_not_finite_are_named_and_kept(self, value: float, tmp_path: Path) -> None:
        model = gpt()
        model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = value
        folder, lines = converted(tmp_path, model)
        name = "transformer.h.1.mlp.c_fc.weight"
        assert f"warning: there are NaN or infinite values in {name}: the model cannot work" in lines
        written = load_file(folder / "model.safetensors")[name]
        assert written[3, 4].item() == pytest.approx(value, nan_ok=True)

    def test_of_many_tensors_that_are_not_finite_three_are_named(self, tmp_path: Path) -> None:
        model = gpt()
        for weight in model.parameters():
            weight.data.fill_(float("nan"))
        _, lines = converted(tmp_path, model)
        n_weights = len(list(model.parameters()))
        assert f"transformer.h.0.ln_1.weight and {n_weights - 3} more: the model cannot work" in "\n".join(lines)

    def test_a_padded_vocabulary_is_kept_from_being_sampled(self, tmp_path: Path) -> None:
        model = gpt(vocab_size=320)
        folder, lines = converted(tmp_path, model)
        assert "note: the weights' vocabulary is padded: 20 ids have no token and are kept from being sampled" in lines
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        how = {"temperature": 5.0, "top_k": 0, "max_new_tokens": 15, "eos_token_id": None, "pad_token_id": PAD}
        prompts = torch.full((20, 1), BOS)
        assert loaded.generate(prompts, **how).max() < 300
        loaded.generation_config.suppress_tokens = None
        assert loaded.generate(prompts, **how).max() >= 300

    @pytest.mark.parametrize("n_more, is_other", [(127, False), (128, True)])
    def test_a_tokenizer_that_is_too_small_to_be_the_training_s_is_warned_of(
        self, n_more: int, is_other: bool, tmp_path: Path
    ) -> None:
        _, lines = converted(tmp_path, gpt(vocab_size=300 + n_more))
        assert any("note: the weights' vocabulary is padded" in line for line in lines) != is_other
        said = (
            "warning: the tokenizer has 300 tokens and the model embeddings for 428: it is probably not the tokenizer"
        )
        assert any(line.startswith(said) for line in lines) == is_other

    def test_a_vocabulary_smaller_than_the_tokenizer_s_is_an_error_that_names_both(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"tokenizer\.json: has 300 tokens, but .*ckpt\.pt has embeddings for 299"):
            converted(tmp_path, gpt(vocab_size=299))
        assert not (tmp_path / "hf").exists()

    def test_a_tokenizer_without_a_padding_token_is_noted(self, tmp_path: Path) -> None:
        checkpoint_path, tokenizer_path = save_files(tmp_path, gpt())
        content = tokenizer_path.read_text(encoding="utf-8").replace("[PAD]", "[MASK]")
        tokenizer_path.write_text(content, encoding="utf-8")
        lines: list[str] = []
        convert(checkpoint_path, tokenizer_path, tmp_path / "hf", report=lines.append)
        assert "note: the tokenizer has no [PAD]; [EOS] serves as the padding token" in lines


class TestArguments:
    def test_a_state_dict_is_answered_with_what_to_give(self, tmp_path: Path) -> None:
        state = gpt().state_dict()
        for call in (lambda: convert(state, None, tmp_path / "hf"), lambda: load(state), lambda: inspect(state)):
            with pytest.raises(UserError, match="OrderedDict: give the model, not its state dict"):
                call()

    def test_a_class_is_answered_with_what_to_give(self, tmp_path: Path) -> None:
        for call in (lambda: convert(GPT, None, tmp_path / "hf"), lambda: load(GPT)):
            with pytest.raises(UserError, match="GPT is a class: give the model"):
                call()

    def test_in_another_order_are_answered_with_the_right_one(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"the tokenizer is a GPT: the model comes first"):
            convert(TOKENIZER, gpt(), tmp_path / "hf")

    @pytest.mark.parametrize("option", [{"n_head": 1}, {"activation": "relu"}])
    def test_that_a_model_of_one_s_own_tells_are_refused(self, option: dict, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"n_head and activation are for a checkpoint"):
            convert(gpt(), TOKENIZER, tmp_path / "hf", **option)

    def test_without_a_report_its_warnings_are_python_s(self, tmp_path: Path) -> None:
        model = gpt()
        model.lm_head.weight.data[3] = math.nan
        files = save_files(tmp_path, model)
        with pytest.warns(UserWarning, match=r"^there are NaN or infinite values in lm_head\.weight"):
            convert(*files, tmp_path / "hf")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert(*files, tmp_path / "hf", overwrite=True, report=lambda line: None)
            convert(*save_files(tmp_path, gpt()), tmp_path / "hf", overwrite=True)

    def test_an_unknown_name_is_python_s_own_error(self, tmp_path: Path) -> None:
        for name, call in {
            "convert": lambda **how: convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", **how),
            "load": lambda **how: load(CHECKPOINT, TOKENIZER, **how),
            "inspect": lambda **how: inspect(CHECKPOINT, TOKENIZER, **how),
        }.items():
            with pytest.raises(
                TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'n_heads'. Did you mean"
            ):
                call(n_heads=3)


@pytest.mark.parametrize("format", ["transformers", "gpt2"])
def test_the_library_does_not_warn_of_texts_longer_than_the_context(
    format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data.txt").write_text("Paris is the capital of France. " * 99)
    checkpoint, tokenizer = save_files(tmp_path, gpt(block_size=8))
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        for data in (None, tmp_path / "data.txt"):
            how = {"format": format, "raw": True, "training_data": data, "overwrite": True}
            convert(checkpoint, tokenizer, tmp_path / "hf", **how)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "longer than" not in caplog.text


def test_says_what_a_person_wants_to_know(tmp_path: Path) -> None:
    model = gpt()
    folder, lines = converted(tmp_path, model)
    assert lines[:4] == [
        f"source        {tmp_path / 'ckpt.pt'} (weights under 'model_state_dict', iter_num 7)",
        "architecture  2 layers, 4 heads, 32 wide, context 16, vocabulary 300, with biases, head untied, gelu",
        f"parameters    {sum(weight.numel() for weight in model.parameters()):,} in float32",
        f"tokenizer     {tmp_path / 'tokenizer.json'} (300 tokens)",
    ]
    assert lines[4] == f"written       {folder}"
    assert [line.split()[0] for line in lines[5:-1]] == sorted({file.name for file in folder.iterdir()} - {MANIFEST})
    assert lines[-1] == (
        f"verified      compared with the file: {len(model.state_dict())} tensors equal bit for bit, "
        "3 texts encoded the same"
    )


def test_a_path_that_is_said_is_one_that_leads_there(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    lines: list[str] = []
    files = save_files(tmp_path, gpt())
    for name, place in [("link/../hf", "far/hf"), ("nowhere/../hf", "hf"), ("link/hf", "link/hf")]:
        folder = convert(*files, tmp_path / name, verify=False, report=lines.append)
        assert folder == tmp_path / place
        assert folder.is_dir()
        assert f"written       {folder}" in lines


@pytest.mark.parametrize(
    "page, folder",
    [("hf", "hf"), ("hf/r.html", "hf"), ("hf/../hf/r.html", "hf"), ("link/hf/r.html", "hf"), ("r.html", "r.html/hf")],
)
def test_a_page_in_the_folder_s_way_is_found_before_the_work_begins(page: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    checkpoint_path = tmp_path / "ckpt.pt"
    checkpoint_path.write_text("never read", encoding="utf-8")
    if page != folder == "hf":
        (tmp_path / "hf").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"is in the way of .*; choose another name for --report"):
        convert(checkpoint_path, TOKENIZER, tmp_path / folder, overwrite=True, report_page=tmp_path / page)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_option_stops_the_conversion_until_it_is_ignored_by_name(tmp_path: Path) -> None:
    checkpoint_path, tokenizer_path = save_files(tmp_path, gpt())
    content = torch.load(checkpoint_path, weights_only=True)
    content["model_args"] |= {"mup_enabled": True, "mup_width": 64}
    torch.save(content, checkpoint_path)
    with pytest.raises(UserError, match=r"mup_enabled=True, mup_width=64.*--ignore_model_args mup_enabled mup_width"):
        convert(checkpoint_path, tokenizer_path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    lines: list[str] = []
    names = ("mup_enabled", "mup_width")
    convert(checkpoint_path, tokenizer_path, tmp_path / "hf", ignore_model_args=names, report=lines.append)
    assert all(any(line.startswith("warning") and name in line for line in lines) for name in names)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert all(name in card for name in names)


class TestPush:
    def test_uploads_the_folder_to_a_private_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        class Repository(str):
            repo_id = "someone/capitals"

        class Hub:
            def create_repo(self, repo_id: str, **how) -> Repository:
                calls.append((repo_id, how))
                return Repository("https://huggingface.co/someone/capitals")

            def upload_folder(self, **how) -> None:
                calls.append((how["repo_id"], how["folder_path"]))

        monkeypatch.setattr(conversion, "HfApi", Hub)
        assert push(tmp_path, "capitals") == "https://huggingface.co/someone/capitals"
        assert calls == [("capitals", {"private": True, "exist_ok": True}), ("someone/capitals", tmp_path)]

    @pytest.mark.parametrize("repo_id", ["someone/capitals", "not//a name"])
    def test_that_fails_says_that_the_folder_is_complete(self, repo_id: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=f"{tmp_path} is complete, but was not pushed to {repo_id}: "):
            push(tmp_path, repo_id)


class TestRepoName:
    def test_without_a_network_it_is_one_line_before_any_work(self) -> None:
        with pytest.raises(UserError, match=r"^--push_to_hub: HF_HUB_OFFLINE is set"):
            full_repo_name("me/capitals")

    def test_a_name_gets_its_owner_and_another_s_repository_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(conversion.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(conversion.HfApi, "whoami", lambda self: {"name": "me", "orgs": [{"name": "our-lab"}]})
        assert full_repo_name("capitals") == "me/capitals"
        assert full_repo_name("our-lab/capitals") == "our-lab/capitals"
        with pytest.raises(UserError, match=r"somebody/capitals: you may write to repositories of me, our-lab only"):
            full_repo_name("somebody/capitals")

    def test_not_being_logged_in_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def whoami(self: object) -> None:
            raise OSError("Token is required, but no token found.\nSecond line")

        monkeypatch.setattr(conversion.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(conversion.HfApi, "whoami", whoami)
        with pytest.raises(UserError, match=r"^--push_to_hub: .*no token found.*`hf auth login`$"):
            full_repo_name("capitals")
