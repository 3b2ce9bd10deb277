import functools
import http.server
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine import logs, outcome
from engine.config.save import FILE, save_run
from engine.errors import DataError
from engine.outcome import Outcome
from engine.redact import redact, redacted
from tests.distributed.runs import run_config, run_tree, write_corpus


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


ROOT = str(Path(__file__).parents[2])
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


ELSEWHERE = """
import logging, sys, threading, warnings
from engine import cli
cli.main(["--version"])
url = sys.argv[1]
own = logging.getLogger("some.library")
own.addHandler(logging.StreamHandler(sys.stdout))
own.warning("retrying %s", url)
logging.getLogger("another").error({"url": url})  # nobody has set a handler up for it
try:
    raise OSError(url)
except OSError:
    own.exception("failed", stack_info=True)
warnings.warn(f"{url} is slow")
def fail():
    raise OSError(url)
thread = threading.Thread(target=fail)
thread.start()
thread.join()
class Leaving:
    def __del__(self):
        raise OSError(url)
Leaving()
try:
    raise KeyError(url)
except KeyError as error:
    raise ValueError("no luck") from error
"""


def test_tracebacks_warnings_and_other_libraries_say_no_credentials():
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, SECRET], env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True
    )
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "hunter2" not in said
    assert done.stdout.count("127.0.0.1/tokens") == 2, "the record and its traceback"
    assert done.stderr.count("127.0.0.1/tokens") == 5
    assert done.stderr.count("Traceback (most recent call last)") == 4
    assert "ValueError: no luck" in done.stderr


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Serves a folder to whoever has the right header."""

    def send_head(self):
        if self.headers["Authorization"] == "Bearer hunter2":
            return super().send_head()
        self.send_error(401)
        return None

    def log_message(self, *_):
        pass


def test_credentials_from_fsspecs_configuration_are_used_and_said_nowhere(tmp_path):
    write_corpus(tmp_path / "store")
    work = tmp_path / "work"
    work.mkdir()
    kind = functools.partial(Guarded, directory=str(tmp_path / "store"))
    said = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        for secret in ("Bearer hunter2", "Bearer hunter22"):
            own = {"FSSPEC_HTTP": json.dumps({"client_kwargs": {"headers": {"Authorization": secret}}})}
            done = subprocess.run(
                [sys.executable, "-m", "engine.cli", "inspect-data", f"http://127.0.0.1:{server.server_port}/train"],
                env=os.environ | own | {"PYTHONPATH": ROOT},
                cwd=work,
                capture_output=True,
                text=True,
            )
            said.append((done.returncode, done.stdout + done.stderr))
        server.shutdown()
    (well, _), (refused, words) = said
    assert (well, refused) == (0, 1), said
    assert "401" in words
    assert all("hunter2" not in text for _, text in said)
    assert all(b"hunter2" not in path.read_bytes() for path in work.rglob("*") if path.is_file())


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
