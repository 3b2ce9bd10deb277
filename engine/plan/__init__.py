"""Plan: torch-free arithmetic over a configuration: the cost of a layout, valid layouts, and rules against others."""
