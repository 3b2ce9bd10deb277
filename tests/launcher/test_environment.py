"""Places from the variables of every launcher, as they were seen to be set, and what is refused."""

import socket
from dataclasses import replace

import pytest

from engine.config.rank_environment import RankEnvironment
from engine.errors import EnvironmentProblem
from launcher.environment import export, rank_environment
from launcher.meeting_point import check_meeting_point
from launcher.ports import FIRST_PORT, NUM_PORTS, job_port

MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4321"}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    **MEETING,
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    **MEETING,
}
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[06-08]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-77@1",
    "PMIX_RANK": "1",
}
HYDRA = {
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "2",
    "MPI_LOCALNRANKS": "4",
}


def test_alone_gets_a_free_port_of_its_own() -> None:
    environment = rank_environment({})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", environment.master_port))
    assert replace(environment, master_port=1) == RankEnvironment(master_port=1)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, RankEnvironment(5, 8, 1, "10.0.0.1", 4321, "local", 0, 4, 1, 2, "torchrun")),
        (
            TORCHRUN | {"TORCHELASTIC_RUN_ID": "x7"},
            RankEnvironment(5, 8, 1, "10.0.0.1", 4321, "x7", 0, 4, 1, 2, "torchrun"),
        ),
        (DEEPSPEED, RankEnvironment(3, 4, 1, "10.0.0.1", 4321, "local", 0, 2, 1, 2, "deepspeed")),
        (SLURM, RankEnvironment(3, 4, 0, "gpu07", FIRST_PORT + 1234, "1234", 0, 1, 1, 2, "slurm", "0")),
        (SLURM | MEETING, RankEnvironment(3, 4, 0, "10.0.0.1", 4321, "1234", 0, 1, 1, 2, "slurm", "0")),
        (
            OPENMPI,
            RankEnvironment(
                1, 2, 1, "127.0.0.1", job_port("prterun-host-77@1"), "prterun-host-77@1", 0, 2, 0, 1, "openmpi"
            ),
        ),
        (HYDRA, RankEnvironment(2, 4, 2, "127.0.0.1", job_port("local"), "local", 0, 4, 0, 1, "pmi")),
        (
            {"PALIMPSEST_LAUNCHER": "local", "PALIMPSEST_JOB": "j", "PALIMPSEST_ATTEMPT": "2", "RANK": "1"}
            | {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING},
            RankEnvironment(1, 2, 1, "10.0.0.1", 4321, "j", 2, 2, 0, 1, "local"),
        ),
    ],
    ids=["torchrun", "torchrun with an id", "deepspeed", "srun", "srun, host given", "mpirun", "hydra", "local"],
)
def test_every_launcher(environ: dict[str, str], expected: RankEnvironment) -> None:
    assert rank_environment(environ) == expected


def test_all_ranks_of_a_slurm_step_agree() -> None:
    """Four tasks on two nodes: one world, one meeting point, every position once."""
    tasks = [("0", "0", "0"), ("1", "1", "0"), ("2", "2", "0"), ("3", "0", "1")]
    places = [
        rank_environment(SLURM | {"SLURM_PROCID": rank, "SLURM_LOCALID": local, "SLURM_NODEID": node})
        for rank, local, node in tasks
    ]
    assert [environment.global_rank for environment in places] == [0, 1, 2, 3]
    assert [environment.local_world_size for environment in places] == [3, 3, 3, 1]
    assert (
        len(
            {
                (environment.master_addr, environment.master_port, environment.world_size, environment.job)
                for environment in places
            }
        )
        == 1
    )


@pytest.mark.parametrize("inner", [TORCHRUN, DEEPSPEED, OPENMPI, HYDRA], ids=["torchrun", "deepspeed", "mpi", "hydra"])
def test_the_innermost_launcher_wins_inside_a_slurm_step(inner: dict[str, str]) -> None:
    inside = rank_environment(SLURM | MEETING | inner)
    alone = rank_environment(MEETING | inner)
    assert (inside.global_rank, inside.world_size, inside.launcher) == (
        alone.global_rank,
        alone.world_size,
        alone.launcher,
    )
    assert inside.job == "1234"


def test_two_steps_of_a_job_meet_at_two_ports() -> None:
    steps = [rank_environment(SLURM | {"SLURM_STEP_ID": str(step)}) for step in range(50)]
    assert len({environment.master_port for environment in steps}) == 50
    assert {environment.job for environment in steps} == {"1234"}
    assert [environment.step for environment in steps] == [str(step) for step in range(50)]
    by_hand = rank_environment(SLURM | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "gpu07"})
    assert (by_hand.step, by_hand.master_port) == ("0", steps[0].master_port), "RANK=$SLURM_PROCID, as scripts have it"


@pytest.mark.parametrize("cluster", ["SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"])
def test_two_mpiruns_of_a_job_meet_at_two_ports(cluster: str) -> None:
    one, other = (
        rank_environment(OPENMPI | {cluster: "77", "PMIX_NAMESPACE": f"prterun-host-{pid}@1"}) for pid in (5, 6)
    )
    assert one.job == other.job == "77"
    assert one.master_port != other.master_port
    assert one.step != other.step


def test_an_mpirun_has_one_step_whatever_daemons_started_its_ranks() -> None:
    """mpirun starts ranks of its own node itself, and others through an srun of its own."""
    near, far = rank_environment(OPENMPI | MEETING), rank_environment(OPENMPI | MEETING | {"SLURM_STEP_ID": "0"})
    assert near == far


@pytest.mark.parametrize("inner", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_what_surrounds_torchrun_and_deepspeed_says_nothing_of_their_nodes(inner: dict[str, str]) -> None:
    around = {"NODE_RANK": "7", "GROUP_RANK": "5", "GROUP_WORLD_SIZE": "6", "CROSS_RANK": "8", "CROSS_SIZE": "9"}
    if inner is TORCHRUN:
        del around["CROSS_SIZE"]
    assert rank_environment(around | inner) == rank_environment(inner)


def test_agents_of_torchrun_may_be_several_steps() -> None:
    inside = [rank_environment(SLURM | TORCHRUN | {"SLURM_STEP_ID": step}) for step in ("0", "1")]
    assert inside[0] == inside[1]


@pytest.mark.parametrize(
    "shell", [{}, {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}], ids=["batch", "salloc"]
)
def test_a_batch_script_is_not_a_task(shell: dict[str, str]) -> None:
    """Slurm sets SLURM_PROCID in the batch shell, too, where a rank of four would wait for the others for ever."""
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_PROCID": "0"} | shell
    one = {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1"}
    assert rank_environment(batch | one).world_size == 1
    for several in ({"SLURM_NTASKS": "4"}, {"SLURM_JOB_NUM_NODES": "2"}):
        with pytest.raises(EnvironmentProblem, match="srun was forgotten: job 1234 has"):
            rank_environment(batch | one | several)
        assert rank_environment(batch | one | several | TORCHRUN).launcher == "torchrun", "its agent starts ranks"


OPERATOR = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "run-master-0"}
"""Variables of the PyTorch operator of Kubernetes in the second of two pods."""


class TestPods:
    def test_torchruns_options_in_the_environment_make_a_rank(self) -> None:
        port = {"PET_MASTER_PORT": "23456"}
        expected = RankEnvironment(1, 2, 0, "run-master-0", 23456, "local", 0, 1, 1, 2, "kubernetes")
        assert rank_environment(OPERATOR | port) == expected
        # The operator's own RANK and WORLD_SIZE count pods, and there is no LOCAL_RANK.
        assert rank_environment(OPERATOR | port | {"RANK": "1", "WORLD_SIZE": "2"}) == expected
        endpoint = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": "run-master-0:23456"}
        assert rank_environment(endpoint) == expected

    def test_an_indexed_job_numbers_the_pods(self) -> None:
        indexed = {"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "run-0.run", "MASTER_PORT": "4321"}
        assert rank_environment(indexed) == RankEnvironment(
            3, 4, 0, "run-0.run", 4321, "local", 0, 1, 3, 4, "kubernetes"
        )
        assert rank_environment({"JOB_COMPLETION_INDEX": "3"}).launcher == "alone", "one of many independent runs"

    def test_ranks_of_a_torchrun_in_a_pod_are_torchruns(self) -> None:
        assert rank_environment(OPERATOR | {"JOB_COMPLETION_INDEX": "1"} | TORCHRUN) == rank_environment(TORCHRUN)

    def test_several_ranks_in_a_pod_are_left_to_torchrun(self) -> None:
        with pytest.raises(EnvironmentProblem, match="PET_NPROC_PER_NODE = 8") as caught:
            rank_environment(OPERATOR | {"PET_NPROC_PER_NODE": "8"})
        assert "torchrun -m engine.cli train" in caught.value.remedy

    def test_elastic_numbers_of_pods_are_refused(self) -> None:
        with pytest.raises(EnvironmentProblem, match="PET_NNODES = '1:4' is no number"):
            rank_environment(OPERATOR | {"PET_NNODES": "1:4"})


def test_mpirun_in_an_allocation_meets_on_the_first_node_of_the_job() -> None:
    """Ranks of other nodes are children of a step of mpirun's own, whose host list leaves out rank 0's node."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[07-08]", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    world = OPENMPI | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    near = rank_environment(world | job | {"OMPI_COMM_WORLD_RANK": "0"})
    far = rank_environment(
        world | job | {"OMPI_COMM_WORLD_RANK": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu08"}
    )
    assert (near.master_addr, near.master_port) == (far.master_addr, far.master_port)
    assert near.master_addr == "gpu07"


def test_a_later_start_has_a_higher_attempt() -> None:
    attempts = [
        rank_environment(TORCHRUN | {"SLURM_RESTART_COUNT": slurm, "TORCHELASTIC_RESTART_COUNT": torch}).attempt
        for slurm, torch in [("0", "0"), ("0", "1"), ("0", "9"), ("1", "0"), ("1", "1"), ("2", "0")]
    ]
    assert attempts == sorted(set(attempts))


def test_a_child_of_a_process_that_called_mpi_init_alone_is_no_rank_of_it() -> None:
    """What Open MPI 4.1 leaves in the environment of a program that imported mpi4py without mpirun."""
    left = {
        "PMIX_RANK": "0",
        "PMIX_NAMESPACE": "1592197121",
        "OMPI_MCA_ess": "singleton",
        "OMPI_APP_CTX_NUM_PROCS": "1",
    }
    assert rank_environment(left).launcher == "alone"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        (TORCHRUN | {"RANK": "8"}, "torchrun says rank = 8, but world size = 8"),
        (TORCHRUN | {"RANK": "-1"}, "torchrun says rank = -1"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "torchrun says local rank = 4, but ranks on this node = 4"),
        (TORCHRUN | {"GROUP_RANK": "2"}, "torchrun says node rank = 2, but number of nodes = 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "torchrun says ranks on this node = 9, but world size = 8"),
        (TORCHRUN | {"RANK": "five"}, "RANK = 'five' is no number"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT = 'http' is no number"),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE is not set"),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "MASTER_ADDR is not set and the 2 nodes of openmpi"),
        ({"PMIX_RANK": "0"}, "PMI_SIZE is not set"),
        (SLURM | {"SLURM_NODEID": "5"}, "SLURM_NODEID = 5, but Slurm lists tasks of 2 nodes"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "Slurm's tasks per node 'many' cannot be read"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[7"}, "Slurm's host list 'gpu[7' cannot be read"),
        (
            OPENMPI | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            "RANK = 0 and WORLD_SIZE = 1 contradict openmpi, which says rank 1 of 2",
        ),
    ],
)
def test_missing_and_contradictory_variables_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        rank_environment(environ)
    assert caught.value.wrong.startswith(message)
    assert caught.value.remedy


def test_export_makes_any_place_look_like_torchrun() -> None:
    environment = rank_environment(SLURM)
    environ: dict[str, str] = {}
    export(environment, environ)
    again = rank_environment(environ | {"PALIMPSEST_JOB": environment.job, "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"})
    assert replace(again, launcher=environment.launcher, step=environment.step) == environment


class TestMeetingPoint:
    PLACE = RankEnvironment(0, 2, 0, "node1", num_nodes=2)

    def test_one_node_may_meet_on_loopback(self) -> None:
        check_meeting_point(replace(self.PLACE, num_nodes=1), {}, lambda _: "127.0.0.1")

    def test_addresses_between_nodes_pass(self) -> None:
        check_meeting_point(replace(self.PLACE, global_rank=1), {}, lambda _: "10.0.0.1")

    def test_loopback_between_nodes_is_refused(self) -> None:
        with pytest.raises(EnvironmentProblem, match=r"MASTER_ADDR = node1 resolves to 127\.0\.1\.1") as caught:
            check_meeting_point(self.PLACE, {}, lambda _: "127.0.1.1")
        assert "mend /etc/hosts" in caught.value.remedy

    def test_this_hosts_own_name_counts_unless_an_interface_is_named(self) -> None:
        def resolve(name: str) -> str:
            return "10.0.0.1" if name == "node1" else "127.0.1.1"

        other = replace(self.PLACE, global_rank=1)
        with pytest.raises(EnvironmentProblem, match="this host's name"):
            check_meeting_point(other, {}, resolve)
        check_meeting_point(other, {"GLOO_SOCKET_IFNAME": "eth0"}, resolve)

    def test_rank_0_on_another_host_than_the_first_of_the_list_is_refused(self) -> None:
        with pytest.raises(EnvironmentProblem, match="and the first host of the job is node1") as caught:
            check_meeting_point(self.PLACE, {}, lambda _: "192.0.2.1")  # TEST-NET-1 (RFC 5737): nobody's address
        assert "set MASTER_ADDR=" in caught.value.remedy
        check_meeting_point(replace(self.PLACE, global_rank=1), {}, lambda _: "192.0.2.1")
        check_meeting_point(self.PLACE, {"MASTER_ADDR": "node1"}, lambda _: "192.0.2.1")  # a service of Kubernetes

    def test_an_unknown_name_is_refused(self) -> None:
        def resolve(name: str) -> str:
            raise socket.gaierror("Name or service not known")

        with pytest.raises(EnvironmentProblem, match="MASTER_ADDR = node1 does not resolve: Name or service"):
            check_meeting_point(self.PLACE, {}, resolve)


def test_ports_of_jobs_stay_below_what_clients_get() -> None:
    ports = [job_port(job) for job in ("0", "1", str(10**9), "name", "")]
    assert all(FIRST_PORT <= port < FIRST_PORT + NUM_PORTS <= 32768 for port in ports)
    assert job_port("name") == job_port("name")
    assert job_port("1") != job_port("2")
