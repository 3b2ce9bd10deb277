import os
import signal

import pytest

from engine.train import signals
from engine.train.signals import StopSignals


@pytest.mark.parametrize("number", signals.STOP)
def test_a_signal_asks_to_stop_and_is_only_caught_inside(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) is before


def test_signals_close_together_count_as_one_and_a_later_one_ends_the_process(monkeypatch):
    clock = [100.0]
    ended = []
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += signals.SAME_SIGNAL_SECONDS - 0.1
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked
        assert not ended
        clock[0] += 0.2
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [1]
