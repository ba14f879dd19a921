"""The tokens of a model, held in a few flat arrays: 262,144 tokens take 6 MB where a list and a dict take 40."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np


def utf8(text: str | bytes) -> bytes:
    """UTF-8, with surrogate escapes turned back into the bytes they stand for."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


class StringIndex:
    """Positions of strings (as UTF-8), found by hash alone: 12 bytes a string, whatever its length.

    A string that is not there is taken for another with probability n / 2**64. Of equal strings the first counts.
    (Python's hash of str, unlike that of bytes, is the same for "eg" and "来": it depends on the character width.)
    """

    def __init__(self, strings: Iterable[bytes]) -> None:
        hashes = np.fromiter(map(hash, strings), np.int64)
        order = np.argsort(hashes, kind="stable").astype(np.int32)
        self._hashes = array("q", hashes[order].tobytes())  # plain arrays: bisect reads them faster than numpy's
        self._positions = array("i", order.tobytes())

    def find(self, string: bytes) -> int | None:
        wanted = hash(string)
        at = bisect_left(self._hashes, wanted)
        if at < len(self._hashes) and self._hashes[at] == wanted:
            return self._positions[at]
        return None


class Vocabulary:
    """Token texts by id and ids by text. Bytes that are not UTF-8 are carried as surrogate escapes."""

    def __init__(self, tokens: Iterable[str | bytes]) -> None:
        self._text = bytearray()
        self._ends = array("I", [0])
        self._index = StringIndex(self._take(tokens))

    def _take(self, tokens: Iterable[str | bytes]) -> Iterator[bytes]:
        for token in map(utf8, tokens):
            self._text += token
            self._ends.append(len(self._text))
            yield token

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, id: int) -> str:
        return self.raw(id).decode("utf-8", "surrogateescape")

    def raw(self, id: int) -> bytes:
        return bytes(self._text[self._ends[id] : self._ends[id + 1]])

    def find(self, text: str) -> int | None:
        wanted = utf8(text)
        id = self._index.find(wanted)
        return id if id is not None and self.raw(id) == wanted else None


class WrittenTokens:
    """Tokens that are looked for in text as they are written, before any encoding. There may be thousands."""

    def __init__(self, tokens: Iterable[tuple[str, int]]) -> None:
        self._by_start: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
        for token, id in tokens:
            self._by_start[token[:4]].append((token, id))

    def within(self, text: str) -> list[tuple[str, int]]:
        """Those that occur in the text."""
        near = (tokens for start, tokens in self._by_start.items() if start in text)
        return [(token, id) for tokens in near for token, id in tokens if token in text]
