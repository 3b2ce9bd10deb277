"""`palimpsest checkpoint list` and `verify`, as a user calls them."""

import pytest

from engine.cli import main
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state


@pytest.fixture
def run(tmp_path):
    world = World(layout_of(2, 2, 1), 3, small_model())
    for step in (10, 20):
        world.fill(random_state(world.specs, step))
        world.save(tmp_path / "checkpoints", some_state(step))
    return tmp_path


def test_list_shows_newest_first_with_what_saved_them(run, capsys):
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step-00000020", "step-00000010"]
    for text in (
        "12,800 tokens",
        "MB in 4 files",
        "pipe 2 x data 2 x sequence 1 x tensor 1, ZeRO-3",
        "job job attempt 0",
    ):
        assert text in lines[0]


def test_list_says_what_is_damaged(run, capsys):
    (run / "checkpoints" / "step-00000020" / "manifest.json").unlink()
    assert main(["checkpoint", "list", str(run)]) == 0
    assert "damaged: " in capsys.readouterr().out


def test_verify_tells_whole_from_damaged(run, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole\n") == 2
    damaged = run / "checkpoints" / "step-00000010"
    path = damaged / "stage-00-data-0001-tensor-00.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert main(["checkpoint", "verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert "step-00000020: whole" in out
    assert f"{damaged}: DAMAGED" in out
    assert f"  {path.name}: bytes in optim.exp_avg_sq." in out
    assert main(["checkpoint", "verify", str(damaged)]) == 1
    assert main(["checkpoint", "verify", str(run / "checkpoints" / "step-00000020")]) == 0


def test_a_folder_without_checkpoints_is_one_clear_error(tmp_path, capsys):
    for action in ("list", "verify"):
        assert main(["checkpoint", action, str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert "holds no checkpoint" in error
        assert "to do:" in error
