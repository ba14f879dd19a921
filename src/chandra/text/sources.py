"""Tokenizers out of model files: GGUF metadata, tokenizer.json, SentencePiece's tokenizer.model."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chandra.checkpoint.base import Checkpoint
from chandra.errors import TokenizerError, UnsupportedError
from chandra.text.bpe import Encoder, MergeListEncoder, ScoreEncoder, normalizer
from chandra.text.pretokenize import ADD_BOS, IGNORE_MERGES, splitter
from chandra.text.tokenizer import (
    CONTROL,
    END_TOKENS,
    NORMAL,
    USER_DEFINED,
    JsonTokenizer,
    PieceTokenizer,
    SpecialTokens,
    Tokenizer,
)
from chandra.text.unigram import UnigramEncoder
from chandra.text.vocabulary import Vocabulary

_FETCH = "Fetch the model again, or take another file of it."
MAX_JSON_BYTES = 256 << 20


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that comes with a model. TokenizerError when it is missing or damaged, UnsupportedError when it
    is of a kind Chandra does not know."""
    try:
        if checkpoint.kind == "gguf":
            return from_gguf(checkpoint.metadata)
        folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        return from_folder(folder)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise TokenizerError(f"the tokenizer is damaged: {error!r}", _FETCH) from error


def end_ids(vocab: Vocabulary, types: NDArray[np.int8], declared: Iterable[int | None]) -> frozenset[int]:
    """Every token that ends a generation: the declared ones and those known by name, which become control tokens.

    In Gemma `</s>` is a piece of HTML, so that name alone is not enough.
    """
    named = {name: id for name in END_TOKENS if (id := vocab.find(name)) is not None}
    ids = {id for name, id in named.items() if name != "</s>" or types[id] == CONTROL}
    if {"<|return|>", "<|call|>"} <= named.keys() or {"<|calls|>", "<|flush|>"} <= named.keys():
        ids.discard(named.get("<|end|>", -1))  # in these it ends a message, not the turn
    types[list(ids)] = CONTROL
    return frozenset(ids | {id for id in declared if id is not None})


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer from a GGUF file's `tokenizer.*` keys."""

    def key(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    def role(name: str, default: int | None = None) -> int | None:
        id = key(f"{name}_token_id", default)
        return None if id is None or not 0 <= int(id) < len(vocab) else int(id)

    kind = key("model")
    if kind is None or not len(key("tokens", ())):
        raise TokenizerError("the file has no tokenizer", _FETCH)
    vocab = Vocabulary(key("tokens"))
    types = np.array(_column(key("token_type"), len(vocab), NORMAL), dtype=np.int8)
    pre = key("pre", "default") if kind == "gpt2" else kind
    bos_id = role("bos", {"llama": 1, "gpt2": 11}.get(kind))
    eos_id = role("eos", {"llama": 2, "gpt2": 11, "t5": 1}.get(kind))
    special = SpecialTokens(
        bos_id,
        eos_id,
        end_ids(vocab, types, (eos_id, role("eot"), role("eom"))),
        bool(key("add_bos_token", kind == "llama" or pre in ADD_BOS)),
        bool(key("add_eos_token", kind == "t5")),
    )
    add_space = bool(key("add_space_prefix", kind in ("llama", "t5")))
    encoder: Encoder
    if kind in ("llama", "t5"):
        scores = np.asarray(_column(key("scores"), len(vocab), 0.0), dtype=np.float32)
        encoder = scored_encoder(kind == "t5", vocab, scores, types, role("unknown", 0), add_space)
    elif kind in ("gpt2", "gemma4"):
        merges = key("merges", ())
        encoder = MergeListEncoder(vocab, merges, splitter(pre), kind == "gpt2", pre in IGNORE_MERGES)
    else:
        raise UnsupportedError(f"a tokenizer of kind {kind!r}", "Chandra reads gpt2, llama, t5 and gemma4 tokenizers.")
    charsmap = np.asarray(key("precompiled_charsmap", ())).astype(np.uint8).tobytes()
    return PieceTokenizer(
        vocab,
        types,
        encoder,
        special,
        chat_template=metadata.get("tokenizer.chat_template"),
        byte_level=kind == "gpt2",
        space_prefix=add_space,
        normalize=normalizer(charsmap, bool(key("remove_extra_whitespaces", False))) if kind == "t5" else None,
        strip_after_special="phi3" in str(metadata.get("general.name", "")).lower().replace("-", ""),
    )


def scored_encoder(
    unigram: bool,
    vocab: Vocabulary,
    scores: NDArray[np.float32],
    types: NDArray[np.int8],
    unk_id: int | None,
    add_space: bool,
) -> Encoder:
    """SentencePiece's two models. Control, byte and unused tokens are never formed from text."""
    if unk_id is not None and not 0 <= unk_id < len(vocab):
        raise ValueError(f"the unknown token {unk_id} of {len(vocab)}")
    if unigram:
        return UnigramEncoder(vocab, scores, types == NORMAL, unk_id or 0, add_space)
    return ScoreEncoder(vocab, scores, np.isin(types, (NORMAL, USER_DEFINED)), unk_id, add_space)


def _column(values: Any, size: int, default: float) -> Any:
    if values is None:
        return [default] * size
    if len(values) != size:
        raise TokenizerError(f"the tokenizer has {size} tokens but {len(values)} scores or types", _FETCH)
    return values


def from_folder(folder: Path) -> Tokenizer:
    """A tokenizer from a Hugging Face or Lit-GPT folder: tokenizer.json, else tokenizer.model."""
    config = _read_json(folder / "tokenizer_config.json")
    template = _chat_template(folder, config)
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer as JsonModel

        try:
            model = JsonModel.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"tokenizer.json is damaged: {error}", _FETCH) from error
        opening = model.encode("").ids  # what its post-processor puts around any text
        bos_id, eos_id, ends = _roles(folder, config, model.token_to_id)
        added = model.get_added_tokens_decoder()
        named = {id for id, token in added.items() if token.special and token.content in END_TOKENS}
        special = SpecialTokens(bos_id, eos_id, ends | named, opening[:1] == [bos_id], eos_id in opening[-1:])
        return JsonTokenizer(model, special, chat_template=template)
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder, config, template)
    raise TokenizerError(f"no tokenizer.json and no tokenizer.model in {folder}", _FETCH)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8")) if path.stat().st_size <= MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} cannot be read: {error}", _FETCH) from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} is not a JSON object of at most {MAX_JSON_BYTES} bytes", _FETCH)
    return value


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    value = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(value, list):  # several, by name
        value = {item["name"]: item["template"] for item in value}.get("default")
    return value if isinstance(value, str) else None


def _roles(
    folder: Path, config: Mapping[str, Any], find: Callable[[str], int | None]
) -> tuple[int | None, int | None, frozenset[int]]:
    """BOS, EOS and all declared ends, from tokenizer_config, special_tokens_map, generation_config and config.json."""
    names = _read_json(folder / "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
    ids: list[int | None] = []
    for role in ("bos_token", "eos_token"):
        name = names.get(role)
        name = name.get("content") if isinstance(name, dict) else name
        ids.append(find(name) if isinstance(name, str) else None)
    bos_id, eos_id = ids
    ends = {eos_id}
    for file in ("generation_config.json", "config.json"):
        declared = _read_json(folder / file).get("eos_token_id")
        ends.update(declared if isinstance(declared, list) else [declared])
    known = frozenset(id for id in ends if isinstance(id, int))
    return bos_id, min(known, default=None) if eos_id is None else eos_id, known


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protocol buffer message; ValueError where it is cut short."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while shift < 70:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value if value < 1 << 63 else value - (1 << 64)
            shift += 7
        raise ValueError("a number of more than ten bytes")

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(tag & 7) or varint()
        if tag & 7 not in (1, 2, 5) or not 0 <= length <= len(data) - at:
            raise ValueError(f"field {tag >> 3} is damaged")
        yield tag >> 3, data[at : at + length]
        at += length


def _from_sentencepiece(folder: Path, config: Mapping[str, Any], template: str | None) -> Tokenizer:
    """https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto"""
    pieces: list[tuple[bytes, float, int]] = []
    trainer: dict[int, Any] = {}
    rules: dict[int, Any] = {}
    for number, value in _fields((folder / "tokenizer.model").read_bytes()):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1], struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, NORMAL)))
        elif number in (2, 3):
            (trainer if number == 2 else rules).update(_fields(value))
    for token, id in sorted(_read_json(folder / "added_tokens.json").items(), key=lambda item: item[1]):
        if id == len(pieces):
            pieces.append((token.encode(), 0.0, CONTROL))
    vocab = Vocabulary(piece for piece, _, _ in pieces)
    scores = np.array([score for _, score, _ in pieces], np.float32)
    types = np.array([kind for _, _, kind in pieces], np.int8)
    unk_id, bos_id, eos_id = (trainer.get(field, default) for field, default in ((40, 0), (41, 1), (42, 2)))
    add_space = bool(rules.get(3, 1))
    if trainer.get(3, 1) not in (1, 2):
        raise UnsupportedError("a word or character SentencePiece model", "Chandra reads unigram and BPE models.")
    encoder = scored_encoder(trainer.get(3, 1) == 1, vocab, scores, types, unk_id, add_space)
    bos_id, eos_id = (id if 0 <= id < len(pieces) else None for id in (bos_id, eos_id))
    declared = _roles(folder, config, vocab.find)[2]
    special = SpecialTokens(
        bos_id,
        eos_id,
        end_ids(vocab, types, {eos_id, *declared}),
        bool(config.get("add_bos_token", True)) and bos_id is not None,
        bool(config.get("add_eos_token", False)),
    )
    return PieceTokenizer(
        vocab,
        types,
        encoder,
        special,
        chat_template=template,
        space_prefix=add_space,
        normalize=normalizer(rules.get(2, b""), bool(rules.get(4, 1))),
        space_after_special=False,
    )
