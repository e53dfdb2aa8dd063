"""Signals held back: one that stops waits for a safe point, a second one does not; SIGUSR1 asks for a checkpoint."""

import os
import signal
import threading

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


def test_a_checkpoint_is_asked_for_and_nothing_stops() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with held_back() as interruption:
        assert not interruption.checkpoint_wanted
        for _ in range(3):  # however often
            send(signal.SIGUSR1)
        assert interruption.checkpoint_wanted
        assert interruption.pending is None
        send(signal.SIGINT)
        send(signal.SIGUSR1)
        assert interruption.pending == signal.SIGINT
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_request_for_a_checkpoint_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with held_back() as interruption:
            send(signal.SIGUSR1)
            assert not interruption.checkpoint_wanted
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_process_that_got_no_signal_itself_ends_as_if_terminated() -> None:
    """Of several processes one gets the signal, and all of them stop."""
    with held_back() as interruption, pytest.raises(SystemExit) as done:
        interruption.deliver()
    assert done.value.code == 143


def test_outside_the_main_thread_nothing_changes() -> None:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    seen: list[bool] = []

    def work() -> None:
        with held_back() as interruption:
            seen.append({signum: signal.getsignal(signum) for signum in before} == before)
            seen.append(interruption.pending is None)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, True]
