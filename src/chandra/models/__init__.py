"""Models: what they are (`ModelSpec`), where their tensors are, and the one decoder that runs them."""

from __future__ import annotations

from chandra.models.arch import ARCHS
from chandra.models.decoder import Decoder, workspace_bytes
from chandra.models.loader import load_decoder, stored_formats
from chandra.models.metadata import read_spec, spec_from_config
from chandra.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, RopeSpec, TensorSpec
from chandra.models.tensors import Source, find_sources, tensor_table
from chandra.models.weights import Backends

__all__ = [
    "ARCHS",
    "AttentionSpec",
    "Backends",
    "Decoder",
    "LayerSpec",
    "MlpSpec",
    "ModelSpec",
    "RopeSpec",
    "Source",
    "TensorSpec",
    "find_sources",
    "load_decoder",
    "read_spec",
    "spec_from_config",
    "stored_formats",
    "tensor_table",
    "workspace_bytes",
]
