"""The engine: continuous batching of sequences over one decoder and one KV cache. It sees token ids only."""

from __future__ import annotations

from chandra.engine.config import EngineConfig
from chandra.engine.engine import Counters, Engine, Output
from chandra.engine.pressure import Pressure, Step
from chandra.engine.sampler import TokenLogprobs
from chandra.engine.sequence import FinishReason

__all__ = ["Counters", "Engine", "EngineConfig", "FinishReason", "Output", "Pressure", "Step", "TokenLogprobs"]
