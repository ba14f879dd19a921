"""How byte-level BPE models cut text into words before merging: GGUF's `tokenizer.ggml.pre` kinds.

The patterns are those of the models' own tokenizer.json files; each cuts what the one before it left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from chandra.errors import UnsupportedError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import Sequence

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_LETTERS = (  # upper and lower case letters, as DeepSeek's own file lists them
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-"
    "\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-"
    "\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc"
    "\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
    "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)


def _words(digits: str, letters: str = r"\p{L}", slash: str = "") -> str:
    """Llama 3's pattern and its relatives: `digits` at a time, `letters` with one character before them."""
    others = r"\p{L}\p{N}" if letters == r"\p{L}" else r"\p{L}\p{M}\p{N}"
    word = letters if letters == r"\p{L}" else f"[{letters}]"
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{word}+|{digits}| ?[^\s{others}]+[\r\n{slash}]*|{_SPACES}"


def _cased(digits: str, contractions: str) -> str:
    """GPT-4o's pattern: a word also ends where lower case turns upper."""
    head = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{head}{_UPPER}*{_LOWER}+{contractions}|{head}{_UPPER}+{_LOWER}*{contractions}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_LLAMA3_KINDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_LLAMA3 = (_words(r"\p{N}{1,3}"),)
_QWEN2 = (_words(r"\p{N}"),)
_DIGITS_GPT2 = (r"\p{N}", _GPT2)
_GPT4O = (_cased(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),)
_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_NOT_BLOOM_BREAKS = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"

_BY_KIND: dict[tuple[str, ...], tuple[str, ...]] = {
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "a.x-4.0"): (
        _GPT2,
    ),
    ("mellum",): (_GPT2,),
    _LLAMA3_KINDS: _LLAMA3,
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): _LLAMA3,
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2", "kormo"): _QWEN2,
    ("qwen35",): (_words(r"\p{N}", r"\p{L}\p{M}"),),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"): _DIGITS_GPT2,
    ("falcon",): (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    ("deepseek-llm",): (r"[\r\n]", rf"\s?[{_LETTERS}]+", rf"\s?[{_PUNCTUATION}]+", r"\s+$", _CJK, r"\p{N}+"),
    ("deepseek-coder",): (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): _DEEPSEEK3,
    ("tekken",): (_cased(r"\p{N}", ""),),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): _GPT4O,
    ("poro-chat", "bloom", "gpt3-finnish"): (_NOT_BLOOM_BREAKS,),
    ("viking",): (_NOT_BLOOM_BREAKS, r"\p{N}"),
    ("superbpe",): (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    ("gemma4",): (r"[^\n]+|[\n]+",),
}
_PATTERNS = {kind: patterns for kinds, patterns in _BY_KIND.items() for kind in kinds}

IGNORE_MERGES = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
)
ADD_BOS = IGNORE_MERGES | {"gemma4"}


def splitter(kind: str) -> Callable[[str], list[str]]:
    """The function that cuts text into words for a `tokenizer.ggml.pre` kind; UnsupportedError for an unknown one."""
    if kind not in _PATTERNS:
        raise UnsupportedError(
            f"unknown pre-tokenizer {kind!r}", "Use a newer Chandra, or a GGUF file of a model it knows."
        )

    @cache
    def steps() -> Sequence:
        from tokenizers import Regex  # here: these 4 MB are needed for text only
        from tokenizers.pre_tokenizers import Sequence, Split

        return Sequence([Split(Regex(pattern), "isolated") for pattern in _PATTERNS[kind]])

    return lambda text: [word for word, _ in steps().pre_tokenize_str(text)]
