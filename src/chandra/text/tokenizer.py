"""Text to token ids and back."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chandra.errors import TokenizerError
from chandra.text.bpe import SPACE, Encoder, byte_alphabet
from chandra.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as JsonModel

# Token types of GGUF and of SentencePiece's model file alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

END_TOKENS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <PAD> <REPO> <reponame>
    <|fim_pad|> <fim-pad> <fim_pad> <|fim_repo|> <|repo_name|> <fim-repo> <|file_sep|>""".split()  # noqa: SIM905
) | {"<\uff5cend▁of▁sentence\uff5c>"}  # DeepSeek's
MARK = "\ufdd0"  # a code point that Unicode leaves to programs
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTES = {char: byte for byte, char in byte_alphabet().items()}


def token_bytes_of(text: str, byte_level: bool) -> bytes:
    """The bytes an ordinary token stands for, written in GPT-2's byte alphabet or as SentencePiece writes it."""
    if byte_level:
        return b"".join(bytes([_BYTES[ord(c)]]) if ord(c) in _BYTES else c.encode("utf-8", "replace") for c in text)
    return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")


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

    _control_tokens: Sequence[str]

    def __init__(self, special: SpecialTokens, chat_template: str | None, space_prefix: bool) -> None:
        self.bos_id, self.eos_id, self.eos_ids = special.bos_id, special.eos_id, special.eos_ids
        self.add_bos, self.add_eos = special.add_bos, special.add_eos
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
        missing = self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]
        return [self.bos_id, *ids] if missing and self.bos_id is not None else ids

    def quote(self, text: str) -> str:
        """The text with a mark inside each control token it spells out; `encode` drops the marks after it has looked
        for control tokens, so that a user's "<|im_start|>" stays text in a prompt whose own ones are parsed."""
        text = text.replace(MARK, "")
        for token in self._control_tokens:
            if token in text:
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
        """The UTF-8 bytes the token adds to the text; a control token gives its name. May end within a character."""

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> bytes:
        """The bytes of a text. `continues`: it continues another one, so a leading space stays."""
        kept = (id for id in ids if not (skip_special and self.is_special(id)))
        data = b"".join(map(self.token_bytes, kept))
        return data[1:] if self.space_prefix and not continues and data[:1] == b" " else data

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special=skip_special, continues=continues).decode("utf-8", "replace")

    def check_rows(self, rows: int) -> None:
        """TokenizerError when the embedding has fewer rows than there are tokens (more is padding)."""
        if rows < self.vocab_size:
            raise TokenizerError(
                f"the tokenizer has {self.vocab_size} tokens, the embedding only {rows} rows",
                "The tokenizer belongs to another model; fetch the model again.",
            )

    def _check_id(self, id: int) -> int:
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(
                f"token id {id} is not in 0..{self.vocab_size - 1}", "Use ids of this model's tokenizer."
            )
        return id


class PieceTokenizer(Tokenizer):
    """A tokenizer read from GGUF metadata or a SentencePiece model. `types`: int8 [vocab].

    `strip_after_special`: spaces after a special token are dropped (Phi-3).
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
        strip_after_special: bool = False,
    ) -> None:
        super().__init__(special, chat_template, space_prefix)
        self._vocab, self._types, self._encoder = vocab, types, encoder
        self._byte_level, self._strip = byte_level, strip_after_special
        ids = np.flatnonzero((types == CONTROL) | (types == USER_DEFINED) | (types == UNKNOWN))
        named = [(vocab[id], id) for id in map(int, ids) if vocab[id]]
        self._written = sorted(named, key=lambda item: -len(item[0].encode("utf-8", "replace")))  # longest first
        self._control_tokens = [token for token, id in self._written if types[id] != USER_DEFINED]

    @property
    def vocab_size(self) -> int:
        return len(self._vocab)

    def token(self, id: int) -> str:
        return self._vocab[self._check_id(id)]

    def find(self, token: str) -> int | None:
        return self._vocab.find(token)

    def is_special(self, id: int) -> bool:
        return int(self._types[self._check_id(id)]) in (CONTROL, UNKNOWN)

    def token_bytes(self, id: int) -> bytes:
        text, kind = self.token(id), self._types[id]
        if kind == NORMAL:
            return token_bytes_of(text, self._byte_level)
        if kind == BYTE and (byte := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(byte[1], 16)])
        return text.encode("utf-8", "surrogateescape") if kind in (CONTROL, UNKNOWN, USER_DEFINED) else b""

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        first = True
        for part in self._parts(text.encode("utf-8", "replace").decode(), parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encoder.encode(part, first)
            first = isinstance(part, int)
        return [*ids, self.eos_id] if add_special and self.add_eos and self.eos_id is not None else ids

    def _parts(self, text: str, parse_special: bool) -> list[str | int]:
        """The text cut at tokens that are matched before all others: the longest ones first, as llama.cpp does."""
        parts: list[str | int] = [text]
        for token, id in self._written:
            if token in text and (parse_special or self._types[id] == USER_DEFINED):
                parts = list(chain.from_iterable(self._cut(part, token, id) for part in parts))
        plain = (part.replace(MARK, "") if isinstance(part, str) else part for part in parts)
        return [part for part in plain if part != ""]

    def _cut(self, part: str | int, token: str, id: int) -> Iterable[str | int]:
        if isinstance(part, int):
            return [part]
        head, *tail = part.split(token)
        pieces: list[str | int] = [head]
        for piece in tail:
            pieces += (id, piece.lstrip() if self._strip else piece)
        return pieces


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
        super().__init__(special, chat_template, space_prefix=metaspace or stripped)
        self._model, self._lock = model, Lock()
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._added = model.get_added_tokens_decoder()
        self._control_tokens = [token.content for token in self._added.values() if token.special]
        unmark = Replace(MARK, "")  # normalizing comes after the search for control tokens
        model.normalizer = Normalizers([unmark, model.normalizer] if model.normalizer else [unmark])
        self._size = model.get_vocab_size()

    @property
    def vocab_size(self) -> int:
        return self._size

    def token(self, id: int) -> str:
        return self._model.id_to_token(self._check_id(id)) or ""

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
        return token_bytes_of(text, self._byte_level)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        text = text.encode("utf-8", "replace").decode()
        with self._lock:  # the switch belongs to the whole object
            self._model.encode_special_tokens = not parse_special
            return list(self._model.encode(text, add_special_tokens=add_special).ids)
