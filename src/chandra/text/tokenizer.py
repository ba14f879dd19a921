"""Text to token ids and back."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chandra.errors import TokenizerError
from chandra.text.bpe import SPACE, Encoder, byte_alphabet
from chandra.text.vocabulary import Vocabulary, WrittenTokens, utf8

if TYPE_CHECKING:
    from tokenizers import Tokenizer as JsonModel

# Token types of GGUF and of SentencePiece's model file alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
_WRITTEN = (UNKNOWN, CONTROL, USER_DEFINED)  # matched in text as they are written

END_TOKENS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <PAD> <REPO> <reponame>
    <|fim_pad|> <fim-pad> <fim_pad> <|fim_repo|> <|repo_name|> <fim-repo> <|file_sep|>""".split()  # noqa: SIM905
) | {"<\uff5cend▁of▁sentence\uff5c>"}  # DeepSeek's
MARK = "\ufdd0"  # a code point that Unicode leaves to programs
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTES = {char: byte for byte, char in byte_alphabet().items()}


def bytes_of(text: str, byte_level: bool) -> bytes:
    """The bytes an ordinary token stands for, written in GPT-2's byte alphabet or as SentencePiece writes it."""
    if byte_level:
        return b"".join(bytes([_BYTES[ord(c)]]) if ord(c) in _BYTES else c.encode("utf-8", "replace") for c in text)
    return utf8(text.replace(SPACE, " "))


@dataclass(frozen=True)
class SpecialTokens:
    """The ids with a role. `eos_ids`: every token that ends a generation."""

    bos_id: int | None = None
    eos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    add_bos: bool = False
    add_eos: bool = False


class Tokenizer(ABC):
    """What every kind of tokenizer offers. Safe to use from several threads.

    `space_prefix`: the text's form in tokens begins with a space that decoding drops again.
    """

    def __init__(
        self, special: SpecialTokens, control: WrittenTokens, chat_template: str | None, space_prefix: bool
    ) -> None:
        self.bos_id, self.eos_id, self.eos_ids = special.bos_id, special.eos_id, special.eos_ids
        self._opening = [special.bos_id] if special.add_bos and special.bos_id is not None else []
        self._closing = [special.eos_id] if special.add_eos and special.eos_id is not None else []
        self._control = control
        self.chat_template = chat_template
        self.space_prefix = space_prefix

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of `text`. `add_special`: with the model's BOS and EOS where it wants them. `parse_special`: control
        tokens written out in the text become those tokens, as a chat template needs; text from a user must not."""

    def encode_chat(self, prompt: str) -> list[int]:
        """Ids of a rendered chat template: its control tokens parsed, BOS in front if the model wants it and the
        template has not written it."""
        ids = self.encode(prompt, add_special=False, parse_special=True)
        return ids if ids[:1] == self._opening else self._opening + ids

    def quote(self, text: str) -> str:
        """The text with a mark inside each control token it spells out; `encode` drops the marks after it has looked
        for control tokens, so that a user's "<|im_start|>" stays text in a prompt whose own ones are parsed."""
        text = text.replace(MARK, "")
        for token, _ in self._control.within(text):
            text = text.replace(token, token[:1] + MARK + token[1:])
        return text

    @abstractmethod
    def token(self, id: int) -> str:
        """The token as the vocabulary writes it."""

    @abstractmethod
    def find(self, token: str) -> int | None:
        """The id of a token written as in the vocabulary."""

    @abstractmethod
    def is_special(self, id: int) -> bool:
        """Whether it is a control token, which is no part of the text."""

    @abstractmethod
    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes the token adds to the text; a control token gives its name, an id without a
        token (a padding row of the embedding) nothing. May end within a character."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. `continues`: it continues another text, so a
        leading space stays."""
        kept = (id for id in ids if not (skip_special and self.is_special(id)))
        data = b"".join(map(self.token_bytes, kept))
        return (data.removeprefix(b" ") if self.space_prefix and not continues else data).decode("utf-8", "replace")

    def check_rows(self, rows: int) -> None:
        """TokenizerError when the embedding has fewer rows than there are tokens (more is padding)."""
        if rows < self.vocab_size:
            raise TokenizerError(
                f"the tokenizer has {self.vocab_size} tokens, the embedding only {rows} rows",
                "The tokenizer belongs to another model; fetch the model again.",
            )


class PieceTokenizer(Tokenizer):
    """A tokenizer read from GGUF metadata or a SentencePiece model. `types`: int8 [vocab].

    `normalize` is applied to the whole text. `space_after_special`: text after a special token has a space put in
    front like the first one (llama.cpp does, SentencePiece does not). `strip_after_special`: spaces after a special
    token are dropped (Phi-3).
    """

    def __init__(
        self,
        vocab: Vocabulary,
        types: NDArray[np.int8],
        encoder: Encoder,
        special: SpecialTokens,
        *,
        chat_template: str | None = None,
        byte_level: bool = False,
        space_prefix: bool = False,
        normalize: Callable[[str], str] | None = None,
        space_after_special: bool = True,
        strip_after_special: bool = False,
    ) -> None:
        named = [
            (token, id, types[id]) for id in np.flatnonzero(np.isin(types, _WRITTEN)).tolist() if (token := vocab[id])
        ]
        control = WrittenTokens((token, id) for token, id, kind in named if kind != USER_DEFINED)
        super().__init__(special, control, chat_template, space_prefix)
        self._always = WrittenTokens((token, id) for token, id, kind in named if kind == USER_DEFINED)
        self._vocab, self._types, self._encoder = vocab, types, encoder
        self._byte_level, self._normalize = byte_level, normalize
        self._respace, self._strip = space_after_special, strip_after_special

    @property
    def vocab_size(self) -> int:
        return len(self._vocab)

    def token(self, id: int) -> str:
        return self._vocab[id] if 0 <= id < len(self._vocab) else ""

    def find(self, token: str) -> int | None:
        return self._vocab.find(token)

    def is_special(self, id: int) -> bool:
        return 0 <= id < len(self._vocab) and int(self._types[id]) in (CONTROL, UNKNOWN)

    def token_bytes(self, id: int) -> bytes:
        if not (text := self.token(id)):
            return b""
        kind = int(self._types[id])
        if kind == NORMAL:
            return bytes_of(text, self._byte_level)
        if kind == BYTE and (byte := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(byte[1], 16)])
        return utf8(text) if kind in _WRITTEN else b""

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        ids = list(self._opening) if add_special else []
        text, first = text.encode("utf-8", "replace").decode(), True
        for part in self._parts(self._normalize(text) if self._normalize else text, parse_special):
            ids += [part] if isinstance(part, int) else self._encoder.encode(part, first)
            first = self._respace and isinstance(part, int)
        return ids + self._closing if add_special else ids

    def _parts(self, text: str, parse_special: bool) -> Iterator[str | int]:
        """The text cut at the tokens that are matched before all others: the longest ones first, as llama.cpp does."""
        written = self._always.within(text) + (self._control.within(text) if parse_special else [])
        parts: list[str | int] = [text]
        for token, id in sorted(written, key=lambda item: -len(utf8(item[0]))):
            parts = [piece for part in parts for piece in self._cut(part, token, id)]
        for part in parts:
            if (plain := part.replace(MARK, "") if isinstance(part, str) else part) != "":
                yield plain

    def _cut(self, part: str | int, token: str, id: int) -> Iterator[str | int]:
        if isinstance(part, int):
            yield part
            return
        head, *tail = part.split(token)
        yield head
        for piece in tail:
            yield id
            yield piece.lstrip() if self._strip else piece


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, carried by the `tokenizers` library."""

    def __init__(self, model: JsonModel, special: SpecialTokens, *, chat_template: str | None = None) -> None:
        from tokenizers.normalizers import Replace  # here: GGUF models do without the library
        from tokenizers.normalizers import Sequence as Normalizers

        decoder = json.loads(model.decoder.__getstate__()) if model.decoder else {}
        steps: Sequence[dict[str, Any]] = decoder.get("decoders", [decoder])
        kinds = {step.get("type") for step in steps}
        metaspace = any(step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)
        stripped = any(step.get("type") == "Strip" and step.get("start") for step in steps)
        self._added = model.get_added_tokens_decoder()
        control = WrittenTokens((token.content, id) for id, token in self._added.items() if token.special)
        super().__init__(special, control, chat_template, metaspace or stripped)
        self._model, self._lock = model, Lock()
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        unmark = Replace(MARK, "")  # normalizing comes after the search for control tokens
        model.normalizer = Normalizers([unmark, model.normalizer] if model.normalizer else [unmark])

    @property
    def vocab_size(self) -> int:
        return self._model.get_vocab_size()

    def token(self, id: int) -> str:
        return self._model.id_to_token(id) or "" if id >= 0 else ""

    def find(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def is_special(self, id: int) -> bool:
        return id in self._added and self._added[id].special

    def token_bytes(self, id: int) -> bytes:
        text = self.token(id)
        if id in self._added:
            return text.encode("utf-8", "replace")
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(byte[1], 16)])
        return bytes_of(text, self._byte_level)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        text = text.encode("utf-8", "replace").decode()
        with self._lock:  # the switch belongs to the whole object
            self._model.encode_special_tokens = not parse_special
            return list(self._model.encode(text, add_special_tokens=add_special).ids)
