"""`palimpsest checkpoint` as a user calls it: on folders, and on what lies behind a URL."""

import json
import shutil
from dataclasses import dataclass

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import manifest_json
from engine.checkpoint.compare import Opened, compare
from engine.checkpoint.folder import remove
from engine.checkpoint.load import read_weights
from engine.checkpoint.storage import location_of
from engine.cli import main
from engine.errors import CheckpointError
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model, some_state
from tests.engine.models.tiny import random_weights, twin
from tests.engine.serve.runs import run_config, save
from tests.tools.damage import FILE, harm


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


@pytest.fixture(params=["file", "memory"])
def url(request, run):
    """The run behind a URL, with its metrics."""
    (run / "metrics.jsonl").write_text('{"step": 10, "validation_loss": 1.0}\n{"step": 20, "validation_loss": 2.0}\n')
    if request.param == "file":
        yield f"file://{run}"
        return
    memory = fsspec.filesystem("memory")
    memory.put(str(run), "/run", recursive=True)
    yield "memory://run"
    memory.rm("/run", recursive=True)


def test_urls_are_listed_and_verified(url, run, capsys):
    assert main(["checkpoint", "list", url]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step-00000020", "step-00000010"]
    assert main(["checkpoint", "verify", url]) == 0
    assert capsys.readouterr().out.count(": whole\n") == 2
    path = f"{url}/checkpoints/step-00000010/{FILE}"
    file_system, inside = fsspec.core.url_to_fs(path)
    raw = bytearray(file_system.cat_file(inside))
    raw[-1] ^= 1
    file_system.pipe_file(inside, bytes(raw))
    assert main(["checkpoint", "verify", url]) == 1
    assert f"{FILE}: bytes in optim.exp_avg_sq." in capsys.readouterr().out


def test_weights_behind_a_url_are_those_on_the_disk(url, run):
    here = read_weights(run / "checkpoints" / "step-00000020")
    there = read_weights(location_of(f"{url}/checkpoints/step-00000020"))
    assert here.keys() == there.keys()
    assert all((here[name] == there[name]).all() for name in here)


def test_prune_says_what_it_would_do_and_does_it_when_told(url, run, capsys):
    assert main(["checkpoint", "prune", url, "--keep-last", "1"]) == 0
    out = capsys.readouterr().out
    assert "step-00000020 is the newest that verifies" in out
    assert "step-00000010  would be removed" in out
    assert "1 of 2 stay; --yes removes the others" in out
    main(["checkpoint", "list", url])
    assert "step-00000010" in capsys.readouterr().out
    assert main(["checkpoint", "prune", url, "--keep-last", "1", "--keep-best", "1", "--yes"]) == 0
    assert "2 of 2 stay" in capsys.readouterr().out, "the one at step 10 is the best"
    assert main(["checkpoint", "prune", f"{url}/checkpoints", "--keep-last", "1", "--yes"]) == 0
    assert "step-00000010  removed" in capsys.readouterr().out
    main(["checkpoint", "list", url])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step-00000020"]


def test_prune_keeps_what_it_cannot_judge(run, capsys):
    assert main(["checkpoint", "prune", str(run), "--keep-best", "1"]) == 1
    assert "no validation_loss in" in capsys.readouterr().err
    harm(run / "checkpoints" / "step-00000020" / FILE)
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1", "--yes"]) == 0
    assert "2 of 2 stay" in capsys.readouterr().out, "the newest is damaged, so the other one is kept"
    harm(run / "checkpoints" / "step-00000010" / FILE)
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1", "--yes"]) == 1
    assert "nothing is removed" in capsys.readouterr().err


def removed_while_read(monkeypatch, run, doomed, commit=None):
    """Has a live run remove a checkpoint once its manifest has been read, and commit another one."""
    read, left = manifest_json.read, [doomed]

    def reading(folder):
        manifest = read(folder)
        if left and folder.name == left[0].name:
            left.pop()
            remove(doomed)
            if commit:
                commit()
        return manifest

    monkeypatch.setattr(manifest_json, "read", reading)


@pytest.mark.parametrize("action", ["list", "verify"])
def test_what_a_live_run_removes_is_not_damaged(run, capsys, monkeypatch, action):
    removed_while_read(monkeypatch, run, run / "checkpoints" / "step-00000010")
    assert main(["checkpoint", action, str(run)]) == 0
    out = capsys.readouterr().out
    assert "step-00000020" in out
    assert "step-00000010" not in out


@pytest.mark.parametrize("action", ["list", "verify", "prune"])
def test_where_all_that_was_found_is_removed_the_newer_ones_are_read(run, tmp_path, capsys, monkeypatch, action):
    checkpoints = run / "checkpoints"
    remove(checkpoints / "step-00000010")
    world = World(layout_of(2, 2, 1), 3, small_model())

    def commit():
        world.fill(random_state(world.specs, 30))
        world.save(checkpoints, some_state(30))

    removed_while_read(monkeypatch, run, checkpoints / "step-00000020", commit)
    assert main(["checkpoint", action, str(run)]) == 0
    out = capsys.readouterr().out
    assert "step-00000030" in out
    assert "DAMAGED" not in out
    assert "damaged" not in out


def test_one_that_is_saved_anew_meanwhile_is_read_again(run, tmp_path, capsys, monkeypatch):
    """A rollback saves its step over the same step; files of the two are of different sizes.

    The folder stays the same inode, as a file system may have it that gives a freed one to the next folder.
    """
    world = World(layout_of(1, 1, 1), 3, small_model())
    saved, anew = run / "checkpoints" / "step-00000020", tmp_path / "anew"
    world.fill(random_state(world.specs, 20))
    world.save(anew, some_state(20))
    read, left = manifest_json.read, [saved]

    def reading(folder):
        manifest = read(folder)
        if left and folder.name == saved.name:
            left.pop()
            for path in saved.iterdir():
                path.unlink()
            for path in (anew / saved.name).iterdir():
                path.rename(saved / path.name)
        return manifest

    monkeypatch.setattr(manifest_json, "read", reading)
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole\n") == 2


def test_one_under_the_name_of_another_step_is_damaged(run, capsys):
    wrong = run / "checkpoints" / "step-00000030"
    shutil.copytree(run / "checkpoints" / "step-00000020", wrong)
    assert main(["checkpoint", "list", str(run)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("step-00000030  damaged: ")
    assert first.endswith("it is of step 20, and the folder's name says step 30")
    assert main(["checkpoint", "verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert f"{wrong}: DAMAGED\n  manifest.json: it is of step 20" in out
    assert out.count(": whole\n") == 2
    assert main(["checkpoint", "diff", str(wrong), str(run)]) == 1
    assert "to do: rename the folder" in capsys.readouterr().err
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1", "--yes"]) == 0
    assert "step-00000020 is the newest that verifies" in capsys.readouterr().out


def test_one_under_a_name_without_a_step_is_read_as_it_is(run, tmp_path, capsys, monkeypatch):
    kept = tmp_path / "best model"
    shutil.copytree(run / "checkpoints" / "step-00000020", kept)
    (tmp_path / "latest").symlink_to(run / "checkpoints" / "step-00000020")
    for name in (str(kept), f"file://{kept}".replace(" ", "%20"), str(tmp_path / "latest")):
        assert main(["checkpoint", "list", name]) == 0
        assert "12,800 tokens" in capsys.readouterr().out
        assert main(["checkpoint", "verify", name]) == 0
        assert main(["checkpoint", "diff", name, str(run)]) == 0
    monkeypatch.chdir(kept)
    capsys.readouterr()
    assert main(["checkpoint", "list", "."]) == 0
    assert capsys.readouterr().out.startswith("best model  12,800 tokens")


@pytest.mark.parametrize("entered", ["run", "checkpoints", "link", "link to checkpoints", "checkpoints elsewhere"])
def test_prune_finds_the_metrics_of_the_run(run, tmp_path, capsys, monkeypatch, entered):
    (run / "metrics.jsonl").write_text('{"step": 10, "validation_loss": 1.0}\n{"step": 20, "validation_loss": 2.0}\n')
    aside = tmp_path / "aside"
    aside.mkdir()
    (aside / "metrics.jsonl").write_text('{"step": 20, "validation_loss": 1.0}\n')  # of another run
    place = run if entered == "run" else run / "checkpoints"
    if entered.startswith("link"):
        (aside / "ckpts").symlink_to(run if entered == "link" else place)
        place = aside / "ckpts"
    elif entered == "checkpoints elsewhere":
        place.rename(aside / "moved")
        place.symlink_to(aside / "moved")
    options = ["--keep-last", "1", "--keep-best", "1"]
    assert main(["checkpoint", "prune", str(place), *options]) == 0
    assert "2 of 2 stay" in capsys.readouterr().out, "the one at step 10 is the best"
    monkeypatch.chdir(place)
    monkeypatch.setenv("PWD", str(place))  # as the shell's cd sets it
    for name in (".", "../" + place.name):
        if (place / ".." / place.name).exists() or name == ".":
            assert main(["checkpoint", "prune", name, *options]) == 0
            assert "2 of 2 stay" in capsys.readouterr().out


def test_diff_names_the_largest_differences(run, url, capsys):
    first, second = (f"{url}/checkpoints/step-000000{step}" for step in (10, 20))
    assert main(["checkpoint", "diff", first, str(run / "checkpoints" / "step-00000010")]) == 0
    assert "45 of 45 tensors are bitwise equal" in capsys.readouterr().out
    assert main(["checkpoint", "diff", first, second, "--limit", "3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:] == ["... and 42 more", "0 of 45 tensors are bitwise equal"]
    shown = [float(line.split()[1]) for line in lines[:3]]
    assert shown == sorted(shown, reverse=True)


@dataclass(frozen=True)
class Held:
    """Weights in memory, as the other side of a comparison."""

    weights: dict[str, torch.Tensor]

    @property
    def names(self) -> dict[str, bool]:
        return dict.fromkeys(self.weights, True)

    def states(self, name: str) -> tuple[str, ...]:
        return ("model",)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.weights[name].shape)

    def rows(self, name: str, state: str, first: int, end: int) -> torch.Tensor:
        return self.weights[name][first:end]


def test_diff_says_what_only_one_side_has_and_finds_one_bit(run, tmp_path):
    path = run / "checkpoints" / "step-00000010"
    weights = read_weights(path)
    assert not any(one.num_different for one in compare(Opened(path), Held(weights)))
    weights["final_norm.weight"][2] += 0.5
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:-1]
    weights["extra"] = weights.pop("layers.0.ffn.down_proj.bias")
    found = {one.key: one for one in compare(Opened(path), Held(weights))}
    one = found["model.final_norm.weight"]
    assert (one.largest, one.num_different, one.numel) == (0.5, 1, 6)
    assert found["model.embed_positions.weight"].problem == "(7, 6) in the first, (6, 6) in the second"
    assert found["model.extra"].problem == "only in the second"
    assert found["model.layers.0.ffn.down_proj.bias"].problem == "only in the first"
    assert sum(bool(one.problem or one.num_different) for one in found.values()) == 4


@pytest.mark.parametrize(
    ("form", "name", "theirs"),
    [
        ("gpt2", "final_norm.weight", "transformer.ln_f.weight"),
        ("bert", "embed_norm.weight", "bert.embeddings.LayerNorm.weight"),
        ("roberta", "head_norm.bias", "lm_head.layer_norm.bias"),
        ("t5", "encoder_norm.weight", "encoder.final_layer_norm.weight"),
        ("t5-v1.1", "final_norm.weight", "decoder.final_layer_norm.weight"),
    ],
)
def test_diff_with_a_hugging_face_folder(tmp_path, capsys, form, name, theirs):
    config = run_config(tmp_path / "run", form, tmp_path)
    save(config, step=5, seed=0)
    weights = random_weights(config.model, 0)
    model, folder = twin(config.model, weights), tmp_path / "theirs"
    model.save_pretrained(folder)
    command = ["checkpoint", "diff", str(config.folder), str(folder)]
    assert main(command) == 0
    assert f"{len(weights)} of {len(weights)} tensors are bitwise equal" in capsys.readouterr().out
    changed = model.get_parameter(theirs)
    changed.data[0] = weights[name][0] + 0.25
    model.save_pretrained(folder)
    assert main(command) == 1
    assert f"model.{name}  2.500e-01  in 1 of {changed.numel()} elements" in capsys.readouterr().out


def test_diff_tells_what_a_hugging_face_folder_lacks_and_has_besides(tmp_path, capsys):
    config = run_config(tmp_path / "run", "llama", tmp_path)
    save(config, step=5, seed=0)
    folder = tmp_path / "theirs"
    twin(config.model, random_weights(config.model, 0)).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.9.weight"] = state.pop("model.norm.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    command = ["checkpoint", "diff", str(config.folder), str(folder)]
    assert main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "model.final_norm.weight  only in the first" in lines
    assert "model.model.layers.9.weight  only in the second" in lines

    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 5}))
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "layers.4.attention_norm.weight  only in the configuration of the second: no file holds it" in out


def test_urls_that_cannot_be_opened_say_what_is_missing(capsys):
    assert main(["checkpoint", "list", "nonsense://bucket/run"]) == 1
    error = capsys.readouterr().err
    assert "nonsense" in error
    assert "to do:" in error
    with pytest.raises(CheckpointError, match="nonsense"):
        location_of("nonsense://bucket/run")


def test_a_remote_file_that_is_cut_short_is_damage(run, capsys):
    memory = fsspec.filesystem("memory")
    memory.put(str(run), "/cut", recursive=True)
    path = f"/cut/checkpoints/step-00000020/{FILE}"
    memory.pipe_file(path, memory.cat_file(path)[:-8])
    try:
        assert main(["checkpoint", "verify", "memory://cut"]) == 1
        assert f"{FILE}: " in capsys.readouterr().out
        assert main(["checkpoint", "diff", "memory://cut", str(run)]) == 1
        assert "the manifest says" in capsys.readouterr().err
    finally:
        memory.rm("/cut", recursive=True)
