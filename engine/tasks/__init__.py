"""Tasks: fine-tuning on labelled examples, and its evaluation."""
