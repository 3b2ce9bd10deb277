"""Which rank is taken for hung: a clock of our own, no waiting."""

from engine.config.schema.run import LaunchConfig
from engine.heartbeat import Beat, Phase
from launcher.watchdog import LONGEST_TICK_SECONDS, Watchdog

LIMITS = LaunchConfig(
    step_limit_seconds=10.0, step_limit_factor=4.0, start_limit_seconds=100.0, save_limit_seconds=50.0
)
TICK = 0.5


class World:
    """Two ranks that beat when they are told to, and the time that passes between looks."""

    def __init__(self) -> None:
        self.watchdog = Watchdog(LIMITS)
        self.now = 1000.0
        self.beats: dict[int, Beat | None] = {0: None, 1: None}

    def beat(self, step: int, phase: Phase, *ranks: int) -> None:
        for rank in ranks or (0, 1):
            before = self.beats[rank]
            self.beats[rank] = Beat(before.count + 1 if before else 1, step, phase, self.now)

    def silent_until(self, most_seconds: float) -> tuple[int | None, float]:
        """Lets time pass without a beat; who was taken for hung, and after how long."""
        began = self.now
        while self.now < began + most_seconds:
            if (found := self.watchdog.look(dict(self.beats), TICK)) is not None:
                return found, self.now - began
            self.now += TICK
        return None, self.now - began

    def train(self, steps: int, seconds: float) -> None:
        for step in range(steps):
            self.beat(step, "data")
            assert self.watchdog.look(dict(self.beats), seconds) is None
            self.now += seconds


def test_a_rank_that_never_begins_is_judged_as_one_that_starts() -> None:
    found, seconds = World().silent_until(1000)
    assert found is not None
    assert 100 <= seconds < 102
    world = World()
    world.beat(0, "start", 0)
    for _ in range(90):
        world.now += 1
        world.beat(0, "load", 0)  # one rank goes on; the other has not begun
        assert world.watchdog.look(dict(world.beats), 1.0) is None
    found, seconds = world.silent_until(99)
    assert found == 1
    assert 9 <= seconds <= 12


def test_clocks_of_different_nodes_are_not_mixed() -> None:
    """Rank 1's node was started an hour later: its monotonic clock is behind."""
    world = World()
    for step in range(8):
        for rank, ahead in ((0, 0.0), (1, -3600.0)):
            world.beats[rank] = Beat(step + 1, step, "data", world.now + ahead)
            assert world.watchdog.look(dict(world.beats), 0.1) is None
        world.now += 0.25
    assert world.watchdog.usual_step_seconds == 0.25


def test_a_slow_start_is_borne_longer_than_a_step() -> None:
    world = World()
    world.beat(0, "start")
    assert world.silent_until(99)[0] is None
    world.beat(0, "load")
    assert world.silent_until(99)[0] is None
    world.beat(0, "data")
    found, seconds = world.silent_until(200)
    assert found is not None
    assert 100 < seconds < 102, "in the first steps nobody knows what is usual"


def test_a_step_has_a_floor_and_a_multiple_of_the_usual_one() -> None:
    for usual, limit in ((0.1, 10.0), (5.0, 20.0)):
        world = World()
        world.train(8, usual)
        assert world.watchdog.usual_step_seconds is not None
        assert abs(world.watchdog.usual_step_seconds - usual) < 1e-6
        found, seconds = world.silent_until(200)
        assert found is not None
        assert limit - LONGEST_TICK_SECONDS <= seconds <= limit + 2 * TICK, usual


def test_a_save_has_a_limit_of_its_own() -> None:
    world = World()
    world.train(8, 0.1)
    world.beat(8, "save")
    found, seconds = world.silent_until(200)
    assert found is not None
    assert 50 < seconds < 52


def test_the_rank_that_is_silent_for_longest_is_named() -> None:
    world = World()
    world.train(8, 0.1)
    world.silent_until(3)
    world.beat(8, "loss", 0)
    assert world.silent_until(200)[0] == 1


def test_one_rank_that_goes_on_does_not_excuse_the_other() -> None:
    world = World()
    world.train(8, 0.1)
    for step in range(8, 60):
        world.beat(step, "data", 0)
        found, _ = world.silent_until(TICK)
        if found is not None:
            break
    assert found == 1


def test_time_in_which_the_supervisor_slept_is_not_counted() -> None:
    """A suspended node: minutes between two looks are one tick of silence."""
    world = World()
    world.train(8, 0.1)
    for _ in range(5):
        assert world.watchdog.look(dict(world.beats), 3600.0) is None
    assert world.watchdog.ranks[0].silent_seconds <= 5 * LONGEST_TICK_SECONDS
