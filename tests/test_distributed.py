"""The roll call and what keeps a run's processes together, between threads of this process."""

import concurrent.futures
import contextlib
import json
import os
import socket
import threading
import time

import pytest

from t5x_lite import distributed, rollcall
from t5x_lite.errors import UserError
from t5x_lite.rollcall import Place, meet

GROUPS = []  # of the test that runs


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def ended(monkeypatch):
    """Processes that ended at once, and how; they are threads here, which can't."""
    ended = {}
    monkeypatch.setattr(
        rollcall.Group, "exit", lambda self, status: ended.setdefault(self.place.process, status)
    )
    yield ended
    for group in GROUPS:
        group.leave()
    for group in GROUPS:
        for peer in group._peers:
            with contextlib.suppress(OSError):
                peer._connection.shutdown(socket.SHUT_RDWR)
    for thread in threading.enumerate():
        if getattr(thread, "_target", None) and thread._target.__name__ == "_watch":
            thread.join(5)
    for group in GROUPS:
        for peer in group._peers:
            peer.close()
    GROUPS.clear()


def places(count, port=None):
    port = port or free_port()
    return [Place(f"localhost:{port}", count, number) for number in range(count)]


def at_once(function, arguments):
    """What `function` gives for each argument, or the error that it raises."""
    with concurrent.futures.ThreadPoolExecutor(len(arguments)) as pool:
        futures = [pool.submit(function, argument) for argument in arguments]
    return [future.exception() or future.result() for future in futures]


def meet_all(*given):
    found = at_once(lambda place: meet(place, 10), given)
    GROUPS.extend(group for group in found if isinstance(group, rollcall.Group))
    return found


def wait_until(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_have_what_each_says_in_order(ended):
    groups = meet_all(*places(4))
    for turn in ("a", "b"):
        texts = at_once(lambda group, t=turn: group.exchange(f"{t}{group.place.process}"), groups)
        assert texts == [[f"{turn}{number}" for number in range(4)]] * 4
    for group in groups:
        group.leave()
    assert ended == {}


def test_process_0_may_come_last_and_strangers_are_sent_away(ended):
    first, second = places(2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        later = pool.submit(meet, second, 10)
        time.sleep(0.3)
        earlier = pool.submit(meet, first, 10)
        wait_until(lambda: _visit(first.address, b"GET / HTTP/1.1\r\n\r\n"))
        groups = [earlier.result(), later.result()]
    GROUPS.extend(groups)
    assert at_once(lambda group: group.exchange("x"), groups) == [["x", "x"]] * 2


def _visit(address, words):
    with socket.socket() as stranger:
        if stranger.connect_ex(("127.0.0.1", address[1])):
            return True  # all have met, nobody listens any more
        stranger.sendall(words)
        return True


def test_two_with_one_number_are_told(ended):
    three = places(3)
    errors = meet_all(three[0], three[1], three[1])
    assert all(isinstance(error, UserError) for error in errors)
    assert "has the number of process 1 on" in str(errors[0])
    assert str(errors[1]) == str(errors[0]) or str(errors[2]) == str(errors[0])


def test_different_counts_are_told():
    port = free_port()
    first, second = places(3, port)[0], places(2, port)[1]
    errors = meet_all(first, second)
    for error in errors:
        assert "was told of 2 processes and process 0 of 3" in str(error)


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at port {port} of this host"):
            meet(places(2, port)[0], 1)


def test_a_service_that_is_no_run_is_named():
    with socket.create_server(("localhost", 0)) as server:
        place = places(2, server.getsockname()[1])[1]
        closing = threading.Thread(target=lambda: server.accept()[0].close(), daemon=True)
        closing.start()
        with pytest.raises(UserError, match="no process 0 answered from there"):
            meet(place, 5)
        closing.join()


@pytest.mark.parametrize("victim", [0, 2])
def test_whose_death_it_was_is_printed_by_all_others(ended, capsys, victim):
    groups = meet_all(*places(3))
    groups[victim]._ending.acquire()  # the dead say nothing
    for peer in groups[victim]._peers:
        peer._connection.shutdown(socket.SHUT_RDWR)  # as the kernel does for the dead
    others = {0, 1, 2} - {victim}
    wait_until(lambda: others <= set(ended))
    assert {ended[number] for number in others} == {1}
    err = capsys.readouterr().err
    for number in others:
        assert f"; process {number} stops too" in err
    assert err.count(f"error: process {victim} on ") >= len(others)


def test_an_error_of_one_ends_the_others_with_its_message(ended, monkeypatch, capsys):
    monkeypatch.setattr(rollcall, "GRACE", 0.1)
    groups = meet_all(*places(3))
    groups[1].fail("UserError: the disk is full", 2)
    wait_until(lambda: set(ended) == {0, 1, 2})
    assert ended == {0: 1, 1: 2, 2: 1}
    assert "on " in (err := capsys.readouterr().err)
    assert err.count("stopped: UserError: the disk is full") == 2


def test_an_error_of_all_is_each_ones_own(ended, monkeypatch, capsys):
    monkeypatch.setattr(rollcall, "GRACE", 0.1)
    groups = meet_all(*places(3))
    for group in groups:
        group.fail("UserError: the loss is nan", 2)
    wait_until(lambda: set(ended) == {0, 1, 2})
    assert set(ended.values()) == {2}
    assert capsys.readouterr().err == ""


def test_a_silent_process_is_named_and_left_to_jax(ended, monkeypatch, capsys):
    monkeypatch.setattr(rollcall, "SILENCE", 0.3)
    monkeypatch.setattr(rollcall, "BEAT", 0.1)
    beat = rollcall.Group._beat
    frozen = threading.Event()
    monkeypatch.setattr(
        rollcall.Group,
        "_beat",
        lambda self: frozen.wait() if self.place.process == 1 else beat(self),
    )
    meet_all(*places(3))
    said = []
    wait_until(lambda: said.append(capsys.readouterr().err) or "process 1 on" in "".join(said))
    time.sleep(0.5)
    said = "".join([*said, capsys.readouterr().err])
    assert said.count("has given no sign of life") == 1
    assert ended == {}
    frozen.set()


def test_all_are_told_how_two_differ(ended, monkeypatch):
    groups = meet_all(*places(3))
    current = threading.local()
    monkeypatch.setattr(distributed, "exchange", lambda text: current.group.exchange(text))
    monkeypatch.setattr(distributed, "is_number", lambda n: current.group.place.process == n)

    def compare(group, texts):
        current.group = group
        distributed.require_same("data", texts[group.place.process])

    same = at_once(lambda group: compare(group, ["a\nb"] * 3), groups)
    assert same == [None] * 3
    errors = at_once(lambda group: compare(group, ["a\nb", "a\nb", "a\nc\nd"]), groups)
    for error in errors:
        assert isinstance(error, UserError)
        assert (
            "processes 0 and 2 differ in their data: process 0 has 'b'; process 2 has 'c', 'd'"
            in str(error)
        )


# --- where a process stands


def slurm(**more):
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[003-004]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    } | more


@pytest.fixture
def environment(monkeypatch):
    """`environment(VARIABLE=…)`: the process's, without those of the machine that tests run on."""
    for name in (*distributed.ENVIRONMENT, *slurm(), "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_options_win_over_variables_and_those_over_the_cluster(environment):
    assert distributed.find_place() is None
    environment(slurm())
    found = distributed.find_place()
    assert (found.coordinator, found.processes, found.process) == ("node003:61447", 2, 1)
    assert found.local_devices == (0,)  # one GPU a process
    variables = ("a:1", "4", "3")
    environment(dict(zip(distributed.ENVIRONMENT, variables, strict=True)))
    assert distributed.find_place() == Place("a:1", 4, 3)
    assert distributed.find_place("b:2", 5, 0) == Place("b:2", 5, 0)
    assert distributed.find_place(processes=1, process=0) is None


def test_a_cluster_of_one_process_is_none(environment):
    environment(slurm(SLURM_NTASKS="1", SLURM_PROCID="0"))
    assert distributed.find_place() is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a:1", 2, 2), "process 2 isn't one of 2"),
        (("a", 2, 1), "'a' must be HOST:PORT"),
        (("a:x", 2, 1), "'a:x' must be HOST:PORT"),
        (("a:1", 2, None), "missing: --process"),
        ((None, 2, 1), "missing: --coordinator"),
    ],
)
def test_a_place_that_cannot_be_is_refused(environment, given, message):
    with pytest.raises(UserError, match=message):
        distributed.find_place(*given)


def test_a_variable_that_is_no_number_is_named(environment):
    environment({"JAX_NUM_PROCESSES": "many"})
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='many' must be an integer"):
        distributed.find_place(environment=os.environ)


def test_a_message_that_is_none_ends_the_connection():
    one, other = socket.socketpair()
    peer = rollcall.Peer(one)
    other.sendall(json.dumps({"say": "x"}).encode() + b"\n[1]\n")
    assert peer.listen() == {"say": "x"}
    assert peer.listen() is None
    other.close()
    one.close()
