"""A vocabulary of characters is the trainer's own encoding, and nothing is dropped in silence."""

import json
import pickle
import random
from pathlib import Path

import pytest
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_model.batch import answer_file
from hf_model.errors import UserError
from hf_model.generation import Sampling, encode
from hf_model.loading import load
from hf_model.records import read_records
from hf_model.tokenizer import ModelInfo, characters, example_prompt, find_tokenizer, save_tokenizer
from hf_model.tokenizer.characters import characters_in, read_meta
from tests import relatives
from tests.relatives import CHARACTERS, META, STOI, TEXT

MANY = sorted({chr(number) for number in [*range(9, 14), *range(32, 600), 0x300, 0x200D, 0x2028, 0xFFFD, 0x1F642]})


def model(vocab_size: int = len(CHARACTERS)) -> ModelInfo:
    return ModelInfo(Path("ckpt.pt"), vocab_size, 16)


@pytest.fixture(scope="module", params=["as made", "through AutoTokenizer"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("characters")
    made = find_tokenizer(relatives.save_meta(folder / "meta.pkl"), model()).tokenizer
    if request.param == "as made":
        return made
    save_tokenizer(made, folder / "saved")
    return AutoTokenizer.from_pretrained(folder / "saved")


def random_texts(characters: list[str]) -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choices(characters, k=chance.randrange(40))) for _ in range(100)]


class TestEncoding:
    def test_is_the_trainer_s_and_decodes_to_the_text(self, tokenizer: PreTrainedTokenizerFast) -> None:
        for text in [TEXT, "\n", "  ", "", *random_texts(CHARACTERS)]:
            ids = tokenizer(text).input_ids
            assert ids == [STOI[character] for character in text]
            for skipped in (True, False):
                assert tokenizer.decode(ids, skip_special_tokens=skipped) == text

    def test_of_any_characters(self, tmp_path: Path) -> None:
        stoi = {character: number for number, character in enumerate(MANY)}
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": stoi}))
        tokenizer = find_tokenizer(tmp_path / "meta.pkl", model(len(MANY))).tokenizer
        save_tokenizer(tokenizer, tmp_path / "saved")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
        for text in ["".join(MANY), *random_texts(MANY)]:
            ids = tokenizer(text, verbose=False).input_ids
            assert ids == [stoi[character] for character in text]
            assert tokenizer.decode(ids) == text

    def test_offsets_are_the_characters_own(self, tokenizer: PreTrainedTokenizerFast) -> None:
        offsets = tokenizer(TEXT, return_offsets_mapping=True).offset_mapping
        assert offsets == [(position, position + 1) for position in range(len(TEXT))]

    def test_batches(self, tokenizer: PreTrainedTokenizerFast) -> None:
        texts = ["To be", "\n", TEXT]
        rows = tokenizer(texts).input_ids
        assert rows == [[STOI[character] for character in text] for text in texts]
        assert tokenizer.batch_decode(rows) == texts

    def test_a_stream_gives_each_character_at_once(self, tokenizer: PreTrainedTokenizerFast) -> None:
        stream = DecodeStream(skip_special_tokens=True)
        ids = tokenizer(TEXT).input_ids
        assert [stream.step(tokenizer.backend_tokenizer, number) for number in ids] == list(TEXT)

    def test_there_are_no_special_tokens(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert tokenizer.all_special_tokens == []
        assert len(tokenizer) == len(CHARACTERS)

    def test_the_card_s_way_to_pad_leaves_the_text_alone(self, tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        try:
            batch = tokenizer(["To be", "\n"], padding=True)
        finally:
            tokenizer.pad_token = None
        assert batch.input_ids == [[STOI[c] for c in "To be"], [0, 0, 0, 0, STOI["\n"]]]
        assert batch.attention_mask == [[1] * 5, [0, 0, 0, 0, 1]]
        assert tokenizer.decode(batch.input_ids[0], skip_special_tokens=True) == "To be"


class TestUnknownCharacters:
    @pytest.mark.parametrize("text", ["aЖb", "Ж", "To be\x00", ["To be", "not Ж"]])
    def test_the_tokenizer_refuses(self, text: str | list[str], tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(Exception, match="any character that the model was not trained on"):
            tokenizer(text)

    def test_encode_names_them_and_where_they_are(self, tokenizer: PreTrainedTokenizerFast) -> None:
        message = rf"'Ж' \(U\+0416\) in position 3, 'z' .* position 4: .* the {len(CHARACTERS)} characters"
        with pytest.raises(UserError, match=message):
            encode(tokenizer, "To Жz beЖ")

    def test_of_many_three_are_named(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(UserError, match=r"'5' .*'6' .*'7' \(U\+0037\) in position 2 and 2 more: not among"):
            encode(tokenizer, "56789")

    def test_a_batch_names_the_record_and_answers_none(self, tmp_path: Path) -> None:
        path = relatives.save_nanogpt(tmp_path, relatives.nano_character_model())
        loaded = load(path, relatives.save_meta(tmp_path / "meta.pkl"), device="cpu")
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("\n", "To be", "no Ж")), "utf-8")
        records = read_records(prompts, raw=True)
        with pytest.raises(UserError, match=r"record 3: the text holds 'Ж' \(U\+0416\) in position 3"):
            answer_file(*loaded, records, tmp_path / "out.jsonl", 2, Sampling(max_new_tokens=5))
        assert not (tmp_path / "out.jsonl").exists()


class TestMeta:
    @pytest.mark.parametrize("protocol", range(6))
    def test_of_every_protocol_reads(self, protocol: int, tmp_path: Path) -> None:
        assert read_meta(relatives.save_meta(tmp_path / "meta.pkl", protocol)) == STOI

    def test_ids_in_another_order_are_kept(self, tmp_path: Path) -> None:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 1, "b": 0}, "itos": ["b", "a"]}))
        assert find_tokenizer(tmp_path / "meta.pkl", model(2)).tokenizer("ab").input_ids == [1, 0]

    @pytest.mark.parametrize("itos", [META["itos"], CHARACTERS, tuple(CHARACTERS)], ids=["dict", "list", "tuple"])
    def test_may_have_one_direction_only(self, itos: object, tmp_path: Path) -> None:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": itos}))
        assert read_meta(tmp_path / "meta.pkl") == STOI

    def test_may_hold_more(self, tmp_path: Path) -> None:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(META | {"source": "input.txt", "sizes": [1, (2.5, None)]}))
        assert read_meta(tmp_path / "meta.pkl") == STOI

    @pytest.mark.parametrize(
        "meta, message",
        [
            ([1, 2], "has no 'stoi'"),
            ({"vocab_size": 3}, "has no 'stoi', .*; its keys are 'vocab_size'"),
            ({"stoi": ["a"]}, "has no 'stoi'"),
            ({"itos": [1, 2]}, "has no 'stoi'"),
            ({"itos": ["a", "b", "a"]}, "has 2 characters, but none of them has the id 0"),
            ({"stoi": {"a": 0}, "itos": ["a", "a"]}, "its 'itos' is not the inverse"),
            ({"stoi": {}}, "has no characters"),
            ({"stoi": {"a": 0, "the": 1}}, "'the' in its 'stoi' is not one character"),
            ({"stoi": {"": 0}}, "'' in its 'stoi' is not one character"),
            ({"stoi": {7: 0}}, "7 in its 'stoi' is not one character"),
            ({"stoi": {"a": "0"}}, "the id of 'a' is '0', not an integer"),
            ({"stoi": {"a": True}}, "the id of 'a' is True, not an integer"),
            ({"stoi": {"a": 0, "b": 2}}, "has 2 characters, but none of them has the id 1"),
            ({"stoi": {"a": 0, "b": 0}}, "has 2 characters, but none of them has the id 1"),
            ({"stoi": {"a": 1, "b": 2}}, "none of them has the id 0"),
            ({"stoi": {"a": 0, "\ud800": 1}}, "is half of a character"),
            (META | {"itos": META["itos"] | {0: "x"}}, "its 'itos' is not the inverse"),
            (META | {"itos": {}}, "its 'itos' is not the inverse"),
            (META | {"itos": 5}, "its 'itos' is not the inverse"),
            (META | {"vocab_size": 65}, "says vocab_size=65, but has"),
        ],
    )
    def test_that_is_none_is_refused(self, meta: object, message: str, tmp_path: Path) -> None:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
        with pytest.raises(UserError, match=f"meta.pkl: .*{message}|meta.pkl: {message}"):
            read_meta(tmp_path / "meta.pkl")

    def test_of_more_characters_than_the_model_has_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"meta\.pkl: has \d+ tokens, but ckpt\.pt has embeddings for 5"):
            find_tokenizer(relatives.save_meta(tmp_path / "meta.pkl"), model(5))


class TestTrainingText:
    def test_gives_its_sorted_characters(self, tmp_path: Path) -> None:
        (tmp_path / "input.txt").write_text(TEXT * 3, encoding="utf-8")
        assert characters_in(tmp_path / "input.txt") == STOI

    def test_is_read_as_the_trainers_read_it(self, tmp_path: Path) -> None:
        (tmp_path / "input.txt").write_bytes(b"b\r\na\r")
        assert characters_in(tmp_path / "input.txt") == {"\n": 0, "a": 1, "b": 2}

    @pytest.mark.parametrize("chunk", [1, 7])
    def test_however_long_it_is(self, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hf_model.tokenizer.characters.CHUNK", chunk)
        (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")
        assert characters_in(tmp_path / "input.txt") == STOI

    def test_must_have_as_many_characters_as_the_model(self, tmp_path: Path) -> None:
        (tmp_path / "input.txt").write_text("abc", encoding="utf-8")
        for vocab_size in (2, 4):
            with pytest.raises(UserError, match=f"has 3 different characters, but ckpt.pt has .* {vocab_size}: it is"):
                find_tokenizer(None, model(vocab_size), characters_of=tmp_path / "input.txt")

    @pytest.mark.parametrize(
        "content, message", [(b"", "has no characters"), (b"\xff\xfe", "is not UTF-8 text"), (None, "cannot be read")]
    )
    def test_that_is_none_is_refused(self, content: bytes | None, message: str, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "input.txt").write_bytes(content)
        with pytest.raises(UserError, match=rf"input\.txt: {message}"):
            characters_in(tmp_path / "input.txt")


SPECIAL = {"<pad>": 0, "<unk>": 1, "<sep>": 2}
WITH_SPECIAL = SPECIAL | {character: number + 3 for character, number in STOI.items()}


class TestJSON:
    """What a trainer's own class of characters writes, under names of its own."""

    @pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "chars.json"])
    @pytest.mark.parametrize(
        "content",
        [
            STOI,
            {"stoi": STOI, "itos": {str(number): character for character, number in STOI.items()}},
            {"id2char": {number: character for character, number in STOI.items()}, "version": 1},
            {"idx_to_char": CHARACTERS, "vocab_size": len(CHARACTERS)},
            CHARACTERS,
        ],
        ids=["bare", "both ways", "by id", "a list under a key", "a list"],
    )
    def test_of_any_form_reads(self, content: object, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(json.dumps(content))
        tokenizer = find_tokenizer(tmp_path / name, model()).tokenizer
        assert tokenizer(TEXT).input_ids == [STOI[character] for character in TEXT]
        assert tokenizer.special_tokens_map == {}

    @pytest.mark.parametrize("content", [{"word2id": WITH_SPECIAL, "id2word": list(WITH_SPECIAL)}, WITH_SPECIAL])
    def test_may_have_special_tokens(self, content: dict, tmp_path: Path) -> None:
        (tmp_path / "vocab.json").write_text(json.dumps(content))
        found = find_tokenizer(tmp_path / "vocab.json", model(len(WITH_SPECIAL)), eos_token="<sep>")
        save_tokenizer(found.tokenizer, tmp_path / "saved")
        for tokenizer in (found.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
            for text in [TEXT, "\n", *random_texts(CHARACTERS)]:
                ids = tokenizer(text).input_ids
                assert ids == [WITH_SPECIAL[character] for character in text]
                assert tokenizer.decode(ids) == text
            assert tokenizer("T☃☃T").input_ids == [WITH_SPECIAL["T"], 1, 1, WITH_SPECIAL["T"]]
            assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == ("<sep>", "<pad>", "<unk>")
        assert any("<pad>, <unk>, <sep>; a character that it does not know becomes <unk>" in n for n in found.notes)

    def test_without_an_unknown_token_an_unknown_character_is_an_error(self, tmp_path: Path) -> None:
        ids = {"<pad>": 0} | {character: number + 1 for character, number in STOI.items()}
        (tmp_path / "vocab.json").write_text(json.dumps(ids))
        tokenizer = find_tokenizer(tmp_path / "vocab.json", model(len(ids))).tokenizer
        with pytest.raises(Exception, match="not trained on"):
            tokenizer("T☃")

    @pytest.mark.parametrize(
        "content",
        [{"the": 0, "a": 1, "b": 2}, {"a": 0, "b": 2}, {"a": 0, "b": "1"}, {"<unk>": 0, "a": 1}, {"lr": 0.1}, [1, 2]],
        ids=["a word", "a gap", "a text for an id", "half of it special", "options", "numbers"],
    )
    def test_of_another_kind_is_refused(self, content: object, tmp_path: Path) -> None:
        (tmp_path / "chars.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"chars\.json: .*`tokenizers`"):
            find_tokenizer(tmp_path / "chars.json", model())

    @pytest.mark.parametrize("rows, is_read", [(len(STOI), True), (64, True), (len(STOI) + 1, False), (512, False)])
    def test_must_have_as_many_characters_as_the_model_but_for_padding(
        self, rows: int, is_read: bool, tmp_path: Path
    ) -> None:
        (tmp_path / "chars.json").write_text(json.dumps({"flags": CHARACTERS}))
        if is_read:
            assert len(find_tokenizer(tmp_path / "chars.json", model(rows)).tokenizer) == len(STOI)
        else:
            with pytest.raises(UserError, match=rf"{len(STOI)} characters, and the model has {rows} tokens"):
                find_tokenizer(tmp_path / "chars.json", model(rows))

    @pytest.mark.parametrize("other", [[" ", ","], {"a": 0, "b": 1}, ["<pad>", "x", "y"]], ids=str)
    def test_the_largest_vocabulary_is_taken(self, other: object, tmp_path: Path) -> None:
        (tmp_path / "chars.json").write_text(json.dumps({"separators": other, "stoi": STOI}))
        tokenizer = find_tokenizer(tmp_path / "chars.json", model()).tokenizer
        assert tokenizer(TEXT).input_ids == [STOI[character] for character in TEXT]

    @pytest.mark.parametrize("other", ["chars", "itos"])
    def test_which_of_two_vocabularies_is_not_guessed(self, other: str, tmp_path: Path) -> None:
        (tmp_path / "chars.json").write_text(json.dumps({other: CHARACTERS[::-1], "stoi": STOI}))
        with pytest.raises(UserError, match=r"chars\.json: has two vocabularies of \d+ tokens with different ids"):
            find_tokenizer(tmp_path / "chars.json", model())

    def test_half_of_a_character_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "chars.json").write_text(json.dumps({"a": 0, "\ud800": 1}))
        with pytest.raises(UserError, match=r"chars\.json: .* is half of a character"):
            find_tokenizer(tmp_path / "chars.json", model(2))

    def test_the_prompt_to_try_has_no_unknown_character(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "漢": 1, "字": 2}))
        tokenizer = find_tokenizer(tmp_path / "vocab.json", model(3)).tokenizer
        assert example_prompt(tokenizer) in "漢字"


@pytest.mark.parametrize(
    "characters, prompt", [("Once upon a time\n", "Once upon a time"), ("0123", "012"), ("\nab", "\n"), ("+-", "+")]
)
def test_the_prompt_to_try_is_of_known_characters(characters: str, prompt: str, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text(characters, encoding="utf-8")
    vocabulary = find_tokenizer(None, model(len(set(characters))), characters_of=tmp_path / "input.txt")
    assert example_prompt(vocabulary.tokenizer) == prompt


def test_a_training_text_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(characters, "MOST_CHARACTERS", 10**7)
    with pytest.raises(UserError, match="/dev/zero: is more than 10000000 characters"):
        characters_in(Path("/dev/zero"))
