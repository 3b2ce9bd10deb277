"""Fine-tuning measured beside transformers' Trainer."""
