"""Plan: torch-free arithmetic over a configuration; what a layout costs, what composes, and why not."""
