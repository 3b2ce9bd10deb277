"""Damage to a file of a checkpoint."""

from pathlib import Path

FILE = "stage-00-data-0001-tensor-00.safetensors"


def harm(path: Path) -> None:
    """Flip a bit of the last byte."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
