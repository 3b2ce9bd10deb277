"""Checkpoints of ours in the formats of DeepSpeed and torch, and back: what others read of them, and what must not run.

`convert` is called as users do. Independent readers: torch.distributed.checkpoint.load and DeepSpeed's zero_to_fp32.
"""

from __future__ import annotations

import json
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.interchange.huggingface import to_huggingface
from engine.checkpoint.interchange.initial import open_source
from engine.checkpoint.manifest import WEIGHT
from engine.checkpoint.verify import verify
from engine.cli import main
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE, CheckpointError
from tests.engine.checkpoint.interchange.formats import MOMENTS, STEP, check_equal, save_run, states_of


def convert(source: Path, output: Path, *options: str) -> int:
    return main(["convert", str(source), "--output", str(output), *options])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Any:
    """Run folder, configuration and states of a model with fused and transposed projections."""
    folder = tmp_path_factory.mktemp("gpt2") / "run"
    config, states = save_run(folder, "gpt2")
    return folder, config, states


@pytest.mark.parametrize("names", ["ours", "huggingface"])
@pytest.mark.parametrize("to", ["dcp", "universal", "deepspeed"])
def test_ours_comes_back_with_its_moments(run, tmp_path, to, names):
    folder, _, states = run
    assert convert(folder, tmp_path / to, "--to", to, "--with-optimizer", "--names", names) == EXIT_DONE
    assert convert(tmp_path / to, tmp_path / "back", "--with-optimizer", "--shard-size", "60KB") == EXIT_DONE
    (path,) = (tmp_path / "back" / "checkpoints").glob("step-*")
    assert path.name == f"step-{STEP:08d}"
    assert len(list(path.glob("*.safetensors"))) > 1
    assert not verify(path)
    check_equal(states_of(path), states)


def test_weights_alone_are_the_default_and_further_formats_need_no_detour(run, tmp_path):
    folder, _, states = run
    assert convert(folder, tmp_path / "dcp", "--to", "dcp") == EXIT_DONE
    assert convert(tmp_path / "dcp", tmp_path / "ds", "--to", "deepspeed") == EXIT_DONE
    assert convert(tmp_path / "ds", tmp_path / "back") == EXIT_DONE
    check_equal(states_of(tmp_path / "back" / "checkpoints" / "step-00000000"), {WEIGHT: states[WEIGHT]})
    assert convert(tmp_path / "ds", tmp_path / "no", "--to", "universal") == EXIT_FAILURE
    assert convert(tmp_path / "ds", tmp_path / "no", "--with-optimizer") == EXIT_FAILURE
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("form", ["llama", "bert", "t5-v1.1"])
def test_forms_with_fused_blocks_and_several_stacks_come_back(tmp_path, form):
    _, states = save_run(tmp_path / "run", form)
    options = ("--with-optimizer", "--names", "huggingface")
    assert convert(tmp_path / "run", tmp_path / "dcp", "--to", "dcp", *options) == EXIT_DONE
    assert convert(tmp_path / "dcp", tmp_path / "back", "--with-optimizer") == EXIT_DONE
    check_equal(states_of(tmp_path / "back" / "checkpoints" / f"step-{STEP:08d}"), states)


def test_deepspeeds_zero_to_fp32_reads_what_is_written(run, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder, config, states = run
    options = ("--to", "deepspeed", "--with-optimizer", "--names", "huggingface")
    assert convert(folder, tmp_path / "ds", *options) == EXIT_DONE
    found: Any = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "ds"))
    _, expected = to_huggingface(config.model, states[WEIGHT])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def sharded(folder: Path, tensors: dict[str, torch.Tensor], moment_key: str) -> None:
    """A checkpoint as torch's own writer makes it of another trainer's tensors, with keys of its own."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tree: dict[str, Any] = {f"app.model.{name}": value for name, value in tensors.items()}
    for moment in MOMENTS:
        tree |= {moment_key.format(name=name, moment=moment): value + 1 for name, value in tensors.items()}
    tree |= {"app.step": 7, "app.optim.param_groups.0.lr": 0.1}
    save(tree, storage_writer=FileSystemWriter(folder), no_dist=True)


@pytest.mark.parametrize("moment_key", ["app.optim.state.{name}.{moment}", "optimizer.state.{moment}.{name}"])
def test_dcp_of_others_is_read_by_the_names_of_either_side(run, tmp_path, moment_key):
    _, config, states = run
    _, theirs = to_huggingface(config.model, states[WEIGHT])
    for names, tensors in (("theirs", theirs), ("ours", states[WEIGHT])):
        sharded(tmp_path / names, tensors, moment_key)
        opened = open_source(str(tmp_path / names), model=config.model).check()
        assert sorted(opened.moments) == sorted(MOMENTS)
        for name, value in states[WEIGHT].items():
            assert torch.equal(opened.read(name), value), name
            assert torch.equal(opened.read(name, 1, 3), value[1:3])
            assert torch.equal(opened.read(name, state="exp_avg"), value + 1)


def test_a_source_that_names_no_model_asks_for_it_and_another_model_is_told(run, tmp_path, capsys):
    _, config, states = run
    sharded(tmp_path / "dcp", states[WEIGHT], "optimizer.state.{moment}.{name}")
    assert convert(tmp_path / "dcp", tmp_path / "ours") == EXIT_USAGE
    assert "does not say which model it is of" in (said := capsys.readouterr().err)
    assert "--run" in said
    tree = config.model_dump(mode="json")
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    assert convert(tmp_path / "dcp", tmp_path / "ours", "--run", str(tmp_path / "run.yaml")) == EXIT_DONE
    tree["model"]["num_layers"] += 1
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    assert convert(tmp_path / "dcp", tmp_path / "two", "--run", str(tmp_path / "run.yaml")) == EXIT_USAGE
    assert "no file holds layers." in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def spoil_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Evil()}))


def spoil_chunk(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:3000])


def lose_file(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (spoil_metadata, r"it names builtins\.print, which is not on the list"),
        (spoil_chunk, r"lies at the bytes \d+ to \d+ of 3000"),
        (lose_file, r"__0_0\.distcp cannot be used: it is not there, and .* is in it"),
        (lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04"), "it cannot be read"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([1])), "not the metadata of torch's"),
    ],
)
def test_hostile_and_torn_dcp_is_told_by_name_and_nothing_runs(run, tmp_path, capsys, spoil, what):
    folder, config, _ = run
    assert convert(folder, tmp_path / "dcp", "--to", "dcp") == EXIT_DONE
    spoil(tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=what):
        open_source(str(tmp_path / "dcp"), model=config.model).read("final_norm.weight")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("file", ["fp32.pt", "exp_avg.pt"])
def test_hostile_and_torn_universal_files_are_told_by_name(run, tmp_path, capsys, file):
    folder, config, _ = run
    assert convert(folder, tmp_path / "u", "--to", "universal") == EXIT_DONE
    (path,) = (tmp_path / "u").glob(f"step-*/zero/final_norm.weight/{file}")
    whole = path.read_bytes()
    torch.save({"param": Evil()}, path)
    with pytest.raises(CheckpointError, match=rf"{file} .*it names print"):
        open_source(str(tmp_path / "u"))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{file} cannot be used: it cannot be read"):
        open_source(str(tmp_path / "u"))
    if file == "fp32.pt":
        path.unlink()
        with pytest.raises(CheckpointError, match=r"final_norm\.weight holds no fp32\.pt"):
            open_source(str(tmp_path / "u"))
    shutil.rmtree(path.parent)
    with pytest.raises(Exception, match=r"no file holds final_norm\.weight"):
        open_source(str(tmp_path / "u")).check()
    assert "must not run" not in capsys.readouterr().out
    assert config


def test_a_file_that_is_cut_anywhere_is_told_by_name(run, tmp_path):
    """torch's readers raise other errors for other lengths."""
    folder, config, _ = run
    assert convert(folder, tmp_path / "u", "--to", "universal") == EXIT_DONE
    (path,) = (tmp_path / "u").glob("step-*/zero/embed_tokens.weight/fp32.pt")
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"fp32\.pt cannot be used: it cannot be read"):
            open_source(str(tmp_path / "u"), model=config.model)


def test_what_a_name_alone_makes_look_like_ours_is_told(run, tmp_path, capsys):
    folder, _, _ = run
    assert convert(folder, tmp_path / "u", "--to", "universal") == EXIT_DONE
    (tmp_path / "u" / "latest_universal").unlink()  # what is left is a folder step-N
    assert convert(tmp_path / "u", tmp_path / "out") == EXIT_USAGE
    assert "holds nothing that can be converted" in capsys.readouterr().err
    assert convert(next((tmp_path / "u").glob("step-*")), tmp_path / "out", "--run", str(tmp_path / "no")) == EXIT_USAGE


def test_a_url_that_does_not_answer_is_told(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/model"
    for command in (["convert", url, "--output", str(tmp_path / "out")], ["checkpoint", "diff", url, url]):
        assert main(command) == EXIT_FAILURE
        assert f"{url} cannot be reached: " in capsys.readouterr().err


def test_zero_without_its_optimizer_states_says_that_weights_are_rounded(run, tmp_path, caplog):
    folder, _, states = run
    assert convert(folder, tmp_path / "ds", "--to", "deepspeed") == EXIT_DONE
    next((tmp_path / "ds").glob("*/*_optim_states.pt")).unlink()
    opened = open_source(str(tmp_path / "ds")).check()
    assert torch.equal(opened.read("embed_tokens.weight"), states[WEIGHT]["embed_tokens.weight"])
    assert "holds no optimizer states: the weights are those of its model states, rounded" in caplog.text
