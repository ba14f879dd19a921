"""Text out of a stream of ids: whole characters only, and stop strings found across token borders."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from chandra.errors import RequestError
from chandra.text.tokenizer import Tokenizer


class StreamDetokenizer:
    """The text of ids that arrive one by one. All pushes and `finish` together equal `Tokenizer.decode` of all ids.

    `continues`: the ids continue a text (a plain completion), so a leading space stays.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, *, continues: bool = False) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.space_prefix and not continues

    def push(self, id: int) -> str:
        """The characters that `id` completes, often one word, sometimes none."""
        if self._skip_special and self._tokenizer.is_special(id):
            return ""
        data = self._tokenizer.token_bytes(id)
        if data and self._drop_space:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What was held back: a character that never became whole, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Cuts a stream of text at the first stop string to be completed (of two that end together, the longer one).

    `matched` is that string. RequestError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise RequestError("a stop string is empty", "Leave it out, or give at least one character.")
        self.matched: str | None = None
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can go out now, and whether a stop string has been completed. Only what may still become a
        stop string is held back; nothing follows a stop."""
        if self.matched is not None:
            return "", True
        self._held += text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            _, at, self.matched = min(ends)
            text, self._held = self._held[:at], ""
            return text, True
        keep = next((n for n in range(self._longest - 1, 0, -1) if self._may_begin(n)), 0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False

    def _may_begin(self, length: int) -> bool:
        tail = self._held[-length:]
        return len(tail) == length and any(len(stop) > length and stop.startswith(tail) for stop in self._stops)

    def finish(self) -> str:
        """The text held back, once it is known that no more will come."""
        text, self._held = self._held, ""
        return text
