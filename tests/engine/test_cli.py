"""The command: overview, lazy imports, exit codes."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import typer

from engine import __version__, cli
from engine.errors import CheckpointError, ConfigError


def call(*arguments: str) -> int:
    return cli.main(list(arguments))


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("--local_rank=1", "--help")])
def test_overview_names_every_command(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 0
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in shown
        assert command.summary in shown
    assert "local_rank" not in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"palimpsest {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "message", "remedy"),
    [
        ("trian", "unknown command 'trian'", "did you mean train?"),
        ("inspect", "unknown command 'inspect'", "did you mean inspect-data?"),
        ("zzzz", "unknown command 'zzzz'", "see palimpsest --help"),
        ("--fast", "unknown option '--fast'", "see palimpsest --help"),
    ],
)
def test_unknown_commands(typed: str, message: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(typed) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert f"to do: {remedy}" in shown.err


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch):
    """Makes `palimpsest train` call a function of the test's."""

    def install(function) -> None:
        monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(main=function))
        monkeypatch.setitem(cli.COMMANDS, "train", cli.Command("stand_in:main", "Stand in."))

    return install


def test_errors_become_exit_codes_and_messages(stand_in, capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((ConfigError("bad key", "good keys", "mend it"), 2), (CheckpointError("torn"), 1)):

        def main(error=error) -> None:
            raise error

        stand_in(lambda main=main: main())
        assert call("train") == code
        assert capsys.readouterr().err == f"palimpsest train: {error}\n"


@pytest.mark.parametrize("code", [0, 1, 85])
def test_a_commands_exit_code_is_the_process_exit_code(stand_in, code: int) -> None:
    def main() -> None:
        raise typer.Exit(code)

    stand_in(main)
    assert call("train") == code
    assert call("--local_rank=3", "train") == code


def test_arguments_reach_the_function(stand_in) -> None:
    seen = []

    def main(config: Path, overrides: Annotated[list[str] | None, typer.Argument()] = None, count: int = 1) -> None:
        seen.append((config, overrides, count))

    stand_in(main)
    assert call("train", "run.yaml", "a.b=1", "--count", "3", "c=[1, 2]") == 0
    assert seen == [(Path("run.yaml"), ["a.b=1", "c=[1, 2]"], 3)]


def test_an_application_with_commands_of_its_own(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    app, seen = typer.Typer(), []
    app.command("list")(lambda: seen.append("list"))
    app.command("verify")(lambda: seen.append("verify"))
    stand_in(app)
    assert call("train", "verify") == 0
    assert seen == ["verify"]


def test_usage_errors(stand_in, capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: Path) -> None: ...

    stand_in(main)
    assert call("train") == 2
    assert call("train", "run.yaml", "--fast") == 2
    assert "--fast" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer", "prepare", "convert", "train", "checkpoint"])
def test_ctrl_c_is_told(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    hint = cli.COMMANDS[name].interrupted
    monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(main=main))
    monkeypatch.setitem(cli.COMMANDS, name, cli.Command("stand_in:main", "Stand in.", hint))
    assert call(name) == 130
    assert capsys.readouterr().err.strip() == f"palimpsest {name}: interrupted" + (f"; {hint}" if hint else "")
    assert bool(hint) == (name in ("tokenizer", "prepare", "convert"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/data/x"), "'/data/x' cannot be used: Permission denied"),
        (OSError(28, "No space left on device", b"/data/\xff"), "No space left on device"),
        (
            UnicodeEncodeError("ascii", "a中b", 1, 2, "not in range"),
            r"'\u4e2d' cannot be spelled in the encoding ascii",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_clear_error(stand_in, capsys, error: Exception, said: str) -> None:
    def main() -> None:
        raise error

    stand_in(main)
    assert call("train") == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert "allowed: " in shown
    assert "to do: " in shown


def test_an_error_of_a_device_that_no_user_named_keeps_its_traceback(stand_in) -> None:
    def main() -> None:
        raise OSError(28, "No space left on device")

    stand_in(main)
    with pytest.raises(OSError, match="No space"):
        call("train")


SHOW = "from engine.cli import main; import sys; sys.exit(main(sys.argv[1:]))"


def shell(arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    line = f"{sys.executable} -c '{SHOW}' {arguments}"
    return subprocess.run(
        line, shell=True, capture_output=True, text=True, env={**os.environ, **(environment or {})}, check=False
    )


@pytest.mark.parametrize("arguments", ["--help", "plan --help", "plan configs/runs/gpt2-124m.yaml"])
def test_standard_output_on_a_full_device(arguments: str) -> None:
    done = shell(f"{arguments} > /dev/full")
    assert done.returncode == 1
    assert "standard output cannot be written: No space left on device\n  allowed: " in done.stderr
    assert "Traceback" not in done.stderr


def test_standard_error_on_a_full_device_keeps_the_exit_code() -> None:
    assert shell("plan not-there.yaml 2> /dev/full").returncode == 2


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    done = shell("plan configs/runs/gpt2-124m.yaml | true")
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_locale_that_cannot_spell_a_name_shows_its_code_points(tmp_path: Path) -> None:
    done = shell(f"plan {tmp_path}/语料.yaml", {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert r"\u8bed\u6599.yaml cannot be read" in done.stderr


@pytest.mark.parametrize("typed", [["--fast", "true"], ["x", "--fast", "False"]])
def test_a_flag_takes_no_value(stand_in, capsys: pytest.CaptureFixture[str], typed: list[str]) -> None:
    def main(
        names: Annotated[list[str] | None, typer.Argument()] = None,
        fast: Annotated[bool, typer.Option("--fast")] = False,
        speed: Annotated[str, typer.Option()] = "",
    ) -> None: ...

    stand_in(main)
    assert call("train", *typed) == 2
    shown = capsys.readouterr().err
    assert f"--fast {typed[-1]}" in shown
    assert f"leave {typed[-1]} out" in shown
    assert call("train", "--speed", "true") == 0
    capsys.readouterr()
    assert call("train", "--help") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--fast" in line]
    assert "bool" not in line.lower()


def test_errors_that_are_ours_to_mend_keep_their_traceback(stand_in) -> None:
    def main() -> None:
        raise ZeroDivisionError

    stand_in(main)
    with pytest.raises(ZeroDivisionError):
        call("train")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["launch", "--help"], ["plan", "--help"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    script = (
        f"import sys\nfrom engine.cli import main\ncode = main({arguments!r})\n"
        "print(code, [name for name in ('torch', 'deepspeed', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("0 []")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_file(name: str) -> None:
    module = cli.COMMANDS[name].target.partition(":")[0]
    path = Path(__file__).parents[2] / (module.replace(".", "/") + ".py")
    assert path.is_file()
    assert callable(cli.load(name)) or isinstance(cli.load(name), typer.Typer)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("numpy.so: failed to map segment from shared object"),
        SystemError("error return without exception set"),
    ],
)
def test_out_of_memory_is_one_sentence(error, monkeypatch, capsys):
    def run(*_):
        raise error

    monkeypatch.setattr(cli, "run", run)
    assert cli.main(["plan", "run.yaml"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("palimpsest plan: out of memory on this machine\n  to do:")
    assert "Traceback" not in told


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ImportError("no module"), SystemError("other")])
def test_other_errors_are_not_taken_for_it(error, monkeypatch):
    def run(*_):
        raise error

    monkeypatch.setattr(cli, "run", run)
    with pytest.raises(type(error)):
        cli.main(["plan", "run.yaml"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prepare", "", "--tokenizer", "t", "--output", "o"), "an argument is empty"),
        (("prepare", "a.txt", "--tokenizer", "t", "--output", ""), "--output is empty"),
        (("prepare", "a.txt", "--tokenizer=", "--output", "o"), "--tokenizer is empty"),
        (("tokenizer", "a.txt", "--output="), "--output is empty"),
        (("inspect-data", ""), "an argument is empty"),
        (("convert", "run", "--output", ""), "--output is empty"),
        (("checkpoint", "list", ""), "an argument is empty"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(arguments, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["file/below", "file"])
def test_a_run_folder_that_cannot_be_used_is_told_before_torch_is_imported(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("x")
    run = f"configs/smoke/gpt2.yaml folder={tmp_path / folder}"
    script = (
        f"import sys\nfrom engine.cli import main\ncode = main(['train', *{run.split()!r}])\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["1", "False"]
    assert f"run folder {tmp_path / folder} cannot be used: " in done.stderr
    assert "Traceback" not in done.stderr
