"""The tokens of a model, held where the file has them: 262,144 tokens take 2 MB where a list and a dict take 40."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from chandra.backends.cpu import _cpu
from chandra.checkpoint import StringArray


def utf8(text: str | bytes) -> bytes:
    """UTF-8, with surrogate escapes turned back into the bytes they stand for."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def indexed(strings: Iterable[str | bytes]) -> _cpu.Strings:
    """The strings as UTF-8, found by position and by their bytes; of equal ones the first."""
    if isinstance(strings, StringArray):
        return _cpu.Strings(strings.data, len(strings))
    pieces = list(map(utf8, strings))
    return _cpu.Strings(b"".join(len(piece).to_bytes(8, "little") + piece for piece in pieces), len(pieces))


class Vocabulary:
    """Token texts by id and ids by text. Bytes that are not UTF-8 are carried as surrogate escapes."""

    def __init__(self, tokens: Iterable[str | bytes]) -> None:
        self._tokens = indexed(tokens)
        self.holding = self._tokens.holding

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, id: int) -> str:
        return self._tokens[id].decode("utf-8", "surrogateescape")

    def find(self, text: str) -> int | None:
        return self._tokens.find(utf8(text))


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
