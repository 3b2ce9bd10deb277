"""`palimpsest schema`: the JSON schema of run files, for editors."""

from __future__ import annotations

import json


def main() -> None:
    """Print the JSON schema of run files.

    Editors with a YAML language server complete and explain keys with it: write it to a file, and name that file in
    the first line of a run file, `# yaml-language-server: $schema=run.schema.json`.
    """
    from engine.config.json_schema import run_schema

    print(json.dumps(run_schema(), indent=1))
