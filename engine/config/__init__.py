"""Configuration: frozen typed sections, read from YAML and the command line, checked without torch or a GPU."""
