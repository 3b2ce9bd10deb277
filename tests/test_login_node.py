"""Commands that run on a login node, where torch may be missing and processes are short of memory."""

import subprocess
import sys

from tests.readme import REPOSITORY
from tests.sources import dotted, sources

WITHOUT_TORCH = (
    "engine/plan/",
    "engine/config/",
    "launcher/",
    "engine/cli.py",
    "engine/run_folder.py",
    "engine/atomic.py",
    "engine/redact.py",
    "engine/outcome.py",
    "engine/errors.py",
    "engine/logs.py",
    "engine/output.py",
    "engine/heartbeat.py",
)
WITHOUT_TORCH_TOOLS = ("tools/plan.py", "tools/plan_tables.py", "tools/launch.py", "tools/train.py")


def test_what_a_login_node_runs_imports_no_torch() -> None:
    """In a fresh interpreter: importing all of it leaves torch and other heavy packages out."""
    modules = [dotted(source) for source in sources() if source.startswith(WITHOUT_TORCH)]
    modules += [dotted(source) for source in WITHOUT_TORCH_TOOLS]
    heavy = ("torch", "deepspeed", "transformers", "datasets", "pandas", "pyarrow", "matplotlib", "numpy")
    script = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"
