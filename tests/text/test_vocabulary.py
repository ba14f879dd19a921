"""Strings found by their bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chandra.backends.cpu import _cpu
from chandra.text.vocabulary import Vocabulary, indexed


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=200), st.binary(max_size=20), st.binary(min_size=1, max_size=2))
def test_strings_are_found_where_they_stand(strings: list[bytes], other: bytes, part: bytes) -> None:
    table = indexed(strings)
    assert [table[i] for i in range(len(table))] == strings
    for wanted in [*strings, other]:
        assert table.find(wanted) == (strings.index(wanted) if wanted in strings else None)
    assert table.holding(part) == [i for i, string in enumerate(strings) if part in string[1:]]


def test_many_strings_are_found() -> None:
    strings = [str(i).encode() for i in range(100_000)]
    table = indexed(strings)
    assert [table.find(string) for string in strings] == list(range(len(strings)))
    assert not any(table.find(b"-" + string) for string in strings)


def test_bytes_that_are_not_utf8_are_tokens_too() -> None:
    vocab = Vocabulary([b"a", b"\xff"])
    assert vocab[1] == "\udcff"
    assert vocab.find("\udcff") == 1


@pytest.mark.parametrize("text", [b"", bytes(7), b"\x01" + bytes(7), b"\xff" * 8])
def test_a_text_that_ends_early_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="ends before"):
        _cpu.Strings(text, 1)


@pytest.mark.parametrize("byte", [0, 1, 0xFF])
def test_a_text_that_is_overwritten_is_never_left(byte: int) -> None:
    strings = [bytes([i]) * i for i in range(200)]
    text = bytearray(b"".join(len(string).to_bytes(8, "little") + string for string in strings))
    table = _cpu.Strings(memoryview(text), len(strings))
    assert table.find(strings[7]) == 7
    text[:] = bytes([byte]) * len(text)
    for index, string in enumerate(strings):
        assert len(table[index]) <= len(text)
        table.find(string)
    table.holding(b"a")


def test_positions_outside_are_no_strings() -> None:
    table = indexed(["a"])
    for index in (-1, 1):
        with pytest.raises(IndexError):
            table[index]
