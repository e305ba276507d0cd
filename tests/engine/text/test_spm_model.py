"""The hand-written ModelProto against sentencepiece."""

from __future__ import annotations

from sentencepiece import SentencePieceProcessor

from millrace.engine.text.spm_model import Piece, PieceType, spm_model, without_dummy_prefix

PIECES = [
    Piece("<unk>", 0.0, PieceType.UNKNOWN),
    Piece("<s>", 0.0, PieceType.CONTROL),
    Piece("ab", -1.5, PieceType.NORMAL),
    Piece("a", -3.0, PieceType.NORMAL),
    Piece("b" * 300, -4.0, PieceType.NORMAL),  # its length takes two bytes
    Piece("<x>", 0.0, PieceType.USER_DEFINED),
    Piece("▁", -5.0, PieceType.NORMAL),
    Piece("old", 0.0, PieceType.UNUSED),
]
BYTES = [Piece(f"<0x{byte:02X}>", 0.0, PieceType.BYTE) for byte in range(256)]


def load(pieces: list[Piece], unk_id: int = 0, prefix: bool = True) -> SentencePieceProcessor:
    model = spm_model(pieces, unk_id, add_dummy_prefix=prefix, remove_extra_whitespaces=False)
    return SentencePieceProcessor(model_proto=model)


def test_pieces_keep_spelling_score_and_type() -> None:
    model = load([*PIECES, *BYTES])
    ids = list(range(model.vocab_size()))
    assert [(model.IdToPiece(i), model.GetScore(i)) for i in ids] == [p[:2] for p in PIECES + BYTES]
    for test, kind in (
        (model.IsControl, PieceType.CONTROL),
        (model.IsUnknown, PieceType.UNKNOWN),
        (model.IsUnused, PieceType.UNUSED),
        (model.IsByte, PieceType.BYTE),
    ):
        assert [test(i) for i in ids] == [p.type is kind for p in PIECES + BYTES]


def test_encoding_uses_merges_bytes_and_user_defined_pieces() -> None:
    model = load([*PIECES, *BYTES])
    assert model.EncodeAsPieces("ab<x>é") == ["▁", "ab", "<x>", "<0xC3>", "<0xA9>"]
    assert load(PIECES).EncodeAsIds("é") == [6, 0], "without byte pieces: unknown"


def test_unknown_piece_may_have_any_id() -> None:
    model = load([*PIECES[1:], PIECES[0]], unk_id=len(PIECES) - 1)
    assert model.unk_id() == len(PIECES) - 1


def test_dummy_prefix_can_be_taken_out() -> None:
    model = spm_model(PIECES, 0, add_dummy_prefix=True, remove_extra_whitespaces=False)
    rest = SentencePieceProcessor(model_proto=without_dummy_prefix(model))
    assert rest.EncodeAsPieces("ab  a") == ["ab", "▁", "▁", "a"]
    assert load(PIECES, prefix=False).EncodeAsPieces("ab") == ["ab"]
