"""Writing a streamed answer to the terminal."""

from __future__ import annotations

import shutil
from typing import TextIO


class AnswerWriter:
    """Writes text as it arrives; on a terminal, breaks lines between words instead of inside them."""

    def __init__(self, stream: TextIO, wrap: bool) -> None:
        self.stream = stream
        self.width = shutil.get_terminal_size().columns if wrap and stream.isatty() else 0
        self.column = 0
        self.word = ""

    def write(self, text: str) -> None:
        if not self.width:
            self.stream.write(text)
            self.stream.flush()
            return
        for char in text:
            if char == "\n":
                self._put_word()
                self.stream.write("\n")
                self.column = 0
            elif char == " ":
                self._put_word()
                if self.column < self.width:
                    self.stream.write(" ")
                    self.column += 1
            else:
                self.word += char
                if len(self.word) >= self.width:  # longer than a line: nothing is gained by holding it back
                    self._put_word()
        self.stream.flush()

    def finish(self) -> None:
        self._put_word()
        self.stream.flush()

    def _put_word(self) -> None:
        if self.column and self.column + len(self.word) > self.width:
            self.stream.write("\n")
            self.column = 0
        self.stream.write(self.word)
        self.column += len(self.word)
        self.word = ""
