import pytest

from engine.errors import ConfigError, EnvironmentProblem
from engine.serve.new_folder import new_folder


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    output = tmp_path / "deep" / "out"
    with new_folder(output) as partial:
        (partial / "file").write_text("x")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["file"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "file").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as partial:
        fail(partial)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("x")
    with new_folder(tmp_path / "out") as partial:
        assert not list(partial.iterdir())
        (partial / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_a_second_writer_is_refused_and_disturbs_nothing(tmp_path):
    with new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        with pytest.raises(ConfigError, match="is being written by another process"), new_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_a_resumable_folder_keeps_what_was_left_and_what_an_interrupt_leaves(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("x")

    def interrupted(folder):
        assert [path.name for path in folder.iterdir()] == ["half"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", resumable=True) as partial:
        interrupted(partial)
    with new_folder(tmp_path / "out", resumable=True) as partial:
        assert [path.name for path in partial.iterdir()] == ["half"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_there_stays(tmp_path):
    (tmp_path / "file").write_text("x")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="exists and holds something already"), new_folder(taken):
            pass
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty"):
        pass
    with pytest.raises(EnvironmentProblem, match="cannot be written"), new_folder(tmp_path / "file" / "below"):
        pass
