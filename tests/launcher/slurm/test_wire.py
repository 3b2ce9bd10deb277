"""Messages between conductor and agents, over a pair of sockets."""

import socket
import threading

from launcher.slurm import wire


def pair() -> tuple[wire.Line, wire.Line, socket.socket]:
    one, other = socket.socketpair()
    return wire.Line(one), wire.Line(other), one


def test_messages_arrive_whole_and_in_order() -> None:
    here, there, _ = pair()
    long = {"stacks": "x" * 300_000}
    thread = threading.Thread(target=lambda: (here.send({"n": 1}), here.send(long), here.close()))
    thread.start()
    assert list(there.messages()) == [{"n": 1}, long]
    thread.join()


def test_what_is_no_message_ends_the_connection() -> None:
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"x" * (wire.LONGEST_LINE + 2)):
        _, there, raw = pair()
        thread = threading.Thread(target=lambda data=data, raw=raw: (raw.sendall(data), raw.close()))
        thread.start()
        try:
            assert list(there.messages()) == []
        finally:
            there.close()
        thread.join()


def test_a_side_that_is_gone() -> None:
    here, there, _ = pair()
    there.close()
    assert not (here.send({}) and here.send({}))


def test_tokens() -> None:
    assert wire.is_token("abc", "abc")
    for found in ("ab", "", None, 7):
        assert not wire.is_token(found, "abc")
