"""Tokenizers that people train themselves: each converts, and the folder encodes and decodes as the file does."""

import base64
import json
import pickle
import random
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    BertWordPieceTokenizer,
    ByteLevelBPETokenizer,
    CharBPETokenizer,
    Regex,
    SentencePieceBPETokenizer,
    SentencePieceUnigramTokenizer,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_model.errors import UserError
from hf_model.tokenizer import FoundTokenizer, ModelInfo, find_tokenizer, save_tokenizer, unused_ids

VOCAB_SIZE = 600
CORPUS = [
    "To be, or not to be: that is the question.",
    "Whether 'tis nobler in the mind to suffer  the slings and arrows of outrageous fortune,",
    "HelloWorld, it's 12345 o'clock; we'll go!\n\tdef f(x):\n        return x**2  # two   spaces\n\n",
    "Ünïcödé e\u0301, 漢字 and العربية, 🙂.",
] * 3
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "a",
    "unknown Ж☃ words ŷ",
    "  leading and trailing  ",
    "<s>to be</s> <|endoftext|> [CLS]",
]

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NANOCHAT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def trained(model: models.Model, trainer: trainers.Trainer, **parts: object) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def bpe(*special: str, **parts: object) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["[UNK]", *special], show_progress=False)
    return trained(models.BPE(unk_token="[UNK]"), trainer, **parts)


def byte_level(pattern: str | None = None, *special: str, **parts: object) -> Tokenizer:
    """Byte-level BPE, of texts that are split by a pattern of its own."""
    split: list = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        ),
        pre_tokenizer=pre_tokenizers.Sequence([*split, in_bytes]),
        decoder=decoders.ByteLevel(),
        **parts,
    )


def quick(tokenizer: object, **how: object) -> Tokenizer:
    """One of the library's own ready-made classes, trained."""
    tokenizer.train_from_iterator(CORPUS, show_progress=False, **how)  # type: ignore[attr-defined]
    return tokenizer._tokenizer  # type: ignore[attr-defined]


def switched_on(tokenizer: Tokenizer, name: str) -> Tokenizer:
    if name == "padding":
        tokenizer.enable_padding(length=32, pad_id=0, pad_token="[UNK]")
    elif name == "truncation":
        tokenizer.enable_truncation(4, stride=2)
    else:
        tokenizer.model.dropout = 0.5
    return tokenizer


def word_level(unknown: str | None) -> Tokenizer:
    special = [unknown] if unknown else []
    return trained(
        models.WordLevel(unk_token=unknown) if unknown else models.WordLevel(),
        trainers.WordLevelTrainer(special_tokens=special, show_progress=False),
        pre_tokenizer=pre_tokenizers.Whitespace(),
    )


def bert() -> Tokenizer:
    """As in the library's tour of a BERT from scratch."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    tokenizer = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False),
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]),
        pre_tokenizer=pre_tokenizers.Whitespace(),
        decoder=decoders.WordPiece(),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return tokenizer


def unigram() -> Tokenizer:
    """As in the library's tour of a Unigram from scratch."""
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False, shrinking_factor=0.75
        ),
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def roberta() -> Tokenizer:
    tokenizer = byte_level(None, "<s>", "</s>")
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def with_added_tokens() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("newword", single_word=True), AddedToken(" Wide ", lstrip=True, rstrip=True)])
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def with_a_hole() -> Tokenizer:
    tokenizer = byte_level()
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.__getitem__)] += 50
    return Tokenizer.from_str(json.dumps(content))


HONEST: dict[str, Callable[[], Tokenizer]] = {
    "the quick tour's BPE": lambda: bpe("[CLS]", "[SEP]", "[PAD]", "[MASK]", pre_tokenizer=pre_tokenizers.Whitespace()),
    "BPE without a pre-tokenizer": bpe,
    "BPE that drops unknown characters": lambda: trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=300, show_progress=False),
        pre_tokenizer=pre_tokenizers.Whitespace(),
    ),
    "BPE of words and numbers": lambda: bpe(pre_tokenizer=pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}"), "isolated")),
    "BPE with an end of words": lambda: quick(CharBPETokenizer(), vocab_size=400),
    "BPE after a normalizer of spaces": lambda: bpe(
        normalizer=normalizers.Replace(Regex(r"\s{2,}"), " "), pre_tokenizer=pre_tokenizers.Whitespace()
    ),
    "BPE of Metaspace": lambda: bpe(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"),
        decoder=decoders.Metaspace(prepend_scheme="first"),
    ),
    "SentencePieceBPETokenizer": lambda: quick(SentencePieceBPETokenizer(), vocab_size=400),
    "SentencePieceUnigramTokenizer": lambda: quick(
        SentencePieceUnigramTokenizer(), vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>"
    ),
    "ByteLevelBPETokenizer": lambda: quick(ByteLevelBPETokenizer(), vocab_size=500, special_tokens=["<|endoftext|>"]),
    "ByteLevelBPETokenizer in lower case": lambda: quick(
        ByteLevelBPETokenizer(lowercase=True, add_prefix_space=True, trim_offsets=True), vocab_size=500
    ),
    "GPT-4's pattern": lambda: byte_level(GPT4, "<|endoftext|>"),
    "GPT-4o's pattern": lambda: byte_level(GPT4O, "<|endoftext|>"),
    "nanochat's pattern": lambda: byte_level(NANOCHAT, "<|bos|>", "<|user_start|>"),
    "digits one by one": lambda: byte_level(r"\p{N}|[^\p{N}]+"),
    "a pattern of two alternatives": lambda: byte_level(r"\p{L}+|\p{N}"),
    "byte-level with added tokens": with_added_tokens,
    "byte-level with a hole in its ids": with_a_hole,
    "RoBERTa's": roberta,
    "BERT's, of the tour": bert,
    "BertWordPieceTokenizer": lambda: quick(BertWordPieceTokenizer(), vocab_size=400),
    "Unigram, of the tour": unigram,
    "WordLevel": lambda: word_level("[UNK]"),
    "WordLevel without an unknown token": lambda: word_level(None),
    "padding switched on": lambda: switched_on(byte_level(None, "[UNK]"), "padding"),
    "truncation switched on": lambda: switched_on(byte_level(), "truncation"),
    "dropout switched on": lambda: switched_on(byte_level(), "dropout"),
}
CHANGED = ("padding", "truncation", "dropout")


def model(path: Path) -> ModelInfo:
    return ModelInfo(path / "ckpt.pt", VOCAB_SIZE, 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tokenizer, FoundTokenizer, Path]]:
    """Each tokenizer, switched to plain encoding; what was found in its file; and the folder that was written."""
    kept = {}

    def make(name: str) -> tuple[Tokenizer, FoundTokenizer, Path]:
        if name not in kept:
            folder = tmp_path_factory.mktemp("honest")
            tokenizer = HONEST[name]()
            tokenizer.save(str(folder / "tokenizer.json"))
            reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
            reference.no_padding()
            reference.no_truncation()
            if name.startswith("dropout"):
                reference.model.dropout = None
            found = find_tokenizer(folder / "tokenizer.json", model(folder))
            save_tokenizer(found.tokenizer, folder / "hf")
            kept[name] = reference, found, folder / "hf"
        return kept[name]

    return make


def known(reference: Tokenizer, texts: list[str]) -> list[str]:
    """The texts that a tokenizer takes: one without an unknown token may refuse some."""
    taken = []
    for text in texts:
        try:
            reference.encode(text)
            taken.append(text)
        except Exception:
            assert reference.model.unk_token is None or "WordLevel" in repr(reference.model)
    return taken


@pytest.mark.parametrize("name", HONEST)
class TestHonestTokenizers:
    @pytest.fixture(params=["made", "read"])
    def both(
        self, request: pytest.FixtureRequest, name: str, made: Callable
    ) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
        reference, found, folder = made(name)
        return reference, found.tokenizer if request.param == "made" else AutoTokenizer.from_pretrained(folder)

    def test_ids_and_texts_are_the_file_s(self, name: str, both: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
        reference, tokenizer = both
        texts = known(reference, TEXTS)
        assert len(texts) > 5
        for text in texts:
            ids = reference.encode(text, add_special_tokens=False).ids
            assert tokenizer(text, add_special_tokens=False).input_ids == ids
            for skips in (True, False):
                assert tokenizer.decode(ids, skip_special_tokens=skips) == reference.decode(
                    ids, skip_special_tokens=skips
                )

    def test_a_text_begins_as_the_file_s_does_and_has_no_end(
        self, name: str, both: tuple[Tokenizer, PreTrainedTokenizerFast]
    ) -> None:
        reference, tokenizer = both
        whole = reference.encode("To be").ids
        bare = reference.encode("To be", add_special_tokens=False).ids
        start = next(start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
        assert tokenizer("To be").input_ids == whole[: start + len(bare)]

    def test_offsets_are_the_file_s(self, name: str, both: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
        reference, tokenizer = both
        for text in known(reference, TEXTS):
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
            assert offsets == reference.encode(text, add_special_tokens=False).offsets

    def test_a_stream_of_tokens_gives_the_text(
        self, name: str, both: tuple[Tokenizer, PreTrainedTokenizerFast]
    ) -> None:
        reference, tokenizer = both
        ids = reference.encode(CORPUS[0], add_special_tokens=False).ids
        ours, theirs = DecodeStream(skip_special_tokens=True), DecodeStream(skip_special_tokens=True)
        chunks = [ours.step(tokenizer.backend_tokenizer, number) for number in ids]
        assert chunks == [theirs.step(reference, number) for number in ids]
        assert "".join(chunk or "" for chunk in chunks).split() == reference.decode(ids).split()

    def test_batches_are_single_texts(self, name: str, both: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
        reference, tokenizer = both
        texts = known(reference, TEXTS)
        assert tokenizer(texts).input_ids == [tokenizer(text).input_ids for text in texts]

    def test_a_written_folder_would_be_compared_with_the_file(self, name: str, made: Callable) -> None:
        reference, found, folder = made(name)
        for text in known(reference, TEXTS):
            assert found.encode(text) == AutoTokenizer.from_pretrained(folder)(text).input_ids

    def test_what_was_switched_off_is_said(self, name: str, made: Callable) -> None:
        _, found, _ = made(name)
        for setting in CHANGED:
            said = [note for note in found.notes if note.startswith(setting) and "is switched off here" in note]
            assert len(said) == name.startswith(setting)


@pytest.mark.parametrize("name, drops", [("BPE that drops unknown characters", True), ("WordLevel", False)])
def test_a_tokenizer_that_drops_characters_says_so(name: str, drops: bool, made: Callable) -> None:
    reference, found, _ = made(name)
    assert (reference.encode("Ж").ids == []) is drops
    assert any("left out" in note for note in found.notes) is drops


def test_ids_that_no_token_has_are_listed(made: Callable) -> None:
    tokenizer = made("byte-level with a hole in its ids")[1].tokenizer
    unused = unused_ids(tokenizer, VOCAB_SIZE)
    assert sorted([*unused, *tokenizer.get_vocab().values()]) == list(range(VOCAB_SIZE))
    assert unused[0] < max(tokenizer.get_vocab().values()) < unused[-1]
    tokenizer.add_tokens(["<|new|>"])
    assert tokenizer.convert_tokens_to_ids("<|new|>") not in unused_ids(tokenizer, VOCAB_SIZE)


def test_an_id_past_the_embedding_is_named(tmp_path: Path) -> None:
    with_a_hole().save(str(tmp_path / "tokenizer.json"))
    vocabulary = with_a_hole().get_vocab()
    last = max(vocabulary.values())
    assert last > len(vocabulary)
    with pytest.raises(UserError, match=rf"has a token with the id {last}, but .*ckpt\.pt has embeddings for {last}"):
        find_tokenizer(tmp_path / "tokenizer.json", ModelInfo(tmp_path / "ckpt.pt", last, 64))


# --- vocab.txt


class TestWordPieces:
    @pytest.mark.parametrize("lowercase", [True, False])
    def test_a_vocab_txt_is_bert_s(self, lowercase: bool, tmp_path: Path) -> None:
        reference = BertWordPieceTokenizer(lowercase=lowercase)
        reference.train_from_iterator(CORPUS, vocab_size=400, show_progress=False)
        reference.save_model(str(tmp_path))
        reference = BertWordPieceTokenizer(str(tmp_path / "vocab.txt"), lowercase=lowercase)
        found = find_tokenizer(tmp_path / "vocab.txt", model(tmp_path))
        for text in TEXTS:
            ids = reference.encode(text).ids
            assert found.tokenizer(text).input_ids == ids[:-1]
            assert found.tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)
        assert (found.tokenizer.bos_token, found.tokenizer.eos_token) == ("[CLS]", "[SEP]")
        assert any("lower case" in note if lowercase else "capitals are kept" in note for note in found.notes)

    def test_a_training_text_of_this_name_is_told_from_it(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.txt").write_text("To be\nor not\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"vocab\.txt: has no \[UNK\], .* --characters_of"):
            find_tokenizer(tmp_path / "vocab.txt", model(tmp_path))


# --- ranks and merges of bytes, as minbpe and tiktoken keep them


class ByteMerges:
    """An independent byte-level BPE: pairs of ids with the id that they make, the smallest first."""

    def __init__(self, merges: dict[tuple[int, int], int], tokens: dict[int, bytes]):
        self.merges, self.tokens = merges, tokens

    def encode(self, piece: str) -> list[int]:
        ids = list(piece.encode())
        while pairs := [pair for pair in pairwise(ids) if pair in self.merges]:
            best = min(pairs, key=self.merges.__getitem__)
            place = next(i for i in range(len(ids) - 1) if (ids[i], ids[i + 1]) == best)
            ids[place : place + 2] = [self.merges[best]]
        return ids


@pytest.fixture(scope="module")
def byte_merges() -> ByteMerges:
    """Merges at random, of pairs that occur in the corpus; no two make the same bytes."""
    chance = random.Random(0)
    tokens = {number: bytes([number]) for number in range(256)}
    found = ByteMerges({}, tokens)
    while len(tokens) < 400:
        ids = found.encode(chance.choice(CORPUS))
        place = chance.randrange(len(ids) - 1)
        joined = tokens[ids[place]] + tokens[ids[place + 1]]
        if joined not in tokens.values():
            found.merges[ids[place], ids[place + 1]] = len(tokens)
            tokens[len(tokens)] = joined
    return found


def save_minbpe(path: Path, made: ByteMerges, pattern: str = "", special: dict[str, int] | None = None) -> Path:
    special = special or {}
    lines = ["minbpe v1", pattern, str(len(special)), *(f"{token} {number}" for token, number in special.items())]
    lines += [f"{first} {second}" for first, second in made.merges]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


class TestMinbpe:
    def test_without_a_pattern_a_text_is_one_piece(self, byte_merges: ByteMerges, tmp_path: Path) -> None:
        tokenizer = find_tokenizer(save_minbpe(tmp_path / "basic.model", byte_merges), model(tmp_path)).tokenizer
        for text in TEXTS:
            assert tokenizer(text).input_ids == byte_merges.encode(text)
            assert tokenizer.decode(byte_merges.encode(text)) == text

    def test_a_pattern_splits_it(self, byte_merges: ByteMerges, tmp_path: Path) -> None:
        path = save_minbpe(tmp_path / "regex.model", byte_merges, r"[a-z]+|[^a-z]", {"<|endoftext|>": 400})
        tokenizer = find_tokenizer(path, model(tmp_path)).tokenizer
        words = ["to", " ", "be", ",", " ", "or"]
        assert tokenizer("".join(words)).input_ids == [number for word in words for number in byte_merges.encode(word)]
        assert tokenizer("to<|endoftext|>").input_ids[-1] == 400
        assert tokenizer.eos_token_id == 400

    def test_gpt_4_s_pattern_with_possessive_quantifiers_is_read(self, byte_merges: ByteMerges, tmp_path: Path) -> None:
        pattern = NANOCHAT.replace("{1,2}", "{1,3}")
        tokenizer = find_tokenizer(
            save_minbpe(tmp_path / "gpt4.model", byte_merges, pattern), model(tmp_path)
        ).tokenizer
        for text in TEXTS:
            assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_two_tokens_of_the_same_bytes_are_named(self, tmp_path: Path) -> None:
        merges = ByteMerges({(97, 98): 256, (98, 99): 257, (256, 99): 258, (97, 257): 259}, {})
        with pytest.raises(UserError, match="its tokens 258 and 259 are the same bytes, b'abc'"):
            find_tokenizer(save_minbpe(tmp_path / "m.model", merges), model(tmp_path))

    @pytest.mark.parametrize("text", ["", "\n\nx\n", "\n\n0\n97 256\n", "\n\n0\n1\n"])
    def test_a_damaged_one_is_refused(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "m.model").write_text(f"minbpe v1{text}", encoding="utf-8")
        with pytest.raises(UserError, match=r"m\.model: is a damaged model of minbpe"):
            find_tokenizer(tmp_path / "m.model", model(tmp_path))

    def test_lines_that_double_a_token_are_refused(self, tmp_path: Path) -> None:
        doubling = [f"{255 + number} {255 + number}" for number in range(1, 60)]
        (tmp_path / "m.model").write_text("\n".join(["minbpe v1", "", "0", "97 97", *doubling]), encoding="utf-8")
        with pytest.raises(UserError, match=r"m\.model: its tokens are more than 33,554,432 bytes long"):
            find_tokenizer(tmp_path / "m.model", model(tmp_path))

    def test_a_pattern_that_backtracks_is_refused(self, byte_merges: ByteMerges, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"m\.model: cannot be used: encoding"):
            find_tokenizer(save_minbpe(tmp_path / "m.model", byte_merges, "(a+)+$"), model(tmp_path))


def save_ranks(path: Path, tokens: dict[int, bytes]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + f" {number}\n".encode() for number, token in tokens.items()))
    return path


class TestTiktoken:
    @pytest.mark.parametrize("name", ["mine.tiktoken", "mine.bpe", "tokenizer.model"])
    def test_ranks_give_tiktoken_s_tokens(self, name: str, byte_merges: ByteMerges, tmp_path: Path) -> None:
        ranks = {token: number for number, token in byte_merges.tokens.items()}

        def encode(piece: str) -> list[int]:
            """By the definition: the neighbours that make the lowest rank are merged, whatever they are."""
            parts = [bytes([byte]) for byte in piece.encode()]
            while made := [first + second for first, second in pairwise(parts)]:
                best = min(made, key=lambda token: ranks.get(token, len(ranks)))
                if best not in ranks:
                    break
                place = made.index(best)
                parts[place : place + 2] = [best]
            return [ranks[part] for part in parts]

        found = find_tokenizer(save_ranks(tmp_path / name, byte_merges.tokens), model(tmp_path))
        for word in ("question", " outrageous", "nobler", " HelloWorld", "漢字"):
            assert found.tokenizer(word).input_ids == encode(word)
        for text in TEXTS:
            assert found.tokenizer.decode(found.tokenizer(text).input_ids) == text
        assert any("does not tell how a text is split: it is split as for GPT-4" in note for note in found.notes)

    def test_long_numbers_tell_gpt_2_s_pattern(self, byte_merges: ByteMerges, tmp_path: Path) -> None:
        found = find_tokenizer(save_ranks(tmp_path / "m.bpe", byte_merges.tokens | {400: b"2024"}), model(tmp_path))
        assert any("as for GPT-2" in note for note in found.notes)

    def test_gpt_2_s_own_ranks_have_its_special_token(self, tmp_path: Path) -> None:
        tokens = {number: bytes([number]) for number in range(256)}
        tokens |= {number: b"x" + number.to_bytes(2) for number in range(256, 50256)}
        how = ModelInfo(tmp_path / "ckpt.pt", 50257, 64)
        found = find_tokenizer(save_ranks(tmp_path / "r50k_base.tiktoken", tokens), how)
        assert found.tokenizer("a<|endoftext|>").input_ids == [97, 50256]
        assert any("r50k_base" in note for note in found.notes)

    @pytest.mark.parametrize("content", ["YQ== 0\n", "YQ== 0\nYQ\n", "YQ== 0\nYg== x\n"])
    def test_damaged_ranks_are_refused(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "m.tiktoken").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"m\.tiktoken: is a damaged file of tiktoken"):
            find_tokenizer(tmp_path / "m.tiktoken", model(tmp_path))

    @pytest.mark.parametrize("lengths", [[10**6], range(2, 1000)], ids=["one long token", "many ways to split"])
    def test_tokens_that_take_long_to_split_are_refused(self, lengths: Iterable[int], tmp_path: Path) -> None:
        tokens = [*(bytes([byte]) for byte in range(256)), *(b"a" * length for length in lengths)]
        path = save_ranks(tmp_path / "m.tiktoken", dict(enumerate(tokens)))
        with pytest.raises(UserError, match=r"m\.tiktoken: its tokens are too long"):
            find_tokenizer(path, model(tmp_path))

    def test_a_pickled_encoding_is_not_opened_and_the_way_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoding = type("Encoding", (), {"__module__": "tiktoken.core"})
        for name in ("tiktoken", "tiktoken.core"):
            module = type(sys)(name)
            module.Encoding = encoding  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)
        (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding()))
        with pytest.raises(UserError, match=r"a pickled encoding of tiktoken.* not opened.*convert_tiktoken_to_fast"):
            find_tokenizer(tmp_path / "tokenizer.pkl", model(tmp_path))


# --- SentencePiece


class TestSentencePiece:
    @pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
    @pytest.mark.parametrize(
        "how",
        [
            {},
            {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
            {"add_dummy_prefix": False},
        ],
        ids=["default", "as Llama's", "no prefix"],
    )
    def test_ids_and_texts_are_sentencepiece_s(self, kind: str, how: dict, tmp_path: Path) -> None:
        sentencepiece = pytest.importorskip("sentencepiece")
        (tmp_path / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "corpus.txt"),
            model_prefix=str(tmp_path / "tokenizer"),
            model_type=kind,
            **{"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2},
            **how,
        )
        reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        found = find_tokenizer(tmp_path / "tokenizer.model", model(tmp_path))
        save_tokenizer(found.tokenizer, tmp_path / "hf")
        for tokenizer in (found.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "hf")):
            for text in (*CORPUS[:4], "", "   ", "  leading and trailing  ", "ﬁne"):
                ids = reference.encode(text)
                assert tokenizer(text).input_ids == ids
                if reference.unk_id() not in ids:
                    assert tokenizer.decode(ids) == reference.decode(ids)
        assert found.tokenizer.eos_token == "</s>"

    def test_missing_packages_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def requires(*_: object) -> None:
            raise ImportError("SentencePieceExtractor requires the SentencePiece library")

        # A function of transformers hides the module of the same name.
        monkeypatch.setattr(sys.modules["transformers.convert_slow_tokenizer"], "requires_backends", requires)
        (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
        with pytest.raises(UserError, match=r"tokenizer\.model: .*pip install sentencepiece protobuf"):
            find_tokenizer(tmp_path / "tokenizer.model", model(tmp_path))

    def test_another_file_of_this_name_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("sentencepiece")
        (tmp_path / "tokenizer.model").write_bytes(b"not a model")
        with pytest.raises(UserError, match=r"tokenizer\.model: is not a model of SentencePiece"):
            find_tokenizer(tmp_path / "tokenizer.model", model(tmp_path))
