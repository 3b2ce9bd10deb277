"""Checkpoints in the forms of others: transformers, DeepSpeed, torch.distributed.checkpoint."""
