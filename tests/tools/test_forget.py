"""The command forgets by id, says who still holds the documents, and refuses what it cannot do before it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tools.forget
from engine.checkpoint.folder import committed
from engine.cli import main
from engine.corpus.options import PrepareOptions
from engine.corpus.prepare import prepare
from engine.data.objectives.sampling import make_sampler
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.tombstones import FILE, Tombstones, read_tombstones
from engine.data.stage import open_parts, run_stage_seed, stage_stream
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE
from engine.train.forgotten import RunOfDocuments
from tests.distributed.runs import LENGTH, run_config, run_tree
from tests.engine.data import forgotten
from tests.engine.data.corpus import made_up_texts
from tests.engine.train.fake import fake_run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """What `prepare --id-key` wrote: ids `doc 0` to `doc 59`."""
    from engine.corpus.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("prepared")
    train_tokenizer(made_up_texts(100), folder / "tokenizer", "bpe", 300)
    rows = [{"text": text, "id": f"doc {number}"} for number, text in enumerate(made_up_texts(60))]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = PrepareOptions((str(folder / "texts.jsonl"),), folder / "tokenizer", folder / "out", 0.2, 2000)
    prepare(PrepareOptions(**{**options.__dict__, "id_key": "id"}))
    return folder / "out"


@pytest.fixture
def data(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def ids(folder: Path, *lines: str) -> list[str]:
    path = folder / "ids.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return ["--document-ids", str(path)]


def place_of(data: Path, name: str) -> tuple[str, str, int]:
    """Part, shard and number of the document with an id, by hand from the raw files."""
    for part in ("train", "validation"):
        for entry in TokenDataset(data / part).index.shards:
            assert entry.ids is not None
            names = [json.loads(line) for line in (data / part / entry.ids.file).read_text().splitlines()]
            if name in names:
                return part, entry.content_hash, names.index(name)
    raise AssertionError(name)


def test_documents_are_named_by_id_in_either_form(data, tmp_path, capsys):
    _, shard, number = place_of(data, "doc 7")
    given = ids(tmp_path, "doc 3", '"doc 4"', '{"id": "doc 5", "why": "asked"}', "", f"{shard}:{number}", "doc 3")
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert main(["forget", str(data), *given]) == EXIT_DONE
    said = capsys.readouterr().out
    expected: dict[str, dict[str, list[int]]] = {"train": {}, "validation": {}}
    for name in ("doc 3", "doc 4", "doc 5", "doc 7"):
        part, shard, number = place_of(data, name)
        expected[part].setdefault(shard, []).append(number)
    for part, documents in expected.items():
        assert read_tombstones(data / part) == Tombstones(documents)
        for shard in documents:
            assert shard in said
    assert {path: path.read_bytes() for path in before} == before
    assert "each read as the end of the text" in said
    # repeated is harmless
    lines = {path: path.read_bytes() for path in data.rglob(FILE)}
    assert main(["forget", str(data), *given]) == EXIT_DONE
    assert {path: path.read_bytes() for path in data.rglob(FILE)} == lines
    assert "0 new lines" in capsys.readouterr().out


def test_ids_that_the_command_takes_are_those_that_inspect_data_prints(data, tmp_path, capsys):
    plain = tmp_path / "plain"
    index = json.loads((data / "train" / "index.json").read_text())
    shutil.copytree(data / "train", plain)
    for shard in index["shards"]:
        del shard["ids"]
    (plain / "index.json").write_text(json.dumps(index))
    for folder in (data / "train", plain):
        assert main(["inspect-data", str(folder), "--samples", "0", "--documents", "1000"]) == EXIT_DONE
        listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("document ")]
        dataset = TokenDataset(folder)
        assert len(listed) == dataset.index.num_documents
        name = listed[3].removeprefix("document ").partition(": ")[0]
        assert main(["forget", str(folder), *ids(tmp_path, name)]) == EXIT_DONE
        capsys.readouterr()
        assert main(["inspect-data", str(folder), "--samples", "0", "--documents", "1000"]) == EXIT_DONE
        after = [line for line in capsys.readouterr().out.splitlines() if line.startswith("document ")]
        assert [line for line in after if line.endswith("forgotten")] == [after[3]]
        assert after[:3] + after[4:] == listed[:3] + listed[4:]


def test_a_dry_run_writes_nothing(data, tmp_path, capsys):
    before = sorted(data.rglob("*"))
    assert main(["forget", str(data), *ids(tmp_path, "doc 3"), "--dry-run"]) == EXIT_DONE
    assert sorted(data.rglob("*")) == before
    assert "1 lines would go into" in capsys.readouterr().out


def test_unknown_ids_are_listed_and_refused(data, tmp_path, capsys):
    given = ids(tmp_path, "doc 3", "nobody", "f" * 32 + ":0", *(f"no {n}" for n in range(30)))
    assert main(["forget", str(data), *given]) == EXIT_FAILURE
    said = capsys.readouterr().err
    assert "32 of 33 ids name no document of this data: nobody, " in said
    assert "and 12 more" in said
    assert not list(data.rglob(FILE))
    assert main(["forget", str(data), *given, "--allow-missing"]) == EXIT_DONE
    assert "passed over: 32 of 33 ids" in capsys.readouterr().out
    assert sum(len(read_tombstones(data / part)) for part in ("train", "validation")) == 1


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"", EXIT_FAILURE, "names no id"),
        (b"\n \n", EXIT_FAILURE, "names no id"),
        (b"doc 3\n{\n", EXIT_FAILURE, "ids.txt:2 names no id"),
        (b'{"name": "doc 3"}\n', EXIT_FAILURE, "no key 'id'"),
        (b'{"id": null}\n', EXIT_FAILURE, "no text or number"),
        (b'"open\n', EXIT_FAILURE, "ids.txt:1 names no id"),
        (b"\xff\xfe\n", EXIT_FAILURE, "no UTF-8"),
        (b"doc 3", EXIT_DONE, ""),
        (b"\xef\xbb\xbfdoc 3\r\n", EXIT_DONE, ""),
    ],
)
def test_files_of_ids(data, tmp_path, capsys, content, code, said):
    (tmp_path / "ids.txt").write_bytes(content)
    assert main(["forget", str(data), "--document-ids", str(tmp_path / "ids.txt")]) == code
    assert said in capsys.readouterr().err
    assert bool(list(data.rglob(FILE))) == (code == EXIT_DONE)


def test_places_that_cannot_be_forgotten_in(data, tmp_path, capsys, monkeypatch):
    given = ids(tmp_path, "doc 3")
    for arguments, code, said in (
        ([str(tmp_path / "nowhere")], EXIT_FAILURE, "no folder of token shards"),
        ([str(data), "--run", str(data)], EXIT_USAGE, "is no run folder"),
        ([f"file://{data}/train"], EXIT_USAGE, "is a URL"),
    ):
        assert main(["forget", *arguments, *given]) == code
        assert said in capsys.readouterr().err
    monkeypatch.setattr(tools.forget, "_is_writable", lambda folder: False)
    assert main(["forget", str(data), *given]) == EXIT_USAGE
    assert "--run RUN" in capsys.readouterr().err
    assert not list(data.rglob(FILE))
    assert main(["forget", str(data), "--document-ids", str(tmp_path / "no.txt")]) == EXIT_FAILURE
    assert "cannot be read" in capsys.readouterr().err


def two_stages(corpus: Path, folder: Path) -> dict[str, Any]:
    """A run of four steps of 8 samples, and five of 6 samples of half the length."""
    tree = run_tree(corpus, folder)
    [stage] = tree["stages"]
    shorter = {"sequence_length": LENGTH // 2, "global_batch_size": 6, "schedule": {"shape": "constant", "warmup": 2}}
    one, two = {"name": "one", "duration": {"steps": 4}}, {"name": "two", "duration": {"steps": 5}}
    return tree | {"stages": [stage | one, stage | two | shorter]}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A run of two stages with a checkpoint every three steps, and its configuration."""
    folder = tmp_path_factory.mktemp("forget") / "run"
    tree = two_stages(corpus, folder)
    fake_run(tree)
    return folder, tree


def samples_seen(tree: dict[str, Any], step: int) -> set[tuple[int, int]]:
    """Every (shard, row) of the first stage's and the second stage's steps before one, by reading as training does."""
    config, found = run_config(tree), set()
    for number, stage in enumerate(config.stages):
        stream = stage_stream(stage, open_parts(stage, None, 300), run_stage_seed(config.seed, number))
        for _ in range(min(step, stage.num_steps)):
            size = stream.batch_size
            taken, _ = stream.order.take(stream.progress.cursor, size)
            found |= {(number, *row) for row in stream.order.shard_rows(taken).tolist()}
            stream.skip()
        step -= min(step, stage.num_steps)
    return found


def test_checkpoints_that_were_trained_on_documents_are_told(trained):
    folder, tree = trained
    config, run = run_config(tree), RunOfDocuments(trained[0])
    dataset = TokenDataset(config.stages[0].data.train or "")
    entries = dataset.index.shards
    documents = Tombstones({entry.content_hash: range(0, entry.num_documents, 4) for entry in entries})
    checkpoints = {held.name: held for held in run.held(documents)}
    assert len(checkpoints) == len(committed(folder / "checkpoints")) >= 3
    shares = []
    for name, held in checkpoints.items():
        assert not held.unknown
        seen, expected = samples_seen(tree, int(name.removeprefix("step-"))), {}
        for number, entry in enumerate(entries):
            bounds = dataset.offsets(number)[0]
            for document in documents.of(entry.content_hash).tolist():
                first, last = int(bounds[document]), int(bounds[document + 1]) - 1
                for stage_number, stage in enumerate(config.stages):
                    width = stage.sequence_length
                    # a row reads its tokens and the successor of its last one
                    rows = {row for row in range(last // width + 1) if row * width + width >= first}
                    if any((stage_number, number, row) in seen for row in rows):
                        expected.setdefault(entry.content_hash, []).append(document)
        assert held.documents == Tombstones(expected)
        shares.append(len(held.documents) / len(documents))
    assert shares == sorted(shares, reverse=True)  # newest first
    assert 0 < shares[-1] < shares[0] < 1


def test_a_run_is_told_and_learns_at_its_next_start(trained, corpus, tmp_path, capsys, caplog):
    folder = Path(shutil.copytree(trained[0], tmp_path / "run"))
    tree = two_stages(corpus, folder)
    url = f"file://{corpus}/train"
    shards = TokenDataset(corpus / "train").index.shards
    everything = Tombstones({entry.content_hash: range(entry.num_documents) for entry in shards})
    newest = next(iter(RunOfDocuments(folder).held(everything))).documents  # two that the newest has seen
    shard = newest.shards[0]
    documents = newest.of(shard)[:2].tolist()
    given = ids(tmp_path, *(f"{shard}:{number}" for number in documents))
    assert main(["forget", url, *given, "--run", str(folder)]) == EXIT_DONE
    said = capsys.readouterr().out
    assert f"2 new lines in {folder / FILE}" in said
    assert "step-00000009  was trained on 2 of 2 documents" in said
    assert "scan of stage one, data: 2 documents in " in said
    assert "scan of stage two, data: 2 documents in " in said
    assert not (corpus / "train" / FILE).exists()
    # goes on from the newest checkpoint but one: the change is logged, and later states carry it
    shutil.rmtree(folder / "checkpoints" / "step-00000009")
    (folder / "saved.json").unlink(missing_ok=True)
    (folder / "outcome.json").unlink(missing_ok=True)
    fake_run(tree)
    assert "changed since this run was started: tombstones: '' -> " in caplog.text
    newest = committed(folder / "checkpoints")[0]
    loader = json.loads((newest / "manifest.json").read_text())["sections"]["loader"]
    assert loader["tombstones"] == [2, Tombstones({shard: documents}).hash]


@pytest.mark.parametrize("case", forgotten.CASES)
def test_rows_of_documents_are_those_that_hold_their_tokens(case, tmp_path):
    how = {"attention": "document", **forgotten.CASES[case]}
    dataset = forgotten.write(tmp_path, forgotten.MARKED)
    sampler = make_sampler(dataset, forgotten.LENGTH, 11, **how)
    for number, entry in enumerate(dataset.index.shards):
        documents = forgotten.tombstones_of(dataset).of(entry.content_hash)
        count = int(sampler.count(np.array([number]))[0])
        for epoch in (0, 1):
            samples = np.array([[epoch, number, row] for row in range(count)])
            made = sampler.make(samples, samples[:, 1:], count)
            texts = [array for name, array in made.inputs.items() if "tokens" in name or "targets" in name]
            held = [any(np.isin(array[b], forgotten.MARKED).any() for array in texts) for b in range(count)]
            found = set(sampler.rows_of(number, documents, epoch).tolist())
            # a row may hold but the end of a document's text, which is no token of its own
            assert set(np.flatnonzero(held).tolist()) <= found
            assert len(found) <= np.count_nonzero(held) + documents.size
