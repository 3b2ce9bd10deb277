"""Sources of weights: tensors by name, of which any rows can be read alone."""

from engine.checkpoint.interchange.sources.checkpoint import CheckpointSource
from engine.checkpoint.interchange.sources.memory import MemorySource
from engine.checkpoint.interchange.sources.safetensors_folder import SafetensorsFolder
from engine.checkpoint.interchange.sources.source import Source, check_source, read_parameter, unknown

__all__ = [
    "CheckpointSource",
    "MemorySource",
    "SafetensorsFolder",
    "Source",
    "check_source",
    "read_parameter",
    "unknown",
]
