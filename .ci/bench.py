#!/usr/bin/env python3
"""Print what the server costs, in a table, in about three minutes.

    python .ci/bench.py [--seconds N]     N: how long each measurement lasts, 2 by default

Three processes: this one is the clients, one is a lean Ollama, one is the server, started by
README's own command with default options. The same question goes to Ollama itself and to three
dialects, in alternating rounds; the table has medians.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import functools
import heapq
import itertools
import json
import os
import platform
import re
import selectors
import socket
import statistics
import string
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ollama_api
from test_ollama_api import (API_CHAT, CHAT, MESSAGES, PATIENCE, USER, content, done, offer,
                             processor_seconds, refuses)

HERE = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "ollama_api.py")  # README's; the environment says the rest
JSON = Dict[str, Any]
PROSE = "The quick brown fox jumps over the lazy dog. " * 78  # 3.5 KB
IMAGE = base64.b64encode(os.urandom(3_750_000)).decode()
LETTERS = (string.ascii_letters + string.digits + "+/").encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
LINE = json.dumps(content(" word")).encode() + b"\n"
REFUSAL = b'{"error": "plain does not support tools"}'
REFUSED = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(REFUSAL) + REFUSAL


@functools.lru_cache(maxsize=None)
def lean_answer(count: int, bound: bool) -> List[bytes]:
    """Return the head, and a chunk for each line, as the wire has them."""
    lines = [LINE] * count + [json.dumps(done(prompt=30, answer=count)).encode() + b"\n"]
    if bound:
        lines[:1] = [json.dumps(content('{"answer": "')).encode() + b"\n"]
        lines[-2] = json.dumps(content('"}')).encode() + b"\n"
    return [HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
            *[b"%x\r\n%s\r\n" % (len(each), each) for each in lines], b"0\r\n\r\n"]


class LeanOllama:
    """Answer a question to the model `bench-TOKENS-MILLISECONDS` with so many tokens at that pace,
    one send each; at 0, as fast as they are taken. One thread with a timetable does it. The model
    `plain-bench-...` knows no tools."""

    def __init__(self) -> None:
        self.timetable: List[Tuple[float, int, float, bytes, Iterator[bytes], socket.socket]] = []
        self.numbers = itertools.count()
        self.received: Dict[socket.socket, bytearray] = {}
        self.selector = selectors.DefaultSelector()

    def run(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1024)
            print(listener.getsockname()[1], flush=True)
            self.selector.register(listener, selectors.EVENT_READ)
            while True:
                wait = self.timetable[0][0] - time.monotonic() if self.timetable else None
                for key, _ in self.selector.select(wait):
                    if key.fileobj is listener:
                        self.accept(listener)
                    else:
                        self.receive(key.fileobj)
                while self.timetable and self.timetable[0][0] <= time.monotonic():
                    self.send(*heapq.heappop(self.timetable))

    def accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received[sock] = bytearray()
        self.selector.register(sock, selectors.EVENT_READ)

    def receive(self, sock: Any) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = sock.recv(1 << 20)
        if not data:
            self.selector.unregister(sock)
            del self.received[sock]
            sock.close()
            return
        request = self.received[sock]
        request += data
        head = request.find(b"\r\n\r\n") + 4
        length = re.search(rb"(?i)content-length: (\d+)", request[:head])
        if head > 3 and len(request) - head == int(length[1] if length else 0):
            # What it looks for stands before the conversation, or after it.
            self.answer(sock, bytes(request[:4096] + request[-4096:]))
            request.clear()

    def answer(self, sock: socket.socket, request: bytes) -> None:
        chat = b"POST /api/chat " in request
        wanted = re.search(rb'"(plain-)?bench-(\d+)-(\d+)"', request) if chat else None
        count, pace = (int(wanted[2]), int(wanted[3])) if wanted else (0, 0)
        parts: Iterator[bytes] = iter((HEAD + b"Content-Length: 14\r\n\r\n{\"models\": []}",))
        if wanted and wanted[1] and b'"tools"' in request:
            parts = iter((REFUSED,))
        elif wanted:
            parts = iter(lean_answer(count, b'"format"' in request))
        self.enter(time.monotonic(), pace / 1000, next(parts), parts, sock)

    def enter(self, due: float, pace: float, part: bytes, parts: Iterator[bytes],
              sock: socket.socket) -> None:
        heapq.heappush(self.timetable, (due, next(self.numbers), pace, part, parts, sock))

    def send(self, due: float, _: int, pace: float, part: bytes, parts: Iterator[bytes],
             sock: socket.socket) -> None:
        try:
            part = part[sock.send(part):]
        except BlockingIOError:
            self.enter(time.monotonic() + 0.001, pace, part, parts, sock)
            return
        except OSError:
            return
        part = part or next(parts, b"")
        if part:
            self.enter(due + pace if pace else time.monotonic(), pace, part, parts, sock)


@dataclass
class Target:
    """Name a server that is asked: a column of the table."""
    name: str
    port: int
    path: str
    pid: int = 0  # 0: Ollama itself, which costs nothing here

    def request(self, tokens: int, pace: int = 0, stream: bool = True) -> bytes:
        return self.post({"model": f"bench-{tokens}-{pace}", "stream": stream, "max_tokens": 99,
                          "messages": USER})

    def conversation(self) -> JSON:
        """Return 7 MB in 2,000 messages."""
        turns = [{"role": role, "content": PROSE} for role in ("user", "assistant")] * 1000
        return {"model": "bench-1-0", "stream": False, "max_tokens": 99, "messages": turns + USER}

    def screenshot(self) -> JSON:
        """Return an image of 5 MB in base64."""
        message: JSON = {"role": "user", "content": "What is this?", "images": [IMAGE]}
        if self.path == CHAT:
            url = {"url": "data:image/png;base64," + IMAGE}
            message = {"role": "user", "content": [{"type": "image_url", "image_url": url}]}
        if self.path == MESSAGES:
            source = {"type": "base64", "media_type": "image/png", "data": IMAGE}
            message = {"role": "user", "content": [{"type": "image", "source": source}]}
        return {**self.conversation(), "messages": [message]}

    def with_tools(self, model: str) -> bytes:
        return self.post(offer(self.path, {"messages": USER}, model=model, stream=True))

    def post(self, value: Any) -> bytes:
        body = json.dumps(value).encode()
        return (f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
                f"\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body

    def cpu(self) -> float:
        """Return the seconds of processor time so far."""
        return processor_seconds(self.pid) if self.pid else 0.0

    def memory(self) -> float:
        """Return megabytes now; 0 where there is no /proc."""
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.pid}/status").read_text()
            return int((status.partition("VmRSS:")[2].split() or "0")[0]) / 1024
        return 0.0


def floor(body: JSON) -> float:
    """Return the seconds that a body costs whoever reads, looks at its image, and passes it on."""
    data, began = json.dumps(body).encode(), time.perf_counter()
    json.dumps(json.loads(data)).encode()
    if len(body["messages"]) == 1:
        IMAGE.encode().translate(None, LETTERS)
    return time.perf_counter() - began


def answered(sock: socket.socket, request: bytes) -> Tuple[float, float]:
    """Ask, and read the answer to its end. Return seconds until its first token, and in all."""
    began = time.perf_counter()
    sock.sendall(request)
    got, first = b"", 0.0
    while True:
        data = sock.recv(1 << 20)
        got += data
        first = first or (time.perf_counter() - began if b"word" in got else 0.0)
        head, _, body = got.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if not data or got.endswith(b"\r\n0\r\n\r\n") or length and len(body) == int(length[1]):
            assert head.startswith(b"HTTP/1.1 200 "), head
            return first, time.perf_counter() - began


@dataclass
class Load:
    """Hold what many clients saw that came at once."""
    finished: int = 0
    first: List[float] = field(default_factory=list)  # seconds, one for each client
    gaps: List[float] = field(default_factory=list)  # seconds between two tokens of one
    cpu: float = 0.0  # seconds of the server's
    memory: float = 0.0  # megabytes more than before, half-way


def load(target: Target, clients: int, tokens: int, pace: int = 0, request: bytes = b"") -> Load:
    """Let `clients` connect at once, ask and read."""
    result, cpu, memory = Load(), target.cpu(), target.memory()
    request, began = request or target.request(tokens, pace), time.monotonic()
    sample_at, give_up = began + tokens * pace / 2000, began + tokens * pace / 1000 + PATIENCE
    with selectors.DefaultSelector() as selector:
        for _ in range(clients):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", target.port))
            selector.register(sock, selectors.EVENT_WRITE)
        last: Dict[Any, float] = {}
        while selector.get_map() and time.monotonic() < give_up:
            for key, _ in selector.select(1):
                look_after(selector, key, request, last, result, began)
            if time.monotonic() > sample_at:
                result.memory, sample_at = target.memory() - memory, give_up
        for key in list(selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
    result.cpu = target.cpu() - cpu
    return result


def look_after(selector: selectors.BaseSelector, key: Any, request: bytes, last: Dict[Any, float],
               result: Load, began: float) -> None:
    """Do what one of the clients can do now."""
    sock = key.fileobj
    if key.events == selectors.EVENT_WRITE:
        sock.sendall(request)
        selector.modify(sock, selectors.EVENT_READ)
        return
    with contextlib.suppress(OSError):
        data, now = sock.recv(1 << 18), time.monotonic()
        if b"word" in data:
            (result.gaps if sock in last else result.first).append(now - last.get(sock, began))
            last[sock] = now
        if data and not data.endswith(b"0\r\n\r\n"):
            return
        result.finished += bool(data)
    selector.unregister(sock)
    sock.close()


def middle(values: Iterable[float]) -> float:
    return statistics.median(list(values) or [0.0])


def p99(values: List[float]) -> float:
    return sorted(values or [0.0])[len(values) * 99 // 100 - (len(values) % 100 == 0)]


class Bench:
    """Hold the rows of the table: a name, and for each target the values of all rounds."""

    def __init__(self, targets: List[Target], seconds: float) -> None:
        self.targets, self.seconds = targets, seconds
        self.rows: Dict[str, Dict[str, List[float]]] = {}

    def note(self, row: str, target: Target, value: float) -> None:
        self.rows.setdefault(row, {}).setdefault(target.name, []).append(value)

    def run(self) -> None:
        for _ in range(3):
            for target in self.targets:
                self.latency(target)
                self.large(target)
                for clients in (8, 64):
                    self.saturated(target, clients)
                if target.pid:
                    self.with_tools(target)
        for clients in (200, 100, 300, 400):
            for _ in range(3):
                for target in self.targets:
                    self.paced(target, clients, 20, clients == 200)
        for target in self.targets:
            self.paced(target, 1000, 200, True)

    def latency(self, target: Target) -> None:
        new: List[float] = []
        first: List[float] = []
        plain, streamed = target.request(1, stream=False), target.request(1)
        with socket.create_connection(("127.0.0.1", target.port)) as sock:
            kept = [answered(sock, plain)[1] for _ in range(100)]
        for request, values, part in ((plain, new, 1), (streamed, first, 0)):
            for _ in range(100):
                began = time.perf_counter()
                with socket.create_connection(("127.0.0.1", target.port)) as sock:
                    connected = time.perf_counter() - began
                    values.append(connected + answered(sock, request)[part])
        for row, values in (("answer on a kept connection, ms", kept),
                            ("answer on a new connection, ms", new), ("first token, ms", first)):
            self.note(row, target, 1000 * middle(values))

    def large(self, target: Target) -> None:
        for name, body in (("an image of 5 MB", target.screenshot()),
                           ("7 MB of conversation", target.conversation())):
            request = target.post(body)
            with socket.create_connection(("127.0.0.1", target.port)) as sock:
                for _ in range(3):
                    self.note(f"{name}, ms", target, 1000 * answered(sock, request)[1])
                    self.note(f"{name}: its floor, ms", target, 1000 * floor(body))

    def saturated(self, target: Target, clients: int) -> None:
        tokens = int(20_000 * self.seconds) // clients
        result = load(target, clients, tokens)
        self.note(f"{clients} streams without delay, CPU us/token", target,
                  1e6 * result.cpu / (tokens * clients))

    def with_tools(self, target: Target, clients: int = 8) -> None:
        tokens = int(20_000 * self.seconds) // clients
        for row, model in (("native tools", "bench"), ("a model without tools", "plain-bench")):
            request = target.with_tools(f"{model}-{tokens}-0")
            result = load(target, clients, tokens, request=request)
            self.note(f"{clients} streams, {row}, CPU us/token", target,
                      1e6 * result.cpu / (tokens * clients))

    def paced(self, target: Target, clients: int, pace: int, all_rows: bool) -> None:
        tokens = max(1, int(1000 * self.seconds) // pace)
        result = load(target, clients, tokens, pace)
        name = f"{clients} streams x {pace} ms"
        rows = [("finished, %", 100 * result.finished / clients),
                ("gap p99, ms", 1000 * p99(result.gaps)),
                ("first token p99, ms", 1000 * p99(result.first)),
                ("CPU us/token", 1e6 * result.cpu / (tokens * clients)),
                ("KB a stream", 1024 * result.memory / clients)]
        for row, value in rows if all_rows else rows[1:2]:
            self.note(f"{name}: {row}", target, value)

    def table(self) -> str:
        names = [target.name for target in self.targets]
        lines = ["| | " + " | ".join(names) + " | ratios to direct |",
                 "|---|" + "--:|" * (len(names) + 1)]
        for row, values in self.rows.items():
            found = [middle(values.get(name, ())) for name in names]
            ratios = [f"{value / found[0]:.1f}" for value in found[1:] if found[0]]
            lines.append(f"| {row} | " + " | ".join(f"{value:.4g}" for value in found)
                         + f" | {', '.join(ratios)} |")
        return "\n".join(lines)


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program, and end it whatever happens: Popen's own `with` would wait for it."""
    with subprocess.Popen(command, **how) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def first_answer(ollama: str) -> Iterator[Tuple[Target, float]]:
    """Start the server. Yield whom to ask, and the seconds until it answered."""
    port, began = free_port(), time.perf_counter()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA")}
    environ = {**inherited, "OLLAMA_HOST": ollama, "OLLAMA_API_PORT": str(port)}
    with running(COMMAND, cwd=HERE, env=environ, stdout=subprocess.DEVNULL,
                 stderr=subprocess.DEVNULL) as process:
        while refuses("127.0.0.1", port):
            assert process.poll() is None, "the server does not start"
            time.sleep(0.002)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE) as reply:
            reply.read()
        yield Target("chat", port, CHAT, process.pid), time.perf_counter() - began


def start_up(ollama: str) -> Tuple[float, float]:
    """Return milliseconds from a user's command to the first answer, and megabytes then."""
    times, memory = [], 0.0
    for _ in range(7):
        with first_answer(ollama) as (target, took):
            times.append(1000 * took)
            memory = target.memory()
    return middle(times), memory


def bench(seconds: float) -> int:
    """Print the benchmark's table."""
    ollama_api.allow_many_sockets()
    lean_ollama = (sys.executable, __file__, "--lean-ollama")
    with running(lean_ollama, stdout=subprocess.PIPE) as ollama:
        assert ollama.stdout
        lean = int(ollama.stdout.readline())
        address = f"127.0.0.1:{lean}"
        took, memory = start_up(address)
        with first_answer(address) as (chat, _):
            targets = [Target("direct", lean, API_CHAT), chat,
                       dataclasses.replace(chat, name="messages", path=MESSAGES),
                       dataclasses.replace(chat, name="/api/chat", path=API_CHAT)]
            rounds = Bench(targets, seconds)
            rounds.run()
    print(f"ollama_api.py {ollama_api.__version__}, Python {platform.python_version()}, "
          f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, "
          f"{time.strftime('%Y-%m-%d')}\n")
    print(rounds.table())
    print(f"\nstart to first answer: {took:.0f} ms; at rest: {memory:.0f} MB")
    return 0


def main() -> int:
    if "--lean-ollama" in sys.argv:
        LeanOllama().run()
    options = argparse.ArgumentParser(description="Print what the server costs.")
    options.add_argument("--seconds", type=float, default=2.0)
    return bench(options.parse_args().seconds)


if __name__ == "__main__":
    sys.exit(main())
