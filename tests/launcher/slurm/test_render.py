"""Scripts of a job: as the files in `slurm/` and `golden/` show them, in letters that a shell reads as they are meant.

Render anew with `python -m tests.launcher.slurm.test_render`, and read the difference.
"""

import shlex
import subprocess
from pathlib import Path

import pytest

from launcher.slurm import render, site
from tests.launcher.slurm.specs import EVERYTHING, RESUBMIT, RUN, example, preflight
from tests.readme import REPOSITORY

GOLDEN = Path(__file__).parent / "golden"
SUFFIX = site.Site(source="a site whose fast network has other names", network=site.Network(suffix="i"))
RENDERED = {
    REPOSITORY / "slurm" / "train.sbatch": lambda: render.batch_script(example()),
    REPOSITORY / "slurm" / "chain.sbatch": lambda: render.batch_script(example(chain=4, requeues=0)),
    REPOSITORY / "slurm" / "preflight.sbatch": lambda: render.preflight_script(preflight()),
    REPOSITORY / "slurm" / "rank.sh": lambda: render.rank_script(example()),
    GOLDEN / "resubmit.sbatch": lambda: render.batch_script(example("resubmit", RESUBMIT)),
    GOLDEN / "suffix-preflight.sbatch": lambda: render.preflight_script(preflight("suffix", SUFFIX)),
    GOLDEN / "everything-preflight.sbatch": lambda: render.preflight_script(preflight("everything", EVERYTHING)),
    GOLDEN / "everything-preflight-rank.sh": lambda: render.preflight_rank_script(preflight("everything", EVERYTHING)),
    GOLDEN / "everything.sbatch": lambda: render.batch_script(example("everything", EVERYTHING, exclude=("n7", "n9"))),
    GOLDEN / "everything-rank.sh": lambda: render.rank_script(example("everything", EVERYTHING)),
}


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.name)
def test_scripts_are_as_the_repository_shows_them(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == RENDERED[path](), (
        "render anew: python -m tests.launcher.slurm.test_render"
    )


@pytest.mark.parametrize("name", site.names())
def test_scripts_of_every_site_are_shell(name: str) -> None:
    job, checks = example(name, chain=2, requeues=0), preflight(name)
    scripts = [render.batch_script(job), render.rank_script(job)]
    scripts += [render.preflight_script(checks), render.preflight_rank_script(checks)]
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_words_with_blanks_and_quotes_reach_the_rank_whole(tmp_path: Path) -> None:
    """The rank's script runs its arguments as they are, and tells its exit code to the agent."""
    script = tmp_path / "rank.sh"
    script.write_text(render.rank_script(example()), encoding="utf-8")
    code = "import os, sys; print(sys.argv[1:], os.environ['RANK'], os.environ['PALIMPSEST_MARK']); sys.exit(85)"
    environment = {
        "PATH": "/usr/bin:/bin",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "PALIMPSEST_JOB": "17",
        "PALIMPSEST_ATTEMPT": "1002",
        "PALIMPSEST_HEARTBEATS": str(tmp_path),
    }
    words = ["it's", 'a "b" $HOME', ""]
    done = subprocess.run(
        ["bash", str(script), "python3", "-c", code, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (85, f"{words} 3 17.1002\n")
    assert (tmp_path / "end-3").read_text() == "85\n"


def test_steps_start_beside_others_and_the_first_exit_kills_nobody() -> None:
    spec = example()
    agents, ranks = render.agents_step(spec, 4), render.rank_step(spec, ["n2", "n3"], 16, 1002, ["parallel.data=16"])
    for step in (agents, ranks):
        assert {"--overlap", "--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--mem=0", "--mpi=none"} <= set(step)
    assert {"--nodes=4", "--ntasks=4", "--overlap"} <= set(agents)
    assert {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--nodelist=n2,n3", "--distribution=block"} <= set(ranks)
    assert f"--output={RUN}/jobs/NAME/logs/rank-%t.1002.log" in ranks
    assert ranks[-7:] == [spec.python, "-u", "-m", "engine.cli", "train", str(spec.config), "parallel.data=16"]


def test_binding_of_a_site_is_of_the_ranks_alone() -> None:
    spec = example("everything", EVERYTHING)
    ranks = render.rank_step(spec, ["n1", "n2"], 16, 0, [])
    bound = {"--cpus-per-task=7", "--cpu-bind=mask_cpu:fe,fe00", "--gpu-bind=closest", "--mem-bind=local", "--mpi=pmix"}
    assert bound <= set(ranks)
    assert not bound & set(render.agents_step(spec, 2))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("apptainer", "apptainer exec --nv --bind /a:/b IMAGE"),
        ("singularity", "singularity exec --nv --bind /a:/b IMAGE"),
        ("shifter", "shifter --image=IMAGE --volume=/a:/b"),
        ("podman", "podman run --rm --env-host --network=host --ipc=host --pid=host --volume /a:/b IMAGE"),
    ],
)
def test_ranks_in_a_container(program: str, words: str) -> None:
    container = {"program": program, "image": "IMAGE", "binds": ["/a:/b"], "gpus": "nv", "python": "/opt/python"}
    profile = site.Site.model_validate({"source": "x", "container": container})
    spec = example("x", profile)
    assert f'{words} "$@" &' in render.rank_script(spec)
    assert render.train_command(spec, [])[0] == "/opt/python"
    assert spec.python in render.agents_step(spec, 2), "agents see the host"


def test_pyxis_is_an_option_of_srun() -> None:
    container = {"program": "pyxis", "image": "/i.sqsh", "binds": ["/a:/b"]}
    spec = example("x", site.Site.model_validate({"source": "x", "container": container}))
    ranks = render.rank_step(spec, ["n1"], 8, 0, [])
    assert "--container-image=/i.sqsh" in ranks
    assert f"--container-mounts=/a:/b,{RUN}:{RUN},/dev/shm:/dev/shm" in ranks
    assert '\n"$@" &' in render.rank_script(spec)


def test_values_of_a_node_are_evaluated_on_the_node() -> None:
    spec = example("everything", EVERYTHING)
    assert "CACHE" not in render.batch_script(spec)
    assert 'export CACHE="/tmp/$USER-$SLURM_NODEID"\n' in render.rank_script(spec)


def test_options_are_words_of_a_shell() -> None:
    """sbatch splits its lines as a shell does."""
    spec = example(run_folder=Path("/runs/my run"))
    (comment,) = [option for option in render.sbatch_options(spec) if option.startswith("--comment")]
    assert shlex.split(comment) == ["--comment=palimpsest /runs/my run"]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for path, text in RENDERED.items():
        path.write_text(text(), encoding="utf-8")
