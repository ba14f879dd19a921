"""Names, digests and the catalog."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandra.errors import UsageError
from chandra.models import spec_from_config, tensor_table
from chandra.store import load_catalog, parse_digest, parse_name


@pytest.mark.parametrize(
    ("text", "kind", "canonical", "manifest"),
    [
        ("smollm2", "catalog", "smollm2:latest", "catalog/smollm2/latest.json"),
        ("Gemma3:4B", "catalog", "gemma3:4b", "catalog/gemma3/4b.json"),
        ("qwen2.5-coder:0.5b", "catalog", "qwen2.5-coder:0.5b", "catalog/qwen2.5-coder/0.5b.json"),
        ("someone/model", "registry", "someone/model:latest", "catalog/someone/model/latest.json"),
        ("localhost:5000/llama3", "registry", "localhost:5000/llama3:latest", "localhost+5000/llama3/latest.json"),
        ("models.example.org/a/b:Q8", "registry", "models.example.org/a/b:Q8", "models.example.org/a/b/Q8.json"),
        ("hf.co/Org/Repo-GGUF", "hub", "hf.co/Org/Repo-GGUF", "hf.co/Org/Repo-GGUF/latest.json"),
        ("https://huggingface.co/Org/Repo:q4_k_m", "hub", "hf.co/Org/Repo:Q4_K_M", "hf.co/Org/Repo/Q4_K_M.json"),
    ],
)
def test_names(text: str, kind: str, canonical: str, manifest: str) -> None:
    name = parse_name(text)
    assert (name.kind, str(name), name.manifest) == (kind, canonical, Path(manifest))
    assert parse_name(canonical) == name


@pytest.mark.parametrize("text", ["./x.gguf", "/models/x", "../x", "~/x", "x.gguf", "folder/x.safetensors", "."])
def test_paths(text: str) -> None:
    name = parse_name(text)
    assert name.kind == "file"
    assert Path(name.path).is_absolute()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\0b",
        "a\nb",
        "a" * 500,
        "a b",
        "name:",
        ":tag",
        "name:a:b",
        "a//b",
        "a/../b",
        "a/..",
        "name:../../x",
        "name:..",
        "a/b/c/d/e",
        "-rf",
        "host.org/..%2f/x",
        "hf.co/only",
        "hf.co/a/b/c",
        "hf.co/a/../b",
        "ho st.org/x",
        "host.org:99999999/x",
        "a\\..\\b",
        "e\u0301:\u202e",
    ],
)
def test_refused_names(text: str) -> None:
    with pytest.raises(UsageError):
        parse_name(text)


@given(st.text(max_size=60) | st.text("ab./:\\-~_\0", max_size=30))
def test_no_name_leaves_its_folder(text: str) -> None:
    try:
        name = parse_name(text)
    except UsageError:
        return
    if name.kind != "file":
        assert ".." not in name.manifest.parts
        assert not name.manifest.is_absolute()
        assert "\0" not in str(name.manifest)
        assert parse_name(str(name)) == name


def test_digests() -> None:
    assert parse_digest("sha256:" + "0" * 64) == parse_digest("sha256-" + "0" * 64) == "0" * 64
    for bad in (
        "sha256:" + "g" * 64,
        "sha256:" + "0" * 63,
        "0" * 64,
        "sha256:../" + "0" * 61,
        "sha256:" + "0" * 64 + "\n",
        None,
    ):
        with pytest.raises(UsageError):
            parse_digest(bad)


# Parameters as the publishers count them (the sizes of the safetensors files on their pages).
PARAMETERS = {
    "codellama:7b": 6_738_546_688,
    "codellama:34b": 33_743_970_304,
    "falcon:7b": 6_921_720_704,
    "falcon:40b": 41_303_293_952,
    "gemma:2b": 2_506_172_416,
    "gemma:7b": 8_537_680_896,
    "gemma2:2b": 2_614_341_888,
    "gemma2:9b": 9_241_705_984,
    "gemma2:27b": 27_227_128_320,
    "gemma3:270m": 268_098_176,
    "gemma3:1b": 999_885_952,
    "llama2:7b": 6_738_415_616,
    "llama2:13b": 13_015_864_320,
    "llama2:70b": 68_976_648_192,
    "llama3:8b": 8_030_261_248,
    "llama3.1:70b": 70_553_706_496,
    "llama3.2:1b": 1_235_814_400,
    "llama3.2:3b": 3_212_749_824,
    "mistral:7b": 7_248_023_552,
    "mistral:7b-v0.1": 7_241_732_096,
    "mixtral:8x7b": 46_702_792_704,
    "phi3:mini": 3_821_079_552,
    "phi4:14b": 14_659_507_200,
    "qwen2.5:0.5b": 494_032_768,
    "qwen2.5:1.5b": 1_543_714_304,
    "qwen2.5:3b": 3_085_938_688,
    "qwen2.5:7b": 7_615_616_512,
    "qwen2.5:14b": 14_770_033_664,
    "qwen2.5:32b": 32_763_876_352,
    "qwen2.5:72b": 72_706_203_648,
    "qwen3:0.6b": 596_049_920,
    "qwen3:4b": 4_022_468_096,
    "qwen3:8b": 8_190_735_360,
    "qwen3:14b": 14_768_307_200,
    "qwen3:32b": 32_762_123_264,
    "qwen3:30b-a3b": 30_532_122_624,
    "qwq:32b": 32_763_876_352,
    "smollm2:135m": 134_515_008,
    "smollm2:360m": 361_821_120,
    "smollm2:1.7b": 1_711_376_384,
}


@pytest.mark.parametrize("name", load_catalog().entries)
def test_catalog_entries_describe_models(name: str) -> None:
    entry = load_catalog().entries[name]
    assert str(parse_name(name)) == name
    assert bool(entry.packages) != bool(entry.hub)
    assert entry.license
    assert not entry.packages or len(entry.sha256) == 64
    parameters = sum(math.prod(tensor.shape) for tensor in tensor_table(spec_from_config(entry.config)))
    assert parameters == PARAMETERS.get(name, parameters)


def test_catalog_finds_aliases_and_formats() -> None:
    catalog = load_catalog()
    assert set(PARAMETERS) <= set(catalog.entries)
    assert set(catalog.aliases.values()) <= set(catalog.entries)

    def found(text: str) -> tuple[str, str] | None:
        entry = catalog.find(parse_name(text))
        return entry and (entry.name, entry.quant)

    assert found("smollm2") == ("smollm2:135m", "Q4_1")
    assert found("phi3:3.8b") == ("phi3:mini", "Q4_K_M")
    assert found("llama2:13b-q8_0") == ("llama2:13b-q8_0", "Q8_0")
    assert found("smollm2:135m-q8_0") is None  # its package has one format
    assert found("llama2:13b-chat") is None
    assert found("nothing") is None
    assert found("hf.co/a/smollm2") is None


def test_terms_go_with_the_models_that_have_them() -> None:
    for name, entry in load_catalog().entries.items():
        assert bool(entry.terms) == (entry.license.startswith(("Gemma", "Llama", "Qwen"))), name
