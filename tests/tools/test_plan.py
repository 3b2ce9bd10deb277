"""`palimpsest plan` as a person and a script read it."""

import json
import re
from pathlib import Path

import pytest

from engine import cli
from engine.config.load import load_run
from tests.distributed.runs import write_corpus
from tools.plan_tables import scale

RUNS = Path(__file__).parents[2] / "configs" / "runs"
SMOKE = RUNS.parent / "smoke"
GPT2 = SMOKE / "gpt2.yaml"


def plan(capsys: pytest.CaptureFixture[str], run: str | Path, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["plan", str(run if isinstance(run, Path) else RUNS / f"{run}.yaml"), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_first_line_says_that_it_fits_and_the_rest_what_it_takes(capsys):
    code, out, _ = plan(capsys, "gpt2-124m", "--world", "8")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "fits: 9.79 of 80 GiB on 8 x h100-80gb (assumed; --gpu names another)"
    words = " ".join(out.split())
    assert "19,074 steps, 10,000,269,312 tokens" in words
    assert "GPU-hours" in words
    assert "20 of 1.39 GiB" in words
    assert "missing: data.train: no folder data/train; `palimpsest prepare` writes it" in lines


def test_the_memory_shown_adds_up(capsys):
    _, out, _ = plan(capsys, "llama-7b", "--world", "8", "parallel.pipe=2")
    table = out[out.index("memory of one rank's GPU") :].splitlines()
    for row in table[3:5]:
        figures = [float(figure) for figure in row.split()[1:]]
        assert sum(figures[:-1]) == pytest.approx(figures[-1], abs=1e-6)


def test_a_run_that_does_not_fit_says_so_first_and_by_its_exit_code(capsys):
    code, out, _ = plan(capsys, "llama-70b", "--world", "8", "--gpu", "h100-80gb")
    assert code == 2
    assert out.splitlines()[0].startswith("does not fit 8 x h100-80gb: needs ")
    code, out, _ = plan(capsys, "llama-70b", "--world", "8", "--gpu", "h100-80gb", "--json")
    assert code == 2
    assert json.loads(out)["fits"] is False


def test_the_best_layout_can_be_pasted(capsys, tmp_path):
    code, out, _ = plan(capsys, "llama-7b", "--world", "8", "--gpu", "h100-80gb")
    lines = out.splitlines()
    pasted = lines[lines.index("the best of them, for the run file or the command line:") + 1]
    overrides = lines[lines.index(pasted) + 1].split()
    run = tmp_path / "run.yaml"
    run.write_text(f"include: {RUNS / 'llama-7b.yaml'}\n{pasted}\n", encoding="utf-8")
    assert load_run(run).parallel == load_run(RUNS / "llama-7b.yaml", overrides).parallel
    code, out, _ = plan(capsys, run, "--world", "8", "--gpu", "h100-80gb")
    assert code == 0
    assert out.startswith("fits: ")


def test_each_cause_of_a_refusal_stands_once(capsys):
    _, out, _ = plan(capsys, "llama-70b", "--world", "64", "--json")
    zero, tensor = json.loads(out)["refused"]
    assert zero["layouts"] == ["ZeRO-0"]
    assert tensor["problem"].startswith("parallel.tensor = 16 does not divide model.num_kv_heads = 8")
    assert tensor["layouts"] == [
        f"pipe {pipe} x tensor {tensor}" for pipe in (1, 2, 4) for tensor in (16, 32, 64) if pipe * tensor <= 64
    ]


def test_a_world_that_does_not_do_is_answered_with_worlds_that_do(capsys):
    code, _, err = plan(capsys, "gpt2-124m", "--world", "7")
    assert code == 2
    assert "as it is, the run starts on 1, 2, 4, 8, 16, 32 ranks" in err
    for world in ("1", "32"):
        assert plan(capsys, "gpt2-124m", "--world", world)[0] == 0
    code, _, err = plan(capsys, "gpt2-124m", "--world", "8", "parallel.tensor=8")
    assert code == 2
    assert err.count("does not divide") == 1
    assert "starts on" not in err, "no world mends it"


@pytest.mark.parametrize(
    "override",
    [
        "model.num_layers=1000000000",
        "model.hidden_size=1000000000000",
        "model.vocab_size=1000000000000000",
        "model.feed_forward_size=100000000000000",
        "model.num_heads=1000000000000",
        "stages.0.sequence_length=1000000000000",
        "stages.0.global_batch_size=1000000000000000",
        "parallel.micro_batch_size=1000000000",
        "parallel.pipe=1000000",
        "parallel.data=1000000000000",
        "parallel.tensor=1000000007",
    ],
)
def test_absurd_sizes_are_refused(capsys, override):
    code, out, err = plan(capsys, "gpt2-124m", override)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err


def test_an_absurd_world_is_refused(capsys):
    assert plan(capsys, "gpt2-124m", "--world", "1000000000")[0] == 2


@pytest.mark.parametrize("family", ["gpt2-124m", "modernbert-base", "t5-base"])
def test_ten_thousand_layers_are_answered(capsys, family):
    code, out, _ = plan(capsys, family, "--world", "8", "model.num_layers=10000")
    assert code == 2
    assert out.startswith("does not fit 8 x h100-80gb")


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A run file of two run stages, the second with the longer rows."""
    tree = load_run(RUNS / "gpt2-124m.yaml", ["parallel.micro_batch_size=8", "stages.0.schedule={}"]).model_dump(
        mode="json"
    )
    stage = tree["stages"][0]
    tree["stages"] = [
        stage | {"name": "short", "sequence_length": 256, "duration": {"steps": 70}},
        stage | {"name": "long", "duration": {"steps": 30}},
    ]
    file = tmp_path / "several.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file


def test_a_run_of_several_stages_has_a_line_for_each(capsys, several):
    code, out, err = plan(capsys, several, "--world", "8")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    (title,) = [
        number for number, line in enumerate(lines) if line.startswith("run stages; long needs the most memory")
    ]
    short, long = lines[title + 3 : title + 5]
    assert short.split()[:5] == ["short", "70", "9.18e+06", "512", "256"]
    assert long.split()[:6] == ["long", "*", "30", "1.57e+07", "512", "1,024"]
    memory = re.search(r"fits: ([0-9.]+) of 80 GiB", lines[0])
    assert memory is not None
    assert long.split()[-1] == memory[1]
    assert "100 steps, 24,903,680 tokens" in " ".join(out.split())
    assert "missing: stages.1.data.train: no folder data/train; `palimpsest prepare` writes it" in lines
    code, out, _ = plan(capsys, "gpt2-124m", "--world", "8")
    assert "run stages" not in out, "one needs no table"


def test_a_script_reads_each_run_stage(capsys, several):
    _, out, _ = plan(capsys, several, "--world", "8", "--json")
    tree = json.loads(out)
    assert tree["largest_run_stage"] == "long"
    assert [stage["name"] for stage in tree["run_stages"]] == ["short", "long"]
    assert [stage["steps"] for stage in tree["cost"]["run_stages"]] == [70, 30]
    assert tree["advice"]["planned"]["memory_bytes"] == max(stage["memory_bytes"] for stage in tree["run_stages"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def of_corpus(corpus: Path, *others: str) -> list[str]:
    return [
        f"tokenizer={corpus / 'tokenizer'}",
        f"stages.0.data.train={corpus / 'train'}",
        f"stages.0.data.validation={corpus / 'validation'}",
        *others,
    ]


def test_data_that_is_there_is_counted(capsys, corpus):
    from engine.data.shards.index import read_index

    code, out, _ = plan(capsys, "gpt2-124m", *of_corpus(corpus))
    tokens = read_index(corpus / "train").num_tokens
    words = " ".join(out.split())
    assert code == 0
    assert "missing" not in words
    assert f"has {tokens:,} tokens" in words
    assert f"reads them {10_000_269_312 / tokens:.3g} times" in words
    assert "less than a step's 524,288" in words


def test_a_vocabulary_that_is_too_small_is_wrong_once(capsys, corpus):
    code, out, _ = plan(capsys, "gpt2-124m", *of_corpus(corpus, "model.vocab_size=200"))
    assert code == 2
    assert out.count("wrong:") == 1
    assert "model.vocab_size = 200, but the tokenizer" in out


def test_data_of_another_tokenizer_is_wrong(capsys, corpus, tmp_path):
    from engine.corpus.tokenizer_training import train_tokenizer

    train_tokenizer(["other text, other pieces"] * 20, tmp_path / "other", "bpe", 270, "causal")
    code, out, _ = plan(capsys, "gpt2-124m", *of_corpus(corpus, f"tokenizer={tmp_path / 'other'}"))
    assert code == 2
    assert "wrong: data.train: the shards in" in out


def test_the_runs_reservoir_is_told_among_the_data():
    from engine.config.load import load_run
    from tools.plan_inputs import look

    found = look(load_run(Path(__file__).parents[2] / "configs/examples/replay-reservoir.yaml")).found
    assert "stages.1.replay.source: the run's reservoir of 100,000 rows at most" in found


def table_width(shown: str) -> int:
    """The longest line that is neither a missing input nor keys to paste."""
    pasted = ("missing: ", "parallel", "parallel: ")
    return max(len(line) for line in shown.splitlines() if not line.startswith(pasted))


def test_tables_fit_a_terminal(capsys):
    code, shown, _ = plan(capsys, SMOKE / "zero3-pipe.yaml", "--world", "4")
    assert code == 0
    for part in ("pipe 2 x data 2", "ZeRO-3", "idle 33.3%", "gathered", "bytes that one rank sends", "refused"):
        assert part in shown
    assert table_width(shown) <= 80


def test_what_lies_elsewhere_has_a_column_of_its_own(capsys):
    near = ("parallel.zero_stage=3", "parallel.gather_within=2", "parallel.offload=optimizer")
    code, shown, _ = plan(capsys, GPT2, "--world", "4", *near)
    assert code == 0
    assert " host" in shown
    assert "moments" not in shown
    assert "near" in shown
    assert table_width(shown) <= 80
    assert "host" not in plan(capsys, GPT2, "--world", "4", "parallel.zero_stage=3")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--world", "4", "parallel.zero_stage=3", "parallel.data=4", "parallel.gather_within=4"),
            "parallel.gather_within = 4 does not cut the 4 data x sequence ranks",
        ),
        (("parallel.gather_within=1",), "parallel.gather_within"),
        (("parallel.offload=weights",), "parallel.offload"),
        (("parallel.pipe=2", "--world", "3"), "a world of 3 does not fit pipe 2"),
        (("--gpu", "tpu"), "--gpu tpu is not known"),
    ],
)
def test_what_cannot_be_planned_is_refused(capsys, arguments, said):
    code, _, error = plan(capsys, GPT2, *arguments)
    assert code == 2
    assert said in error


def test_json_holds_the_same(capsys):
    code, out, _ = plan(capsys, GPT2, "parallel.pipe=2", "--json")
    tree = json.loads(out)
    assert code == 0
    assert tree["layout"] == {"pipe": 2, "data": 1, "sequence": 1, "tensor": 1}
    assert len(tree["stages"]) == 2
    for stage in tree["stages"]:
        for parts in (stage["memory"], stage["traffic"]):
            assert parts["total"] == sum(value for key, value in parts.items() if key not in ("total", "host_bytes"))
    assert tree["operations"] == tree["operations_per_token"] * tree["tokens"]
    assert all(refusal["problems"] for refusal in tree["refused"])


def test_layouts_are_ranked_by_seconds(capsys):
    code, out, _ = plan(capsys, GPT2, "--world", "4", "--gpu", "h100-80gb", "--json")
    advice = json.loads(out)["advice"]
    least, most = advice["planned"]["band_seconds"]
    assert code == 0
    assert least < advice["planned"]["seconds"] < most
    seconds = [candidate["seconds"] for candidate in advice["ranked"] if candidate["fits"]]
    assert seconds == sorted(seconds)
    assert len(seconds) > 3


def test_units():
    assert [scale(n) for n in (0, 1023, 1024, 5 * 1024**3)] == [(1, "B"), (1, "B"), (1024, "KiB"), (1024**3, "GiB")]
