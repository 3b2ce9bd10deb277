"""The README's lines from a user's own text to a model, as typed into a shell."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.readme import REPOSITORY, section


def test_its_first_lines_lead_from_text_to_a_model(tmp_path: Path) -> None:
    """On prose of the standard library; only the activation and the number of steps differ."""
    text = tmp_path / "my-text"
    text.mkdir()
    for name in ("argparse", "json/decoder", "random", "statistics", "typing", "zipfile"):
        source = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
        (text / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    shown = section("From your own text to a model").partition("```console\n")[2].partition("```")[0]
    lines = shown.replace("source .venv/bin/activate", f"PATH={Path(sys.executable).parent}:$PATH")
    lines = lines.replace("steps: 200", "steps: 6").replace("warmup: 20", "warmup: 2")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euc", lines], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my" / "model" / "model.safetensors").is_file()
    assert "Once upon a time" in done.stdout
