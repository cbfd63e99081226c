"""SentencePiece's `.model`, read by transformers' own converter, as the JSON of a `tokenizers` tokenizer."""

import base64
from pathlib import Path
from typing import Any

from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges

from hf_model.errors import UserError, one_line
from hf_model.reading import read_bytes
from hf_model.tokenizer.ranks import check_splits

MAX_BYTES = 2**26
SPACE = "▁"  # SentencePiece writes this character for a space
UNIGRAM, BPE, CHARACTERS = 1, 2, 4  # trainer_spec.model_type; the other one is of whole words
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # a piece's type


def sentence_pieces_json(path: Path) -> tuple[dict[str, Any], str | None, tuple[str, ...]]:
    """The JSON of a `.model` file, the piece that ends a text, and notes on what differs from SentencePiece.

    Raises:
        UserError: a package is missing, the file cannot be read or is damaged, or it splits texts in a way that the
            `tokenizers` library cannot.
    """
    read_bytes(path, MAX_BYTES)
    try:
        proto = SentencePieceExtractor(str(path)).proto
    except ImportError:
        raise UserError(
            f"{path}: is a model of SentencePiece, which needs two packages: pip install sentencepiece protobuf"
        ) from None
    except Exception as error:  # of protobuf, a class that may be missing
        raise UserError(f"{path}: is not a model of SentencePiece ({one_line(error, 150)})") from None
    trained = proto.trainer_spec
    if not proto.pieces:
        raise UserError(f"{path}: is not a model of SentencePiece (it has no pieces)")
    if trained.model_type not in (UNIGRAM, BPE, CHARACTERS) or trained.treat_whitespace_as_suffix:
        raise UserError(
            f"{path}: is a SentencePiece of whole words or with spaces at their ends, which the `tokenizers` library "
            "does not have"
        )
    if trained.model_type == BPE:
        check_splits((piece.piece for piece in proto.pieces), path)
    # In Unigram a piece of the user's own is one among others, with the best score. In BPE no merges lead to it, so the
    # library has to find it first, in the normalized text.
    is_unigram = trained.model_type == UNIGRAM
    added = [
        {
            **{"id": number, "content": piece.piece, "special": piece.type == CONTROL},
            **{"single_word": False, "lstrip": False, "rstrip": False, "normalized": piece.type != CONTROL},
        }
        for number, piece in enumerate(proto.pieces)
        if piece.type == CONTROL or (piece.type == USER_DEFINED and not is_unigram)
    ]
    # A prefix by the normalizer is the exact one, but would become part of the user's own pieces.
    prepends = proto.normalizer_spec.add_dummy_prefix
    by_normalizer = prepends and not any(token["normalized"] for token in added)
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto.normalizer_spec, by_normalizer)},
        "pre_tokenizer": metaspace if prepends and not by_normalizer else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _decoders(trained.byte_fallback, prepends)},
        "model": _unigram(proto) if is_unigram else _bpe(proto),
    }
    notes = []
    if prepends and not by_normalizer:
        own = next(token["content"] for token in added if token["normalized"])
        notes.append(
            f"a text that begins with a space or with a user-defined piece ({own}) may give other tokens than "
            "SentencePiece gives"
        )
    return content, trained.eos_piece if trained.eos_id >= 0 else None, tuple(notes)


def _normalizers(spec: Any, prepends: bool) -> list[dict[str, Any]]:
    """The steps that SentencePiece takes with a text, in its order."""
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if prepends:
        steps.append({"type": "Prepend", "prepend": " "})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def _decoders(byte_fallback: bool, prepends: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    if byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    return [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepends else steps


def _unigram(proto: Any) -> dict[str, Any]:
    best = max((piece.score for piece in proto.pieces if piece.type == NORMAL), default=0.0)
    # SentencePiece's own rule for the user's pieces.
    scores = [len(piece.piece) * best - 0.1 if piece.type == USER_DEFINED else piece.score for piece in proto.pieces]
    return {
        "type": "Unigram",
        "unk_id": proto.trainer_spec.unk_id,
        "vocab": [[piece.piece, score] for piece, score in zip(proto.pieces, scores, strict=True)],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _bpe(proto: Any) -> dict[str, Any]:
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    others = {piece.piece for piece in proto.pieces if piece.type != NORMAL}
    is_bpe = proto.trainer_spec.model_type == BPE
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": proto.trainer_spec.unk_piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [list(pair) for pair in generate_merges(vocabulary, None, others)] if is_bpe else [],
    }
