"""Byte-pair encoding of one stretch of text, as GPT-2 and as SentencePiece do it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from chandra.errors import TokenizerError
from chandra.text.vocabulary import Vocabulary, indexed, utf8

SPACE = "▁"  # how SentencePiece writes a space
_SPACE = utf8(SPACE)
CACHED_WORDS = 4096
CACHED_LENGTH = 64

Rank = Callable[[str, str], float | None]


class Encoder(Protocol):
    """Turns text without special tokens into ids. `first`: a model that puts a space in front of its text does so."""

    def encode(self, text: str, first: bool) -> Iterable[int]: ...


def byte_alphabet() -> dict[int, int]:
    """The printable character that stands for each byte in GPT-2 vocabularies (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}


def normalizer(charsmap: bytes, squeeze: bool) -> Callable[[str], str] | None:
    """SentencePiece's normalization of a whole text: the model's character map, and runs of spaces made one."""
    if not charsmap and not squeeze:
        return None
    from tokenizers.normalizers import Precompiled  # here: most models have no map and do without the library

    mapped = Precompiled(charsmap).normalize_str if charsmap else str
    return (lambda text: " ".join(filter(None, mapped(text).split(" ")))) if squeeze else mapped


def spaced(text: str, add_space: bool) -> str:
    """The text with its spaces as SentencePiece writes them, and one more in front if asked for."""
    return (" " + text if add_space else text).replace(" ", SPACE)


def spelled(text: str, vocab: Vocabulary, unk_id: int | None) -> list[int]:
    """The byte tokens ("<0x41>") of a text that has no token, or the unknown token when one of them is missing."""
    ids = [vocab.find(f"<0x{byte:02X}>") for byte in text.encode("utf-8", "replace")]
    known = [id for id in ids if id is not None]
    return known if len(known) == len(ids) else [] if unk_id is None else [unk_id]


def merge(symbols: list[str], rank: Rank) -> list[str]:
    """Join neighbours, lowest rank first and leftmost among equals, until no pair has a rank. O(n log n)."""
    count = len(symbols)
    if count < 2:
        return symbols
    before, after = list(range(-1, count - 1)), list(range(1, count + 1))
    queue: list[tuple[float, int, int, str]] = []  # rank, left, right, the joined text

    def consider(left: int, right: int) -> None:
        if left >= 0 and right < count and (found := rank(symbols[left], symbols[right])) is not None:
            heappush(queue, (found, left, right, symbols[left] + symbols[right]))

    for left in range(count - 1):
        if (found := rank(symbols[left], symbols[left + 1])) is not None:
            queue.append((found, left, left + 1, symbols[left] + symbols[left + 1]))
    heapify(queue)
    while queue:
        _, left, right, joined = heappop(queue)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != joined:
            continue  # one of the two has been joined to another since
        symbols[left], symbols[right] = joined, ""
        after[left] = after[right]
        if after[left] < count:
            before[after[left]] = left
        consider(before[left], left)
        consider(left, after[left])
    return [symbol for symbol in symbols if symbol]


class _WordEncoder:
    """What the two kinds share: a vocabulary, and the ids of short words remembered."""

    def __init__(self, vocab: Vocabulary) -> None:
        self.vocab = vocab
        self._remember = lru_cache(CACHED_WORDS)(self._encode_word)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        raise NotImplementedError

    def encode_words(self, words: Iterable[str]) -> Iterable[int]:
        for word in words:
            yield from self._remember(word) if len(word) <= CACHED_LENGTH else self._encode_word(word)


class MergeListEncoder(_WordEncoder):
    """BPE by a list of merges ("left right"), over GPT-2's byte alphabet or, if `byte_level` is false, characters.

    `split` cuts text into words; no merge crosses them. `ignore_merges`: a word that is a token is left whole.
    """

    def __init__(
        self,
        vocab: Vocabulary,
        merges: Sequence[str],
        split: Callable[[str], Iterable[str]],
        byte_level: bool,
        ignore_merges: bool,
    ) -> None:
        super().__init__(vocab)
        if len(merges) == 0:
            raise TokenizerError("the tokenizer has no merges", "Fetch the model again, or take another file of it.")
        self._merges = indexed(merges)
        self._split = split
        self._alphabet = byte_alphabet() if byte_level else None
        self._ignore_merges = ignore_merges

    def encode(self, text: str, first: bool) -> Iterable[int]:  # noqa: ARG002 - no space is ever added
        return self.encode_words(self._split(text if self._alphabet else text.replace(" ", SPACE)))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if self._alphabet:
            word = word.encode("utf-8", "replace").decode("latin-1").translate(self._alphabet)
        if (self._ignore_merges or not word.strip("\n")) and (whole := self.vocab.find(word)) is not None:
            return (whole,)
        ids: list[int] = []
        for symbol in merge(list(word), lambda left, right: self._merges.find(utf8(f"{left} {right}"))):
            if (id := self.vocab.find(symbol)) is not None:
                ids.append(id)
            else:
                units = symbol if self._alphabet else (f"<0x{byte:02X}>" for byte in symbol.encode("utf-8", "replace"))
                ids += (id for unit in units if (id := self.vocab.find(unit)) is not None)
        return tuple(ids)


class ScoreEncoder(_WordEncoder):
    """SentencePiece's BPE: the pair whose joined token has the highest score comes first.

    A character without a token becomes its UTF-8 bytes' tokens, or `unk_id`. Only tokens in `mergeable` (bool [vocab])
    are formed from text: control and byte tokens are not, as in SentencePiece. (Kudo and Richardson 2018)
    """

    def __init__(
        self,
        vocab: Vocabulary,
        scores: NDArray[np.float32],
        mergeable: NDArray[np.bool_],
        unk_id: int | None,
        add_space: bool,
    ) -> None:
        super().__init__(vocab)
        self._scores, self._mergeable = scores, mergeable
        self._unk_id, self._add_space = unk_id, add_space
        # A space opens a word wherever no token holds it after that character: no merge can cross there.
        inner = [vocab[id] for id in vocab.holding(_SPACE) if mergeable[id]]
        bridges = {SPACE, *(before for token in inner for before, after in pairwise(token) if after == SPACE)}
        self._border = re.compile(f"(?<![{re.escape(''.join(sorted(bridges)))}])(?={SPACE})")

    def encode(self, text: str, first: bool) -> Iterable[int]:
        return self.encode_words(filter(None, self._border.split(spaced(text, first and self._add_space))))

    def _find(self, text: str) -> int | None:
        id = self.vocab.find(text)
        return id if id is not None and self._mergeable[id] else None

    def _rank(self, left: str, right: str) -> float | None:
        id = self._find(left + right)
        return None if id is None else -float(self._scores[id])

    def _encode_word(self, word: str) -> tuple[int, ...]:
        ids: list[int] = []
        for symbol in merge(list(word), self._rank):
            if (id := self._find(symbol)) is not None:
                ids.append(id)
            else:
                unknown = spelled(symbol, self.vocab, self._unk_id)
                ids += unknown if unknown != ids[-1:] or unknown != [self._unk_id] else []  # one for a run of them
        return tuple(ids)
