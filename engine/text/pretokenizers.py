"""How byte-level BPE vocabularies cut text into words before merging, by GGUF's name for it.

A GGUF has no tokenizer.json, only `tokenizer.ggml.pre`. The patterns are those of the models' own
tokenizer.json files; which name means which is in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from millrace.engine.errors import UnsupportedModel

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

LLAMA3 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
QWEN2 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One family of byte-level BPE vocabularies."""

    pattern: str | None = None  # None: GPT-2's, which `ByteLevel` has built in
    splits_digits: bool = False  # every digit is a word of its own
    nfc: bool = False  # text is brought into Unicode's form C first
    whole_words: bool = False  # a word in the vocabulary is one token, whatever the merges say
    add_bos: bool = False  # unless the file says otherwise

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None

    def splitter(self) -> pre_tokenizers.PreTokenizer:
        """Words in GPT-2's byte alphabet."""
        byte_level = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=self.pattern is None
        )
        steps: list[pre_tokenizers.PreTokenizer] = [byte_level]
        if self.pattern is not None:
            steps.insert(0, pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        if self.splits_digits:
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        return pre_tokenizers.Sequence(steps)


_GPT2 = PreTokenizer()
_SMOLLM = PreTokenizer(splits_digits=True)
_LLAMA3 = PreTokenizer(LLAMA3, whole_words=True, add_bos=True)
_LLAMA3_MERGED = PreTokenizer(LLAMA3)
_QWEN2 = PreTokenizer(QWEN2, nfc=True)
_GPT4O = PreTokenizer(GPT4O)

PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "codeshell": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "lfm2": _LLAMA3,
    "dbrx": _LLAMA3_MERGED,
    "smaug-bpe": _LLAMA3_MERGED,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": PreTokenizer(QWEN2),
    "tekken": PreTokenizer(TEKKEN, whole_words=True, add_bos=True),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
}


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """Raises UnsupportedModel, listing what there is, for a name that is not in the table."""
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        known = ", ".join(PRE_TOKENIZERS)
        message = f"tokenizer.ggml.pre: unknown pre-tokenizer {name!r}; supported: {known}"
        raise UnsupportedModel(message) from None
