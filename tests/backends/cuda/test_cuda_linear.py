"""The Triton products against float64, in Triton's interpreter, for every format."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from chandra.backends.cuda import layouts, linear, moe, moe_kernels, packing, sizes
from chandra.quant import Format, PackedWeight, formats, get_format

SEED = secrets.randbits(31)
ERROR = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of rounding an activation or a weight
CHIP = linear.chip_of(torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def _seed() -> Iterator[None]:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # all is small here
    yield
    torch.set_num_threads(threads)


@functools.cache
def make(name: str, shape: tuple[int, ...]) -> tuple[layouts.DeviceWeight, torch.Tensor]:
    """A weight in its device layout, and its exact values."""
    fmt = get_format(name)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)) * 0.05
    packed = PackedWeight.pack(fmt, values)
    memory = np.full(layouts.weight_nbytes(fmt, shape), 0xFF, np.uint8)
    packing.pack(packed, memory)
    return layouts.bind(fmt, shape, torch.from_numpy(memory)), packed.unpack().double()


@pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("experts", [(), (3,)], ids=["dense", "experts"])
def test_a_weight_loaded_in_pieces_is_the_same(
    fmt: Format, experts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (*experts, 77, columns_of(fmt)[1])
    packed = PackedWeight.pack(fmt, torch.randn(shape) * 0.05)
    whole, tiles = np.zeros(layouts.weight_nbytes(fmt, shape), np.uint8), layouts.arrange(fmt, (64, shape[-1])).nbytes
    packing.pack(packed, whole)  # at once: it is smaller than a piece
    largest = 0

    def write(host: np.ndarray[Any, Any], out: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, host.nbytes)
        out.copy_(torch.from_numpy(host.copy()))
        host[...] = 0

    for stage in (tiles, 64):  # two tiles of rows at a time; fewer than one
        monkeypatch.setattr(packing, "STAGE", stage)
        memory = torch.zeros(len(whole), dtype=torch.uint8)
        packing.load(packed, memory, lambda n: torch.full((n,), 0xA5, dtype=torch.uint8), write)
        assert np.array_equal(memory.numpy(), whole)
        assert largest <= tiles


def columns_of(fmt: Format) -> tuple[int, int]:
    """Small columns, one of them odd for the tiles."""
    unit = layouts.arrange(fmt, (1, 256)).layout.group
    if unit == 0 or fmt.name in ("F32", "F16", "BF16"):
        return 37, 160
    return (256, 512) if getattr(fmt, "block_size", 1) == 256 else (unit, 384)


@pytest.fixture(scope="module")
def scratch() -> torch.Tensor:
    return torch.zeros(sizes.SPLITS, dtype=torch.uint8)


def bound(x: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Errors of weights scaled or looked up in 16 bits, and of float32 sums."""
    return x.double().abs() @ exact.abs().T * (1.5 * ERROR[x.dtype]) + 1e-6


def check(name: str, rows: int, columns: int, n: int, dtype: torch.dtype, scratch: torch.Tensor) -> None:
    weight, exact = make(name, (rows, columns))
    x, bias = torch.randn(n, columns).to(dtype), torch.randn(rows)
    out = torch.full((n, rows), torch.nan)
    linear.product(x, linear.Product(weight, bias, out), scratch)
    expected = x.double() @ exact.T + bias
    assert torch.all((out - expected).abs() <= bound(x, exact))


@pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.name)
def test_products_match_float64(fmt: Format, scratch: torch.Tensor) -> None:
    small, large = columns_of(fmt)
    check(fmt.name, 5, small, 1, torch.float16, scratch)
    check(fmt.name, 37, large, 16, torch.float16, scratch)
    check(fmt.name, 70, small, 40, torch.float16, scratch)
    check(fmt.name, 5, small, 3, torch.bfloat16, scratch)
    check(fmt.name, 5, small, 17, torch.bfloat16, scratch)


@pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.name)
def test_codes_are_exact_where_sums_are_scaled(fmt: Format) -> None:
    """Up to 16 rows only float32 sums round, but for tables of fractions and floats in another type."""
    if fmt.name in ("nf4", "nf4-dq", "F32", "BF16"):
        pytest.skip("rounded to the type of the activations")
    weight, exact = make(fmt.name, (37, columns_of(fmt)[1]))
    x = torch.randn(2, exact.shape[1]).half()
    out = torch.empty(2, 37)
    linear.product(x, linear.Product(weight, None, out))
    size = x.double().abs() @ exact.abs().T
    assert torch.all((out - x.double() @ exact.T).abs() <= 1e-5 * size + 1e-6)


@pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.name)
def test_unpacked_rows_are_those_of_the_format(fmt: Format) -> None:
    for columns in columns_of(fmt):
        weight, exact = make(fmt.name, (37, columns))
        out = torch.full((20, columns), torch.nan)
        linear.unpack(weight, out, 9)
        tolerance = 2.0**-11 if fmt.name.startswith("nf4") else 3e-7  # the levels are float16
        assert torch.all((out - exact[9:29]).abs() <= tolerance * exact.abs().max())


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "int8", "nf4-dq", "F16"])
def test_embedding_looks_rows_up(name: str) -> None:
    weight, exact = make(name, (37, 256))
    ids = torch.randint(0, 37, (11,), dtype=torch.int32)
    out = torch.full((11, 256), torch.nan)
    linear.unpack(weight, out, ids=ids, factor=1.5)
    torch.testing.assert_close(out, (exact[ids] * 1.5).float(), rtol=5e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "int8", "F16"])
def test_rows_do_not_depend_on_the_batch(name: str, scratch: torch.Tensor) -> None:
    weight, _ = make(name, (30, 1024))
    x = torch.randn(40, 1024).half()
    for rows in ((1, 8, 9, 16), (17, 33, 40)):
        outs = []
        for n in rows:
            out = torch.full((n, 30), torch.nan)
            linear.product(x[:n], linear.Product(weight, None, out), scratch)
            outs.append(out[: rows[0]])
        assert all(torch.equal(out, outs[0]) for out in outs)


def test_scratch_can_be_used_again(scratch: torch.Tensor) -> None:
    weight, exact = make("Q4_0", (40, 1536))
    assert linear.splits_for(CHIP, 2, 6) == 3
    for n in (1, 16, 3):
        x = torch.randn(n, 1536).half()
        out = torch.full((n, 40), torch.nan)
        linear.product(x, linear.Product(weight, None, out), scratch)
        assert torch.all((out - x.double() @ exact.T).abs() <= bound(x, exact))


def test_products_are_added_to_what_is_there(scratch: torch.Tensor) -> None:
    weight, exact = make("Q4_0", (37, 384))
    for n in (2, 20):
        x, before = torch.randn(n, 384).half(), torch.randn(n, 37)
        out = before.clone()
        linear.product(x, linear.Product(weight, None, out), scratch, into="add")
        assert torch.all((out - before - x.double() @ exact.T).abs() <= bound(x, exact))


def test_query_key_and_value_are_one_launch(scratch: torch.Tensor) -> None:
    for formats_ in (("Q4_0", "Q4_0", "Q4_0"), ("Q4_0", "Q4_0", "Q8_0"), ("Q4_0", "Q4_0")):
        weights = [make(name, (rows, 256)) for name, rows in zip(formats_, (70, 33, 40), strict=False)]
        for n in (3, 20):
            x = torch.randn(n, 256).half()
            products = [linear.Product(w, None, torch.full((n, len(exact)), torch.nan)) for w, exact in weights]
            linear.linears(x, products, scratch)
            for one, (_, exact) in zip(products, weights, strict=True):
                assert torch.all((one.out - x.double() @ exact.T).abs() <= bound(x, exact))


def test_many_rows_meet_an_unpacked_weight(scratch: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_UNPACK_ROWS", 40)
    monkeypatch.setattr(linear, "UNPACKED", 256 * 128 * 2)
    weight, exact = make("Q4_K", (300, 256))
    x, bias = torch.randn(40, 256).half(), torch.randn(300)
    out = torch.full((40, 300), torch.nan)
    linear.product(x, linear.Product(weight, bias, out), scratch)
    assert torch.all((out - x.double() @ exact.T - bias).abs() <= bound(x, exact))


def activated(y: torch.Tensor, activation: str) -> torch.Tensor:
    functions: dict[str, Any] = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
    }
    return functions[activation](y)


@pytest.mark.parametrize(
    ("activation", "gate_format"),
    [("silu", "Q4_0"), ("gelu", "Q8_0"), ("gelu_tanh", "Q4_0"), ("relu", None), ("sigmoid", "Q8_0")],
)
def test_gate_and_up_are_one_product(activation: str, gate_format: str | None, scratch: torch.Tensor) -> None:
    up, up_exact = make("Q4_0", (40, 256))
    for n in (3, 20):
        x, bias, gate_bias = torch.randn(n, 256).half(), torch.randn(40), torch.randn(40)
        out = torch.full((n, 40), torch.nan, dtype=torch.float16)
        expected = x.double() @ up_exact.T + bias
        if gate_format is None:
            linear.gate_up(x, None, linear.Product(up, bias, out), activation)
            expected = activated(expected, activation)
        else:
            gate, exact = make(gate_format, (40, 256))
            products = linear.Product(gate, gate_bias, out), linear.Product(up, bias, out)
            linear.gate_up(x, *products, activation, scratch)
            expected = expected * activated(x.double() @ exact.T + gate_bias, activation)
        assert torch.all((out - expected).abs() <= 3e-3 * expected.abs() + 3e-3)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("name", "n"), [("Q4_0", 1), ("nf4-dq", 5), ("Q8_0", 18), ("BF16", 40)])
def test_experts_match_float64(name: str, n: int, normalize: bool) -> None:
    experts, hidden, ff, top_k = 4, 64, 128, 2
    weights = [make(name, shape) for shape in ((experts, ff, hidden), (experts, ff, hidden), (experts, hidden, ff))]
    (gate, g), (up, u), (down, d) = weights
    x, logits = torch.randn(n, hidden).half(), torch.randn(n, experts)
    out = torch.full((n, hidden), torch.nan)
    memory = torch.full((sizes.moe_scratch(n, experts, top_k, hidden, ff),), 0xFF, dtype=torch.uint8)
    moe.moe(x, logits, gate, up, down, top_k, normalize, "silu", out, memory)
    chosen = logits.double().topk(top_k, 1)
    shares = chosen.values.softmax(1) if normalize else logits.double().softmax(1).gather(1, chosen.indices)
    expected = torch.zeros(n, hidden, dtype=torch.float64)
    for row, (indices, row_shares) in enumerate(zip(chosen.indices.tolist(), shares, strict=True)):
        for expert, share in zip(indices, row_shares, strict=True):
            y = x[row].double()
            inner = activated(y @ g[expert].T, "silu") * (y @ u[expert].T)
            expected[row] += share * (inner @ d[expert].T)
    assert torch.all((out - expected).abs() <= 5e-3 * expected.abs().max())


def test_experts_take_the_first_of_equal_logits() -> None:
    choices, shares = torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3)
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, -torch.inf]])
    moe_kernels.choose_kernel[(1,)](logits, choices, shares, 5, TOP=3, E=8, NORMALIZE=True)
    assert choices.tolist() == [[1, 3, 2]]
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.name)
def test_layouts_take_no_more_bytes_than_the_format(fmt: Format) -> None:
    for shape in ((4096, 4096), (8, 14336, 4096)):
        assert layouts.weight_nbytes(fmt, shape) <= fmt.nbytes(shape) * 1.02
