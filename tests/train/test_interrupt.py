"""Signals held back: one waits for a safe point, a second one does not."""

import os
import signal

import pytest

from slm.train.interrupt import held_back


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def test_the_first_waits() -> None:
    with held_back() as interruption:
        send(signal.SIGINT)
        assert interruption.pending == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            interruption.deliver()


def test_the_second_does_not() -> None:
    with held_back():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_termination_without_a_handler() -> None:
    with held_back() as interruption:
        send(signal.SIGTERM)
        with pytest.raises(SystemExit) as done:
            interruption.deliver()
    assert done.value.code == 143


def test_handlers_come_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_back() as interruption:
            send(signal.SIGINT)
            assert interruption.pending is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    with held_back():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
