"""`palimpsest continue` as a user calls it: on runs over a fake pipeline, which then go on in the new stage."""

import difflib
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from engine.cli import main
from engine.config.load import load_run, read_tree
from engine.corpus.tokenizer_training import train_tokenizer
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.writer import ShardWriter
from engine.data.tokenizer.folder import tokenizer_hash
from engine.errors import EXIT_DONE
from engine.run_folder import FolderUser
from engine.train.saved_reservoir import frozen_generation
from tests.distributed.runs import LENGTH, run_tree
from tests.engine.train.fake import fake_run, stopped_run, values

STEP_TOKENS = 8 * LENGTH
HEAD = '# the run of the week\nname: "a run"   # quoted\n'


def write_data(folder: Path, corpus: Path, domains: tuple[str, ...] = (), tokenizer: Path | None = None) -> Path:
    """Data as `prepare` writes it, from the corpus's shards; shards of another tokenizer where one is named."""
    for half in ("train", "validation"):
        for domain in domains or ("",):
            target = folder / half / domain
            target.parent.mkdir(parents=True, exist_ok=True)
            if tokenizer is None:
                shutil.copytree(corpus / half, target)
                continue
            with ShardWriter(target, 300, 0, tokenizer_hash(tokenizer)) as writer:
                writer.add(np.arange(40) % 290 + 1)
    return folder


def write_run(path: Path, tree: dict[str, Any]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.write(HEAD)
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump({key: value for key, value in tree.items() if key != "name"}, file)
        file.write("# the end\n")
    return path


def a_run(corpus: Path, tmp_path: Path, steps: int = 4, reservoir: dict[str, Any] | None = None, **stage: Any) -> Path:
    """The file of a run of `steps` steps that is trained to its end."""
    tree = run_tree(corpus, tmp_path / "run")
    if reservoir is not None:
        tree["reservoir"] = reservoir
    tree["stages"][0] |= {"name": "old", "duration": {"steps": steps}} | stage
    assert fake_run(tree).code == EXIT_DONE
    return write_run(tmp_path / "run.yaml", tree)


def call(capsys: Any, *arguments: object, code: int = 0) -> str:
    """Call the command; return what it printed, or its error."""
    got = main(["continue", *map(str, arguments)])
    captured = capsys.readouterr()
    assert got == code, captured.err
    return captured.err if code else captured.out


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A folder with a trained run of a cosine schedule, its file, and new data; copy it before changing it."""
    folder = tmp_path_factory.mktemp("trained")
    a_run(corpus, folder)
    write_data(folder / "new", corpus)
    return folder


def test_an_appended_stage_is_trained_from_where_the_run_stands(corpus, tmp_path, capsys):
    run = a_run(corpus, tmp_path)
    before = run.read_text(encoding="utf-8")
    data = write_data(tmp_path / "new", corpus)
    told = call(capsys, run, "--name", "new", "--data", data, "--tokens", 3 * STEP_TOKENS)
    after = run.read_text(encoding="utf-8")
    diff = list(difflib.ndiff(before.splitlines(keepends=True), after.splitlines(keepends=True)))
    assert {line[0] for line in diff} == {" ", "+"}, "nothing is lost or changed"
    config = load_run(run)
    assert [stage.name for stage in config.stages] == ["old", "new"]
    new = config.stages[1]
    assert (new.data.train, new.data.validation) == (f"{data}/train", {"new": f"{data}/validation"})
    assert (new.sequence_length, new.global_batch_size, new.num_steps) == (LENGTH, 8, 3)
    assert new.data.window_shards == 2, "shards are read as in the stage before"
    for part in ("at step 4", "3 steps of 8 x 16 tokens", "rewarm", "moments are kept", "palimpsest train"):
        assert part in told
    # The outcome 0 of the earlier stage stands in the folder, and the next start goes on all the same.
    run_again = fake_run(read_tree(run))
    assert (run_again.started_at, run_again.state.step, run_again.state.run_stage) == (4, 7, 1)
    rates = values(tmp_path / "run", "learning_rate")
    peak, final = config.optimizer.learning_rate, new.schedule.final_factor
    assert rates[4] == pytest.approx(new.schedule.initial_factor * peak, rel=1e-5), "it goes on from the rate it had"
    assert (rates[5], rates[7]) == (pytest.approx(peak), pytest.approx(final * peak))


@pytest.mark.parametrize(
    ("schedule", "shape", "rate"),
    [
        ({"shape": "cosine"}, "rewarm", 1.0),
        ({"shape": "linear", "final_factor": 0.0}, "rewarm", 1.0),
        ({"shape": "wsd", "decay": 2}, "rewarm", 1.0),
        ({"shape": "infinite", "decay": 2}, "rewarm", 1.0),
        ({"shape": "constant"}, "infinite", 1.0),
        ({"shape": "constant", "learning_rate": 0.5}, "infinite", 50.0),
    ],
)
def test_the_schedule_follows_from_where_the_old_one_ends(corpus, tmp_path, capsys, schedule, shape, rate):
    """`rate`: the new stage's peak, by that of the optimizer."""
    run = a_run(corpus, tmp_path, schedule=schedule)
    call(capsys, run, "--name", "new", "--data", write_data(tmp_path / "new", corpus), "--tokens", 20 * STEP_TOKENS)
    config = load_run(run)
    found, peak = config.stages[1].schedule, config.optimizer.learning_rate
    assert found.shape == shape
    assert found.learning_rate == pytest.approx(rate * peak)
    assert fake_run(read_tree(run)).state.step == 24
    rates = values(tmp_path / "run", "learning_rate")
    if shape == "infinite":
        assert [rates[step] for step in (4, 5, 20)] == pytest.approx([rate * peak] * 3), "no step up or down"
        assert rates[24] < 0.2 * rates[22], "the anneal, in the last tenth"
    else:
        assert found.initial_factor == pytest.approx(rates[4] / peak)
        assert max(rates.values()) == pytest.approx(rates[5]), "1 % of 20 steps, at least one"


def test_a_stage_that_was_ended_before_its_anneal_goes_on_at_the_constant_rate(corpus, tmp_path, capsys):
    """Shortened while it ran: the formula would say that the last steps were annealed; the records know better."""
    tree = run_tree(corpus, tmp_path / "run")
    tree["checkpoint"] = {"every_steps": 2}
    stage = tree["stages"][0] | {"name": "old", "duration": {"steps": 8}, "schedule": {"shape": "wsd", "decay": 3}}
    tree["stages"] = [stage]

    class Stop:
        stop_requested = False

    signals = Stop()

    def prepare(trainer: Any) -> None:
        step = trainer._step
        trainer._step = lambda: (setattr(signals, "stop_requested", trainer.state.step >= 3), step())[1]

    fake_run(tree, prepare, signals=signals)
    stood = values(tmp_path / "run", "learning_rate")
    steps = max(stood)
    run = write_run(tmp_path / "run.yaml", tree)
    data = write_data(tmp_path / "new", corpus)
    told = call(capsys, run, "--name", "new", "--data", data, "--dry-run")
    assert f"{8 - steps} steps up to the end of stage old are trained first" in told
    assert f"{{steps: {steps}}}" in told
    tree["stages"] = [stage | {"duration": {"steps": steps}}]
    write_run(run, tree)
    assert "shape: infinite" in call(capsys, run, "--name", "new", "--data", data, "--dry-run")


def test_a_dry_run_writes_nothing_and_shows_the_stage_that_would_stand_there(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "copy")
    tree = read_tree(trained / "run.yaml")
    run = write_run(tmp_path / "run.yaml", tree | {"folder": str(folder / "run")})
    before = hashes(tmp_path)
    arguments = (run, "--name", "new", "--data", folder / "new", "--tokens", 1000)
    told = call(capsys, *arguments, "--dry-run")
    assert hashes(tmp_path) == before
    shown = YAML(typ="safe", pure=True).load(told.partition("is written):\n")[2])
    call(capsys, *arguments)
    assert read_tree(run)["stages"][1:] == shown


def test_the_new_data_is_passed_once_where_no_length_is_given(corpus, trained, tmp_path, capsys):
    run = write_run(tmp_path / "run.yaml", read_tree(trained / "run.yaml"))
    told = call(capsys, run, "--name", "new", "--data", trained / "new")
    (row,) = [line.split() for line in told.splitlines() if line.split()[:1] == ["new"] and "%" in line]
    assert float(row[-1]) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("named", ["", "train"])
def test_domains_become_sources_and_held_out_sets(corpus, trained, tmp_path, capsys, named):
    data = write_data(tmp_path / "new", corpus, ("law", "medicine"))
    run = write_run(tmp_path / "run.yaml", read_tree(trained / "run.yaml"))
    told = call(capsys, run, "--name", "new", "--data", data / named)
    found = load_run(run).stages[1].data
    assert [(source.name, source.path) for source in found.sources] == [
        (name, f"{data}/train/{name}") for name in ("law", "medicine")
    ]
    assert found.validation == {name: f"{data}/validation/{name}" for name in ("law", "medicine")}
    assert "50.0%" in told


def test_a_link_stays_one_and_the_mode_stays(trained, tmp_path, capsys):
    real = write_run(tmp_path / "real.yaml", read_tree(trained / "run.yaml"))
    real.chmod(0o640)
    link = tmp_path / "run.yaml"
    link.symlink_to("real.yaml")
    call(capsys, link, "--name", "new", "--data", trained / "new")
    assert link.is_symlink()
    assert len(read_tree(real)["stages"]) == 2
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.yaml", "run.yaml"], "nothing is left beside it"


def test_a_file_that_changes_meanwhile_is_left_alone(trained, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run.yaml", read_tree(trained / "run.yaml"))
    from tools import continue_text

    plan_text = continue_text.plan_text

    def edit(planned: Any) -> str:
        run.write_text(run.read_text(encoding="utf-8") + "# somebody else\n", encoding="utf-8")
        return plan_text(planned)

    monkeypatch.setattr(continue_text, "plan_text", edit)
    assert "has changed since" in call(capsys, run, "--name", "new", "--data", trained / "new", code=2)
    assert run.read_text(encoding="utf-8").endswith("# somebody else\n")
    assert len(read_tree(run)["stages"]) == 1


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...], int, tuple[str, ...]]] = {
    "name taken": ({}, ("--name", "old"), 2, ("--name old", "stage of this name")),
    "name with a line break": ({}, ("--name", "a\nb"), 2, ("is no name",)),
    "name with a space at its end": ({}, ("--name", "a "), 2, ("is no name",)),
    "ratio 1": ({}, ("--ratio", "1"), 2, ("--ratio 1", "less than 1")),
    "ratio below 0": ({}, ("--ratio", "-0.1"), 2, ("--ratio -0.1",)),
    "ratio nan": ({}, ("--ratio", "nan"), 2, ("--ratio nan",)),
    "no tokens": ({}, ("--tokens", "0"), 2, ("--tokens 0",)),
    "data missing": ({}, ("--data", "/nowhere"), 1, ("/nowhere", "no folder of token shards")),
    "data empty": ({}, ("--data", ""), 2, ("--data is empty",)),
    "data url without a cache": ({}, ("--data", "s3://bucket/data"), 2, ("is a URL", "cache:")),
    "no file": ({"file": None}, (), 2, ("cannot be read",)),
    "no mapping": ({"file": "- a\n- b\n"}, (), 2, ("holds list",)),
    "no yaml": ({"file": "a: [\n"}, (), 2, ("not valid YAML",)),
    "unknown key": ({"key": ("stagse", 3)}, (), 2, ("unknown key stagse",)),
    "stages absent": ({"drop": "stages"}, (), 2, ("stages is missing",)),
    "stages empty": ({"key": ("stages", [])}, (), 2, ("stages",)),
    "stages included": ({"include": True}, (), 2, ("does not stand in this file", "by hand")),
    "folder of another run": ({"key": ("seed", 99)}, (), 2, ("belongs to another run", "seed")),
    "folder without a checkpoint": ({"key": ("folder", "/nowhere/run")}, (), 1, ("no checkpoint",)),
    "completed stage changed": ({"stage": {"global_batch_size": 16}}, (), 2, ("global_batch_size",)),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_gets_one_clear_error_and_changes_nothing(trained, tmp_path, capsys, kind):
    change, options, code, parts = BAD[kind]
    tree = read_tree(trained / "run.yaml")
    tree |= dict([change["key"]]) if "key" in change else {}
    tree["stages"] = [stage | change.get("stage", {}) for stage in tree["stages"]]
    if "drop" in change:
        del tree[change["drop"]]
    run = write_run(tmp_path / "run.yaml", tree)
    if change.get("include"):
        run.rename(tmp_path / "base.yaml")
        run.write_text("include: base.yaml\n", encoding="utf-8")
    if "file" in change:
        run.unlink()
        if change["file"] is not None:
            run.write_text(change["file"], encoding="utf-8")
    before = hashes(tmp_path) | hashes(trained)
    chosen = {"--name": "new", "--data": str(trained / "new")} | dict(zip(options[::2], options[1::2], strict=True))
    error = call(capsys, run, *(part for pair in chosen.items() for part in pair), code=code)
    for part in parts:
        assert part in error
    assert hashes(tmp_path) | hashes(trained) == before


def test_data_of_another_tokenizer_is_refused(corpus, trained, tmp_path, capsys):
    train_tokenizer(["other text 12345"] * 9, tmp_path / "tokenizer", "bpe", 300)
    data = write_data(tmp_path / "other", corpus, tokenizer=tmp_path / "tokenizer")
    run = write_run(tmp_path / "run.yaml", read_tree(trained / "run.yaml"))
    error = call(capsys, run, "--name", "new", "--data", data, code=1)
    assert "were written with tokenizer" in error
    assert len(read_tree(run)["stages"]) == 1


def test_a_held_out_set_of_the_same_name_is_refused(corpus, tmp_path, capsys):
    validation = str(corpus / "validation")
    run = a_run(corpus, tmp_path, data={"train": str(corpus / "train"), "validation": {"new": validation}})
    data = write_data(tmp_path / "new", corpus)
    assert "held-out set 'new' already" in call(capsys, run, "--name", "new", "--data", data, code=2)


def test_a_run_that_goes_on_is_left_alone(trained, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run.yaml", read_tree(trained / "run.yaml"))
    monkeypatch.setattr("engine.train.continuation.current_user", lambda path: FolderUser("job", 0, "node1", 77))
    error = call(capsys, run, "--name", "new", "--data", trained / "new", code=1)
    assert "still going on" in error
    assert "77" in error
    assert len(read_tree(run)["stages"]) == 1


def test_a_file_that_is_read_only_is_left_alone_and_shown_by_a_dry_run(trained, tmp_path, capsys):
    run = write_run(tmp_path / "run.yaml", read_tree(trained / "run.yaml"))
    run.chmod(0o444)
    assert "read-only" in call(capsys, run, "--name", "new", "--data", trained / "new", code=2)
    assert "name: new" in call(capsys, run, "--name", "new", "--data", trained / "new", "--dry-run")
    assert os.access(run, os.R_OK)


def test_replay_of_the_earlier_data(corpus, tmp_path, capsys):
    """A quarter of 8 samples in each of 4 steps; the earlier data is what the run was trained on."""
    run = a_run(corpus, tmp_path)
    data = write_data(tmp_path / "new", corpus, ("law",))
    told = call(capsys, run, "--name", "new", "--data", data, "--ratio", 0.25, "--tokens", 4 * STEP_TOKENS)
    num_tokens = TokenDataset(corpus / "train").index.num_tokens
    (row,) = [line.split() for line in told.splitlines() if line.split()[:1] == ["replay"]]
    assert row == ["replay", str(STEP_TOKENS), "25.0%", f"{STEP_TOKENS / num_tokens:.2f}"]
    replay = load_run(run).stages[1].replay
    assert replay is not None
    assert (replay.ratio, replay.source) == (0.25, str(corpus / "train"))
    assert fake_run(read_tree(run)).state.step == 8
    assert values(tmp_path / "run", "replay_samples")[8] == 8
    capsys.readouterr()
    assert main(["ledger", str(run), "--no-check", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert stages[1]["tokens"] == {"law": 3 * STEP_TOKENS, "replay": STEP_TOKENS}


def test_replay_of_the_runs_reservoir(corpus, tmp_path, capsys):
    """Which has documents of all that the run was trained on, of several data sets, too."""
    sources = [{"name": name, "path": str(corpus / name)} for name in ("train", "validation")]
    run = a_run(corpus, tmp_path, reservoir={"rows": 1000}, data={"sources": sources})
    data = write_data(tmp_path / "new", corpus, ("law",))
    told = call(capsys, run, "--name", "new", "--data", data, "--ratio", 0.25, "--tokens", 4 * STEP_TOKENS)
    config = load_run(run)
    replay = config.stages[1].replay
    assert replay is not None
    assert (replay.ratio, replay.source) == (0.25, None)
    generation = frozen_generation(config, 1)
    assert generation is not None
    (row,) = [line.split() for line in told.splitlines() if line.split()[:1] == ["replay"]]
    assert row == ["replay", str(STEP_TOKENS), "25.0%", f"{STEP_TOKENS / generation.num_tokens:.2f}"]
    assert main(["inspect-data", str(run)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "replay" in line.split()]
    assert f"{generation.num_tokens:,}" in row
    assert fake_run(read_tree(run)).state.step == 8
    assert values(tmp_path / "run", "replay_samples")[8] == 8
    capsys.readouterr()
    assert main(["ledger", str(run), "--no-check", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert stages[1]["tokens"] == {"law": 3 * STEP_TOKENS, "replay": STEP_TOKENS}
    assert main(["inspect-data", str(run)]) == 0
    assert row in capsys.readouterr().out, "as before: the checkpoints name what the stage replays"


def test_a_reservoir_that_is_empty_is_not_replayed(corpus, tmp_path, capsys):
    """It was switched on when the run was done: its data is replayed."""
    run = a_run(corpus, tmp_path)
    write_run(run, read_tree(run) | {"reservoir": {"rows": 1000}})
    data = write_data(tmp_path / "new", corpus, ("law",))
    call(capsys, run, "--name", "new", "--data", data, "--ratio", 0.25)
    replay = load_run(run).stages[1].replay
    assert replay is not None
    assert replay.source == str(corpus / "train")


def test_a_reservoir_is_told_before_it_is_known(corpus, tmp_path, capsys):
    """The run stands inside of its first stage."""
    tree = run_tree(corpus, tmp_path / "run")
    tree["reservoir"] = {"rows": 1000}
    stopped_run(tree, 2)
    run = write_run(tmp_path / "run.yaml", tree)
    data = write_data(tmp_path / "new", corpus, ("law",))
    told = call(capsys, run, "--name", "new", "--data", data, "--ratio", 0.25)
    assert "known when the stage begins" in told
    assert main(["inspect-data", str(run)]) == 0
    assert "replays from the run's reservoir, which is known when it begins" in capsys.readouterr().out


def test_several_earlier_data_sets_are_not_replayed_by_guess(corpus, tmp_path, capsys):
    sources = [{"name": name, "path": str(corpus / name)} for name in ("train", "validation")]
    run = a_run(corpus, tmp_path, data={"sources": sources})
    data = write_data(tmp_path / "new", corpus)
    error = call(capsys, run, "--name", "new", "--data", data, "--ratio", 0.25, code=2)
    assert "2 data sets" in error
    assert "replay: {ratio: R, source: DIR}" in error
