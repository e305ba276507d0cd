# ruff: noqa: RUF001 - look-alike characters are the point here
"""Texts and vocabularies that the tests of engine/text share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import transformers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from millrace.engine.text.spm_model import PieceType
from millrace.engine.weights.locate import ModelLocation, resolve

SPM_MODELS = ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3")
TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  two leading, two trailing  ",
    "\n\n\tindented\r\n    code = {'a': [1, 2]}  # comment\n",
    "a" + " " * 37 + "b" + "\n" * 9 + "\t\t c",
    "3.14159 1234567 ٣٤٥ ²½ Ⅷ  77\n 8",
    "I'm, you'LL, they've: don't!?… — «quoted» “curly”",
    "日本語のテキスト。中文没有空格 한국어 조선말",
    "Привет мир, γειά σου, שלום עולם, مرحبا بالعالم, हिन्दी में, ภาษาไทย",
    "café cafe\u0301 ﬁne ﬀ Å A\u030a \u1e9b\u0323",  # NFC and NFD, compatibility characters
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪 🏴󠁧󠁢󠁥󠁮󠁧󠁿 😀😀😀",
    "nul \x00 bell \x07 del \x7f c1 \x85\x9f bom \ufeff zwsp \u200b rlm \u200f nbsp \u00a0!",
    "▁literal ▁▁underline <0x0A> Ġalphabet Ċ",
    "<s> </s> <unk> <|im_start|> <|im_end|x>",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff \ufffd",
)


@pytest.fixture(params=TEXTS, ids=range(len(TEXTS)))
def text(request: pytest.FixtureRequest) -> str:
    """One text after another, each hard on some tokenizer."""
    return str(request.param)


@pytest.fixture(scope="session", params=SPM_MODELS)
def spm_file(request: pytest.FixtureRequest) -> Path:
    """A real sentencepiece model, with byte fallback and (in v3) user-defined pieces."""
    return Path(mistral_common.__file__).parent / "data" / str(request.param)


@pytest.fixture(scope="session")
def spm_reference(spm_file: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(spm_file))


@pytest.fixture(scope="session")
def spm_metadata(spm_reference: SentencePieceProcessor) -> dict[str, Any]:
    """The same vocabulary as a GGUF has it."""
    model, ids = spm_reference, range(spm_reference.vocab_size())

    def kind(token_id: int) -> PieceType:
        tests = {
            PieceType.BYTE: model.IsByte,
            PieceType.CONTROL: model.IsControl,
            PieceType.UNKNOWN: model.IsUnknown,
        }
        found = [name for name, test in tests.items() if test(token_id)]
        if found:
            return found[0]
        spelling = model.IdToPiece(token_id)
        user_defined = spelling.startswith("[REF") and spelling.endswith("]")
        return PieceType.USER_DEFINED if user_defined else PieceType.NORMAL

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.IdToPiece(i) for i in ids],
        "tokenizer.ggml.scores": [model.GetScore(i) for i in ids],
        "tokenizer.ggml.token_type": [int(kind(i)) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="session")
def trained() -> Callable[[], Tokenizer]:
    """Makes copies of a small byte-level BPE with control tokens <s>, </s> and a plain <tool>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    serialized = tokenizer.to_str()
    return lambda: Tokenizer.from_str(serialized)


@pytest.fixture(scope="session")
def bpe_metadata(trained: Callable[[], Tokenizer]) -> dict[str, Any]:
    """The same vocabulary as a GGUF has it."""
    model = json.loads(trained().to_str())["model"]
    ids = trained().get_vocab()
    tokens = sorted(ids, key=lambda token: ids[token])
    types = dict.fromkeys(tokens, PieceType.NORMAL) | {
        "<s>": PieceType.CONTROL,
        "</s>": PieceType.CONTROL,
        "<tool>": PieceType.USER_DEFINED,
    }
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(types[token]) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": ids["<s>"],
        "tokenizer.ggml.eos_token_id": ids["</s>"],
    }


@pytest.fixture(scope="session")
def builtin_location() -> ModelLocation:
    return resolve(None)


@pytest.fixture(scope="session")
def builtin_reference(builtin_location: ModelLocation) -> Any:
    """The built-in model's tokenizer in transformers."""
    path = builtin_location.path
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers 5.23 doesn't know "smollm" and splits as GPT-2 does. This is the pre-tokenizer in
    # the tokenizer.json of HuggingFaceTB/SmolLM2-135M-Instruct.
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return reference
