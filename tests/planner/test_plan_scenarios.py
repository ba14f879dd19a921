"""Plans of well-known models from their shapes alone: the situations Chandra is made for."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from chandra.errors import DoesNotFit, UsageError
from chandra.kvcache.layout import group_layers, kv_bytes
from chandra.memory.device import KNOWN_GPUS, Device, parse_rate, parse_size
from chandra.memory.plan import Plan
from chandra.planner import (
    ASSUMED_HOST,
    Constraints,
    PlannableModel,
    Profile,
    Rate,
    plan,
    plannable_config,
)
from chandra.planner.explain import counterfactuals
from chandra.store import load_catalog, parse_name

GIB, MIB = 1 << 30, 1 << 20


def model(name: str, label: str | None = None) -> PlannableModel:
    entry = load_catalog().find(parse_name(name))
    assert entry is not None
    return plannable_config(name, entry.config, label)


def gpus(*sizes: str, like: str = "rtx4090") -> list[Device]:
    _, bandwidth, link = KNOWN_GPUS[like]
    rates = parse_rate(bandwidth), parse_rate(link)
    return [Device(f"gpu:{i}", "assumed", parse_size(size), *rates) for i, size in enumerate(sizes)]


def host(size: str) -> Device:
    return Device("cpu", "cpu", parse_size(size))


def make(name: str, devices: list[Device], label: str | None = None, **wishes: object) -> Plan:
    made = plan(model(name, label), devices, ASSUMED_HOST, Constraints(**wishes))  # type: ignore[arg-type]
    assert all(made.predicted(device.name) <= device.cap for device in devices)
    return made


def layers_on(made: Plan, device: str) -> list[int]:
    return [i for i, part in enumerate(made.layers) if part.device == device]


def whole(made: Plan) -> bool:
    return all(part.placement == "resident" for part in (*made.layers, *made.experts, made.head))


@pytest.mark.parametrize(
    ("name", "context", "mebibytes"),
    [("llama2:7b", 4096, 2048), ("llama2:13b", 4096, 3200), ("llama3:8b", 8192, 1024), ("gemma:2b", 8192, 144)],
)
def test_cache_of_known_models_is_exact(name: str, context: int, mebibytes: int) -> None:
    made = make(name, [*gpus("80GB"), host("64GiB")], context=context)
    assert sum(row.nbytes for row in made.predictions if row.kind == "kv") == mebibytes * MIB


def test_windows_bound_the_cache() -> None:
    """Gemma 3 4B at 128k: full layers hold the context, window layers the window and a chunk."""
    spec = model("gemma3:4b").spec
    groups = group_layers([layer.attention for layer in spec.layers])
    full = [group for group in groups if group.window is None]
    assert kv_bytes(full, "f16", 131072, 512, 16) == 2560 * MIB
    assert kv_bytes(groups, "f16", 131072, 512, 16) == (2560 + 174) * MIB


@pytest.mark.parametrize(
    ("name", "label", "gigabytes"),
    [
        ("llama2:7b", "F16", 13.48),
        ("llama2:7b", "Q8_0", 7.16),
        ("llama2:7b", "Q6_K", 5.53),
        ("llama2:7b", "Q5_K_M", 4.78),
        ("llama2:7b", "Q4_K_M", 4.08),
        ("llama2:7b", "Q4_0", 3.83),
        ("llama2:7b", "Q3_K_M", 3.30),
        ("llama2:7b", "Q2_K", 2.53),
        ("llama3.1:8b", "Q4_K_M", 4.92),
        ("llama3.1:70b", "Q4_K_M", 42.5),
        ("mixtral:8x7b", "Q4_K_M", 28.45),
        ("gemma:2b", "F16", 5.01),
    ],
)
def test_labels_weigh_what_published_files_weigh(name: str, label: str, gigabytes: float) -> None:
    """Sizes of the GGUF files that llama.cpp's quantizer made, which also hold the vocabulary."""
    (sizes,) = model(name, label).variants
    assert sizes.packed.total / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_gemma_on_four_gigabytes() -> None:
    made = make("gemma:2b", [*gpus("4GB", like="t4"), host("16GiB")])
    assert made.format == "Q8_0"
    assert whole(made)
    assert make("gemma:2b", [*gpus("8GB", like="t4"), host("16GiB")]).format == "F16"
    with pytest.raises(DoesNotFit):
        make("gemma:2b", [*gpus("4GB"), host("1GiB")], format="F16")


def test_qwq_on_two_equal_gpus() -> None:
    made = make("qwq:32b", [*gpus("24GiB", "24GiB"), host("64GiB")])
    assert whole(made)
    assert made.format == "Q8_0"
    first, second = layers_on(made, "gpu:0"), layers_on(made, "gpu:1")
    assert first + second == list(range(64))
    assert len(first) - len(second) in (1, 2)  # the head, which is worth 1.6 layers, lies with the second
    assert made.head.device == "gpu:1"


def test_unequal_gpus_get_unequal_shares() -> None:
    fast, slow = gpus("24GiB", like="rtx4090")[0], Device("gpu:1", "assumed", 24 * GIB, 500e9, 12e9)
    made = make("qwq:32b", [fast, slow, host("64GiB")])
    assert whole(made)
    assert len(layers_on(made, "gpu:0")) > 1.2 * len(layers_on(made, "gpu:1"))


def test_a_model_larger_than_two_gpus() -> None:
    """36 GB of weights on 16 + 16 GiB and 16 GiB of RAM."""
    devices = [*gpus("16GiB", "16GiB"), host("16GiB")]
    made = make("llama3.1:70b", devices, "Q4_0", context=4096, modes=("host",))
    assert sum(part.nbytes for part in made.parts()) > 36e9
    runs = [part.device for i, part in enumerate(made.layers) if not i or part.device != made.layers[i - 1].device]
    assert runs == ["cpu", "gpu:0", "gpu:1"]
    assert abs(made.predicted("gpu:0") - made.predicted("gpu:1")) < 1.5 * GIB
    free = make("llama3.1:70b", devices, "Q4_0", context=4096)
    request = [plan.speed.first_token + 256 / plan.speed.decode for plan in (free, made)]
    assert request[0] <= request[1]


def test_llama_7b_on_sixteen_gigabytes() -> None:
    made = make("llama2:7b", [*gpus("16GB", like="t4"), host("64GiB")])
    assert made.format == "F16"
    assert whole(made)
    quantized = make("llama2:7b", [*gpus("16GB", like="t4"), host("64GiB")], "nf4", parallel=4)
    assert whole(quantized)
    assert quantized.speed.decode > made.speed.decode


def test_llama_13b_on_six_gibibytes() -> None:
    """No format of 4 bits fits as a whole: the plan offloads, and says what else could be done."""
    devices = [*gpus("6GiB", like="rtx2060"), host("32GiB")]
    made = make("llama2:13b", devices)
    assert made.format.startswith("Q4")
    assert 10 < len(layers_on(made, "gpu:0")) < 40
    texts = " ".join(counterfactuals(model("llama2:13b"), devices, ASSUMED_HOST, Constraints(), made))
    for change in ("context", "q8_0 cache", "Q2_K weights", "more on gpu:0"):
        assert change in texts


def test_experts_go_to_the_host_first() -> None:
    made = make("qwen3:30b-a3b", [*gpus("12GiB"), host("64GiB")])
    assert made.experts
    assert all(part.placement == "resident" for part in made.layers)
    assert all(part.placement == "host" for part in made.experts)
    on_cpu = make("qwen3:30b-a3b", [*gpus("12GiB"), host("64GiB")], modes=("host",), format=made.format)
    assert made.speed.decode > on_cpu.speed.decode


def test_a_slow_cpu_streams() -> None:
    slow = replace(ASSUMED_HOST, profiles={"cpu": Profile((("F16", Rate(2e9, 5e9)),), 3e-5)})
    made = plan(model("llama2:13b"), [*gpus("6GiB"), host("32GiB")], slow, Constraints(objective="latency"))
    assert {part.placement for part in made.layers} == {"resident", "stream"}


def test_only_a_host_that_computes_keeps_room_for_repacking(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [*gpus("6GiB"), host("32GiB")]
    monkeypatch.setattr("chandra.planner.planner.PIECE", 1 << 40)
    assert whole(make("gemma:2b", devices))
    with pytest.raises(DoesNotFit):
        make("llama2:13b", devices, format="Q8_0")


def test_ranges_are_kept_or_refused() -> None:
    devices = [*gpus("24GiB", "24GiB"), host("64GiB")]
    made = make("qwq:32b", devices, layers={"gpu:1": [(0, 19)]})
    assert layers_on(made, "gpu:1") == list(range(20))
    assert layers_on(made, "gpu:0") == list(range(20, 64))
    middle = make("qwq:32b", devices, layers={"gpu:0": [(0, 19)], "cpu": [(20, 24)]})
    assert layers_on(middle, "cpu") == list(range(20, 25))
    for layers, reason in (
        ({"gpu:2": [(0, 1)]}, "not a device"),
        ({"gpu:0": [(0, 64)]}, "layers 0-63"),
        ({"gpu:0": [(0, 9)], "gpu:1": [(9, 12)]}, "on both"),
        ({"gpu:0": [(0, 9), (20, 29)]}, "gap"),
        ({"gpu:0": [(10, 19)], "gpu:1": [(30, 39)]}, "3 runs"),
    ):
        with pytest.raises(UsageError, match=reason):
            make("qwq:32b", devices, layers=layers)


def test_wishes_are_refused_with_the_reason() -> None:
    devices = [*gpus("24GiB"), host("64GiB")]
    for wish, reason in (
        ({"context": 1 << 20}, "trained for contexts"),
        ({"format": "Q1"}, "not to be had"),
        ({"chunk": 2, "parallel": 4}, "cannot serve"),
    ):
        with pytest.raises(UsageError, match=reason):
            make("llama2:7b", devices, **wish)


def test_what_does_not_fit_names_the_smallest_change() -> None:
    with pytest.raises(DoesNotFit) as refusal:
        make("llama2:7b", [host("4GiB")], context=4096, kv_type="f16")
    assert refusal.value.exit_code == 3
    hint = refusal.value.hint
    assert "--ctx" in hint
    assert "--kv-type q8_0" in hint
    match = re.search(r"with ([0-9.]+ GiB) on cpu", hint)
    assert match is not None
    size = parse_size(match[1])
    assert make("llama2:7b", [Device("cpu", "cpu", size)], context=4096, kv_type="f16")
    with pytest.raises(DoesNotFit):
        make("llama2:7b", [Device("cpu", "cpu", size - 128 * MIB)], context=4096, kv_type="f16")


def test_the_disk_is_used_only_when_allowed() -> None:
    with pytest.raises(DoesNotFit, match="--disk"):
        make("llama2:13b", [host("6GiB")], "Q4_K_M")
    made = make("llama2:13b", [host("6GiB")], "Q4_K_M", disk=8 * GIB)
    assert {part.placement for part in made.layers} >= {"disk"}
    assert sum(part.nbytes for part in made.layers if part.placement == "disk") <= 8 * GIB


def test_swap_space_where_it_pays_and_as_asked_for() -> None:
    def swap(devices: list[Device], **wishes: object) -> int:
        made = make("llama2:7b", devices, "Q4_K_M", context=4096, **wishes)
        return sum(row.nbytes for row in made.predictions if row.kind == "swap")

    cache, big = (
        kv_bytes(group_layers([x.attention for x in model("llama2:7b").spec.layers]), "f16", 4096, 512, 16),
        "24GiB",
    )
    assert swap([*gpus(big), host("32GiB")], kv_type="f16") == cache
    assert 0 < swap([*gpus(big), host("4GiB")], kv_type="f16") <= GIB
    assert swap([*[replace(gpu, link=1e5) for gpu in gpus(big)], host("32GiB")]) == 0  # computing again is faster
    assert swap([host("32GiB")]) == 0
    assert GIB - MIB * 9 <= swap([host("32GiB")], swap=GIB, kv_type="f16") <= GIB
    assert swap([*gpus(big), host("32GiB")], swap=0) == 0
    with pytest.raises(DoesNotFit, match="without --swap"):
        swap([*gpus(big), host("4GiB")], swap=8 * GIB)
