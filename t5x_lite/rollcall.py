"""The roll call: processes meet at the coordinator's address, and stay connected while they live.

A star of TCP connections around process 0, one JSON object a line:

    {"process": 1, "processes": 4, "host": "b"}   who comes
    {"refused": "..."} or {"all": [...]}          the answer: why not, or the hosts of all
    {"say": "..."}, {"all": ["...", ...]}         `exchange`: what one has, then what all have
    {"failed": "..."}, {"died": "..."}            an error that ends the sender; another's death
    {"done": true}                                the sender has done its part
    {"beat": true}                                the sender lives

A connection that ends without a word is a process that died. The kernel ends it for a killed
process at once, and TCP's keep-alive for a host that lost power or its network in 14 s. One that is
silent is a process that froze: this says which, and JAX's heartbeats, which need no Python, end it.
"""

import contextlib
import dataclasses
import json
import os
import queue
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from t5x_lite.errors import UserError

KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}  # seconds, seconds, probes
GRACE = 5  # seconds for a process to end by itself once another has failed, perhaps by the same
BEAT, SILENCE = 2, 8  # seconds between beats; without any before it is said
LONGEST_GREETING = 4096  # bytes; whoever says more is no process of a run


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands in its run: `process` of `processes`, number 0 at `coordinator`.

    `local_devices` are the GPUs that it keeps to where a host has several processes; None for all.
    """

    coordinator: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None

    def __post_init__(self):
        if not 0 <= self.process < self.processes:
            raise UserError(
                f"process {self.process} isn't one of {self.processes}; they count from 0, and "
                f"--processes says how many there are."
            )
        _ = self.address

    @property
    def address(self) -> tuple[str, int]:
        """The coordinator's host and port."""
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(f"the coordinator {self.coordinator!r} must be HOST:PORT.")
        return host.strip("[]"), int(port)


class Peer:
    """The connection to another process; `told` holds what it said and nobody has read yet."""

    def __init__(self, connection: socket.socket, process: int = 0, host: str = ""):
        self.process, self.host = process, host
        self.told: queue.Queue[dict[str, Any]] = queue.Queue()
        self.is_over = False  # it said that it ends
        self._connection, self._heard = connection, b""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    def keep(self) -> None:
        """From here on the connection lasts as long as both processes."""
        tcp, options = self._connection, KEEPALIVE.items()
        tcp.settimeout(SILENCE)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options:
            if hasattr(socket, name):  # macOS names them differently
                tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Sends one message; one to a process that is gone is lost, as `listen` finds out."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    def listen(self, longest: int | None = None) -> dict[str, Any] | None:
        """The next message; None at the end of the connection.

        Raises:
            TimeoutError: there was none for as long as the connection waits.
        """
        while b"\n" not in self._heard:
            try:
                more = self._connection.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError:
                more = b""
            if not more or (longest and len(self._heard) > longest):
                return None
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            return message if isinstance(message, dict) else None
        return None


class Group:
    """A process among the others of its run. Made by `meet`."""

    def __init__(self, place: Place, peers: list[Peer]):
        self.place, self._peers = place, peers
        self._ending = threading.Lock()  # held from the moment that this process ends by an error
        for peer in peers:
            threading.Thread(target=self._watch, args=(peer,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def exchange(self, text: str) -> list[str]:
        """The text of every process, by number. Every process must call it, in the same order."""
        if self.place.process:
            self._peers[0].send(say=text)
            return self._peers[0].told.get()["all"]
        texts = [text, *(peer.told.get()["say"] for peer in self._peers)]
        for peer in self._peers:
            peer.send(all=texts)
        return texts

    def leave(self) -> None:
        """Says that this process has done its part; from here on nobody misses it."""
        for peer in self._peers:
            peer.send(done=True)
            peer.is_over = True

    def fail(self, why: str, status: int) -> None:
        """Says that this process ends by an error, and sees to it that it does."""
        self._ending.acquire(blocking=False)
        for peer in self._peers:
            peer.send(failed=why)
        # Threads that wait for other processes may keep this one from reaching its end.
        timer = threading.Timer(2 * GRACE, self.exit, [status])
        timer.daemon = True
        timer.start()

    def exit(self, status: int) -> NoReturn:
        """Ends this process at once, without a wait for anybody."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            for peer in self._peers:
                peer.send(beat=True)

    def _hear(self, peer: Peer) -> dict[str, Any] | None:
        """The next message of a peer; says so when it is silent for long."""
        is_reported = False
        while True:
            try:
                return peer.listen()
            except TimeoutError:
                if not is_reported and not peer.is_over:
                    print(f"{peer} has given no sign of life for {SILENCE} s.", file=sys.stderr)
                is_reported = True

    def _watch(self, peer: Peer) -> None:
        while (message := self._hear(peer)) is not None:
            if "failed" in message:
                peer.is_over = True
                time.sleep(GRACE)
                self._end(f"{peer} stopped: {message['failed']}")
            elif "died" in message:
                self._end(message["died"])
            elif "done" in message:
                peer.is_over = True
            elif "beat" not in message:
                peer.told.put(message)
        if not peer.is_over:
            self._end(f"{peer} died")

    def _end(self, why: str) -> None:
        """Ends this process because of another, unless it is about to end by an error of its own.

        Process 0 knows of all; the others of process 0 alone, so it tells them.
        """
        if not self._ending.acquire(blocking=False):
            return
        for peer in self._peers:
            peer.send(died=why)
        print(f"t5x_lite: error: {why}; process {self.place.process} stops too. The same commands "
              f"resume from the newest checkpoint.", file=sys.stderr)  # fmt: skip
        self.exit(1)


def meet(place: Place, patience: float | int) -> Group:
    """Waits until all processes of a run are there.

    Args:
        place: this process's.
        patience: seconds.

    Raises:
        UserError: the coordinator's address can't be reached or listened at, a process didn't
            come, or two say that they are the same one.
    """
    deadline = time.monotonic() + patience
    peers = _receive(place, deadline) if place.process == 0 else [_visit(place, deadline)]
    return Group(place, peers)


def _receive(place: Place, deadline: float) -> list[Peer]:
    """Process 0: answers the others once all have come."""
    peers: dict[int, Peer] = {}
    with _listener(place) as listener:
        try:
            while len(peers) < place.processes - 1:
                peer = _admit(place, listener, deadline, peers)
                if peer is not None:
                    peers[peer.process] = peer
        except UserError as error:
            for peer in peers.values():
                peer.send(refused=str(error))
                peer.close()
            raise
    hosts = [socket.gethostname(), *(peers[i].host for i in sorted(peers))]
    for peer in peers.values():
        peer.send(all=hosts)
    return [peers[number] for number in sorted(peers)]


def _listener(place: Place) -> socket.socket:
    _, port = place.address
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(
            ("", port), family=family, dualstack_ipv6=dual, backlog=place.processes
        )
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {port} of this host ({error.strerror}): give "
            f"--coordinator another port."
        ) from error


def _admit(
    place: Place, listener: socket.socket, deadline: float, peers: dict[int, Peer]
) -> Peer | None:
    """The next process that comes; None for a visitor that is none."""
    listener.settimeout(max(0.01, deadline - time.monotonic()))
    try:
        connection, address = listener.accept()
    except TimeoutError:
        absent = [str(i) for i in range(1, place.processes) if i not in peers]
        raise UserError(
            f"of {place.processes} processes, {', '.join(absent)} didn't come to process 0 at "
            f"{place.coordinator} in time: start them, or see whether they can reach it."
        ) from None
    connection.settimeout(GRACE)
    peer = Peer(connection)
    try:
        greeting = peer.listen(LONGEST_GREETING) or {}
    except TimeoutError:
        greeting = {}
    if not isinstance(greeting.get("process"), int):
        peer.close()
        return None
    peer.process = greeting["process"]
    peer.host = f"{greeting.get('host')} ({address[0].removeprefix('::ffff:')})"
    wrong = None
    if greeting.get("processes") != place.processes:
        wrong = f"{peer} was told of {greeting.get('processes')} processes and process 0 of "
        wrong += f"{place.processes}; give all the same --processes."
    elif peer.process == 0 or peer.process in peers or peer.process >= place.processes:
        other = peers.get(peer.process, "process 0")
        wrong = f"{peer} has the number of {other}; give each its own --process."
    if wrong:
        peer.send(refused=wrong)
        peer.close()
        raise UserError(wrong)
    peer.keep()
    return peer


def _visit(place: Place, deadline: float) -> Peer:
    """Another process: comes to process 0 and waits for its answer."""
    connection = _reach(place, deadline)
    peer = Peer(connection)
    peer.send(process=place.process, processes=place.processes, host=socket.gethostname())
    connection.settimeout(max(GRACE, deadline - time.monotonic() + GRACE))
    try:
        answer = peer.listen() or {}
    except TimeoutError:
        answer = {}
    if "all" not in answer:
        peer.close()
    if not {"refused", "all"} & set(answer):
        raise UserError(
            f"process {place.process} reached {place.coordinator}, but no process 0 answered from "
            f"there: see how it ended, or give --coordinator a port that nothing else uses."
        )
    if "refused" in answer:
        raise UserError(answer["refused"])
    peer.keep()
    peer.host = f"{answer['all'][0]} ({place.coordinator})"
    return peer


def _reach(place: Place, deadline: float) -> socket.socket:
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(place.address, timeout=min(5, left))
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(min(0.2, left))
            continue
        if connection.getsockname() != connection.getpeername():  # a port may call itself
            return connection
        connection.close()
    raise UserError(
        f"process {place.process} cannot reach the coordinator at {place.coordinator} ({why}): "
        f"start process 0 there, or correct the address, the port or the firewall."
    )
