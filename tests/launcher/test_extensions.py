"""Build locks: which are stale, and what is said about them."""

import os
import time
from pathlib import Path

import pytest

from engine.errors import EnvironmentProblem
from launcher.extensions import STALE_SECONDS, VARIABLE, prepare_extensions


def lock_in(cache: Path, idle_seconds: float = 0.0) -> Path:
    build = cache / "py311_cpu" / "deepspeed_shm_comm"
    build.mkdir(parents=True)
    (build / "lock").touch()
    for path in (build / "lock", build):
        then = time.time() - idle_seconds
        os.utime(path, (then, then))
    return build / "lock"


def test_a_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    prepare_extensions(tmp_path / "run", environ)
    assert environ == {VARIABLE: str(tmp_path / "run" / "extensions")}


def test_a_users_folder_is_kept(tmp_path: Path) -> None:
    environ = {VARIABLE: str(tmp_path / "cache")}
    prepare_extensions(tmp_path / "run", environ)
    assert environ == {VARIABLE: str(tmp_path / "cache")}


def test_any_lock_in_the_runs_own_folder_is_stale_before_it_starts(tmp_path: Path) -> None:
    lock = lock_in(tmp_path / "extensions")
    with pytest.raises(EnvironmentProblem) as caught:
        prepare_extensions(tmp_path, {})
    assert caught.value.wrong == f"the build lock {lock} was left by a build that was killed (0 minutes idle)"
    assert "would wait for ever" in caught.value.allowed
    assert caught.value.remedy.startswith(f"rm -r {lock.parent} ")


def test_a_lock_that_another_rank_may_hold_is_left_alone(tmp_path: Path) -> None:
    lock = lock_in(tmp_path / "extensions")
    before = lock.stat(), sorted(lock.parent.iterdir())
    prepare_extensions(tmp_path, {}, first=False)
    assert (lock.stat(), sorted(lock.parent.iterdir())) == before


def test_an_old_lock_in_a_shared_folder_is_refused(tmp_path: Path) -> None:
    lock_in(tmp_path / "cache", idle_seconds=STALE_SECONDS + 60)
    with pytest.raises(EnvironmentProblem, match="11 minutes idle"):
        prepare_extensions(tmp_path / "run", {VARIABLE: str(tmp_path / "cache")})


def test_a_build_that_goes_on_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_in(tmp_path / "cache", idle_seconds=STALE_SECONDS + 60)
    (lock.parent / "half.o").touch()  # the compiler is still writing
    told: list[str] = []
    monkeypatch.setattr("launcher.extensions._log.warning", lambda text, *values: told.append(text % values))
    prepare_extensions(tmp_path / "run", {VARIABLE: str(tmp_path / "cache")})
    assert told == [f"somebody is building extensions now ({lock}): ranks that need them wait for it"]
