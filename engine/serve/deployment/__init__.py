"""Formats that models are deployed in: ONNX, GGUF and int8, each read again by its reader and held to a loss."""
