"""The tokens of a model, held in a few flat arrays: 262,144 tokens take 6 MB where a list and a dict take 40."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from chandra.checkpoint import StringArray


def utf8(text: str | bytes) -> bytes:
    """UTF-8, with surrogate escapes turned back into the bytes they stand for."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Strings:
    """Strings as UTF-8 in one text. `begins`, `ends`: uint32 [n]."""

    text: bytes
    begins: NDArray[np.uint32]
    ends: NDArray[np.uint32]

    @classmethod
    def of(cls, strings: Iterable[str | bytes]) -> Strings:
        if isinstance(strings, StringArray):
            text, begins, ends = strings.raw()
        else:
            pieces = list(map(utf8, strings))
            ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
            text, begins = b"".join(pieces), np.append(0, ends)[:-1]
        return cls(text, begins.astype(np.uint32), ends.astype(np.uint32))

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[bytes]:
        def some(start: int) -> Iterator[bytes]:  # not all at once: a hundred bytes each while they last
            stop = start + 4096
            slices = map(slice, self.begins[start:stop].tolist(), self.ends[start:stop].tolist())
            return map(self.text.__getitem__, slices)

        return chain.from_iterable(map(some, range(0, len(self), 4096)))


class StringIndex:
    """Positions of strings (as UTF-8), found by hash alone: 12 bytes a string, whatever its length.

    A string that is not there is taken for another with probability n / 2**64. Of equal strings the first counts.
    (Python's hash of str, unlike that of bytes, is the same for "eg" and "来": it depends on the character width.)
    """

    def __init__(self, strings: Strings) -> None:
        hashes = np.fromiter(map(hash, strings), np.int64, len(strings))
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
        self._tokens = Strings.of(tokens)
        self._index = StringIndex(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, id: int) -> str:
        return self.raw(id).decode("utf-8", "surrogateescape")

    def raw(self, id: int) -> bytes:
        return self._tokens.text[self._tokens.begins[id] : self._tokens.ends[id]]

    def holding(self, part: bytes) -> list[int]:
        """The tokens that hold a part behind their first byte."""
        tokens = self._tokens
        text, places = np.frombuffer(tokens.text, np.uint8), max(0, len(tokens.text) - len(part) + 1)
        found = np.flatnonzero(np.all([text[i : i + places] == byte for i, byte in enumerate(part)], axis=0))
        ids = np.searchsorted(tokens.begins, found, "right") - 1
        inside = (found > tokens.begins[ids]) & (found + len(part) <= tokens.ends[ids])
        return [int(id) for id in np.unique(ids[inside])]

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
