"""Random models, machines and wishes for the planner's tests."""

from __future__ import annotations

import random

from chandra.memory.device import Device
from chandra.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec
from chandra.planner import Constraints, Machine, PlannableModel, Profile, Rate, machine_with
from chandra.planner.kernels import PLAIN
from chandra.planner.mixes import LABELS
from chandra.planner.sizes import sizes_as

MIB = 1 << 20


def random_spec(rng: random.Random) -> ModelSpec:
    """A small model, in shapes as the real ones have them: windows in some layers, experts in some models."""
    head_dim = rng.choice([32, 64, 80, 128])
    kv_heads = rng.choice([1, 2, 4])
    heads = kv_heads * rng.choice([1, 2, 4])
    window, period = rng.choice([None, 64, 1024]), rng.choice([1, 2, 6])
    experts = rng.choice([0, 0, 0, 8, 16])
    intermediate = 32 * rng.randint(4, 40)
    layers = []
    for index in range(rng.randint(1, 14)):
        attention = AttentionSpec(heads, kv_heads, head_dim, 1.0, window if (index + 1) % period else None)
        mlp = MlpSpec(intermediate, "silu", num_experts=experts, experts_per_token=min(experts, 2))
        layers.append(LayerSpec(attention, mlp))
    vocab, hidden = rng.choice([1000, 32000, 100000]), 64 * rng.randint(2, 20)
    longest = rng.choice([512, 2048, 8192, 32768])
    return ModelSpec("llama", vocab, hidden, tuple(layers), longest, 1e-6, tied_embeddings=rng.random() < 0.5)


def random_model(rng: random.Random) -> PlannableModel:
    spec = random_spec(rng)
    labels = LABELS if rng.random() < 0.5 else rng.sample(LABELS, 1)
    return PlannableModel("model", spec, tuple(sizes_as(spec, label, PLAIN) for label in labels))


def random_devices(rng: random.Random, model: PlannableModel) -> list[Device]:
    """Up to three GPUs (virtual ones, for these have no context to pay for), whose sizes are about what is needed."""
    whole = model.variants[0].packed.total + 4 * MIB
    devices = []
    for index in range(rng.randint(0, 3)):
        cap, bandwidth, link = int(whole * rng.uniform(0.05, 1.2)), rng.choice([3e11, 1e12]), rng.choice([1.2e10, 6e10])
        twin = devices and rng.random() < 0.3
        name = f"virtual:{index}"
        devices.append(
            Device(name, "virtual", devices[-1].cap, devices[-1].bandwidth, devices[-1].link)
            if twin
            else Device(name, "virtual", cap, bandwidth, link)
        )
    return [*devices, Device("cpu", "cpu", int(whole * rng.uniform(0.05, 2.5)))]


def random_machine(rng: random.Random, devices: list[Device]) -> Machine:
    host = Profile((("F16", Rate(rng.choice([1e10, 5e10]), rng.choice([1e11, 1e12]))),), 2e-5, None, MIB)
    fast = {d.name: Profile((("F16", Rate(d.bandwidth or 1, 1e13)),), 4e-6, d.link) for d in devices if d.name != "cpu"}
    return machine_with(Machine({"cpu": host, **fast}, 1e9), devices)


def random_constraints(rng: random.Random, model: PlannableModel, devices: list[Device]) -> Constraints:
    """Most are left open."""
    count, layers = model.spec.num_layers, {}
    if rng.random() < 0.15:
        first = rng.randrange(count)
        layers[rng.choice(devices).name] = [(first, rng.randrange(first, count))]

    def sometimes(value: object, share: float = 0.25) -> object:
        return value if rng.random() < share else None

    parallel = sometimes(rng.randint(1, 6))
    return Constraints(
        context=sometimes(rng.randint(1, model.spec.max_position)),
        parallel=parallel,
        objective=rng.choice(["quality", "quality", "latency", "throughput"]),
        kv_type=sometimes(rng.choice(["f16", "f32", "bf16", "q8_0", "q4_0"] if not _odd(model) else ["f16", "f32"])),
        format=sometimes(rng.choice(model.variants).label),
        chunk=sometimes(rng.choice([8, 32, 100, 512])),
        layers=layers,
        reserve=sometimes(rng.randint(0, MIB)) or 0,
        swap=sometimes(rng.randint(0, MIB)),
        disk=sometimes(rng.randint(1, model.variants[0].packed.total), 0.15) or 0,
    )


def _odd(model: PlannableModel) -> bool:
    return bool(model.spec.layers[0].attention.head_dim % 32)
