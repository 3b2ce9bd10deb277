"""Layouts: the rank grid, process groups, tensor and pipeline parallelism, and ZeRO through DeepSpeed."""
