"""Streams of ids and of text, cut anywhere, against the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chandra.errors import RequestError
from chandra.text.bpe import byte_alphabet
from chandra.text.detokenizer import StopMatcher, StreamDetokenizer
from chandra.text.sources import from_gguf
from chandra.text.tokenizer import Tokenizer


def byte_level_tokenizer() -> Tokenizer:
    """One token a byte, and a few of several, some of which end within a character."""
    letters = byte_alphabet()
    pieces = [bytes([byte]) for byte in range(256)] + [b" \xf0\x9f", b"\x91\xa8\xe2", b"he", b"the"]
    tokens = ["".join(chr(letters[byte]) for byte in piece) for piece in pieces] + ["<s>", "</s>", "<user>"]
    types = np.array([1] * len(pieces) + [3, 3, 4], np.int32)
    return from_gguf(
        {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": ["h e", "t he"],
        }
    )  # fmt: skip


def sentencepiece_tokenizer() -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "é", "▁▁"]
    types = np.array([2, 3, 3] + [6] * 256 + [1] * 5, np.int32)
    scores = -np.arange(len(tokens), dtype=np.float32)
    return from_gguf(
        {
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.scores": scores,
        }
    )  # fmt: skip


TOKENIZERS = {"bytes": byte_level_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    ids=st.lists(st.integers(0, 262), max_size=30),
    flags=st.fixed_dictionaries({"skip_special": st.booleans(), "continues": st.booleans()}),
)
@example("sentencepiece", [1, 259, 260], {"skip_special": True, "continues": False})
@example("bytes", [0xF0, 0x9F, 0x41, 0xE2, 0x82], {"skip_special": True, "continues": False})
def test_a_stream_is_the_whole_and_never_shows_half_a_character(
    name: str, ids: list[int], flags: dict[str, Any]
) -> None:
    tokenizer = TOKENIZERS[name]
    stream = StreamDetokenizer(tokenizer, **flags)
    pushed = [stream.push(id) for id in ids]
    whole = tokenizer.decode(ids, **flags)
    assert "".join(pushed) + stream.finish() == whole
    for count in range(len(ids)):  # what has gone out is never taken back
        assert whole.startswith("".join(pushed[:count]))


def test_a_character_comes_with_its_last_byte() -> None:
    stream = StreamDetokenizer(TOKENIZERS["bytes"])
    assert [stream.push(byte) for byte in "é👨".encode()] == ["", "é", "", "", "", "👨"]


def test_special_tokens_show_only_on_request() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = [tokenizer.find("<s>"), tokenizer.find("<user>"), 65]
    assert tokenizer.decode([id for id in ids if id is not None]) == "<user>A"
    stream = StreamDetokenizer(tokenizer, skip_special=False)
    assert "".join(stream.push(id) for id in ids if id is not None) == "<s><user>A"


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By trying every beginning of the text: the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


few_letters = st.text("ab\n", max_size=25)


@settings(deadline=None, max_examples=500)
@given(chunks=st.lists(few_letters, max_size=12), stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4))
@example(["ab", "c"], ["abc", "b"])
@example(["aa", "ab"], ["aab"])
def test_stop_strings_are_found_whatever_the_chunks(chunks: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    emitted, stopped = "", False
    for chunk in chunks:
        if not stopped:
            text, stopped = matcher.push(chunk)
            emitted += text
    expected, stop = first_stop("".join(chunks), stops)
    assert matcher.matched == stop
    assert stopped == (stop is not None)
    assert emitted + matcher.finish() == expected


@settings(deadline=None)
@given(chunks=st.lists(few_letters, max_size=12), stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4))
def test_nothing_is_held_back_that_cannot_become_a_stop(chunks: list[str], stops: list[str]) -> None:
    matcher, emitted, seen = StopMatcher(stops), "", ""
    for chunk in chunks:
        text, stopped = matcher.push(chunk)
        if stopped:
            return
        emitted, seen = emitted + text, seen + chunk
        held = seen[len(emitted) :]
        assert not held or any(len(stop) > len(held) and stop.startswith(held) for stop in stops)


def test_after_a_stop_there_is_silence() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("text EN") == ("text ", False)
    assert matcher.push("D more") == ("", True)
    assert matcher.push("even more") == ("", True)
    assert matcher.finish() == ""


def test_an_empty_stop_string_is_an_error() -> None:
    with pytest.raises(RequestError):
        StopMatcher(["a", ""])
