"""Tokenizers trained here, read from each kind of file, against the libraries that define them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from chandra.errors import ChandraError, TokenizerError, UnsupportedError
from chandra.text.sources import from_folder, from_gguf, load_tokenizer
from chandra.text.tokenizer import Tokenizer

PROSE = (Path(__file__).parent.parent / "data" / "prose.txt").read_text("utf-8")
TEXTS = [
    *PROSE.splitlines()[:40],
    "",
    " ",
    "  two  spaces ",
    "\n\n",
    "naïve 東京 😀👨‍👩‍👧",
    "\x00\x1b",
    "12345",
    "a" * 300,
]
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0"), max_size=40)


@dataclass
class FakeCheckpoint:
    """A checkpoint without weights, as `load_tokenizer` needs it."""

    kind: str
    path: Path
    metadata: dict[str, Any]


@pytest.fixture(scope="module")
def byte_level() -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", "<|im_end|>"])
    model.train_from_iterator([PROSE], trainer)
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return model


def write_json_folder(model: tokenizers.Tokenizer, folder: Path) -> Path:
    model.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    return folder


def gguf_of(model: tokenizers.Tokenizer, pre: str = "gpt-2") -> dict[str, Any]:
    document = json.loads(model.to_str())
    vocab = document["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [" ".join(merge) for merge in document["model"]["merges"]]
    types = np.array([3 if id < 2 else 1 for id in range(len(tokens))], np.int32)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": types, "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip


def train_sentencepiece(folder: Path, kind: str, **options: Any) -> sentencepiece.SentencePieceProcessor:
    (folder / "text").write_text(PROSE)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), model_type=kind, vocab_size=500,
        minloglevel=2, hard_vocab_limit=False,
        user_defined_symbols=["<user>"], control_symbols=["<|im_end|>"], **options,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


def test_byte_level_bpe_gives_the_librarys_ids_from_gguf_and_json(
    byte_level: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    write_json_folder(byte_level, tmp_path)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for tokenizer in (from_folder(tmp_path), from_gguf(gguf_of(byte_level))):
        for text in TEXTS:
            expected = reference(text)["input_ids"]
            assert tokenizer.encode(text) == expected, text
            assert tokenizer.encode(text, add_special=False) == expected[1:]
            assert tokenizer.decode(expected) == text
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.encode("")) == (0, 1, [0])


def test_control_tokens_are_parsed_only_where_asked(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    write_json_folder(byte_level, tmp_path)
    for tokenizer in (from_folder(tmp_path), from_gguf(gguf_of(byte_level))):
        text = "a<|im_end|>b"
        assert 1 not in tokenizer.encode(text)
        assert tokenizer.encode(text, parse_special=True)[2] == 1
        assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == "ab"
        assert tokenizer.decode(tokenizer.encode(text, parse_special=True), skip_special=False) == "<s>" + text
        prompt = tokenizer.quote(text) + "<|im_end|>"
        assert tokenizer.encode_chat(prompt) == [*tokenizer.encode(text), 1]
        assert tokenizer.encode_chat("<s>x") == tokenizer.encode("x")


def test_a_folder_declares_its_ends_and_its_template(byte_level: tokenizers.Tokenizer, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(FakeCheckpoint("hf", write_json_folder(byte_level, tmp_path), {}))  # type: ignore[arg-type]
    assert tokenizer.eos_ids == {1, 5}
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
    assert from_folder(tmp_path).chat_template == "{{ 1 }}"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert from_folder(tmp_path).chat_template == "d"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("options", [{}, {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}])
@pytest.mark.parametrize("fallback", [True, False])
def test_sentencepiece_gives_its_own_ids(kind: str, options: dict[str, Any], fallback: bool, tmp_path: Path) -> None:
    reference = train_sentencepiece(tmp_path, kind, byte_fallback=fallback, **options)
    tokenizer = from_folder(tmp_path)
    for text in [*TEXTS, "a<user>b <user>", "</s><s><|im_end|><0x41>"]:
        expected = reference.encode(text)
        assert tokenizer.encode(text, add_special=False) == expected, text
        if fallback:
            assert tokenizer.decode(expected) == reference.decode(expected), text
    assert tokenizer.encode("x")[0] == tokenizer.bos_id == reference.bos_id()
    assert reference.piece_to_id("<|im_end|>") in tokenizer.eos_ids


def test_a_sentencepiece_model_reads_the_same_from_gguf(tmp_path: Path) -> None:
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    for kind, name in (("bpe", "llama"), ("unigram", "t5")):
        reference = train_sentencepiece(tmp_path, kind, **options)
        ids = range(reference.get_piece_size())
        types = [
            2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6 if reference.is_byte(i) else 1
            for i in ids
        ]
        types[reference.piece_to_id("<user>")] = 4
        metadata = {
            "tokenizer.ggml.model": name, "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": np.array([reference.get_score(i) for i in ids], np.float32),
            "tokenizer.ggml.token_type": np.array(types, np.int32), "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1,
        }  # fmt: skip
        tokenizer = from_gguf(metadata)
        for text in TEXTS:
            assert tokenizer.encode(text, add_special=False) == reference.encode(text), text
        assert tokenizer.encode("") == [{"bpe": tokenizer.bos_id, "unigram": tokenizer.eos_id}[kind]]


def test_a_leading_space_is_dropped_only_where_one_was_added(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path, "bpe", byte_fallback=True)
    tokenizer = from_folder(tmp_path)
    ids = tokenizer.encode("the end", add_special=False)
    assert tokenizer.decode(ids) == "the end"
    assert tokenizer.decode(ids, continues=True) == " the end"
    assert tokenizer.decode([tokenizer.bos_id or 0, *ids]) == "the end"


def test_a_metaspace_json_decodes_like_its_library(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model.train_from_iterator(PROSE.split(), trainers.BpeTrainer(vocab_size=700, special_tokens=special[:2]))
    state = json.loads(model.to_str())
    state["model"]["vocab"] |= {name: len(state["model"]["vocab"]) + i for i, name in enumerate(special[2:])}
    model = tokenizers.Tokenizer.from_str(json.dumps(state))
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = from_folder(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == model.encode(text).ids
        assert tokenizer.decode(ids) == model.decode(ids) == text


@pytest.fixture(scope="module")
def every_kind(byte_level: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    folders = [tmp_path_factory.mktemp(kind) for kind in ("json", "bpe", "unigram")]
    write_json_folder(byte_level, folders[0])
    for folder in folders[1:]:
        train_sentencepiece(folder, folder.name.rstrip("0123456789"), **plain)
    return [from_gguf(gguf_of(byte_level)), *map(from_folder, folders)]


@settings(deadline=None, max_examples=150)
@given(text=anything)
def test_any_text_comes_back(text: str, every_kind: list[Tokenizer]) -> None:
    for tokenizer in every_kind:
        text = text if tokenizer.find("▁") is None else text.replace("▁", " ")
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_surrogate_pair_is_no_error(every_kind: list[Tokenizer]) -> None:
    for tokenizer in every_kind:
        assert tokenizer.decode(tokenizer.encode("a\ud83d")) == "a?"


def test_ids_without_a_token_add_nothing(every_kind: list[Tokenizer]) -> None:
    for tokenizer in every_kind:
        assert tokenizer.decode([tokenizer.vocab_size, 10**9, -1]) == ""
        assert tokenizer.token(10**9) == ""


def broken(metadata: dict[str, Any], **changes: Any) -> dict[str, Any]:
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": None}, TokenizerError),
        ({"model": "rwkv"}, UnsupportedError),
        ({"tokens": []}, TokenizerError),
        ({"tokens": [1, 2]}, TokenizerError),
        ({"merges": None}, TokenizerError),
        ({"merges": 7}, TokenizerError),
        ({"pre": "no such"}, UnsupportedError),
        ({"token_type": np.zeros(3, np.int32)}, TokenizerError),
        ({"model": "llama", "scores": np.zeros(3, np.float32)}, TokenizerError),
        ({"bos_token_id": "x"}, TokenizerError),
    ],
)
def test_damaged_metadata_is_refused(
    changes: dict[str, Any], error: type[ChandraError], byte_level: tokenizers.Tokenizer
) -> None:
    metadata = broken(gguf_of(byte_level), **changes)
    with pytest.raises(error):
        load_tokenizer(FakeCheckpoint("gguf", Path(), metadata))  # type: ignore[arg-type]


def test_an_id_out_of_range_is_no_role(byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = from_gguf(broken(gguf_of(byte_level), bos_token_id=10**6))
    assert tokenizer.bos_id is None
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\x12\x00"]
)
def test_damaged_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError):
        load_tokenizer(FakeCheckpoint("hf", tmp_path, {}))  # type: ignore[arg-type]


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        from_folder(tmp_path)
