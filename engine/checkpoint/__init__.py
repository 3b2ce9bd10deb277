"""Layout-free checkpoints: saved without a gather, committed atomically, verified by hash, loaded into any layout."""
