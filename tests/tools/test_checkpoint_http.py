"""`palimpsest checkpoint` on a web server, with lists of folders and ranges of bytes or without."""

import functools
import http.server
import io
import re
import threading
from contextlib import contextmanager

import pytest

from engine.cli import main
from tests.tools.damage import FILE, harm


class Serves(http.server.SimpleHTTPRequestHandler):
    """A server as Python has it, which lists folders; with ranges, where they are wanted, and not with lists."""

    ranges = True
    refusal: int | None
    """Status in place of a list."""
    asked: list[str]

    def log_message(self, *arguments):
        pass

    def list_directory(self, path):
        return self.send_error(self.refusal) if self.refusal else super().list_directory(path)

    def do_GET(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None or not self.ranges:
            super().do_GET()
            return
        self.asked.append(self.headers["Range"])
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.copyfile(io.BytesIO(content), self.wfile)


@contextmanager
def over_http(folder, ranges=True, refusal=None):
    """A server on loopback: its URL, and the ranges that it was asked for."""
    kind = type("Handler", (Serves,), {"ranges": ranges, "refusal": refusal, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", kind.asked
        finally:
            server.shutdown()
            thread.join()


def test_over_http_they_are_listed_verified_and_compared(run, capsys):
    with over_http(run) as (url, asked):
        for where in (url, f"{url}/checkpoints", f"{url}/checkpoints/"):
            assert main(["checkpoint", "list", where]) == 0
            names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
            assert names == ["step-00000020", "step-00000010"]
        assert main(["checkpoint", "verify", url]) == 0
        assert capsys.readouterr().out.count(": whole\n") == 2
        first, second = (f"{url}/checkpoints/step-000000{step}" for step in (10, 20))
        asked.clear()
        assert main(["checkpoint", "diff", first, str(run / "checkpoints" / "step-00000010")]) == 0
        assert "45 of 45 tensors are bitwise equal" in capsys.readouterr().out
        assert len(asked) > 45, "single ranges were read"
        assert main(["checkpoint", "diff", first, second]) == 1
        assert "0 of 45 tensors are bitwise equal" in capsys.readouterr().out
        harm(run / "checkpoints" / "step-00000010" / FILE)
        assert main(["checkpoint", "verify", first]) == 1
        assert f"{FILE}: bytes in optim.exp_avg_sq." in capsys.readouterr().out


def test_over_http_nothing_is_pruned(run, capsys):
    with over_http(run) as (url, _):
        assert main(["checkpoint", "prune", url, "--keep-last", "1", "--yes"]) == 1
        assert "cannot write" in capsys.readouterr().err
    assert len(list((run / "checkpoints").glob("step-*/manifest.json"))) == 2


@pytest.mark.parametrize(
    ("refusal", "wrong", "allowed"),
    [
        (403, "cannot be read: ClientResponseError: 403", "a folder or URL that can be read"),
        (404, "holds no checkpoint", "behind a server that lists folders, or one checkpoint step-N"),
    ],
)
def test_a_server_without_lists_gives_single_checkpoints(run, capsys, refusal, wrong, allowed):
    with over_http(run, refusal=refusal) as (url, _):
        one = f"{url}/checkpoints/step-00000020"
        assert main(["checkpoint", "list", one]) == 0
        assert "12,800 tokens" in capsys.readouterr().out
        assert main(["checkpoint", "verify", one]) == 0
        assert main(["checkpoint", "verify", url]) == 1
        error = capsys.readouterr().err
        assert wrong in error
        assert allowed in error
        assert main(["checkpoint", "verify", f"{url}/checkpoints/step-00000030"]) == 1
        assert "holds no checkpoint" in capsys.readouterr().err


def test_a_server_without_ranges_is_enough_to_verify_and_not_to_compare(run, capsys):
    with over_http(run, ranges=False) as (url, _):
        assert main(["checkpoint", "verify", url]) == 0
        capsys.readouterr()
        assert main(["checkpoint", "diff", f"{url}/checkpoints/step-00000020", str(run)]) == 1
        error = capsys.readouterr().err
        assert "the server sends all" in error
        assert "allowed: a server that answers requests for ranges of bytes" in error
        assert "to do: copy the checkpoint to a disk" in error


def test_a_server_that_is_gone_is_one_clear_error(run, capsys):
    with over_http(run) as (url, _):
        pass
    assert main(["checkpoint", "verify", f"{url}/checkpoints/step-00000020"]) == 1
    assert "to do:" in capsys.readouterr().err
