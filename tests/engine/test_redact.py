import json
import logging
import os

import pytest

from engine import logs, outcome
from engine.config.save import FILE, save_run
from engine.errors import DataError
from engine.outcome import Outcome
from engine.redact import redact, redacted
from tests.distributed.runs import run_config, run_tree


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:hunter2@host/a", "https://host/a"),
        ("see 's3://AKIA:hunter2/x+y@bucket/key', and", "see 's3://bucket/key', and"),
        ("https://hunter2@host:80/a@v2", "https://host:80/a@v2"),
        ("simplecache::https://u:hunter2@h/a zip://x::ftp://u:hunter2@h", "simplecache::https://h/a zip://x::ftp://h"),
        ("https://u:hunter2@2@host/a", "https://host/a"),
        ("https://host/a?X-Amz-Signature=hunter2&b=1#c", "https://host/a?X-Amz-Signature=***&b=***#c"),
        ("https://host:8080/data@v2/train", "https://host:8080/data@v2/train"),
        ("s3://bucket/data", "s3://bucket/data"),
        ("mail a@b, and c", "mail a@b, and c"),
    ],
)
def test_credentials_are_taken_out_of_urls(text, expected):
    assert redact(text) == expected
    assert redacted({"a": [text, 1, None], "b": (text,)}) == {"a": [expected, 1, None], "b": [expected]}


SECRET = "https://user:hunter2@127.0.0.1/tokens?token=hunter2"


def test_errors_and_logs_hold_no_credentials(capsys):
    error = DataError(f"{SECRET} is gone", SECRET, SECRET)
    assert "hunter2" not in f"{error}{error.wrong}{error.allowed}{error.remedy}{error!r}"
    logs.configure()
    try:
        raise OSError(SECRET)
    except OSError:
        logs.logger(__name__).warning("%s", SECRET, exc_info=True)
    logging.getLogger(logs.ROOT).handlers.clear()
    said = capsys.readouterr().err
    assert "127.0.0.1/tokens" in said
    assert "hunter2" not in said


def test_files_of_a_run_hold_no_credentials(tmp_path, monkeypatch):
    import wandb

    from engine.train.metrics import Wandb

    tree = run_tree(tmp_path, tmp_path, logging={"wandb": "offline"})
    tree["stages"][0]["data"] = {"train": SECRET}
    config = run_config(tree)
    assert config.stages[0].data.train == SECRET
    save_run(config, tmp_path)
    assert "127.0.0.1" in (tmp_path / FILE).read_text()
    outcome.write(tmp_path, Outcome("job", 0, 1, 0, 0, f"OSError: {SECRET}"))
    assert "127.0.0.1" in json.loads((tmp_path / outcome.FILE).read_text())["error"]
    monkeypatch.setattr("sys.argv", ["palimpsest", "train", f"stages.0.data.train={SECRET}"])
    assert wandb.__name__
    Wandb(config, 0).close()
    for folder, _, names in os.walk(tmp_path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                assert b"hunter2" not in file.read(), os.path.join(folder, name)
