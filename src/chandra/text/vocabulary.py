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
    """Strings as UTF-8 in one text: string i ends where i + 1 `starts` (uint32 [n + 1]), and begins `gap` bytes after
    its start."""

    text: memoryview
    starts: NDArray[np.uint32]
    gap: int

    @classmethod
    def of(cls, strings: Iterable[str | bytes]) -> Strings:
        if isinstance(strings, StringArray):
            text, starts = strings.raw()
            return cls(text, starts, 8)
        pieces = list(map(utf8, strings))
        starts = np.cumsum([0, *map(len, pieces)]).astype(np.uint32)
        return cls(memoryview(b"".join(pieces)), starts, 0)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> bytes:
        return bytes(self.text[int(self.starts[index]) + self.gap : self.starts[index + 1]])

    def __iter__(self) -> Iterator[bytes]:
        text = bytes(self.text)

        def some(start: int) -> Iterator[bytes]:  # not all at once: each would take a hundred bytes meanwhile
            starts = self.starts[start : start + 4097].astype(np.int64)
            return map(text.__getitem__, map(slice, (starts[:-1] + self.gap).tolist(), starts[1:].tolist()))

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
        return self._tokens[id]

    def holding(self, part: bytes) -> list[int]:
        """The tokens that hold a part behind their first byte."""
        tokens = self._tokens
        text, places = np.frombuffer(tokens.text, np.uint8), max(0, len(tokens.text) - len(part) + 1)
        found = np.flatnonzero(np.all([text[i : i + places] == byte for i, byte in enumerate(part)], axis=0))
        ids = np.searchsorted(tokens.starts, found, "right") - 1
        begins, ends = tokens.starts[ids].astype(np.int64) + tokens.gap, tokens.starts[ids + 1]
        inside = (found > begins) & (found + len(part) <= ends)
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
