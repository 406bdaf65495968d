#!/usr/bin/env python3
"""Serve Anthropic's, OpenAI's and Ollama's HTTP APIs from the local Ollama: one file, and nothing
but the standard library.

Start it
    python ollama_api.py           serves http://127.0.0.1:8000 and asks Ollama on this machine
    python ollama_api.py --demo    needs no Ollama: a stand-in model repeats what you say
    python ollama_api.py --check   says what Ollama and the model can do here

Point a client at it (any key will do; the SDKs insist on one)
    anthropic SDK, Claude Code     base URL http://127.0.0.1:8000       key "none"
    openai SDK                     base URL http://127.0.0.1:8000/v1    key "none"
    what speaks Ollama's own API   OLLAMA_HOST=http://127.0.0.1:8000    no key

Endpoints
    POST /v1/messages              Anthropic Messages
    POST /v1/messages/count_tokens the length of a prompt, estimated
    POST /v1/chat/completions      OpenAI Chat Completions; curl and Python's requests get a
                                   stream unless they send "stream": false
    POST /v1/responses             OpenAI Responses, for Codex
    GET  /v1/responses/{id}        repeat a response that is stored
    DELETE /v1/responses/{id}      forget it
    GET  /v1/responses/{id}/input_items
                                   list what it was made from
    POST /v1/completions           continue a text, or fill in its middle
    POST /v1/embeddings            turn texts into vectors
    GET  /v1/models                list the models that Ollama has, for both SDKs
    GET  /v1/models/{id}           describe one of them
    POST /api/chat                 Ollama's own API, with the same guarantees
    POST /api/generate             continue a text
    POST /api/embed                turn texts into vectors
    POST /api/embeddings           the older form of it
    POST /api/show                 describe a model
    GET  /api/tags                 list the models that Ollama has
    GET  /api/ps                   list those that are loaded
    GET  /api/version              say which release Ollama is
    GET  /health                   200 while Ollama answers, otherwise 503
    GET  /metrics                  figures for Prometheus
    GET  /                         for a browser, a page to talk to a model; for all others,
                                   name, version and endpoints

Contents of this file, from top to bottom
    Configuration                  all options, defaults and limits
    Questions and events           what all dialects share: a question, the events of its answer
    Reading requests               fields, options, strict JSON
    Messages and calls             the conversation so far, as Ollama gets it
    Frames                         the pieces that replies are made of
    Anthropic Messages             a dialect
    Blocks and tools of Messages   what its messages consist of
    OpenAI's words                 what the next three sections have in common
    OpenAI Chat Completions        a dialect
    Completions and Embeddings     OpenAI's smaller endpoints
    OpenAI Responses               a dialect
    Responses as a stream          its frames
    Stored responses               what later requests may point to
    Ollama's own API               a dialect, and what is passed on as it is
    Models and health              what Ollama has, and whether it answers
    Metrics                        what the server has done
    Routes                         the product on one screen
    Tools                          which of three ways they take; all that models are told
    JSON schemas                   the part of a client's schema that is safe for Ollama
    Schemas of tools               the part that Ollama reads
    Asking Ollama                  requests to Ollama, and what its errors mean
    Counting tokens                how long a prompt is
    Events of an answer            from Ollama's chunks to events, and filters over events
    Calls in text                  more filters: answers that are calls, in JSON
    Waiting for Ollama             watching Ollama and the client at the same time
    Reading HTTP                   from bytes to a request
    Who may ask                    web pages and keys
    Answering                      one request and its reply
    The server                     connections, limits, shutdown
    The page                       what a browser gets
    The demo                       a stand-in for Ollama
    The check                      what Ollama and the model can do here
    Options, start and end         command line

A request enters at Reading HTTP, near the end of this file. Routes names its endpoint, and the
endpoint's dialect turns the body into a question for Ollama. Asking Ollama sends it, Events of
an answer reads what comes back, and the dialect turns that into a reply.
To add a dialect, write its section and its rows in ROUTES. To add an option, add a field to Config.
"""

from __future__ import annotations

import _thread
import argparse
import base64
import bisect
import collections
import contextlib
import dataclasses
import email.utils
import errno
import fnmatch
import functools
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import operator
import os
import re
import selectors
import signal
import socket
import socketserver
import ssl
import string
import struct
import sys
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import (Any, Callable, Deque, Dict, Generator, Iterable, Iterator, List, Mapping,
                    NamedTuple, NoReturn, Optional, Pattern, Sequence, Set, Tuple, Type,
                    TypedDict, TypeVar, Union, cast)

__version__ = "0.1.0"


# ---- Configuration -------------------------------------------------------------------------------
# All settings. A field made by `option` is also a command line option and an environment
# variable (see Options, start and end). ollama_key comes from OLLAMA_API_KEY. The others are
# limits, changed only here. Nothing is read from the environment at import. Times are in seconds.

def option(default: Any, meaning: str, **how: Any) -> Any:
    """Return a field of Config that the command line can set. `how` is passed to argparse,
    except `env`: the environment variable, if it is not OLLAMA_API_<OPTION>."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "how": how})


@dataclass(frozen=True)
class Config:
    host: str = option("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int = option(8000, "port to listen on; 0 picks a free one", type=int, metavar="N")
    ollama: str = option(
        "127.0.0.1:11434", "where Ollama listens: host, host:port or a URL",
        metavar="URL", env="OLLAMA_HOST")
    model: str = option("phi4:latest", "model for requests that name none", metavar="NAME")
    tools: str = option(
        "any", "which models can call tools: any, or only those of which Ollama says so (native)",
        choices=("any", "native"))
    alias: Tuple[str, ...] = option(
        (), "use MODEL for names like PATTERN (* and ?) that are not installed; repeatable, "
        "the first match wins", metavar="PATTERN=MODEL", action="append")
    num_ctx: Optional[int] = option(
        None, "context window in tokens, for requests without num_ctx; by default Ollama decides",
        type=int, metavar="N")
    default_stream: str = option(
        "auto", "stream chat completions that do not say whether to: on, off, or auto (on for "
        "curl, Wget, HTTPie and Python's requests and urllib, off for all others)",
        choices=("auto", "on", "off"))
    ping: float = option(
        15.0, "seconds of silence after which a stream gets a keep-alive ping",
        type=float, metavar="SECONDS")
    api_key: Tuple[str, ...] = option(
        (), "demand a key of every client, and accept this one; repeatable",
        metavar="KEY", action="append", env="OLLAMA_API_SERVER_KEY")
    allow_host: Tuple[str, ...] = option(
        (), "let clients call this machine by this name, like box.example; repeatable",
        metavar="NAME", action="append")
    allow_origin: Tuple[str, ...] = option(
        (), "admit web pages of this origin, like https://chat.example; * stands for a host, the "
        "beginning of one, or a port; repeatable", metavar="ORIGIN", action="append")
    tls_cert: str = option(
        "", "serve https with the certificate chain in this PEM file", metavar="FILE")
    tls_key: str = option(
        "", "the certificate's private key, if it is in another file", metavar="FILE")
    insecure: bool = option(
        False, "with no --api-key, allow an address that others can reach", action="store_true")
    demo: bool = option(False, "start a stand-in for Ollama that repeats what it is told",
                        action="store_true")
    check: bool = option(False, "say in a minute what Ollama and the model can do here, and exit",
                         action="store_true")
    check_seconds: float = 60

    ollama_key: str = dataclasses.field(default="", repr=False)  # for an https Ollama
    head_bytes: int = 64 << 10
    head_fields: int = 100
    head_seconds: float = 15  # from its start
    body_bytes: int = 64 << 20  # screenshots
    body_seconds: float = 30  # and one more for each megabyte that has arrived
    json_depth: int = 200
    idle_seconds: float = 60
    write_seconds: float = 30  # without progress: then a client counts as gone
    linger_seconds: float = 2  # for a refusal to arrive before the connection closes
    max_running: int = 1024  # requests; Ollama itself queues 512
    max_connections: int = 4096  # a thread each
    backlog: int = 1024  # with 5, seven of ten bursts of 200 clients failed
    connect_seconds: float = 5  # to Ollama
    ask_seconds: float = 10  # for lists, version
    show_seconds: float = 2  # for what the models of a list can do
    health_seconds: float = 2
    stored_responses: int = 1000
    stored_bytes: int = 64 << 20  # of JSON, as it was sent
    line_bytes: int = 32 << 20  # from Ollama
    embed_bytes: int = 256 << 20
    grace_seconds: float = 10  # after SIGTERM


# ---- Questions and events ------------------------------------------------------------------------
# What all dialects share. A question holds Ollama's own request body: each dialect writes it
# directly, without a form in between. An answer is a stream of small events, the same for all
# clients: any number of Thinking, Text and ToolCall in the model's order, then exactly one
# Finish. Any failure is an APIError.

JSON = Dict[str, Any]
Prompt = Mapping[str, Any]  # a body for Ollama
T = TypeVar("T")
Q = TypeVar("Q", bound="Question")


class OllamaMessage(TypedDict, total=False):
    role: str  # user, system, assistant, tool
    content: str
    thinking: str  # of an assistant
    images: List[str]  # in base64
    tool_calls: List[JSON]  # see add_call
    tool_name: str  # of the call it answers
    tool_call_id: str  # of the same call


class OllamaRequest(TypedDict, total=False):
    """Describe the body of /api/chat, or of /api/generate if it has a prompt."""
    model: str
    messages: List[OllamaMessage]
    prompt: str
    suffix: str  # follows what is filled in
    tools: List[JSON]  # see Tool.for_ollama
    format: JSON  # from SchemaReducer
    think: Union[bool, str]
    logprobs: bool
    top_logprobs: int
    keep_alive: Union[str, float]
    options: JSON


@dataclass
class Question:
    """Hold a translated request: what Ollama is asked, and what shapes its answer here."""
    body: OllamaRequest
    path: str = "/api/chat"
    stream: bool = False
    stop: Sequence[str] = ()  # for until_stop
    only_counts: bool = False  # no token is wanted
    one_call: bool = False  # drop all but the first
    tools: Sequence[Tool] = ()  # that Ollama is given
    schema: Optional[Field] = None  # that it is given beside them
    amounts: Sequence[float] = ()  # see Counting tokens
    prompt_tokens: int = 0  # an estimate
    decode: Optional[Decode] = None  # of an answer that is bound to calls
    speaks: bool = False  # it may be text as well: see CALL_OR_TEXT
    as_is: bool = False  # from a client of Ollama's own API, which expects Ollama's own ways


# Events are dataclasses: if they were NamedTuples, Text("a") == Thinking("a") would be true.

@dataclass(frozen=True)
class Thinking:
    text: str


@dataclass(frozen=True)
class Text:
    text: str
    logprobs: Tuple[JSON, ...] = ()  # as Ollama has them

    def __add__(self, other: Text) -> Text:
        return Text(self.text + other.text, self.logprobs + other.logprobs)

    def split(self, n: int) -> Tuple[Text, Text]:
        """Split in two. Logprobs have no positions: all of them stay with the first."""
        return Text(self.text[:n], self.logprobs), Text(self.text[n:])


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: JSON
    rescued: bool = dataclasses.field(default=False, compare=False)  # from text


@dataclass(frozen=True)
class Finish:
    reason: str  # stop, length, tool_calls or stop_sequence
    prompt_tokens: int
    completion_tokens: int
    stop_sequence: Optional[str] = None
    cached_tokens: Optional[int] = None  # since Ollama 0.34
    has_calls: bool = dataclasses.field(default=False, compare=False)  # they came with it
    own: JSON = dataclasses.field(default_factory=dict, compare=False)  # what else came with it


Event = Union[Thinking, Text, ToolCall, Finish]
Events = Iterator[Event]
Decode = Callable[[JSON], Event]  # of an answer that is JSON
Part = Tuple[str, Any]  # (key of Ollama's message, value to add to it)
Parts = Iterator[Part]
Messages = Iterator[OllamaMessage]
Frames = Iterator[bytes]
Choice = Tuple[str, List["Tool"]]  # see choose
Response = http.client.HTTPResponse  # of Ollama


@dataclass
class Request:
    """Hold the head of an HTTP request. Header names are in lower case."""
    method: str
    path: str  # without the query; still quoted
    headers: Dict[str, str]
    version: str  # 1.0 or 1.1
    query: str = ""  # still quoted
    argument: str = ""  # for {id} in Route.path
    key: str = ""  # that it has used, if one is demanded


@dataclass
class Reply:
    """Hold what an endpoint gives: one JSON object, a text in bytes, or the frames of a stream."""
    content: Union[JSON, bytes, Frames]
    status: int = 200
    content_type: str = "application/json"
    pings: Frames = iter(())  # while silent
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # more of the header


@dataclass
class Context:
    """Hold what an endpoint gets: the request, the way to Ollama, and the server."""
    request: Request
    body: Body
    ollama: Ollama
    server: Server

    def ask(self, question: Q, reply: Callable[[Q, Events], JSON],
            stream: Callable[[Q, Events], Frames], pings: Frames) -> Reply:
        """Return Ollama's answer in the dialect's words: by `reply`, or by `stream` as frames."""
        self.body.sent = b""  # it may be large, and is not needed any more
        question.amounts = amounts_in(question.body)
        question.prompt_tokens = self.server.rates.tokens(question.body["model"], question.amounts)
        options = question.body["options"]
        question.only_counts = options.get("num_predict") == 0
        if question.only_counts:
            options["num_predict"] = 1  # up to 0.30, 0 would be no limit
        events = self.ollama.events(question)
        if question.stream:
            frames = stream(question, events)
            return Reply(frames, content_type=EVENT_STREAM, pings=pings)
        return Reply(reply(question, events))


@dataclass(eq=False)
class APIError(Exception):
    """Report a failure to the client, in the words of its dialect."""
    status: int
    message: str
    param: Optional[str] = None  # a field's path
    code: Optional[str] = None  # OpenAI's machine-readable reason
    details: Optional[JSON] = None  # Anthropic's
    retry_after: Optional[int] = None  # seconds; None tells the client not to retry
    origin: Optional[Tuple[int, str]] = None  # what Ollama said: its status (200 in a stream), text


class PromptTooLong(APIError):
    """Report a prompt that does not fit the context window. A number is 0 if it is unknown."""

    def __init__(self, prompt_tokens: int, window: int, origin: Optional[Tuple[int, str]]) -> None:
        self.prompt_tokens = prompt_tokens
        self.window = window
        tokens = f": {prompt_tokens} tokens" if prompt_tokens else ""
        maximum = f" > {window} maximum" if window else ""
        super().__init__(400, f"prompt is too long{tokens}{maximum}", code=TOO_LONG, origin=origin)


class ClientLeft(Exception):
    """Stop work: the client has closed its connection, and nobody is left to answer."""


# ---- Reading requests ----------------------------------------------------------------------------
# Dialects read a body through Field. Whatever is wrong raises a 400 that names the path of
# the field, as in messages.2.content.0.text. null counts as absent. Fields without effect
# are collected by Field.ignore, and reported in the header x-ignored-fields.

JSON_TYPES: Dict[type, str] = {
    str: "a string", bool: "true or false", int: "an integer", float: "a number",
    list: "a list", dict: "an object"}
REPORTED_FIELDS = 64
EMPTY = "must not be empty"
NO_TEXT = "(no text)"  # of a tool: models take an empty result for a failure
GO_ON = "Continue."  # where the user has said nothing
SENT_BACK = {"type", "id", "status", "index"}  # with an earlier answer; they ask for nothing


def json_type(value: Any) -> str:
    return "null" if value is None else JSON_TYPES[type(value)]


def whole(value: Any) -> Any:
    """Return the integer that a number like 1024.0 stands for; any other value as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Field:
    """Hold a value of a body, and its place."""
    __slots__ = "body", "name", "parent", "value"
    body: Body

    def __init__(self, value: Any, parent: Optional[Field], name: Union[str, int]) -> None:
        self.value, self.name = value, name
        self.parent = parent
        if parent is not None:
            self.body = parent.body

    @property
    def path(self) -> str:
        """Join the names that lead here. Few fields are asked for it, so it is not kept."""
        before = "" if self.parent is None else self.parent.path
        return f"{before}.{self.name}" if before else str(self.name)

    def invalid(self, problem: str) -> APIError:
        path = self.path
        return APIError(400, f"{path}: {problem}", param=path)

    def ignore(self) -> None:
        """Report this field as ignored."""
        ignored = self.body.ignored
        if len(ignored) < REPORTED_FIELDS and self.path not in ignored:
            ignored.append(self.path)

    def ignore_others(self, *read: str) -> None:
        """Report as ignored what this object asks for in fields that are not `read`."""
        for name, value in self.value.items():
            if value and name not in read and name not in SENT_BACK:
                self.at(name).ignore()

    def check(self, expected: Type[T]) -> T:
        """Return the value if it has the expected type. An integer is a number; true is not.
        A number like 1024.0 is an integer."""
        value = whole(self.value) if expected is int else self.value
        found = type(value)
        if found is not expected and (found, expected) != (int, float):
            raise self.invalid(f"must be {JSON_TYPES[expected]}, not {json_type(value)}")
        return cast(T, value)

    def word(self, words: Iterable[str]) -> str:
        """Return the value, one of `words`."""
        if self.value not in words:
            known = ", ".join(words) or "nothing"
            raise self.invalid(f"must be one of {known}, not {dumps(self.value)}")
        return str(self.value)

    def at(self, name: str) -> Field:
        """Return the field `name` of this object, whether it is there or not."""
        return Field(self.value.get(name), self, name)

    def get(self, name: str, expected: Type[T]) -> Optional[T]:
        """Return the value of `name`, or None if it is absent. `object` admits any type."""
        value: Optional[T] = self.value.get(name)
        if value is None or expected in (type(value), object):
            return value
        return self.at(name).check(expected)

    def need(self, name: str, expected: Type[T]) -> T:
        value = self.get(name, expected)
        if value is None:
            raise self.at(name).invalid("is required")
        return value

    def one_of(self, name: str, words: Iterable[str]) -> str:
        """Return the string `name`, which must be one of `words`."""
        value = self.need(name, str)
        return value if value in words else self.at(name).word(words)

    def needed(self, name: str, expected: type = dict) -> Field:
        """Return the field `name`, which must be there. (`need` returns its value.)"""
        return Field(self.need(name, expected), self, name)

    def object(self, name: str) -> Field:
        """Return the object `name`; an empty one if it is absent."""
        return Field(self.get(name, dict) or {}, self, name)

    def each(self, name: str, expected: type = dict) -> Iterator[Field]:
        """Yield the items of the list `name`; none if it is absent."""
        owner = Field(self.get(name, list), self, name)
        for index, value in enumerate(owner.value or ()):
            item = Field(value, owner, index)
            item.check(expected)
            yield item

    def blocks(self, name: str) -> Iterator[Field]:
        """Yield the content blocks in `name`. A string is one text block."""
        content = self.value.get(name)
        if isinstance(content, str):
            yield Field({"type": "text", "text": content}, self, name)
        elif content is None or isinstance(content, list):
            yield from self.each(name)
        else:
            raise self.at(name).invalid(
                f"must be a string or a list of blocks, not {json_type(content)}")


class Body(Field):
    """Hold the whole body of a request, the tool calls read so far, and what had no effect."""
    __slots__ = "config", "history", "ignored", "sent"

    def __init__(self, value: JSON, config: Config, sent: bytes = b"") -> None:
        super().__init__(value, None, "")
        self.body, self.config, self.sent = self, config, sent
        self.history = History()
        self.ignored: List[str] = []  # paths


def ignore_unread(owner: Field, fields: Iterable[str]) -> None:
    """Report as ignored what the client sent, but for the `fields` that are read.
    A dotted name means that only that part of an object is read."""
    for name, value in owner.value.items():
        field = Field(value, owner, name)
        path = field.path
        if isinstance(value, dict) and any(read.startswith(path + ".") for read in fields):
            ignore_unread(field, fields)
        elif value is not None and path not in fields:
            field.ignore()


class Option(NamedTuple):
    """Say how a field of a request becomes one of Ollama's options."""
    name: str
    type: type
    at_least: float = float("-inf")
    or_just: Optional[int] = None  # a value below at_least


def read_options(body: Field, table: Mapping[str, Option]) -> JSON:
    options: JSON = {}
    for field, (name, expected, at_least, or_just) in table.items():
        value = body.get(field, expected)
        if value is None:
            continue
        if value < at_least and value != or_just:
            raise body.at(field).invalid(f"must be at least {at_least:g}")
        if abs(value) >= 2**63:
            raise body.at(field).invalid("is too large a number")
        options[name] = value
    return options


OLLAMA_OPTIONS = {
    **{name: Option(name, int) for name in (
        "num_ctx", "num_keep", "num_predict", "top_k", "repeat_last_n", "num_batch",
        "num_gpu", "main_gpu", "num_thread", "draft_num_predict")},
    **{name: Option(name, float) for name in ("min_p", "typical_p", "repeat_penalty")},
    "use_mmap": Option("use_mmap", bool)}


LEAST_BATCH = 32  # of tokens: 1 ends the runner of Ollama 0.33, for all clients


def read_ollama_options(body: Field, table: Mapping[str, Option]) -> Tuple[JSON, List[str]]:
    """Return the options, with the client's own `options` on top; and the stop texts in those."""
    own = body.object("options")
    stop = stop_texts(own, "stop")
    options = {**read_options(body, table), **own.value, "stop": None}
    refuse_batch(options, own if "num_batch" in own.value else body)
    return {name: value for name, value in options.items() if value is not None}, stop


def refuse_batch(options: JSON, owner: Field) -> None:
    """Take a num_batch out that would end Ollama's runner, and report it."""
    batch = options.get("num_batch")
    if isinstance(batch, (int, float)) and not LEAST_BATCH <= batch < 2**31:
        owner.at("num_batch").ignore()
        del options["num_batch"]


def model_of(body: Body) -> str:
    """Return the model that the client names, or else the default one."""
    return body.get("model", str) or body.config.model


def keep_alive_of(body: Field) -> OllamaRequest:
    """Return how long the model stays loaded: seconds, or text like 5m; {} if not given."""
    value = body.value.get("keep_alive")
    if not isinstance(value, str):
        value = body.get("keep_alive", float)
    return {} if value is None else {"keep_alive": value}


def stop_texts(owner: Field, name: str) -> List[str]:
    """Return a list of stop texts, few and short enough to look for after each token. Empty
    ones, which would stop nothing, are skipped."""
    texts = [stop_text(text) for text in owner.each(name, str) if text.value]
    if len(texts) > 64:
        raise owner.at(name).invalid("must not be more than 64")
    return texts


def stop_text(text: Field) -> str:
    if len(text.value) > 1000:
        raise text.invalid("must have from 1 to 1000 characters")
    return str(text.value)


def base64_text(field: Field, start: int = 0) -> str:
    """Return the base64 after `start` in a string, in the plain form that Ollama reads (RFC 4648,
    4). Line breaks, URL-safe letters and missing padding lose nothing: they are accepted."""
    data: str = field.value[start:]
    if not is_base64(data):
        data = re.sub(r"\s+", "", urllib.parse.unquote(data)).rstrip("=")
        data = data.replace("-", "+").replace("_", "/") + "=" * (-len(data) % 4)
        if not is_base64(data):
            raise field.invalid("is not base64")
    if not data:
        raise field.invalid(EMPTY)
    return data


BASE64 = (string.ascii_letters + string.digits + "+/").encode()


def is_base64(text: str) -> bool:
    """Return whether a text is base64. To decode a screenshot would take six times as long."""
    rest = text.encode().translate(None, BASE64).decode("latin-1")
    return len(text) % 4 == 0 and rest in ("", "=", "==") and text.endswith(rest)


def list_of(value: Any) -> List[Any]:
    return value if isinstance(value, list) else [value]


def not_json(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def finite(digits: str) -> float:
    return float(digits) if abs(float(digits)) != float("inf") else not_json(digits)


def bounded(digits: str) -> int:
    return int(digits) if len(digits) <= 4300 else not_json(digits[:20] + "...")


READER = json.JSONDecoder(parse_constant=not_json, parse_float=finite, parse_int=bounded)


def strict_json(data: bytes, depth: int) -> Any:
    """Parse JSON (RFC 8259) that nests at most `depth` levels, as strictly as Ollama: no NaN,
    no Infinity, no lone surrogate. Of equal keys the last counts. ValueError says what is wrong."""
    try:
        value = READER.decode(data.decode("utf-8-sig"))  # Windows likes to begin with a mark
    except RecursionError:
        raise ValueError(f"it is nested deeper than {depth} levels") from None
    check_values(value, depth)
    return value


def check_values(value: Any, depth: int) -> None:
    """Raise ValueError if values nest deeper than `depth` levels, or a text has a lone surrogate.
    This looks at each value once, level by level: to recurse would take a stack."""
    level: List[Any] = [[value]]
    for _ in range(depth + 1):
        inside: List[Any] = []
        for outer in level:
            inside += outer  # the keys, if it is an object
            inside += outer.values() if isinstance(outer, dict) else ()
        for text in inside:
            if isinstance(text, str) and not text.isascii():
                text.encode()
        level = [each for each in inside if isinstance(each, (dict, list))]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {depth} levels")


# ---- Messages and calls --------------------------------------------------------------------------
# How dialects build the conversation for Ollama. Its messages have the order that all models'
# templates accept, and each tool result says which call it answers. What a model once wrote
# is never refused when it comes back: that would end the client's session.

def message_of(role: str, parts: Iterable[Part]) -> OllamaMessage:
    """Build a message. Texts are joined by blank lines. Only content may be empty."""
    values: Dict[str, List[Any]] = {}
    for key, value in parts:
        values.setdefault(key, []).append(value)
    message: OllamaMessage = {"role": role, "content": "\n\n".join(values.get("content", ()))}
    if any(values.get("thinking", ())):
        message["thinking"] = "\n\n".join(values["thinking"])
    if "images" in values:
        message["images"] = values["images"]
    if "tool_calls" in values:
        message["tool_calls"] = values["tool_calls"]
    return message


def is_plain(message: Field) -> bool:
    """Return whether a message is a role and a text, as most are: there is nothing else to read."""
    value = message.value
    return len(value) == 2 and "role" in value and isinstance(value.get("content"), str)


def joined(*messages: OllamaMessage) -> OllamaMessage:
    """Return one message for several of the same role."""
    parts: List[Part] = []
    for message in messages:
        parts += [("content", message["content"])] if message["content"] else []
        parts += [("thinking", message["thinking"])] if "thinking" in message else []
        parts += [("images", image) for image in message.get("images", ())]
        parts += [("tool_calls", call) for call in message.get("tool_calls", ())]
    return message_of(messages[0]["role"], parts)


def for_templates(messages: List[OllamaMessage]) -> List[OllamaMessage]:
    """Return the messages in the order that the templates of all models accept.

    System texts before the first answer are joined; later ones become user text: moved to the
    front, they would cost Ollama its KV cache (Claude Code has sent some since 2.1.154). Some
    text is the user's: without one, qwen3's template fails (after the client's compaction).
    No two answers stand at the end: llama-server refuses them (Ollama 0.33)."""
    early: List[str] = []
    turns: List[OllamaMessage] = []
    answered = False
    for message in messages:
        answered = answered or message["role"] == "assistant"
        if message["role"] != "system":
            turns.append(message)
        elif answered:
            turns.append({"role": "user", "content": message["content"]})
        elif message["content"]:
            early.append(message["content"])
    if all(message["role"] != "user" for message in turns):
        turns.insert(0, {"role": "user", "content": GO_ON})
    end = len(turns)
    while turns[end - 1]["role"] == "assistant":  # the user's text stops it
        end -= 1
    turns[end:] = [joined(*turns[end:])] if len(turns) - end > 1 else turns[end:]
    system: OllamaMessage = {"role": "system", "content": "\n\n".join(early)}
    return [system, *turns] if early else turns


class History:
    """Remember the tool calls read so far, for their results, and what messages say of tools.
    Some models number their calls anew in each turn, or give all of a turn the same id: equal
    ids are paired in their order. The ids that Ollama gets have nine letters and digits:
    Mistral's templates demand it (llama.cpp #26359)."""

    def __init__(self) -> None:
        self.count = 0
        # The client's id, or a name or "" for a call without: (Ollama's id, name of the tool)
        self.unanswered: Dict[str, Deque[Tuple[str, str]]] = {}
        self.latest: Dict[str, Tuple[str, str]] = {}
        self.answered: Set[str] = set()  # Ollama's ids
        self.turn_ended = False  # the user has spoken since the last call
        self.dropped: Set[str] = set()  # ids of calls that no model will see
        self.offered: Dict[str, bool] = {}  # tools that messages announce, or withdraw
        self.definitions: List[Field] = []  # tools that messages define

    def add_call(self, id: str, name: str, arguments: JSON) -> JSON:
        """Remember a call, and return it in Ollama's form."""
        if self.turn_ended:
            self.unanswered.clear()
            self.turn_ended = False
        self.dropped.discard(id)
        self.count += 1
        call = f"call{self.count:05}", name
        for key in [id] if id else {name, ""}:
            self.unanswered.setdefault(key, collections.deque()).append(call)
            self.latest[key] = call
        return {"id": call[0], "function": {"name": name, "arguments": arguments}}

    def end_turn(self) -> None:
        """Say that the user speaks again: with the next call, older ones wait no longer."""
        self.turn_ended = True

    def drop(self, owner: Field, key: str) -> None:
        """Report as ignored what no model will see. If it is a call, its result is dropped too."""
        id = owner.value.get(key)
        if id and isinstance(id, str):
            self.dropped.add(id)
        owner.ignore()

    def result(self, owner: Field, key: str, name: Optional[str] = None) -> OllamaMessage:
        """Return the fields of a tool message that say which call it answers: the one whose id
        stands in the field `key`, or else any of the tool `name`."""
        id = owner.get(key, str)
        if id is None and not name:
            raise owner.at(key).invalid("is required")
        known = id or name or ""
        if known in self.latest:
            waiting = self.unanswered.get(known, collections.deque())
            while waiting and waiting[0][0] in self.answered:  # it has a name and no id: two keys
                waiting.popleft()
            if waiting:
                self.latest[known] = waiting.popleft()
            own, name = self.latest[known]
            self.answered.add(own)
            return {"role": "tool", "tool_name": name, "tool_call_id": own}
        if not name:
            raise owner.at(key).invalid(f"no tool call before has the id {dumps(id)}")
        return {"role": "tool", "tool_name": name}


def arguments_of(field: Field) -> JSON:
    """Return the arguments of an earlier call: an object, or JSON text of one. Anything else stays
    text, for the model to read."""
    value = field.value
    if isinstance(value, str) and value.strip():
        with contextlib.suppress(ValueError):
            value = strict_json(value.encode(), field.body.config.json_depth)
    if isinstance(value, dict):
        return value
    empty = value is None or field.value == [] or not text_in(field).strip()
    return {} if empty else {"arguments": text_in(field)}


def text_in(field: Field) -> str:
    """Return the text of a field; of another value its JSON; of an absent one nothing."""
    value = field.value
    return value if isinstance(value, str) else "" if value is None else plain_json(value)


# ---- Frames --------------------------------------------------------------------------------------
# What dialects build replies with. A frame is one server-sent event (WHATWG HTML, 9.2), or, in
# Ollama's own API, one line. JSON for clients is ASCII, so it can always be encoded.

EVENT_STREAM = "text/event-stream; charset=utf-8"
JSON_LINES = "application/x-ndjson"

dumps = json.JSONEncoder(allow_nan=False).encode
plain_json = json.JSONEncoder(ensure_ascii=False).encode  # for a model to read


def new_id(prefix: str) -> str:
    return prefix + os.urandom(12).hex()


def sse(data: JSON) -> bytes:
    """Return a server-sent event, named after the type of `data` if it has one.
    Chunks of chat completions must have none: an `event:` line stops the openai SDK."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {dumps(data)}\n\n".encode()


def json_line(data: JSON) -> bytes:
    return dumps(data).encode() + b"\n"


FRAMING = {EVENT_STREAM: sse, JSON_LINES: json_line}


def prepared(frame: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """Return `frame` with all but the text encoded beforehand: a sixth of the cost per token."""
    gap = new_id("gap_")  # no other text contains it
    parts = frame(gap).split(dumps(gap).encode())
    return lambda text: dumps(text).encode().join(parts)


def once_begun(events: Events) -> Events:
    """Wait for the first event, then return all of them. A stream that begins with a frame of its
    own calls this before, so that an early failure is still an HTTP status."""
    return itertools.chain((next(events),), events)


def collect(events: Events) -> Tuple[List[Any], Finish]:
    *parts, finish = events
    assert isinstance(finish, Finish)
    return parts, finish


def runs_of(events: Iterable[Any]) -> Iterator[Tuple[type, Iterator[Any]]]:
    """Yield runs: consecutive events of one type; each tool call is a run of its own. Dialects
    call a run a content block or an item."""
    for kind, run in itertools.groupby(events, type):
        if kind is ToolCall:
            yield from ((kind, iter((call,))) for call in run)
        else:
            yield kind, run


# ---- Anthropic Messages --------------------------------------------------------------------------
# The Messages API of 2023-06-01 and 2026-10-21, for both generations of the anthropic SDKs
# and for Claude Code. Thinking is off unless it is asked for, because programs read
# content[0].text. Signatures are neither made nor checked. Content blocks are the runs of
# runs_of, so their indexes count up and only one is open at a time.

MESSAGES_PINGS = itertools.repeat(sse({"type": "ping"}))


def create_message(context: Context) -> Reply:
    question = messages_request(context.body)
    return context.ask(question, messages_reply, messages_stream, MESSAGES_PINGS)


def count_tokens(context: Context) -> Reply:
    """Answer with an estimate, without Ollama: Claude Code's /context sends two dozen requests."""
    question = messages_request(context.body)
    tokens = context.server.rates.tokens(question.body["model"], amounts_in(question.body))
    return Reply({"input_tokens": tokens})


MESSAGES_OPTIONS = {
    "max_tokens": Option("num_predict", int, at_least=0),  # 0 is documented: it fills the cache
    "temperature": Option("temperature", float),
    "top_p": Option("top_p", float),
    "top_k": Option("top_k", int)}
MESSAGES_FIELDS = {
    "model", "messages", "system", "stream", "stop_sequences", "thinking.type", "tools",
    "tool_choice.type", "tool_choice.name", "tool_choice.disable_parallel_tool_use",
    "output_config.effort", "output_config.format.type", "output_config.format.schema",
    "output_format.type", "output_format.schema", *MESSAGES_OPTIONS}


def messages_request(body: Body) -> Question:
    """Translate a Messages request. max_tokens may be absent; Anthropic's own API demands it."""
    if body.value.get("thread") is not None:  # anthropic-python 2 then retries with all messages
        raise APIError(
            400, "thread: threads are not kept here, send all messages", param="thread",
            details={"error_code": "thread_unsupported_request", "unsupported": ["thread"]})
    ignore_unread(body, MESSAGES_FIELDS)
    body.need("messages", list)
    turns: List[OllamaMessage] = []
    for turn in body.each("messages"):
        if is_compacted(turn):
            turns.clear()
        turns += messages_turn(turn)
    if not turns:
        raise body.at("messages").invalid(EMPTY)

    # Claude Code's billing header changes each time, and Ollama would lose its KV cache.
    texts = [text for block in body.blocks("system") for _, text in plain_block(block)]
    system = [message_of("system", [("content", text)]) for text in texts
              if text and not text.startswith("x-anthropic-billing-header")]
    question = Question(
        {"model": model_of(body),
         "messages": for_templates(system + turns),
         "think": messages_think(body),
         "options": read_options(body, MESSAGES_OPTIONS)},
        stream=bool(body.get("stream", bool)),
        stop=stop_texts(body, "stop_sequences"))
    mode, tools = messages_tools(body)
    single = body.object("tool_choice").get("disable_parallel_tool_use", bool)
    question.one_call = bool(single)
    choose(question, mode, tools, messages_format(body), body.at("thinking"))
    return question


def is_compacted(turn: Field) -> bool:
    """Return whether a message has a summary that stands for all before it."""
    return any(isinstance(block, dict) and block.get("type") == "compaction"
               and block.get("content") for block in list_of(turn.value.get("content")))


def messages_format(body: Field) -> Optional[Field]:
    """Return the schema for the answer, if any. output_format is the older name."""
    config = body.object("output_config")
    for owner, name in ((config, "format"), (body, "output_format")):
        if owner.get(name, dict) is not None:
            found = owner.object(name)
            found.one_of("type", ["json_schema"])
            return found.needed("schema")
    return None


def messages_think(body: Field) -> Union[bool, str]:
    """Return Ollama's `think`: off if absent, else on or the level of output_config.effort."""
    thinking = body.object("thinking")
    config = body.object("output_config")
    known = ("enabled", "adaptive", "between_tools", "disabled")
    enabled = bool(thinking.value) and thinking.one_of("type", known) != "disabled"
    if config.value.get("effort") is None:
        return enabled
    effort = config.one_of("effort", ("low", "medium", "high", "xhigh", "max"))
    if not enabled:
        config.at("effort").ignore()
    return enabled and ("max" if effort == "xhigh" else effort)


def messages_reply(question: Question, events: Events) -> JSON:
    parts, finish = collect(events)
    blocks = [messages_block(kind, list(run)) for kind, run in runs_of(parts)]
    return messages_object(question, blocks, finish)


def messages_object(question: Question, content: List[JSON], finish: Finish) -> JSON:
    reasons = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
    cached = finish.cached_tokens or 0
    return {
        "id": new_id("msg_"), "type": "message", "role": "assistant",
        "model": question.body["model"], "content": content,
        "stop_reason": reasons.get(finish.reason, finish.reason),
        "stop_sequence": finish.stop_sequence,
        "usage": {
            "input_tokens": finish.prompt_tokens - cached,
            "output_tokens": finish.completion_tokens,
            "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}}


def messages_block(kind: type, parts: List[Any]) -> JSON:
    """Return the content block of a run of events; of no events, an empty one to start with."""
    if kind is ToolCall:
        return {"type": "tool_use", "id": new_id("toolu_"),
                "name": parts[0].name, "input": parts[0].arguments}
    text = "".join(part.text for part in parts)
    if kind is Thinking:
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def messages_stream(question: Question, events: Events) -> Frames:
    """Yield the frames. Ollama reports the prompt's length only at the end: message_start has an
    estimate, and message_delta the count, with which the SDKs replace it."""
    events = once_begun(events)
    start = messages_object(question, [], Finish("", question.prompt_tokens, 0))
    yield sse({"type": "message_start", "message": {**start, "stop_reason": None}})

    for index, (kind, run) in enumerate(runs_of(events)):
        if kind is not Finish:
            yield from messages_block_frames(index, kind, run)
            continue
        end = messages_object(question, [], next(run))
        delta = {key: end[key] for key in ("stop_reason", "stop_sequence")}
        yield sse({"type": "message_delta", "delta": delta, "usage": end["usage"]})
        yield sse({"type": "message_stop"})


def messages_block_frames(index: int, kind: type, run: Iterator[Any]) -> Frames:
    def frame(name: str, **more: JSON) -> bytes:
        return sse({"type": "content_block_" + name, "index": index, **more})

    def delta(key: str, text: str, delta_type: str) -> bytes:
        return frame("delta", delta={"type": delta_type, key: text})

    if kind is ToolCall:
        block = messages_block(kind, list(run))
        yield frame("start", content_block={**block, "input": {}})
        yield delta("partial_json", dumps(block["input"]), "input_json_delta")
    else:
        yield frame("start", content_block=messages_block(kind, []))
        key = "thinking" if kind is Thinking else "text"
        text_delta = prepared(lambda text: delta(key, text, key + "_delta"))
        yield from (text_delta(part.text) for part in run)
    if kind is Thinking:
        yield delta("signature", "", "signature_delta")
    yield frame("stop")


def messages_error(error: APIError, request_id: str) -> JSON:
    types = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
             413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error"}
    otherwise = "invalid_request_error" if error.status < 500 else "api_error"
    content: JSON = {"type": types.get(error.status, otherwise), "message": error.message}
    if error.status == 503 and error.retry_after:
        content["type"] = "overloaded_error"
    if error.details:
        content["details"] = error.details
    return {"type": "error", "error": content, "request_id": request_id}


# ---- Blocks and tools of Messages ----------------------------------------------------------------
# Content blocks become the parts that message_of joins. Unknown ones are dropped and named, as
# are Anthropic's own tools, whose results are read as text; OpenAI's are refused, because a
# model would never see them. Tools are offered from the message on that announces them.

def messages_turn(turn: Field) -> Messages:
    """Translate one of `messages`. Tool results in it become messages before the rest."""
    role = turn.one_of("role", ("user", "assistant", "system"))
    if is_plain(turn):
        if role == "user":
            turn.body.history.end_turn()
        yield {"role": role, "content": turn.value["content"]}
        return
    for name, ours in (("tool_calls", "tool_use"), ("tool_call_id", "tool_result")):
        if turn.value.get(name):
            raise turn.at(name).invalid(f"is OpenAI's: Messages has blocks of type {ours}")
    if role != "system" or turn.value.get("output_config") is None:
        turn.need("content", object)
    turn.ignore_others("role", "content")
    parts = list(messages_parts(turn, "content", role))
    if role == "user":
        turn.body.history.end_turn()
    for index in [n for n, (key, _) in enumerate(parts) if key == "summary"][-1:]:
        parts = [("before", {"role": "user", "content": parts[index][1]}), *parts[index + 1:]]

    before = [value for key, value in parts if key == "before"]
    yield from before
    dropped = not parts and turn.value.get("content") != []
    message = message_of(role, (part for part in parts if part[0] != "before"))
    if not dropped and not (before and message == {"role": role, "content": ""}):
        yield message


def messages_parts(owner: Field, name: str, role: str) -> Parts:
    """Yield the parts of the content blocks in a field, whose key is one of message_of's, or
    `before` for a whole message, or `summary`. Unknown blocks are dropped."""
    for block in owner.blocks(name):
        block_type = block.need("type", str)
        if block_type in FOREIGN_BLOCKS:
            ours = FOREIGN_BLOCKS[block_type]
            raise block.at("type").invalid(f"{block_type} is OpenAI's: Messages " + (
                f"calls it {ours}" if ours else "has nothing like it"))
        roles, read = MESSAGES_BLOCKS.get(block_type, ((role,), other_block))
        if role not in roles:
            raise block.at("type").invalid(f"{block_type} cannot be in content of role {role}")
        yield from read(block)


def nested_parts(owner: Field) -> Tuple[List[str], List[Part]]:
    """Return the texts and the images inside a tool result, document or search result."""
    parts = list(messages_parts(owner, "content", "tool"))
    texts = [value for key, value in parts if key == "content"]
    return texts, [part for part in parts if part[0] == "images"]


def plain_block(block: Field) -> Parts:
    """Yield the text of a text or thinking block: its field has the name of the type."""
    name = "thinking" if block.value.get("type") == "thinking" else "text"
    block.ignore_others(name, "signature")
    yield "thinking" if name == "thinking" else "content", block.need(name, str)


def dropped_block(block: Field) -> Parts:
    block.body.history.drop(block, "id")
    return iter(())


def other_block(block: Field) -> Parts:
    """Yield the text in a block that we do not know, like a result of one of Anthropic's tools."""
    texts = [*filter(None, readable(block.value))]
    if not texts:
        return dropped_block(block)
    return iter([("content", "\n".join(texts))])


READABLE = ("title", "url", "text", "lines", "stdout", "stderr", "error_message", "source",
            "content")


def readable(value: Any) -> Iterator[str]:
    """Yield the texts that are meant for the model in a part of a block of any type."""
    for item in list_of(value):
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            for name in READABLE:
                yield from readable(item.get(name, ()))
            if item.get("type") == "text" and isinstance(item.get("data"), str):
                yield item["data"]


def compaction_block(block: Field) -> Parts:
    """Yield the summary of all that was said before; null if compacting failed."""
    yield from messages_parts(block, "tool_changes", "system")
    text = block.get("content", str)
    if text:
        yield "summary", text


def image_block(block: Field) -> Parts:
    block.ignore_others("source")
    _, source = source_of(block, ("base64",))
    yield "images", base64_text(source.needed("data", str))


def document_block(block: Field) -> Parts:
    """Inline a document. A PDF becomes a note: refused, it would end a session of Claude Code."""
    block.ignore_others("source", "title", "context")
    source_type, source = source_of(block, ("text", "content", "base64"))
    title = plain_json(block.get("title", str) or "")
    context = block.get("context", str)
    images: List[Part] = []
    if source_type == "text":
        texts = [source.need("data", str)]
    elif source_type == "content":
        texts, images = nested_parts(source)
    else:
        block.ignore()
        texts = [f"({source.value.get('media_type')}: cannot be read here)"]

    yield from images
    text = "\n\n".join(filter(None, [context, *texts]))
    yield "content", f"<document title={title}>\n{text}\n</document>"


def source_of(block: Field, types: Sequence[str]) -> Tuple[str, Field]:
    source = block.needed("source")
    source_type = source.need("type", str)
    if source_type not in types:
        raise source.at("type").invalid(f"must be {' or '.join(types)}, not "
                                        f"{dumps(source_type)}: this server fetches nothing")
    return source_type, source


def search_result_block(block: Field) -> Parts:
    block.ignore_others("title", "source", "content")
    title = block.need("title", str)
    source = block.need("source", str)
    texts, images = nested_parts(block)
    yield "content", "\n\n".join([f"{title} ({source})", *texts])
    yield from images


def tool_use_block(block: Field) -> Parts:
    block.ignore_others("name", "input")
    id = block.need("id", str)
    name = block.need("name", str)
    yield "tool_calls", block.body.history.add_call(id, name, arguments_of(block.at("input")))


def tool_result_block(block: Field) -> Parts:
    history = block.body.history
    if block.need("tool_use_id", str) in history.dropped:
        block.ignore()
        return
    block.ignore_others("tool_use_id", "content", "is_error")
    head = history.result(block, "tool_use_id")
    texts, images = nested_parts(block)
    texts = [*filter(None, texts)] or [NO_TEXT]
    if block.get("is_error", bool):
        texts[0] = "The tool failed: " + texts[0]
    parts = [("content", text) for text in texts]
    message = message_of("tool", parts + images)
    message.update(head)
    yield "before", message


def tool_reference_block(block: Field) -> Parts:
    block.ignore_others("tool_name")
    name = block.need("tool_name", str)
    block.body.history.offered[name] = True
    yield "content", "Tool loaded: " + name


def tool_search_block(block: Field) -> Parts:
    """Offer the tools that Anthropic's own search has found."""
    for found in block.needed("content").each("tool_references"):
        block.body.history.offered[found.need("tool_name", str)] = True
    return iter(())


def tool_change_block(block: Field) -> Parts:
    """Offer a tool from now on, or no longer: one of `tools`, or one that is defined here."""
    tool = block.needed("tool")
    history = block.body.history
    if tool.value.get("type") == "tool_definition":
        tool = tool.needed("definition")
        history.definitions.append(tool)
    if tool.value.get("type") in (None, "custom", "tool_reference"):
        history.offered[tool.need("name", str)] = block.value["type"] == "tool_addition"
    else:
        block.ignore()
    return iter(())


# block type: (roles whose content may have it, reader). For the role tool see nested_parts.
MESSAGES_BLOCKS: Dict[str, Tuple[Sequence[str], Callable[[Field], Parts]]] = {
    "text": (("user", "assistant", "system", "tool"), plain_block),
    "image": (("user", "tool"), image_block),
    "document": (("user", "tool"), document_block),
    "search_result": (("user", "tool"), search_result_block),
    "mid_conv_system": (("user",), lambda block: messages_parts(block, "content", "system")),
    "thinking": (("assistant",), plain_block),
    "redacted_thinking": (("assistant",), dropped_block),
    "tool_use": (("assistant",), tool_use_block),
    "tool_result": (("user",), tool_result_block),
    "compaction": (("assistant", "user"), compaction_block),
    "tool_reference": (("tool",), tool_reference_block),
    "tool_search_tool_result": (("assistant",), tool_search_block),
    "tool_addition": (("system",), tool_change_block),
    "tool_removal": (("system",), tool_change_block)}
# Types of OpenAI's that a model would never see if they were skipped: what Messages calls them.
FOREIGN_BLOCKS = {
    "input_text": "text", "output_text": "text", "refusal": "text", "image_url": "image",
    "input_image": "image", "file": "document", "input_file": "document",
    "reasoning": "thinking", "function": "tool_use", "function_call": "tool_use",
    "custom_tool_call": "tool_use", "function_call_output": "tool_result",
    "custom_tool_call_output": "tool_result",
    **dict.fromkeys(("input_audio", "audio_url", "video_url", "item_reference"))}


def messages_tools(body: Body) -> Choice:
    """Return how tools may be called (none, auto or required), and which of them. Deferred tools
    are offered once a message has announced them. Anthropic's own, which have a type other than
    custom, never are; where its search is the only other tool, nobody could announce any."""
    ours: Dict[str, Field] = {}
    others: List[Field] = []
    for tool in itertools.chain(body.each("tools"), body.history.definitions):
        if messages_tool_is_ours(tool):
            ours[tool_name(tool)] = tool
        else:
            others.append(tool)

    deferred = {name for name, tool in ours.items() if tool.get("defer_loading", bool)}
    searches = [tool for tool in others if tool.value["type"].startswith("tool_search_tool")]
    if len(deferred) == len(ours) and searches:
        deferred = set()
    offered = {name: name not in deferred for name in ours}
    offered.update(body.history.offered)
    for tool in [*others, *(ours[name] for name in deferred if not offered[name])]:
        tool.ignore()
    return messages_choice(body.object("tool_choice"), [
        tool_of(tool, "input_schema", "defer_loading")
        for name, tool in ours.items() if offered[name]])


def messages_tool_is_ours(tool: Field) -> bool:
    """Return whether the client runs a tool itself; 400 if it has OpenAI's form."""
    if tool.value.get("type") == "function":
        raise tool.at("type").invalid("function is OpenAI's: in Messages a tool has name, "
                                      "description and input_schema")
    if tool.value.get("parameters") and "input_schema" not in tool.value:
        raise tool.at("parameters").invalid("is OpenAI's: Messages calls it input_schema")
    return (tool.get("type", str) or "custom") == "custom"


def messages_choice(choice: Field, tools: List[Tool]) -> Choice:
    if not choice.value:
        return "auto", tools
    choice_type = choice.one_of("type", ("auto", "any", "tool", "none"))
    if choice_type == "tool":
        name = choice.one_of("name", [tool.name for tool in tools])
        return "required", [tool for tool in tools if tool.name == name]
    if choice_type == "any" and not tools:
        raise choice.at("type").invalid("is any, but no tool is offered")
    return "required" if choice_type == "any" else choice_type, tools


# ---- OpenAI's words ------------------------------------------------------------------------------
# What OpenAI's dialects have in common: roles, parts of content, tools, formats, reasoning,
# errors. Reasoning and Ollama's own settings are accepted under all names in use.

OPENAI_ROLES = {
    "system": "system", "developer": "system", "user": "user",
    "assistant": "assistant", "tool": "tool", "function": "tool"}
# part type: (roles that may have it, reader)
PartReaders = Dict[str, Tuple[Sequence[str], Callable[[Field], Part]]]


def openai_parts(owner: Field, name: str, role: str, readers: PartReaders) -> Parts:
    known = [key for key, (roles, _) in readers.items() if role in roles]
    for part in owner.blocks(name):
        _, read = readers[part.one_of("type", known)]
        yield read(part)


def text_part(part: Field) -> Part:
    name = "refusal" if part.value["type"] == "refusal" else "text"
    part.ignore_others(name)
    return "content", part.need(name, str)


def image_part(part: Field) -> Part:
    """Return the image in image_url: an object with a data URL, or (in Responses) just the URL."""
    part.ignore_others("image_url")
    if part.value.get("image_url") is None and part.value.get("file_id"):
        raise unknown_id(part.at("file_id"), "File")
    url = part.at("image_url")
    if not isinstance(url.value, str):
        owner = part.needed("image_url")
        owner.ignore_others("url")
        url = owner.needed("url", str)
    head = re.match(r"data:(image/[\w.+-]+)?(;[\w=.-]+)*;base64,", url.value, re.I)  # RFC 2397
    if head is None:
        raise url.invalid("must be a data: URL of an image in base64: nothing is fetched here")
    return "images", base64_text(url, head.end())


def unknown_id(field: Field, what: str) -> APIError:
    """Return the error for a field that points to what OpenAI would have stored."""
    id = field.value.get("id") if isinstance(field.value, dict) else field.value
    hint = ("It may be gone: send what it stands for, as SDKs do with store: false."
            if what == "Item" else "Nothing is kept here: send what it stands for.")
    return field.invalid(f"{what} with id '{id}' not found. {hint}")


# (field, its type) -> where its details stand: in an object that is named after the type in
# Chat Completions, beside the type in Responses.
Details = Callable[[Field, str], Field]
DETAILS_INSIDE: Details = Field.needed
DETAILS_BESIDE: Details = lambda field, _type: field  # noqa: E731


def openai_choice(choice: Field, types: Sequence[str], details: Details,
                  tools: List[Tool], by_name: Mapping[str, Tool]) -> Choice:
    """Return how tools may be called, and which, by a word, by one tool, or by allowed_tools."""
    mode = "auto"
    if choice.value and isinstance(choice.value, str):
        mode = choice.word(("auto", "none", "required"))
    elif choice.value:
        choice.check(dict)
        choice_type = choice.one_of("type", (*types, "allowed_tools"))
        found = details(choice, choice_type)
        mode, named = "required", [found]
        if choice_type == "allowed_tools":
            mode = found.one_of("mode", ("auto", "required"))
            found.need("tools", list)
            named = [details(tool, "function") for tool in found.each("tools")]
        tools = [by_name[tool.one_of("name", by_name)] for tool in named]
    if mode == "required" and not tools:
        raise choice.invalid("is required, but no tool is offered")
    return mode, tools


def openai_format(wanted: Field, details: Details) -> Optional[Field]:
    if not wanted.value:
        return None
    wanted_type = wanted.one_of("type", ("text", "json_object", "json_schema"))
    if wanted_type == "json_schema":
        found = details(wanted, "json_schema")
        found.ignore_others("schema", "name", "strict")  # a grammar is always strict
        return found.needed("schema")
    if wanted_type == "json_object" and wanted.value.get("schema"):  # llama.cpp's form
        return wanted.needed("schema")
    wanted.ignore_others()
    return Field(ANY_OBJECT, wanted.parent, wanted.name) if wanted_type == "json_object" else None


def openai_think(body: Field) -> OllamaRequest:
    """Return how much to think, by the first name that says so; {} leaves it to Ollama."""
    efforts: Dict[str, Union[bool, str]] = {
        "none": False, "minimal": "low", "low": "low", "medium": "medium", "high": "high",
        "xhigh": "max", "ultra": "max", "max": "max"}
    reasoning = body.object("reasoning")
    for owner, name in ((body, "reasoning_effort"), (reasoning, "effort")):
        if owner.value.get(name) is not None:
            return {"think": efforts[owner.one_of(name, efforts)]}
    if isinstance(body.value.get("think"), str):
        return {"think": body.one_of("think", ("low", "medium", "high", "max"))}

    think = body.get("think", bool)
    enabled = body.object("chat_template_kwargs").get("enable_thinking", bool)  # as for vLLM
    think = enabled if think is None else think
    return {} if think is None else {"think": think}


def openai_error(error: APIError, _request_id: str) -> JSON:
    types = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
             429: "rate_limit_error"}
    otherwise = "invalid_request_error" if error.status < 500 else "api_error"
    message = error.message
    if isinstance(error, PromptTooLong):
        limit = f"{error.window} tokens" if error.window else "exceeded"
        message = (f"This model's maximum context length is {limit}. However, your messages "
                   f"resulted in {error.prompt_tokens or 'more'} tokens.")
    return {"error": {"message": message, "type": types.get(error.status, otherwise),
                      "param": error.param, "code": error.code}}


# ---- OpenAI Chat Completions ---------------------------------------------------------------------
# For the openai SDKs and all that is built on them; for people with curl, `system` at the top
# level too, and a stream unless "stream" is false. Reasoning has both names in use: DeepSeek's
# reasoning_content and Ollama's reasoning. Keep-alives are comments: openai-python up to 3.54
# parses other lines as JSON. It joins strings across chunks: role and finish_reason come once.

CHAT_PINGS = itertools.repeat(b": ping\n\n")
CHAT_DONE = b"data: [DONE]\n\n"


@dataclass
class ChatQuestion(Question):
    function_call: bool = False  # report the call in OpenAI's older form
    include_usage: bool = False


def create_chat_completion(context: Context) -> Reply:
    question = chat_request(context.body)
    if context.body.value.get("stream") is None:
        default = context.body.config.default_stream
        question.stream = wants_stream(context.request.headers, default)
    return context.ask(question, chat_reply, chat_stream, CHAT_PINGS)


# The user agents of people, who want to see a stream. Client libraries, in any language, leave
# `stream` out if they want none, as OpenAI's API has it (langchaingo fails on the first byte).
PEOPLE = ("curl/", "Wget/", "HTTPie/", "python-requests/", "Python-urllib/")


def wants_stream(headers: Mapping[str, str], default: str) -> bool:
    """Return whether to send a stream if the request does not say."""
    if default != "auto":
        return default == "on"
    streamed = "text/event-stream" in headers.get("accept", "").lower()
    return streamed or headers.get("user-agent", "").startswith(PEOPLE)


CHAT_OPTIONS = {
    **OLLAMA_OPTIONS,
    "max_tokens": Option("num_predict", int, at_least=1, or_just=-1),  # no limit (LM Studio)
    "max_completion_tokens": Option("num_predict", int, at_least=1, or_just=-1),  # overrides it
    "temperature": Option("temperature", float),
    "top_p": Option("top_p", float),
    "seed": Option("seed", int),
    "frequency_penalty": Option("frequency_penalty", float),
    "presence_penalty": Option("presence_penalty", float)}
CHAT_FIELDS = {
    "model", "messages", "system", "stream", "stream_options.include_usage", "stop", "n",
    "tools", "tool_choice", "functions", "function_call", "parallel_tool_calls",
    "response_format", "logprobs", "top_logprobs", "reasoning_effort", "reasoning.effort",
    "chat_template_kwargs.enable_thinking", "options", "keep_alive", "think", "format",
    *CHAT_OPTIONS}
CHAT_PARTS: PartReaders = {
    "text": (("system", "user", "assistant", "tool"), text_part),
    "refusal": (("assistant",), text_part),
    "image_url": (("user", "tool"), image_part)}


def chat_request(body: Body) -> ChatQuestion:
    names = [turn.get("name") for turn in body.need("messages", list)
             if isinstance(turn, dict) and turn.get("role") == "user"]
    speakers = {name for name in names if name and isinstance(name, str)}
    turns = [chat_turn(turn, len(speakers) > 1) for turn in body.each("messages")]
    if not turns:
        raise body.at("messages").invalid(EMPTY)
    system = message_of("system", openai_parts(body, "system", "system", CHAT_PARTS))
    early = [system] if system["content"] else []

    question = chat_question(body, {"messages": for_templates(early + turns)})
    ignore_unread(body, CHAT_FIELDS)
    question.body.update(chat_logprobs(body))
    question.body.update(keep_alive_of(body))
    question.body.update(openai_think(body))
    question.function_call = body.value.get("functions") is not None
    single = body.get("parallel_tool_calls", bool) is False
    question.one_call = single or question.function_call
    mode, tools = chat_tools(body)
    choose(question, mode, tools, chat_format(body), body.at("reasoning_effort"))
    return question


def chat_question(body: Body, asked: OllamaRequest) -> ChatQuestion:
    """Return a question with the settings that Chat Completions and Completions share."""
    if body.get("n", int) not in (None, 1):
        raise body.at("n").invalid("must be 1: Ollama gives one answer at a time")
    usage = body.object("stream_options").get("include_usage", bool)
    options, own_stop = read_ollama_options(body, CHAT_OPTIONS)
    stop = body.at("stop")
    if isinstance(stop.value, str):
        texts = [stop_text(stop)] if stop.value else []
    else:
        texts = stop_texts(body, "stop")
    return ChatQuestion(
        {"model": model_of(body), **asked, "options": options},
        stream=bool(body.get("stream", bool)), stop=texts + own_stop,
        include_usage=bool(usage))


def chat_turn(turn: Field, named: bool) -> OllamaMessage:
    """Translate one of `messages`. If `named`, several people speak: their texts say who."""
    role = OPENAI_ROLES[turn.one_of("role", OPENAI_ROLES)]
    if role == "user":
        turn.body.history.end_turn()
    if role != "tool" and is_plain(turn):
        return {"role": role, "content": turn.value["content"]}
    if role not in ("assistant", "tool"):
        turn.need("content", object)
    turn.ignore_others("role", "content", *CHAT_TURN_FIELDS[role])
    parts = openai_parts(turn, "content", role, CHAT_PARTS)
    if role == "assistant":
        parts = itertools.chain(parts, chat_earlier(turn))
    message = message_of(role, parts)
    name = turn.get("name", str)
    if role == "tool":
        message["content"] = message["content"] or NO_TEXT
        message.update(turn.body.history.result(turn, "tool_call_id", name))
    if role == "user" and name and named:
        message["content"] = f"{name}: {message['content']}"
    elif role == "user" and name:
        turn.at("name").ignore()
    return message


# Ollama's role: what we read of a message besides role and content
CHAT_TURN_FIELDS: Dict[str, Sequence[str]] = {
    "system": (), "user": ("name",), "tool": ("name", "tool_call_id"),
    "assistant": ("refusal", "reasoning_content", "reasoning", "tool_calls", "function_call")}


def chat_earlier(turn: Field) -> Parts:
    """Yield what the assistant has refused, thought and called."""
    if turn.get("refusal", str):
        yield "content", turn.value["refusal"]
    yield "thinking", turn.get("reasoning_content", str) or turn.get("reasoning", str) or ""
    calls = []
    for call in turn.each("tool_calls"):
        call.ignore_others("function")
        calls.append((call.needed("function"), call.need("id", str)))
    if turn.get("function_call", dict):  # the older form has no id
        calls.append((turn.object("function_call"), ""))
    for function, id in calls:
        function.ignore_others("name", "arguments")
        arguments = arguments_of(function.at("arguments"))
        yield "tool_calls", turn.body.history.add_call(id, function.need("name", str), arguments)


def chat_tools(body: Field) -> Choice:
    """Return how tools may be called, and which of them. `functions` is their older form."""
    tools = [tool_of(function, "parameters") for function in body.each("functions")]
    for tool in body.each("tools"):
        tool_type = tool.get("type", str)
        if tool_type not in (None, "function"):
            raise tool.at("type").invalid(f"must be function, not {dumps(tool_type)}")
        tool.ignore_others("function")
        tools.append(tool_of(tool.needed("function"), "parameters"))

    by_name = {tool.name: tool for tool in tools}
    choice = body.at("tool_choice")
    if choice.value is None:
        choice = body.at("function_call")  # the older form: a word, or an object with a name
        if choice.value and not isinstance(choice.value, str):
            choice.check(dict)
            return "required", [by_name[choice.one_of("name", by_name)]]
    return openai_choice(choice, ("function",), DETAILS_INSIDE, tools, by_name)


def chat_format(body: Field) -> Optional[Field]:
    """Return the schema for the answer: in OpenAI's field, else in Ollama's own."""
    def details(wanted: Field, name: str) -> Field:
        found = wanted.needed(name)
        value = {**found.value, "schema": found.object("schema").value}  # optional in Chat alone
        return Field(value, wanted, name)

    found = openai_format(body.object("response_format"), details)
    if found is None and body.value.get("format") == "json":
        return Field(ANY_OBJECT, body, "format")
    if found is None and body.get("format", dict) is not None:
        return body.object("format")
    return found


def chat_logprobs(body: Field) -> OllamaRequest:
    wanted = body.get("logprobs", bool)
    top = body.get("top_logprobs", int)
    if top is not None and not 0 <= top <= 20:
        raise body.at("top_logprobs").invalid("must be between 0 and 20")
    if not wanted:
        return {}
    return {"logprobs": True} if top is None else {"logprobs": True, "top_logprobs": top}


def chat_reply(question: ChatQuestion, events: Events) -> JSON:
    parts, finish = collect(events)
    texts = [part for part in parts if isinstance(part, Text)]
    content = "".join(part.text for part in texts)
    logprobs = itertools.chain(*(text.logprobs for text in texts))
    thoughts = "".join(part.text for part in parts if isinstance(part, Thinking))
    calls = [chat_call(part) for part in parts if isinstance(part, ToolCall)]

    message: JSON = {
        "role": "assistant", "content": None if calls and not content else content,
        "refusal": None}
    if thoughts:
        message.update(reasoning_content=thoughts, reasoning=thoughts)
    message.update(chat_calls(question, calls))
    choice = {
        "index": 0, "message": message,
        "finish_reason": chat_finish_reason(question, finish),
        "logprobs": chat_scores(logprobs)}
    return {**chat_head(question, "chat.completion", "chatcmpl-"),
            "choices": [choice], "usage": chat_usage(finish)}


def chat_head(question: Question, object_type: str, prefix: str) -> JSON:
    return {"id": new_id(prefix), "object": object_type,
            "created": int(time.time()), "model": question.body["model"]}


def chat_usage(finish: Finish) -> JSON:
    usage: JSON = {
        "prompt_tokens": finish.prompt_tokens,
        "completion_tokens": finish.completion_tokens,
        "total_tokens": finish.prompt_tokens + finish.completion_tokens}
    if finish.cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": finish.cached_tokens}
    return usage


def chat_scores(logprobs: Iterable[JSON]) -> Optional[JSON]:
    """Return log probabilities in OpenAI's form, which is almost the same as Ollama's."""
    content = [{"bytes": None, "top_logprobs": [], **entry} for entry in logprobs]
    return {"content": content, "refusal": None} if content else None


def chat_finish_reason(question: ChatQuestion, finish: Finish) -> str:
    if finish.reason == "tool_calls" and question.function_call:
        return "function_call"
    return "stop" if finish.reason == "stop_sequence" else finish.reason


def chat_call(call: ToolCall) -> JSON:
    function = {"name": call.name, "arguments": dumps(call.arguments)}
    return {"id": new_id("call_"), "type": "function", "function": function}


def chat_calls(question: ChatQuestion, calls: List[JSON]) -> JSON:
    """Return the part of a message or delta that has tool calls; {} if there are none."""
    if question.function_call and calls:
        return {"function_call": calls[0]["function"]}
    return {"tool_calls": calls} if calls else {}


def chat_stream(question: ChatQuestion, events: Events) -> Frames:
    def chunk(delta: JSON, finish_reason: Optional[str] = None,
              logprobs: Iterable[JSON] = ()) -> bytes:
        return sse({**head, "choices": [{
            "index": 0, "delta": delta, "finish_reason": finish_reason,
            "logprobs": chat_scores(logprobs)}]})

    events = once_begun(events)
    head = chat_head(question, "chat.completion.chunk", "chatcmpl-")
    text_chunk = prepared(lambda text: chunk({"content": text}))
    reasoning_chunk = prepared(lambda text: chunk({"reasoning_content": text, "reasoning": text}))
    indexes = itertools.count()  # by these, clients join the deltas of a call

    yield chunk({"role": "assistant", "content": ""})
    for event in events:
        if isinstance(event, Text) and event.logprobs:
            yield chunk({"content": event.text}, logprobs=event.logprobs)
        elif isinstance(event, Text):
            yield text_chunk(event.text)
        elif isinstance(event, Thinking):
            yield reasoning_chunk(event.text)
        elif isinstance(event, ToolCall):
            call = {"index": next(indexes), **chat_call(event)}
            yield chunk(chat_calls(question, [call]))
        else:
            yield chunk({}, chat_finish_reason(question, event))
            if question.include_usage:
                yield sse({**head, "choices": [], "usage": chat_usage(event)})
    yield CHAT_DONE


# ---- Completions and Embeddings ------------------------------------------------------------------
# Completions are for editors that fill in the middle of a text, and for older programs. They
# ask /api/generate, so that the model's template applies, and ask for no thoughts, for which
# they have no place. The openai SDK asks for embeddings in base64, as little-endian float32.

COMPLETIONS_FIELDS = {
    "model", "prompt", "suffix", "stream", "stream_options.include_usage", "stop", "n",
    "options", "keep_alive", *CHAT_OPTIONS}
EMBEDDINGS_OPTIONS = {"dimensions": Option("dimensions", int, at_least=1)}
EMBEDDINGS_FIELDS = {
    "model", "input", "encoding_format", "options", "keep_alive",
    *OLLAMA_OPTIONS, *EMBEDDINGS_OPTIONS}


def create_completion(context: Context) -> Reply:
    question = completions_request(context.body)
    return context.ask(question, completions_reply, completions_stream, CHAT_PINGS)


def completions_request(body: Body) -> ChatQuestion:
    prompts = texts_of(body, "prompt")
    if len(prompts) > 1:
        raise body.at("prompt").invalid(
            "must be one text: send a request for each")
    question = chat_question(body, {"prompt": prompts[0], "think": False})
    question.path = "/api/generate"
    suffix = body.get("suffix", str)
    if suffix:
        question.body["suffix"] = suffix
    question.body.update(keep_alive_of(body))
    ignore_unread(body, COMPLETIONS_FIELDS)
    return question


def texts_of(body: Field, name: str) -> List[str]:
    """Return a field that is a string or a list of strings, none of them empty."""
    field = body.at(name)
    texts = [field]
    if not isinstance(field.value, str):
        values = enumerate(body.need(name, list))
        texts = [Field(value, field, index) for index, value in values]
    if not texts:
        raise field.invalid(EMPTY)
    for text in texts:
        if type(text.value) in (int, list):
            raise text.invalid("must be text: ids of OpenAI's tokens mean nothing to Ollama's "
                               "models (LangChain: check_embedding_ctx_length=False)")
        if not text.check(str):
            raise text.invalid(EMPTY)
    return [text.value for text in texts]


def completions_reply(question: ChatQuestion, events: Events) -> JSON:
    parts, finish = collect(events)
    text = "".join(part.text for part in parts if isinstance(part, Text))
    return {**chat_head(question, "text_completion", "cmpl-"),
            **completions_choice(text, chat_finish_reason(question, finish)),
            "usage": chat_usage(finish)}


def completions_stream(question: ChatQuestion, events: Events) -> Frames:
    events = once_begun(events)
    head = chat_head(question, "text_completion", "cmpl-")
    for event in events:
        if isinstance(event, Text):
            yield sse({**head, **completions_choice(event.text, None)})
        elif isinstance(event, Finish):
            reason = chat_finish_reason(question, event)
            yield sse({**head, **completions_choice("", reason)})
            if question.include_usage:
                yield sse({**head, "choices": [], "usage": chat_usage(event)})
    yield CHAT_DONE


def completions_choice(text: str, finish_reason: Optional[str]) -> JSON:
    return {"choices": [{
        "index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}]}


def create_embeddings(context: Context) -> Reply:
    """Answer POST /v1/embeddings. A text that is too long is an error; Ollama would cut it."""
    body = context.body
    texts = texts_of(body, "input")
    encoding = (body.get("encoding_format", str) or "float").lower()
    Field(encoding, body, "encoding_format").word(("float", "base64"))
    model = model_of(body)
    options, _ = read_ollama_options(body, OLLAMA_OPTIONS)
    asked: JSON = {
        "model": model, "input": texts, "options": options, **keep_alive_of(body),
        **read_options(body, EMBEDDINGS_OPTIONS)}
    ignore_unread(body, EMBEDDINGS_FIELDS)

    found = context.ollama.embed(asked)
    vectors: List[Any] = ollama_field(found, "embeddings", [])
    if len(vectors) != len(texts):
        raise broken_answer(f"{len(vectors)} embeddings for {len(texts)} texts")
    data = [{"object": "embedding", "index": index, "embedding": encoded(vector, encoding)}
            for index, vector in enumerate(vectors)]
    tokens = ollama_field(found, "prompt_eval_count", 0)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return Reply({"object": "list", "data": data, "model": model, "usage": usage})


def encoded(vector: Any, encoding: str) -> Union[str, List[float]]:
    """Return an embedding as the client wants it; fail if it is not a list of numbers."""
    try:
        packed = struct.pack(f"<{len(vector)}f", *vector)
    except (TypeError, struct.error, OverflowError) as error:
        raise broken_answer(f"an embedding that is no list of numbers: {error}") from error
    return base64.b64encode(packed).decode() if encoding == "base64" else vector


# ---- OpenAI Responses ----------------------------------------------------------------------------
# For Codex, and for the newest interface of the openai SDKs. A request brings the conversation,
# or points to what is stored of it. Consecutive items of the assistant become one message. The
# model knows a tool of a namespace as "space.name", and a custom tool as one that takes a text.

@dataclass
class ResponsesQuestion(Question):
    # tool name, as the model knows it: type, name and namespace of an item that calls it
    tool_items: Dict[str, JSON] = dataclasses.field(default_factory=dict)
    echo: JSON = dataclasses.field(default_factory=dict)  # see RESPONSES_ECHO
    keep: Callable[[JSON], None] = lambda response: None  # once it is finished


def create_response(context: Context) -> Reply:
    stored, key = context.server.stored, context.request.key
    question = responses_request(context.body, stored.of(key))
    if question.echo["store"]:
        question.keep = functools.partial(stored.keep, key, context.body, context.body.sent)
    stream = ResponseStream(question)
    return context.ask(question, responses_reply,
                       lambda _, events: stream.frames(events), stream.pings())


RESPONSES_OPTIONS = {
    **OLLAMA_OPTIONS,
    "max_output_tokens": Option("num_predict", int, at_least=1, or_just=-1),
    "temperature": Option("temperature", float),
    "top_p": Option("top_p", float)}
RESPONSES_FIELDS = {
    "model", "input", "instructions", "stream", "tools", "tool_choice", "parallel_tool_calls",
    "text.format", "reasoning.effort", "reasoning_effort", "previous_response_id",
    "conversation", "prompt", "background", "store", "options", "keep_alive", "think",
    "chat_template_kwargs.enable_thinking", *RESPONSES_OPTIONS}
# What a response repeats of the request, and what it says if the request does not.
RESPONSES_ECHO: JSON = {
    "instructions": None, "metadata": {}, "parallel_tool_calls": True, "temperature": None,
    "top_p": None, "max_output_tokens": None, "tools": [], "tool_choice": "auto",
    "text": {"format": {"type": "text"}}, "reasoning": None, "store": True}


def responses_request(body: Body, stored: Optional[OwnResponses] = None) -> ResponsesQuestion:
    for name in ("conversation", "prompt"):
        if body.value.get(name) is not None:
            raise unknown_id(body.at(name), name.capitalize())
    if body.get("background", bool):
        raise body.at("background").invalid(
            "must be false: an answer comes at once, or as a stream")
    body.get("store", bool)
    ignore_unread(body, RESPONSES_FIELDS)
    items = responses_items(body, stored)
    tools, tool_items = responses_tools(body, items)
    instructions = body.get("instructions", str)
    system = [message_of("system", [("content", instructions)])] if instructions else []
    options, stop = read_ollama_options(body, RESPONSES_OPTIONS)

    question = ResponsesQuestion(
        {"model": model_of(body), "options": options,
         "messages": for_templates(system + responses_input(body, items)),
         **keep_alive_of(body), **openai_think(body)},
        stream=bool(body.get("stream", bool)), stop=stop, tool_items=tool_items,
        one_call=body.get("parallel_tool_calls", bool) is False,
        echo={name: otherwise if body.value.get(name) is None else body.value[name]
              for name, otherwise in RESPONSES_ECHO.items()})
    if body.value.get("previous_response_id") is not None:
        question.echo["previous_response_id"] = body.value["previous_response_id"]
    by_name = {tool_items[tool.name]["name"]: tool for tool in tools}  # without namespaces
    by_name.update({tool.name: tool for tool in tools})
    mode, tools = openai_choice(
        body.at("tool_choice"), ("function", "custom"), DETAILS_BESIDE, tools, by_name)
    schema = openai_format(body.object("text").object("format"), DETAILS_BESIDE)
    choose(question, mode, tools, schema, body.at("reasoning_effort"))
    return question


def responses_items(body: Body, stored: Optional[OwnResponses]) -> List[Field]:
    """Return the items of the conversation: those up to the previous response, and of `input`."""
    items: List[Field] = []
    previous = body.get("previous_response_id", str)
    if previous is not None:
        known = stored.conversation(previous) if stored else None
        if known is None:  # on this, VS Code sends all again
            raise APIError(400, f"Previous response with id '{previous}' not found.",
                           param="previous_response_id", code="previous_response_not_found")
        past = Body({}, body.config)  # what it ignores was reported when it was sent
        past.history = body.history
        items += [Field(item, past, f"previous_response_id.{n}") for n, item in enumerate(known)]
    if isinstance(body.value.get("input"), str):
        return [*items, Field(text_item(body.value["input"]), body, "input")]
    body.need("input", list)
    known_ids = {item.value.get("id") for item in items if isinstance(item.value.get("id"), str)}
    for item in body.each("input"):
        if item_type_of(item) == "item_reference":
            id = item.need("id", str)
            if id in known_ids:  # refused as at OpenAI: many could be huge
                raise item.at("id").invalid(f"Duplicate item found with id '{id}'")
            known_ids.add(id)
            found = stored.item(id) if stored else None
            if found is None:
                raise unknown_id(item.at("id"), "Item")
            item = Field(found, item.parent, item.name)
        items.append(item)
    return items


def item_type_of(item: Field) -> str:
    """Return the type of an item: messages may leave it out, and so may references."""
    item_type = item.get("type", str) or ("message" if "role" in item.value else None)
    if item_type is None and "id" in item.value:
        return "item_reference"
    if item_type is None:
        raise item.at("type").invalid("is required")
    return item_type


def text_item(text: str) -> JSON:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def responses_input(body: Field, items: Iterable[Field]) -> List[OllamaMessage]:
    messages: List[OllamaMessage] = []
    for item in items:
        item_type = item_type_of(item)
        if item_type in FOREIGN_ITEMS:
            raise item.at("type").invalid(f"{item_type} is no item: in Responses it is "
                                          f"{FOREIGN_ITEMS[item_type]}")
        messages += RESPONSES_ITEMS.get(item_type, dropped_item)(item)
    if not messages:
        raise body.at("input").invalid(EMPTY)
    runs = itertools.groupby(messages, lambda message: message["role"] == "assistant")
    return [message for said, run in runs for message in ([joined(*run)] if said else run)]


def message_item(item: Field) -> Messages:
    role = item.one_of("role", ("user", "assistant", "system", "developer"))
    if item.value.get("tool_calls"):
        raise item.at("tool_calls").invalid("is of Chat Completions: in Responses, a call is an "
                                            "item of type function_call")
    item.need("content", object)
    item.ignore_others("role", "content")
    role = OPENAI_ROLES[role]
    if role == "user":
        item.body.history.end_turn()
    yield message_of(role, openai_parts(item, "content", role, RESPONSES_PARTS))


def call_item(item: Field) -> Messages:
    custom = item.value.get("type") == "custom_tool_call"
    key = "input" if custom else "arguments"
    item.ignore_others("call_id", "name", "namespace", key)
    name = qualified(item.get("namespace", str), item.need("name", str))
    field = item.needed(key, object) if custom else item.at(key)
    arguments = {key: text_in(field)} if custom else arguments_of(field)
    call = item.body.history.add_call(item.need("call_id", str), name, arguments)
    yield message_of("assistant", [("tool_calls", call)])


def output_item(item: Field) -> Messages:
    """Yield a tool's result. Codex since 0.153 has some that name no call, but the tool."""
    if item.get("call_id", str) in item.body.history.dropped:
        item.ignore()
        return
    item.ignore_others("call_id", "output", "name", "namespace")
    parts = openai_parts(item, "output", "tool", RESPONSES_PARTS)
    message = message_of("tool", parts)
    message["content"] = message["content"] or NO_TEXT
    name = item.get("name", str)
    message.update(item.body.history.result(
        item, "call_id", name and qualified(item.get("namespace", str), name)))
    yield message


def reasoning_item(item: Field) -> Messages:
    """Yield thoughts, as Codex sends them back. Encrypted ones cannot be read."""
    item.ignore_others("summary", "content")
    parts = [("thinking", part.need("text", str))
             for name in ("summary", "content") for part in item.each(name)]
    if parts:
        yield message_of("assistant", parts)


def dropped_item(item: Field) -> Messages:
    item.body.history.drop(item, "call_id")
    return iter(())


def tools_item(item: Field) -> Messages:
    """Yield nothing: responses_tools reads the tools that an item brings."""
    item.need("tools", list)
    return iter(())


RESPONSES_ITEMS: Dict[str, Callable[[Field], Messages]] = {
    "message": message_item, "reasoning": reasoning_item,
    "function_call": call_item, "function_call_output": output_item,
    "custom_tool_call": call_item, "custom_tool_call_output": output_item,
    "additional_tools": tools_item, "tool_search_output": tools_item}
# Types that a model would never see if they were skipped: where they belong.
FOREIGN_ITEMS = {
    **dict.fromkeys(("text", "input_text", "output_text", "image_url", "input_image", "image"),
                    "a part of the content of a message"),
    "tool_use": "a function_call", "tool_result": "a function_call_output"}
RESPONSES_PARTS: PartReaders = {
    "text": (("system", "user", "assistant", "tool"), text_part),  # as strings are read
    "input_text": (("system", "user", "assistant", "tool"), text_part),
    "output_text": (("assistant", "user", "tool"), text_part),
    "refusal": (("assistant",), text_part),
    "input_image": (("user", "tool"), image_part)}
TOOL_ITEMS = {"function": "function_call", "custom": "custom_tool_call"}


def qualified(space: Optional[str], name: str) -> str:
    """Return the name by which the model knows a tool of a namespace."""
    if not space or name.startswith(space + "."):
        return name
    return f"{space}.{name}"


def responses_tools(body: Field, items: List[Field]) -> Tuple[List[Tool], Dict[str, JSON]]:
    """Return the tools to offer, and the tool_items of a ResponsesQuestion."""
    tools: Dict[str, Tool] = {}  # a search brings some that are in `tools` too
    tool_items: Dict[str, JSON] = {}

    def read(owner: Field, space: str) -> None:
        for field in owner.each("tools"):
            tool_type = field.need("type", str)
            if tool_type == "namespace":
                field.ignore_others("name", "tools")
                field.need("tools", list)
                read(field, qualified(space, field.need("name", str)))
            elif tool_type in TOOL_ITEMS:
                add(TOOL_ITEMS[tool_type], field, space)
            else:  # OpenAI's own
                field.ignore()

    def add(item_type: str, field: Field, space: str) -> None:
        custom = item_type == "custom_tool_call"
        tool = custom_tool(field) if custom else tool_of(field, "parameters")
        name = qualified(space, tool.name)
        tools[name] = tool._replace(name=name)
        tool_items[name] = {"type": item_type, "name": tool.name}
        if space:
            tool_items[name]["namespace"] = space

    read(body, "")
    for item in items:
        if RESPONSES_ITEMS.get(item.get("type", str) or "") is tools_item:
            read(item, "")
    return [*tools.values()], tool_items


def custom_tool(tool: Field) -> Tool:
    """Return a tool that takes a text. Its grammar, if any, is for the model to read."""
    tool.ignore_others("name", "description", "format")
    grammar = tool.object("format").get("definition", str)
    notes = filter(None, [tool.get("description", str), grammar])
    schema = Field(object_schema(input={"type": "string"}), tool, "parameters")
    return Tool(tool_name(tool), "\n\n".join(notes), schema)


def responses_reply(question: ResponsesQuestion, events: Events) -> JSON:
    parts, finish = collect(events)
    output = [responses_item(question, kind, list(run)) for kind, run in runs_of(parts)]
    response = {**responses_object(question), **responses_end(output, finish)}
    question.keep(response)
    return response


def responses_object(question: ResponsesQuestion) -> JSON:
    return {"id": new_id("resp_"), "object": "response", "created_at": int(time.time()),
            "status": "in_progress", "model": question.body["model"], "output": [],
            "error": None, "incomplete_details": None, "usage": None, **question.echo}


def responses_end(output: List[JSON], finish: Finish) -> JSON:
    """Return the fields of a finished response; `incomplete` if the token limit cut it off."""
    cut = finish.reason == "length"
    cached = {"cached_tokens": finish.cached_tokens or 0, "cache_write_tokens": 0}
    usage = {
        "input_tokens": finish.prompt_tokens, "input_tokens_details": cached,
        "output_tokens": finish.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": finish.prompt_tokens + finish.completion_tokens}
    return {"status": "incomplete" if cut else "completed", "output": output, "usage": usage,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None}


def responses_item(question: ResponsesQuestion, kind: type, parts: List[Any]) -> JSON:
    """Return the output item of a run of events; of no events, an empty one to start with."""
    if kind is ToolCall:
        return responses_call(question, parts[0])
    text = "".join(part.text for part in parts)
    if kind is Thinking:
        return {"id": new_id("rs_"), "type": "reasoning",
                "summary": [{"type": "summary_text", "text": text}]}
    content = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"id": new_id("msg_"), "type": "message", "status": "completed",
            "role": "assistant", "content": [content]}


def responses_call(question: ResponsesQuestion, call: ToolCall) -> JSON:
    """Return the item of a tool call: a custom tool gets its text, others their arguments."""
    plain = {"type": "function_call", "name": call.name}
    begin = question.tool_items.get(call.name, plain)
    item = {"id": new_id("fc_"), **begin, "call_id": new_id("call_"), "status": "completed"}
    if begin["type"] == "function_call":
        return {**item, "arguments": dumps(call.arguments)}
    text = call.arguments.get("input")
    if not isinstance(text, str):
        text = dumps(call.arguments)
    return {**item, "id": new_id("ctc_"), "input": text}


# ---- Responses as a stream -----------------------------------------------------------------------
# All frames are numbered, keep-alives too, and Codex up to 0.169 ignores comments and any
# failure but response.failed. So this stream makes its own pings, and words its failure.

class TextFrames(NamedTuple):
    key: str  # of the item's list of parts
    part: str  # begins the names of a part's frames
    text: str  # begins the names of its text's frames
    extra: JSON  # more fields for the frames of a text


TEXT_FRAMES = {
    Text: TextFrames("content", "content_part", "output_text", {"logprobs": []}),
    Thinking: TextFrames("summary", "reasoning_summary_part", "reasoning_summary_text", {})}


class ResponseStream:
    def __init__(self, question: ResponsesQuestion) -> None:
        self.question = question
        self.number = 0
        self.response = responses_object(question)

    def next_frame(self, name: str, **fields: Any) -> bytes:
        data = {"type": "response." + name, "sequence_number": self.number, **fields}
        self.number += 1
        return sse(data)

    def begin(self) -> bytes:
        """Return response.in_progress, after response.created if nothing is out yet."""
        created = b""
        if not self.number:
            created = self.next_frame("created", response=self.response)
        return created + self.next_frame("in_progress", response=self.response)

    def pings(self) -> Frames:
        while True:
            yield self.begin()

    def frames(self, events: Events) -> Frames:
        """Yield all frames. After the first one, even a ping, a failure is a frame too."""
        try:
            events = once_begun(events)
            yield self.begin()
            yield from self.item_frames(events)
        except APIError as error:
            if not self.number:
                raise
            words = openai_error(error, "")["error"]
            failure = {"code": words["code"] or "server_error", "message": words["message"]}
            failed = {**self.response, "status": "failed", "error": failure}
            yield self.next_frame("failed", response=failed)

    def item_frames(self, events: Events) -> Frames:
        output: List[JSON] = []
        for index, (kind, run) in enumerate(runs_of(events)):
            if kind is Finish:
                response = {**self.response, **responses_end(output, next(run))}
                self.question.keep(response)  # before the client can ask for it
                yield self.next_frame(response["status"], response=response)
            elif kind is ToolCall:
                output.append((yield from self.call_frames(index, next(run))))
            else:
                output.append((yield from self.text_frames(index, kind, run)))

    def text_frames(self, index: int, kind: type,
                    run: Iterator[Union[Text, Thinking]]) -> Generator[bytes, None, JSON]:
        """Yield the frames of a text or of thoughts; return the item."""
        names = TEXT_FRAMES[kind]
        item = responses_item(self.question, kind, [])
        place = {"item_id": item["id"], "output_index": index, names.key + "_index": 0}
        begun = {**item, names.key: []}
        if "status" in item:
            begun["status"] = "in_progress"
        yield self.next_frame("output_item.added", output_index=index, item=begun)
        yield self.next_frame(names.part + ".added", **place, part=item[names.key][0])
        parts = []
        for part in run:
            parts.append(part)
            yield self.next_frame(names.text + ".delta", **place, delta=part.text, **names.extra)

        item = {**responses_item(self.question, kind, parts), "id": item["id"]}
        done = item[names.key][0]
        yield self.next_frame(names.text + ".done", **place, text=done["text"], **names.extra)
        yield self.next_frame(names.part + ".done", **place, part=done)
        yield self.next_frame("output_item.done", output_index=index, item=item)
        return item

    def call_frames(self, index: int, call: ToolCall) -> Generator[bytes, None, JSON]:
        item = responses_call(self.question, call)
        key = "arguments"
        name = "function_call_arguments"
        if "input" in item:
            key = "input"
            name = "custom_tool_call_input"
        place = {"item_id": item["id"], "output_index": index}
        begun = {**item, "status": "in_progress", key: ""}
        yield self.next_frame("output_item.added", output_index=index, item=begun)
        yield self.next_frame(name + ".delta", **place, delta=item[key])
        yield self.next_frame(name + ".done", **place, **{key: item[key]})
        yield self.next_frame("output_item.done", output_index=index, item=item)
        return item


# ---- Stored responses ----------------------------------------------------------------------------
# OpenAI keeps responses, and its clients count on that: they send an id in place of what was
# said before. Here they are kept in memory, for the key that stored them, until the process
# ends or there are too many. On the errors for what is gone, clients send everything again.

class StoredResponse(NamedTuple):
    id: str
    sent: bytes  # the request
    response: bytes
    previous: str  # id of the response before, or ""
    item_ids: Sequence[str]

    def size(self) -> int:
        ids = sum(300 + 4 * len(id) for id in self.item_ids)  # as they stand in memory
        return len(self.sent) + len(self.response) + ids

    def given(self) -> List[JSON]:
        """Return the items of the request."""
        given: Union[str, List[JSON]] = json.loads(self.sent)["input"]
        return [text_item(given)] if isinstance(given, str) else given

    def answer(self) -> JSON:
        found: JSON = json.loads(self.response)
        return found


class StoredResponses:
    """Keep responses, with their requests, up to limits. Those that were not used for the longest
    time go first. An id alone finds nothing: it needs the owner's key too."""

    def __init__(self, config: Config) -> None:
        self.most, self.most_bytes = config.stored_responses, config.stored_bytes
        self.lock = threading.Lock()  # guards all below
        self.kept: Dict[Tuple[str, str], StoredResponse] = {}  # least recently used first
        self.holders: Dict[Tuple[str, str], str] = {}  # of items: ids of their responses
        self.size = 0

    def of(self, owner: str) -> OwnResponses:
        return OwnResponses(self, owner)

    def keep(self, owner: str, body: Body, sent: bytes, response: JSON) -> None:
        given = body.value["input"]
        items = [*(() if isinstance(given, str) else given), *response["output"]]
        self.add(owner, StoredResponse(
            response["id"], sent, dumps(response).encode(),
            body.value.get("previous_response_id") or "", tuple(by_ids(items))))

    def add(self, owner: str, stored: StoredResponse) -> None:
        if stored.size() > self.most_bytes:  # all others would go for nothing
            return
        with self.lock:
            self.kept[owner, stored.id] = stored
            self.holders.update({(owner, item_id): stored.id for item_id in stored.item_ids})
            self.size += stored.size()
            while self.size > self.most_bytes or len(self.kept) > self.most:
                self.forget(*next(iter(self.kept)))

    def use(self, owner: str, id: str) -> Optional[StoredResponse]:
        """Return a response, which is now the last one to go; None if it is gone."""
        with self.lock:
            stored = self.kept.pop((owner, id), None)
            if stored is not None:
                self.kept[owner, id] = stored
            return stored

    def holder(self, owner: str, item_id: str) -> Optional[StoredResponse]:
        """Return the response that has an item."""
        with self.lock:
            id = self.holders.get((owner, item_id), "")
        return self.use(owner, id)

    def remove(self, owner: str, id: str) -> bool:
        with self.lock:
            found = (owner, id) in self.kept
            if found:
                self.forget(owner, id)
            return found

    def forget(self, owner: str, id: str) -> None:
        stored = self.kept.pop((owner, id))
        self.size -= stored.size()
        for item_id in stored.item_ids:
            if self.holders.get((owner, item_id)) == id:
                del self.holders[owner, item_id]


class OwnResponses:
    """Look at the stored responses of one key, for one request."""

    def __init__(self, stored: StoredResponses, owner: str) -> None:
        self.stored, self.owner = stored, owner
        self.by_id: Dict[str, Dict[str, JSON]] = {}  # id of a response: its items by their ids

    def get(self, id: str) -> StoredResponse:
        """Return a response; 404 if it is gone."""
        found = self.stored.use(self.owner, id)
        if found is None:
            raise APIError(404, f"Response with id '{id}' not found.", param="response_id")
        return found

    def conversation(self, id: str) -> Optional[List[JSON]]:
        """Return all items up to a response; None if it, or what it builds on, is gone."""
        chain: List[StoredResponse] = []
        while id:
            stored = self.stored.use(self.owner, id)
            if stored is None:
                return None
            chain.append(stored)
            id = stored.previous
        if not chain:
            return None
        items: List[JSON] = []
        for stored in reversed(chain):
            items += [*stored.given(), *stored.answer()["output"]]
        found = self.resolved(items)
        return None if any(map(is_reference, found)) else found

    def resolved(self, items: Iterable[JSON]) -> List[JSON]:
        """Return items in place of references; a reference stays if its item is gone."""
        return [(self.item(item["id"]) or item) if is_reference(item) else item for item in items]

    def item(self, id: str) -> Optional[JSON]:
        stored = self.stored.holder(self.owner, id)
        if stored is None:
            return None
        if stored.id not in self.by_id:
            self.by_id[stored.id] = by_ids([*stored.given(), *stored.answer()["output"]])
        return self.by_id[stored.id].get(id)


def is_reference(item: JSON) -> bool:
    return item.get("type") == "item_reference" or not (item.get("type") or "role" in item)


def by_ids(items: Iterable[JSON]) -> Dict[str, JSON]:
    """Return the items that a reference can find, by their ids."""
    return {item["id"]: item for item in items
            if isinstance(item.get("id"), str) and not is_reference(item)}


def get_response(context: Context) -> Reply:
    stored = context.server.stored.of(context.request.key).get(context.request.argument)
    if query_of(context).value.get("stream") == "true":
        raise APIError(400, "stream: must be false: a stored response is one JSON object",
                       param="stream")
    return Reply(stored.answer())


def query_of(context: Context) -> Body:
    return Body(dict(urllib.parse.parse_qsl(context.request.query)), context.server.config)


def delete_response(context: Context) -> Reply:
    request = context.request
    stored = context.server.stored.of(request.key).get(request.argument)
    context.server.stored.remove(request.key, stored.id)
    return Reply({"id": stored.id, "object": "response", "deleted": True})


def list_input_items(context: Context) -> Reply:
    """Answer with the items that a response was made from, the newest first."""
    own = context.server.stored.of(context.request.key)
    stored = own.get(context.request.argument)
    items = (own.conversation(stored.previous) or []) + own.resolved(stored.given())
    query = query_of(context)
    shown: Dict[str, JSON] = {}
    for n, item in enumerate(items):
        item = shown_item(item, f"{stored.id[5:23]}{n:06x}", shown)
        shown[item["id"]] = item
    ids = list(shown)
    if query.at("order").value is None or query.one_of("order", ("asc", "desc")) == "desc":
        ids.reverse()
    after = query.value.get("after")
    if after is not None:
        if after not in shown:
            raise query.at("after").invalid("is not the id of one of the items")
        del ids[:ids.index(after) + 1]
    limit = query.value.get("limit", "20")
    if not re.fullmatch("[0-9]{1,3}", limit) or not 1 <= int(limit) <= 100:
        raise query.at("limit").invalid("must be an integer from 1 to 100")
    page = [shown[id] for id in ids[:int(limit)]]
    return Reply({
        "object": "list", "data": page, "has_more": len(page) < len(ids),
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None})


ITEM_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_",
                 "function_call_output": "fco_", "custom_tool_call": "ctc_",
                 "custom_tool_call_output": "ctco_"}


def shown_item(item: JSON, number: str, taken: Mapping[str, JSON]) -> JSON:
    """Return an item with what clients may leave out when they send it. Pages need ids that
    differ."""
    item_type = item.get("type") or ("item_reference" if is_reference(item) else "message")
    id = item.get("id")
    if not id or not isinstance(id, str) or id in taken:
        id = ITEM_PREFIXES.get(item_type, "item_") + number
    shown = {**item, "id": id, "type": item_type}
    if isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        shown["content"] = [{"type": part, "text": item["content"]}]
    return shown


# ---- Ollama's own API ----------------------------------------------------------------------------
# For programs that speak nothing else: VS Code, Open WebUI, Zed, `ollama` itself. Bodies, answers
# and errors stay as they are, as far as that hurts nobody: schemas become harmless, --num-ctx
# and aliases hold, images for a blind model are refused, every model calls tools, a cut answer
# is an error. Silence is filled with chunks without text, which all clients read as nothing
# (Cline gives up where no head has come within 30 s). What changes Ollama is refused.

def native_chat(context: Context) -> Reply:
    return native_answer(context, "/api/chat", "messages")


def native_generate(context: Context) -> Reply:
    return native_answer(context, "/api/generate", "prompt")


def native_answer(context: Context, path: str, asks: str) -> Reply:
    """Answer in chunks, or in one. Without the field that `asks`, Ollama only loads the model or
    unloads it; for _debug_render_only it shows the prompt. What is malformed, Ollama refuses."""
    fields = native_fields(context.body, path)
    whole = dict(fields)
    if whole.get("stream") is None or whole["stream"] is True:
        whole["stream"] = False
    if not fields.get(asks) or fields.get("_debug_render_only") is True:
        return native_whole(context, path, whole)
    try:
        question = native_request(context.body, fields, path)
    except APIError:
        native_whole(context, path, whole)
        raise  # but if it does not, we do
    events = context.ollama.events(question)
    if not question.stream:
        return Reply(native_reply(question, events))
    pings = (json_line(native_chunk(question, ())) for _ in itertools.count())
    return Reply(native_stream(question, events), content_type=JSON_LINES, pings=pings)


def native_whole(context: Context, path: str, fields: JSON) -> Reply:
    """Return Ollama's own answer, one object."""
    found = context.ollama.post(path, context.ollama.with_window(fields))
    return Reply({**found, "model": fields["model"]} if "model" in found else found)


# What Ollama does not read there must not mislead us.
UNREAD = {"/api/chat": ("prompt", "images", "template"), "/api/generate": ("messages", "tools")}


def native_fields(body: Body, path: str) -> JSON:
    """Return the body without what could harm other clients. To Ollama, {"Format": ...} is a format
    too: Go does not heed the case of names. Nor does it mind null in a list."""
    body.value = native_names(body.value)
    for name in UNREAD.get(path, ()):
        body.value.pop(name, None)
    for name in ("messages", "tools"):
        if isinstance(body.value.get(name), list):
            body.value[name] = [item for item in body.value[name] if item is not None]
    fields = {**body.value, "model": body.value.get("model") or ""}

    if fields.get("template"):  # {{range 1000000}}{{printf "%999999d" 1}}{{end}} fills its memory
        raise body.at("template").invalid("is not taken here, for it could end Ollama")
    if fields.get("tools"):
        with contextlib.suppress(APIError):  # then Ollama refuses all of it
            fields["tools"] = [harmless_tool(tool) for tool in body.each("tools")]
    form = body.at("format")
    if form.value == "json":  # since 0.30, Ollama ignores it for some models
        fields["format"] = ANY_OBJECT
    elif isinstance(form.value, dict):
        reducer = SchemaReducer()
        fields["format"] = reducer.finish(reducer.read(form))
    if isinstance(fields.get("options"), dict):
        refuse_batch(fields["options"], body.object("options"))
    return fields


def native_names(owner: JSON) -> JSON:
    return {name.casefold(): value for name, value in owner.items()}


def native_request(body: Body, fields: JSON, path: str) -> Question:
    """Return the question; 400 if it has types that Ollama refuses."""
    body.get("model", str)
    body.get("prompt", str)
    body.get("options", dict)
    list(body.each("images", str))
    messages = [native_message(turn) for turn in body.each("messages")]
    tools = [native_tool(tool) for tool in body.each("tools")]
    stream = body.get("stream", bool) is not False
    if messages:
        fields = {**fields, "messages": messages}
    schema = Field(fields["format"], body, "format") if fields.get("format") else None
    return Question(cast(OllamaRequest, fields), path, stream, tools=tools, schema=schema,
                    as_is=True)


def native_message(turn: Field) -> OllamaMessage:
    """Return a message that has at least a role and content; 400 if it has wrong types."""
    turn.value = native_names(turn.value)
    role = (turn.get("role", str) or "").lower()
    if is_plain(turn):
        return {"role": role, "content": turn.value["content"]}
    for name in ("content", "thinking", "tool_name", "tool_call_id"):
        turn.get(name, str)
    list(turn.each("images", str))
    given = {name: value for name, value in turn.value.items() if value is not None}
    if "tool_calls" in given:
        given["tool_calls"] = [native_call(call) for call in turn.each("tool_calls")]
    return cast(OllamaMessage, {
        **given, "role": role, "content": given.get("content", "")})


def native_call(call: Field) -> JSON:
    call.get("id", str)
    function = call.object("function")
    named = {"name": function.get("name", str) or ""}
    function.get("arguments", dict)
    return {**call.value, "function": {**function.value, **named}}


def harmless_tool(tool: Field) -> JSON:
    """Return a tool with a schema of which no part ends Ollama's runner."""
    function = tool.object("function")
    schema = tool_schema(function.object("parameters"))
    return {**tool.value, "function": {**function.value, "parameters": schema}}


def native_tool(tool: Field) -> Tool:
    function = tool.object("function")
    name, description = (function.get(name, str) or "" for name in ("name", "description"))
    return Tool(name, description, function.object("parameters"))


def native_reply(question: Question, events: Events) -> JSON:
    parts, finish = collect(events)
    return native_chunk(question, [*parts, finish])


def native_chunk(question: Question, events: Iterable[Event], index: int = 0) -> JSON:
    """Return one chunk with all these events; without any, it is a ping. `index` is that of the
    first call."""
    parts = list(events)
    texts = [part for part in parts if isinstance(part, Text)]
    thoughts = "".join(part.text for part in parts if isinstance(part, Thinking))
    calls = [part for part in parts if isinstance(part, ToolCall)]
    generates = question.path == "/api/generate"
    message: JSON = {"response" if generates else "content": "".join(part.text for part in texts)}
    if thoughts:
        message["thinking"] = thoughts
    if calls:
        message["tool_calls"] = [
            {"id": new_id("call_"), "function": {
                "index": n, "name": call.name, "arguments": call.arguments}}
            for n, call in enumerate(calls, index)]

    now = datetime.now(timezone.utc)
    chunk: JSON = {"model": question.body["model"], "created_at": f"{now:%Y-%m-%dT%H:%M:%S.%fZ}"}
    chunk.update(message if generates else {"message": {"role": "assistant", **message}})
    chunk["done"] = False
    logprobs = list(itertools.chain(*(part.logprobs for part in texts)))
    if logprobs:
        chunk["logprobs"] = logprobs
    for part in parts:
        if isinstance(part, Finish):
            reason = "length" if part.reason == "length" else "stop"
            chunk.update(done=True, done_reason=reason, **part.own)
    return chunk


def native_stream(question: Question, events: Events) -> Frames:
    """Yield the chunks. Calls stand in the last one, or each before it, as they came."""
    text_line = prepared(lambda text: json_line(native_chunk(question, [Text(text)])))
    calls: List[Event] = []
    indexes = itertools.count()
    for event in events:
        if isinstance(event, Text) and not event.logprobs:
            yield text_line(event.text)
        elif isinstance(event, ToolCall):
            calls.append(event)
        elif isinstance(event, Finish):
            while calls and not event.has_calls:
                yield json_line(native_chunk(question, [calls.pop(0)], next(indexes)))
            yield json_line(native_chunk(question, [*calls, event]))
        else:
            yield json_line(native_chunk(question, [event]))


def native_error(error: APIError, _request_id: str) -> JSON:
    return {"error": error.message}


def as_ollama_said(error: APIError) -> APIError:
    """Return an error with Ollama's own text and status, if it is one of Ollama's."""
    if error.origin is None:
        return error
    status, text = error.origin
    status = error.status if status == 200 else status
    return APIError(status, text, code=error.code, retry_after=error.retry_after)


def native_post(path: str) -> Callable[[Context], Reply]:
    """Return an endpoint that gives Ollama's own answer to POST `path`."""
    return lambda context: native_whole(context, path, native_fields(context.body, path))


def native_get(path: str) -> Callable[[Context], Reply]:
    """Return an endpoint that gives Ollama's own answer to GET `path`."""
    return lambda context: Reply(context.ollama.get(path))


def native_tags(context: Context) -> Reply:
    answer = context.ollama.get("/api/tags")
    config = context.server.config
    models = [{**model, **abilities_here(model, config)} for model in models_in(answer)]
    return Reply({**answer, "models": models})


def native_show(context: Context) -> Reply:
    """Describe a model as it is here. VS Code cuts its prompts by the window that this tells."""
    given = context.body.value
    asked = {**given, "model": given.get("model") or given.get("name") or ""}
    shown = context.ollama.post("/api/show", asked)
    config = context.server.config
    shown.update(abilities_here(shown, config))
    if config.num_ctx is not None:
        info: JSON = ollama_field(shown, "model_info", {})
        lengths = [name for name, value in info.items()
                   if name.endswith(".context_length") and isinstance(value, int)]
        window = min([config.num_ctx, *(info[name] for name in lengths)])
        shown["model_info"] = {**info, **dict.fromkeys(lengths, window)}
        lines = ollama_field(shown, "parameters", "").split("\n")
        others = [line for line in lines if line and line.split()[0] != "num_ctx"]
        shown["parameters"] = "\n".join([*others, f"{'num_ctx':<30} {window}"])
    return Reply(shown)


CHANGES = {
    "pull": "ollama pull MODEL", "push": "ollama push MODEL", "create": "ollama create MODEL",
    "copy": "ollama cp MODEL NAME", "delete": "ollama rm MODEL", "blobs": "ollama create MODEL"}


def refuse_changes(path: str) -> None:
    """Refuse what changes Ollama's models: a key to ask them is no key to fill its disk."""
    name = re.match("/+api/+([a-z]+)", without_v1(path))
    if name and name[1] in CHANGES:
        raise APIError(403, "Models are not changed through this server. On the machine where "
                            f"Ollama runs, type: {CHANGES[name[1]]}")


# ---- Models and health ---------------------------------------------------------------------------
# One model object satisfies both SDKs. Anthropic's needs has_more: false, or it asks without
# end; OpenAI's clients break on `data: null`. Ollama lists window and abilities from 0.30 on.
# Claude Code 2.1.332 offers only ids with "anthropic" or "claude" in them: it gets each model a
# second time.

ANTHROPIC = "anthropic/"  # before a name, it changes nothing


def list_models(context: Context) -> Reply:
    """Answer GET /v1/models with all models, whatever page a client asks for."""
    models = context.ollama.with_abilities(context.ollama.installed())
    data = [model_object(model, context.server.config) for model in models]
    if context.request.headers.get("user-agent", "").startswith(("claude-cli/", "claude-code/")):
        data += [{**model, "id": ANTHROPIC + model["id"]} for model in data
                 if "completion" in model.get("capabilities", ["completion"])]
    return Reply({
        "object": "list", "data": data, "has_more": False,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None})


def get_model(context: Context) -> Reply:
    name = context.request.argument
    model = context.ollama.find_model(name)
    model, = context.ollama.with_abilities([model])
    return Reply({**model_object(model, context.server.config), "id": name})


def model_object(model: JSON, config: Config) -> JSON:
    """Turn a model of /api/tags into OpenAI's model object and Anthropic's, in one."""
    name = model_name(model)
    owner = name.rpartition("/")[0].rpartition("/")[2] or "library"
    modified = timestamp(ollama_field(model, "modified_at", ""))
    found: JSON = {
        "id": name, "object": "model", "created": int(modified.timestamp()),
        "owned_by": owner, "type": "model", "display_name": name,
        "created_at": modified.strftime("%Y-%m-%dT%H:%M:%SZ")}

    details: JSON = ollama_field(model, "details", {})
    window = ollama_field(details, "context_length", 0)
    if window:
        found.update(context_length=window, max_input_tokens=window)
    return {**found, **abilities_here(model, config)}


def abilities_here(model: JSON, config: Config) -> JSON:
    """Return the field that says what a model can do, {} if Ollama does not say. Here, all that
    complete can also call tools."""
    abilities: List[Any] = ollama_field(model, "capabilities", [])
    if config.tools == "any" and "completion" in abilities and "tools" not in abilities:
        abilities = [*abilities, "tools"]
    return {"capabilities": abilities} if abilities else {}


def timestamp(text: str) -> datetime:
    """Parse Go's RFC 3339: Python before 3.11 reads neither its nine decimals nor its Z."""
    match = re.match(r"(\d+-\d+-\d+T\d+:\d+:\d+)(?:\.\d+)?(?:Z|([+-]\d+:\d+))?$", text)
    if match:
        text = match[1] + (match[2] or "+00:00")
    try:
        return datetime.fromisoformat(text).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return datetime.fromtimestamp(0, timezone.utc)


def get_health(context: Context) -> Reply:
    """Answer GET /health, within two seconds: 200 if Ollama answers, else 503."""
    config = context.server.config
    found: JSON = {"status": "ok", "ollama": config.ollama}
    try:
        answer = context.ollama.get("/api/version", config.health_seconds)
    except APIError as error:
        return Reply({**found, "status": "unavailable", "error": error.message}, 503)
    return Reply({**found, "version": answer.get("version")})


def get_root(context: Context) -> Reply:
    """Answer GET / with the page if a browser asks, else with what is here."""
    if wants_page(context.request):
        return Reply(PAGE, content_type="text/html; charset=utf-8", fields=PAGE_FIELDS)
    return Reply({
        "name": "ollama_api.py", "version": __version__,
        "ollama": context.server.config.ollama,
        "endpoints": [f"{route.method} {route.path}" for route in ROUTES]},
        fields={"vary": "accept, origin"})


# ---- Metrics -------------------------------------------------------------------------------------
# What the server has done since its start, in the text format of Prometheus (0.0.4). All labels
# are bounded: routes are those of ROUTES, and no more than a hundred models are told apart.

METRICS = {
    "requests_total": ("counter", "Requests that have ended; 499: the client left."),
    "requests_running": ("gauge", "Requests that are being answered."),
    "clients_left_total": ("counter", "Clients that left before the end of the answer."),
    "prompt_tokens_total": ("counter", "Tokens of prompts."),
    "cached_tokens_total": ("counter", "Those that came from the KV cache, where Ollama says so."),
    "completion_tokens_total": ("counter", "Tokens of answers."),
    "first_token_seconds": ("histogram", "Seconds from the request to the first token."),
    "tools_total": ("counter", "Answers to requests with tools, by the way the tools took."),
    "ollama_up": ("gauge", "Whether Ollama answered when it was asked last.")}
FIRST_TOKEN_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, float("inf"))
METRICS_MODELS = 100
Labels = Tuple[Tuple[str, str], ...]  # (name, value)


class Metrics:
    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards all below
        self.samples: Dict[str, Dict[Labels, float]] = {name: {} for name in METRICS}
        self.models: Set[str] = set()
        self.first_tokens = [0] * len(FIRST_TOKEN_SECONDS)  # in each bucket
        self.first_seconds = 0.0  # of all of them
        self.add("clients_left_total", 0)

    def add(self, name: str, value: float, **labels: str) -> None:
        """Add to a sample. The lock is held, or nobody else knows this object."""
        sample, samples = tuple(labels.items()), self.samples[name]
        samples[sample] = samples.get(sample, 0) + value

    def set_up(self, up: bool) -> None:
        with self.lock:
            self.samples["ollama_up"][()] = float(up)

    def count(self, exchange: Exchange) -> None:
        """Count a request that has ended."""
        ollama = exchange.ollama
        with self.lock:
            self.add("requests_total", 1, route=exchange.route, status=str(exchange.status))
            self.add("clients_left_total", exchange.status == 499)
            if ollama and ollama.first_at:
                self.count_first(ollama.first_at - exchange.began)
            if ollama and ollama.tools:
                self.add("tools_total", 1, way=ollama.tools)
            if ollama and ollama.finish:
                self.count_tokens(ollama.model, ollama.finish)

    def count_first(self, seconds: float) -> None:
        self.first_tokens[bisect.bisect_left(FIRST_TOKEN_SECONDS, seconds)] += 1
        self.first_seconds += seconds

    def count_tokens(self, model: str, finish: Finish) -> None:
        if len(self.models) < METRICS_MODELS:
            self.models.add(model)
        model = model if model in self.models else "other"
        self.add("prompt_tokens_total", finish.prompt_tokens, model=model)
        self.add("completion_tokens_total", finish.completion_tokens, model=model)
        if finish.cached_tokens is not None:
            self.add("cached_tokens_total", finish.cached_tokens, model=model)

    def text(self, running: int) -> str:
        with self.lock:
            self.samples["requests_running"][()] = running
            lines = []
            for name, (kind, meaning) in METRICS.items():
                full = "ollama_api_" + name
                lines += [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}"]
                samples = self.histogram() if kind == "histogram" else (
                    ("", labels, value) for labels, value in self.samples[name].items())
                lines += [f"{full}{suffix}{shown_labels(labels)} {value:.17g}"
                          for suffix, labels, value in samples]
        return "\n".join(lines) + "\n"

    def histogram(self) -> Iterator[Tuple[str, Labels, float]]:
        counts = list(itertools.accumulate(self.first_tokens))
        for bound, count in zip(FIRST_TOKEN_SECONDS, counts):
            yield "_bucket", (("le", f"{bound:g}".replace("inf", "+Inf")),), count
        yield "_sum", (), self.first_seconds
        yield "_count", (), counts[-1]


def shown_labels(labels: Labels) -> str:
    escapes = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
    texts = (f'{label}="{text.translate(escapes)}"' for label, text in labels)
    return f"{{{','.join(texts)}}}" if labels else ""


def get_metrics(context: Context) -> Reply:
    server = context.server
    text = server.metrics.text(server.running - 1)  # but for this one
    return Reply(text.encode(), content_type="text/plain; version=0.0.4; charset=utf-8")


# ---- Routes --------------------------------------------------------------------------------------
# The product on one screen. Clients get base URLs wrong in known ways (claude-code #20416), so
# paths are compared without leading /v1 segments, however many, without a trailing slash, and
# with any number of slashes for one. {id} at the end is the rest of the path, unquoted: model
# names may contain slashes. HEAD is GET.

Wording = Callable[[APIError, str], JSON]  # (error, request id) -> error object


class Route(NamedTuple):
    method: str
    path: str
    endpoint: Callable[[Context], Reply]
    error: Optional[Wording] = None  # None: see wording_for


ROUTES = (
    Route("POST", "/v1/messages", create_message, messages_error),
    Route("POST", "/v1/messages/count_tokens", count_tokens, messages_error),
    Route("POST", "/v1/chat/completions", create_chat_completion, openai_error),
    Route("POST", "/v1/completions", create_completion, openai_error),
    Route("POST", "/v1/embeddings", create_embeddings, openai_error),
    Route("POST", "/v1/responses", create_response, openai_error),
    Route("GET", "/v1/responses/{id}/input_items", list_input_items, openai_error),
    Route("GET", "/v1/responses/{id}", get_response, openai_error),
    Route("DELETE", "/v1/responses/{id}", delete_response, openai_error),
    Route("GET", "/v1/models", list_models),
    Route("GET", "/v1/models/{id}", get_model),
    Route("POST", "/api/chat", native_chat, native_error),
    Route("POST", "/api/generate", native_generate, native_error),
    Route("POST", "/api/embed", native_post("/api/embed"), native_error),
    Route("POST", "/api/embeddings", native_post("/api/embeddings"), native_error),
    Route("POST", "/api/show", native_show, native_error),
    Route("GET", "/api/tags", native_tags, native_error),
    Route("GET", "/api/ps", native_get("/api/ps"), native_error),
    Route("GET", "/api/version", native_get("/api/version"), native_error),
    Route("GET", "/health", get_health),
    Route("GET", "/metrics", get_metrics),
    Route("GET", "/", get_root))


def without_v1(path: str) -> str:
    return re.sub(r"^(/+v1(?=/|$))+", "", path).rstrip("/")


def pattern_of(path: str) -> Pattern[str]:
    """Return what matches a path, in linear time: only at its end is {id} more than one segment."""
    plain = re.escape(without_v1(path)).replace("/", "/+").replace(r"\{id\}/", "([^/]+)/")
    return re.compile(plain.replace(r"\{id\}", "(.+)"))


PATTERNS = tuple((pattern_of(route.path), route) for route in ROUTES)


@functools.lru_cache(64)  # a request asks twice, and most have one of a few paths
def routes_for(path: str) -> List[Tuple[Route, str]]:
    """Return the rows that have this path, each with what stands for {id} in it."""
    plain = without_v1(path)
    matches = ((pattern.fullmatch(plain), route) for pattern, route in PATTERNS)
    return [(route, urllib.parse.unquote(match[1] if match.groups() else ""))
            for match, route in matches if match]


def allowed_methods(path: str) -> str:
    methods = {route.method for route, _ in routes_for(path)}
    also = {"OPTIONS", "HEAD"} if "GET" in methods else {"OPTIONS"}
    return ", ".join(sorted(methods | also))


def find_route(request: Request) -> Tuple[Route, str]:
    """Return the row of a request and what stands for {id}; 404, 405 or 426 if there is none."""
    found = routes_for(request.path)
    method = "GET" if request.method == "HEAD" else request.method
    for route, argument in found:
        if route.method == method:
            return route, argument
    if not found:
        refuse_changes(request.path)
        raise APIError(404, f"There is no {dumps(request.path)} here. GET / lists the endpoints.",
                       origin=(404, "404 page not found"))
    if "websocket" in request.headers.get("upgrade", "").lower():  # Codex then uses POST at once
        raise APIError(426, 'WebSocket is not spoken here. Send a POST with "stream": true: '
                            "the answer is streamed as server-sent events.")
    raise APIError(405, f"{request.path} does not accept {request.method}. "
                        f"It accepts {allowed_methods(request.path)}.",
                   origin=(405, "405 method not allowed"))


def wording_for(request: Request) -> Wording:
    """Return the function that words errors for a request, whatever its path."""
    for route, _ in routes_for(request.path):
        if route.error:
            return route.error
    if re.match("/+api(/|$)", without_v1(request.path)):
        return native_error
    messages_path = re.match("/+messages", without_v1(request.path))
    anthropic = messages_path or "anthropic-version" in request.headers
    return messages_error if anthropic else openai_error


# ---- Tools ---------------------------------------------------------------------------------------
# A dialect hands its tools to `choose`, and gets ToolCall events, whatever the model. Native:
# Ollama gets the tools, and gives their calls. Bound: a `format` binds the answer to JSON (see
# Calls in text), where a call is forced, for which Ollama has nothing; beside a schema, with
# which it calls no tool; where the model knows no tools; and where Ollama has lost a call.
# Rescued: a call was written as text. First all that a model is told. In words and in the
# grammar, the answer comes before the calls: weak models call too often.

CALL_ONE = "Call the tool {}: answer with the JSON object of its arguments, and nothing else: {}"
CALL_ANY = ('Call one of these tools: answer with a JSON object of its "name" and "parameters", '
            'and nothing else: {}')
OR_CALL = (' Only for what one of these tools is made for, call it instead: give a JSON object of '
           'its "name" and "parameters". The tools: {}')
CALL_OR_TEXT = ('Answer with a JSON object like {{"answer": "your text"}}, and nothing else.'
                + OR_CALL)
CALL_OR_SCHEMA = ('Answer with a JSON object of an "answer" with the schema {}, and nothing else.'
                  + OR_CALL)
ANSWER = "Answer with JSON of this schema, and nothing else: {}"
RESULT = "The tool {} answered:\n{}"

ANY_OBJECT: JSON = {"type": "object"}


class Tool(NamedTuple):
    name: str
    description: str
    schema: Field  # of the arguments

    def for_model(self) -> JSON:
        return {"name": self.name, "description": self.description, "parameters": self.schema.value}

    def for_ollama(self) -> JSON:
        function = {**self.for_model(), "parameters": tool_schema(self.schema)}
        return {"type": "function", "function": function}


def tool_of(tool: Field, key: str, *also: str) -> Tool:
    """Read a tool whose schema is in the field `key`. Those in `also` are read elsewhere."""
    tool.ignore_others("name", "description", key, *also)
    return Tool(tool_name(tool), tool.get("description", str) or "", tool.object(key))


def tool_name(tool: Field) -> str:
    name = tool.need("name", str)
    if not name:
        raise tool.at("name").invalid(EMPTY)
    return name


def choose(question: Question, mode: str, tools: Sequence[Tool], schema: Optional[Field],
           thoughts: Field) -> None:
    """Offer the tools as `mode` says (none, auto or required), and bind the answer to `schema`.
    A required call leaves no room for a schema, or for what the field `thoughts` asks for."""
    tools = [] if mode == "none" else tools
    if mode == "required":
        if question.body.get("think"):
            thoughts.ignore()
        if schema is not None:
            schema.ignore()
        question.body["think"] = False
        bind_call(question, tools)
    elif schema is not None and tools:
        bind_call_or_answer(question, tools, schema)
    elif schema is not None:
        reducer = SchemaReducer()
        bind(question, reducer.finish(reducer.read(schema)),
             ANSWER.format(plain_json(schema.value)))
    elif tools:
        question.tools = tools
        question.body["tools"] = [tool.for_ollama() for tool in tools]


def bound_instead(question: Question) -> Question:
    """Return the question with its tools not for Ollama, but in words: to be answered by a call,
    or by text."""
    body = question.body.copy()
    del body["tools"]
    bound = dataclasses.replace(question, body=body, tools=(), schema=None)
    bind_call_or_answer(bound, question.tools, question.schema)
    return bound


def bind_call(question: Question, tools: Sequence[Tool]) -> None:
    """Bind the answer to a call of one of the tools."""
    reducer = SchemaReducer()
    if len(tools) == 1:
        tool, = tools
        form = arguments_schema(reducer, tool)
        words = CALL_ONE.format(tool.name, plain_json(tool.for_model()))
        question.decode = functools.partial(ToolCall, tool.name)
    else:
        form = {"anyOf": call_schemas(reducer, tools)}
        words = CALL_ANY.format(in_json(tools))
        question.decode = functools.partial(read_choice, [tool.name for tool in tools], False)
    bind(question, reducer.finish(form), words)


def bind_call_or_answer(question: Question, tools: Sequence[Tool],
                        schema: Optional[Field]) -> None:
    """Bind the answer to a call of one of the tools, or to the schema; to text without one."""
    reducer = SchemaReducer()
    if schema is None:
        answer: JSON = {"type": "string"}
        words = CALL_OR_TEXT.format(in_json(tools))
        question.speaks = True
    else:
        answer = reducer.read(schema)
        words = CALL_OR_SCHEMA.format(plain_json(schema.value), in_json(tools))
    form = {"anyOf": [object_schema(answer=answer), *call_schemas(reducer, tools)]}
    names = [tool.name for tool in tools]
    question.decode = functools.partial(read_choice, names, schema is not None)
    bind(question, reducer.finish(form), words)


def bind(question: Question, form: JSON, words: str) -> None:
    """Bind the answer to the schema `form`. The system prompt says the same in `words`: Ollama
    does not show the model its `format`."""
    question.body["format"] = form
    messages = question.body["messages"]
    last = messages[-1]
    if last["role"] == "assistant" and (
            "tool_calls" in last or not re.fullmatch(r"(\{\s*)?", last["content"])):
        # llama-server takes a prefill for the beginning of what it binds (Ollama 0.33).
        messages = [*messages, {"role": "user", "content": GO_ON}]
    start = 1 if messages[0]["role"] == "system" else 0
    order = message_of("system", [("content", words)])
    question.body["messages"] = for_templates([*messages[:start], order, *messages[start:]])


def in_json(tools: Sequence[Tool]) -> str:
    return plain_json([tool.for_model() for tool in tools])


def call_schemas(reducer: SchemaReducer, tools: Sequence[Tool]) -> List[JSON]:
    return [object_schema(name={"const": tool.name}, parameters=arguments_schema(reducer, tool))
            for tool in tools]


def arguments_schema(reducer: SchemaReducer, tool: Tool) -> JSON:
    return {**reducer.read_object(tool.schema), "type": "object"}


def object_schema(**properties: JSON) -> JSON:
    """Return the schema of an object with exactly these properties. Pass them in alphabetical
    order: since 0.30 Ollama generates them so for some models, and the name must come first."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def read_choice(names: Sequence[str], may_answer: bool, value: JSON) -> Event:
    """Return the tool call, or the text, that an answer to CALL_ANY or CALL_OR_SCHEMA holds."""
    if may_answer and "answer" in value and "name" not in value:
        return Text(plain_json(value["answer"]))
    call = tool_call({"parameters": value.get("arguments"), **value}, "parameters")
    if call.name not in names:
        raise broken_answer(f"a call of {dumps(call.name)[:80]}, which was not offered")
    return call


def in_words(messages: Iterable[OllamaMessage]) -> List[OllamaMessage]:
    """Return the messages for a model whose template has no place for calls and their results.
    What the user says next to a result is joined to it: some templates want turns to alternate."""
    names = {"": "?"}
    told = (message_in_words(message, names) for message in messages)
    runs = itertools.groupby(told, operator.itemgetter("role"))
    return [joined(*run) for _, run in runs]


def message_in_words(message: OllamaMessage, names: Dict[str, str]) -> OllamaMessage:
    """Return a call as the JSON that the model would have written, and a result as user text.
    `names` are the tools called before, by the ids of the calls; that of "" is the last one."""
    role, text = message["role"], message["content"]
    if role == "tool":  # in Ollama's own API, some have no tool_name (langchain-ollama 1.1)
        name = message.get("tool_name") or names.get(message.get("tool_call_id", ""), names[""])
        role, text = "user", RESULT.format(name, text)
    told: List[OllamaMessage] = [{**message, "role": role, "content": text, "tool_calls": []}]
    for call in message.get("tool_calls", ()):
        function = call["function"]
        names[""] = names[call.get("id", "")] = function["name"]
        called = {"name": function["name"], "parameters": function.get("arguments", {})}
        told.append({"role": role, "content": plain_json(called)})
    return joined(*told)


def calls_in(body: Prompt) -> bool:
    """Return whether the conversation has calls or results."""
    return any("tool_calls" in message or message["role"] == "tool"
               for message in body.get("messages", ()))


# ---- JSON schemas --------------------------------------------------------------------------------
# Ollama turns `format` into a grammar, and some JSON schemas stop its runner, hang a model, or
# end the whole process, for everybody. So no client's schema reaches it: SchemaReducer builds
# a new one from the keywords that all releases accept, and reports what it leaves out.

SCHEMA_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
SCHEMA_FORMATS = ("date-time", "date", "time", "uuid")
SCHEMA_SHAPES = ("$ref", "const", "enum", "properties", "anyOf", "oneOf", "allOf")
SCHEMA_NOTES = {
    "title", "description", "default", "example", "examples", "deprecated", "readOnly",
    "writeOnly", "$schema", "$id", "$comment", "$defs", "definitions"}
SCHEMA_ITEMS = (0, 64)  # 10,000 end Ollama 0.20
SCHEMA_INTEGERS = (1 - 2**31, 2**31 - 1)
SCHEMA_LEVELS = 60
SCHEMA_DEFINITIONS = 1000
Reduced = Optional[JSON]  # a keyword's part of the new schema; None: left out and reported


class Schema(Field):
    """Hold a part of a client's schema, and the whole schema, which its references point into."""
    __slots__ = "level", "whole"

    def __init__(self, value: Any, parent: Optional[Field], name: Union[str, int],
                 whole: Any, level: int = 0) -> None:
        super().__init__(value, parent, name)
        self.whole, self.level = whole, level

    def keyword(self, word: str) -> Schema:
        return Schema(self.value[word], self, word, self.whole, self.level + 1)

    def member(self, value: Any, name: object) -> Schema:
        # A long name would be repeated in the paths of all that stands below it.
        return Schema(value, self, str(name)[:99], self.whole, self.level)

    def beside(self, word: str) -> Any:
        """Return the value of another keyword of the same schema."""
        assert self.parent is not None
        return self.parent.value.get(word)


class SchemaReducer:
    """Build one schema for `format`, from one or several of a client's. What references lead
    to is collected in $defs at the root: no release looks for it elsewhere."""

    def __init__(self) -> None:
        self.names: Dict[int, str] = {}  # id of a definition: its name
        self.waiting: List[Tuple[str, Schema]] = []  # definitions still to be built
        self.budget = 0  # bytes left
        self.readers: Dict[str, Callable[[Schema], Reduced]] = {
            "type": self.read_type, "format": self.read_format,
            "enum": self.read_values, "const": self.read_values,
            "properties": self.read_properties, "required": self.read_required,
            "additionalProperties": self.read_additional,
            "items": self.read_items, "prefixItems": self.read_items,
            "anyOf": self.read_any_of, "oneOf": self.read_any_of,
            "allOf": self.read_all_of, "$ref": self.read_ref,
            "minItems": self.read_bound, "maxItems": self.read_bound,
            "minimum": self.read_bound, "maximum": self.read_bound}

    def read(self, schema: Field) -> JSON:
        """Reduce a whole JSON Schema (2020-12 or draft 7); 400 if it is malformed or too deep."""
        value = schema.value
        self.budget += allowance(value)
        return self.reduce(Schema(value, schema.parent, schema.name, value))

    def read_object(self, schema: Field) -> JSON:
        """Reduce the schema of an object, like a tool's arguments; what else it allows is left
        out. A reference at its root is followed: beside one, `type` would not count."""
        value = schema.value
        for _ in range(SCHEMA_LEVELS):
            target = pointed_at(schema.value, str(value.get("$ref")))
            value = target if isinstance(target, dict) else value
        kept = {}
        objects = Objects(schema.value)
        for word, part in value.items():
            kept[word] = objects.part(word, part)
            if kept[word] != part:
                schema.at(word).ignore()
            if kept[word] is None:
                del kept[word]
        self.budget += allowance(schema.value)
        return self.reduce(Schema(kept, schema.parent, schema.name, schema.value))

    def finish(self, schema: JSON) -> JSON:
        """Build what waits, and return `schema` with it; 400 if a definition begins with itself."""
        built: Dict[str, JSON] = {}
        sources: Dict[str, Schema] = {}
        while self.waiting:
            name, source = self.waiting.pop(0)
            built[name], sources[name] = self.reduce(source), source

        left = {name: set(direct_references(built[name])) for name in built}
        while left:
            open_ends = {name: others for name, others in left.items()
                         if any(other in left for other in others)}
            if len(open_ends) == len(left):
                raise sources[min(left)].invalid("leads back to itself")
            left = open_ends
        return ({**schema, "$defs": built} if built else schema) or ANY_OBJECT

    def spend(self, at: Schema, n: int) -> None:
        self.budget -= n
        if self.budget < 0:
            raise at.invalid("the schema is too large with all that it refers to")

    def reduce(self, schema: Schema) -> JSON:
        """Return the keywords that are known and harmless, and report the others. Of several
        SCHEMA_SHAPES, Ollama would look at one alone: here it is the first that is not {}."""
        if isinstance(schema.value, bool):
            if not schema.value:
                schema.ignore()
            return {}
        schema.check(dict)
        if schema.level > SCHEMA_LEVELS:
            raise schema.invalid(f"is nested deeper than {SCHEMA_LEVELS} levels")
        schema.value = {word: value for word, value in schema.value.items()
                        if value is not None or word == "const"}
        self.spend(schema, 20 + sum(map(len, schema.value)))

        kept: JSON = {}
        shapes = [word for word in SCHEMA_SHAPES if word in schema.value]
        chosen = [word for word in shapes if schema.value[word] not in ({}, [])][:1] or shapes[:1]
        chosen += ["allOf"] if chosen == ["properties"] else []
        for word in schema.value:
            at = schema.keyword(word)
            rival = word in shapes and word not in chosen
            reader = None if rival else self.readers.get(word)
            found = reader(at) if reader else {} if word in SCHEMA_NOTES else None
            if found is None:
                at.ignore()
            else:
                kept.update(found)
        return self.settle(schema, kept)

    def settle(self, schema: Schema, kept: JSON) -> JSON:
        """Rewrite combinations of which Ollama would look at one keyword alone."""
        if "$ref" in kept:
            for word in kept.keys() - {"$ref", "type"}:  # a type beside it says the same
                schema.at(word).ignore()
            return {"$ref": kept["$ref"]}
        if {"allOf", "properties"} <= set(kept):
            own = {word: kept.pop(word) for word in ("properties", "required") if word in kept}
            kept["allOf"] = [own, *kept["allOf"]]
        word = "additionalProperties"
        if "allOf" in kept and word in kept:
            del kept[word]
            schema.at(word).ignore()
        return kept

    def read_type(self, at: Schema) -> Reduced:
        names = [at.member(name, n).check(str)
                 for n, name in enumerate(list_of(at.value))]
        known = [name for name in names if name in SCHEMA_TYPES]
        if known and len(known) < len(names):
            at.ignore()
        single = not isinstance(at.value, list)
        return {"type": known[0] if single else known} if known else None

    def read_format(self, at: Schema) -> Reduced:
        of_text = at.beside("type") in (None, "string")
        known = of_text and at.value in SCHEMA_FORMATS
        return {"format": at.value} if known else None

    def read_values(self, at: Schema) -> Reduced:
        if at.name == "enum" and not at.check(list):
            return None
        self.spend(at, len(plain_json(at.value)))
        return {str(at.name): at.value}

    def read_properties(self, at: Schema) -> Reduced:
        properties = at.check(dict)
        self.spend(at, sum(map(len, properties)))
        kept = {}
        for name, value in properties.items():
            if fits_grammar(name):
                kept[name] = self.reduce(at.member(value, name))
            else:
                at.member(value, name).ignore()
        return {"properties": kept}

    def read_required(self, at: Schema) -> Reduced:
        properties = at.beside("properties")
        names = [at.member(name, n).check(str) for n, name in enumerate(at.check(list))]
        known = [name for name in names if isinstance(properties, dict) and name in properties
                 and fits_grammar(name)]
        if len(known) < len(names):
            at.ignore()
        return {"required": known} if known else {}

    def read_additional(self, at: Schema) -> Reduced:
        value = at.value if isinstance(at.value, bool) else self.reduce(at)
        return {"additionalProperties": value}

    def read_items(self, at: Schema) -> Reduced:
        if at.name == "prefixItems" or isinstance(at.value, list):  # as in draft 7
            return {"prefixItems": self.members(at)}
        if at.beside("prefixItems") is not None:
            return {} if isinstance(at.value, bool) else None
        return {"items": self.reduce(at)}

    def read_any_of(self, at: Schema) -> Reduced:
        return {"anyOf": self.members(at)}

    def read_all_of(self, at: Schema) -> Reduced:
        """Leave the merging to Ollama, which merges objects. One alone needs none (pydantic 1)."""
        members = [member for member in self.members(at) if member]
        if len(members) == 1 and at.beside("properties") is None:
            return members[0]
        return {"allOf": members} if members else {}

    def members(self, at: Schema) -> List[JSON]:
        values = at.check(list)
        if not values:
            raise at.invalid(EMPTY)
        return [self.reduce(at.member(value, index)) for index, value in enumerate(values)]

    def read_bound(self, at: Schema) -> Reduced:
        """Keep an integer bound that fits all releases, unless its partner contradicts it."""
        of_items = at.name in ("minItems", "maxItems")
        least, most = SCHEMA_ITEMS if of_items else SCHEMA_INTEGERS
        names = ("minItems", "maxItems") if of_items else ("minimum", "maximum")
        pair = [n for n in map(whole, map(at.beside, names))
                if type(n) is int and least <= n <= most]
        typed = of_items or "integer" in list_of(at.beside("type"))
        bound = whole(at.value)
        known = type(bound) is int and bound in pair and pair == sorted(pair)
        return {str(at.name): bound} if known and typed else None

    def read_ref(self, at: Schema) -> Reduced:
        pointer = at.check(str)
        target = pointed_at(at.whole, pointer)
        if target is None:
            raise at.invalid(f"{dumps(pointer)} leads nowhere")
        if id(target) not in self.names:
            if len(self.names) >= SCHEMA_DEFINITIONS:
                raise at.invalid(f"is one of more than {SCHEMA_DEFINITIONS} references")
            name = re.sub(r"[^A-Za-z0-9_]", "", pointer.rpartition("/")[2]) or "root"
            while name in self.names.values():
                name += str(len(self.names))
            self.names[id(target)] = name
            source = Schema(target, at.parent, at.name, at.whole)
            self.waiting.append((name, source))
        return {"$ref": "#/$defs/" + self.names[id(target)]}


def allowance(schema: Any) -> int:
    """Return how many bytes may be built from a schema: references could make it endless."""
    return 8 * len(plain_json(schema)) + 2000


class Objects:
    """Find what a schema says about objects. Each part is looked at once, however often it is
    referred to."""

    def __init__(self, whole: JSON) -> None:
        self.whole = whole
        self.known: Dict[int, Optional[bool]] = {}  # id of a part: see `only`

    def part(self, word: str, value: Any) -> Any:
        """Return what a keyword at the root says about objects; None for nothing."""
        if word in ("enum", "const") or word == "type" and "object" not in list_of(value):
            return None
        if word in ("anyOf", "oneOf") and isinstance(value, list):
            return [each for each in value if self.only(each)] or None
        if word == "allOf" and isinstance(value, list):
            return [each for each in value if self.only(each) is not False] or None
        return value

    def only(self, schema: Any, level: int = 0) -> Optional[bool]:
        """Return whether a part allows only objects (True), none (False), or more (None)."""
        if not isinstance(schema, dict) or level > SCHEMA_LEVELS:
            return None
        if id(schema) not in self.known:
            self.known[id(schema)] = None  # for a part that leads back to itself
            self.known[id(schema)] = self.look(schema, level + 1)
        return self.known[id(schema)]

    def look(self, schema: JSON, level: int) -> Optional[bool]:
        if isinstance(schema.get("$ref"), str):
            return self.only(pointed_at(self.whole, schema["$ref"]), level)
        types = list_of(schema.get("type") or [])
        if {"enum", "const"} & schema.keys() or types and "object" not in types:
            return False
        if types == ["object"] or "properties" in schema:
            return True
        branches = [self.only(each, level) for word in ("anyOf", "oneOf")
                    for each in list_of(schema.get(word, []))]
        parts = [self.only(each, level) for each in list_of(schema.get("allOf", []))]
        if False in parts or branches and all(found is False for found in branches):
            return False
        return True if True in parts or branches and all(branches) else None


def fits_grammar(name: str) -> bool:
    """Return whether a property's name works in a grammar. Ollama 0.12 escapes no others."""
    return re.fullmatch(r"[^\x00-\x1f]+", name) is not None


def direct_references(schema: JSON) -> Iterator[str]:
    """Yield the definitions that a schema may begin with: a loop of these is left recursion."""
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2]
    for member in (*schema.get("anyOf", ()), *schema.get("allOf", ())):
        yield from direct_references(member)


def pointed_at(whole: Any, pointer: str) -> Any:
    """Return what a fragment with a JSON Pointer (RFC 6901) leads to; None for nowhere."""
    if not re.fullmatch("#(/.*)?", pointer, re.DOTALL):
        return None
    found = whole
    for part in pointer.split("/")[1:]:
        name = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and re.fullmatch("[0-9]{1,9}", name):
            found = found[int(name)] if int(name) < len(found) else None
        else:
            found = found.get(name) if isinstance(found, dict) else None
    return found


# ---- Schemas of tools ----------------------------------------------------------------------------
# For `tools`, Ollama reads even less of a JSON Schema, and refuses the whole request for some
# of the rest. What it reads is kept, with references resolved, and what it does not is reported.

def tool_schema(schema: Field) -> JSON:
    """Return what Ollama reads of a tool's schema. Names keep their order, for its KV cache."""
    narrower = SchemaNarrower(schema.value)
    found = narrower.narrow(Schema(schema.value, schema.parent, schema.name, schema.value))
    found = without_branches(found)
    for word in ("enum", "const", "items", "type"):  # Ollama reads none of these at the root
        if word in schema.value and "object" not in list_of(schema.value[word]):
            schema.at(word).ignore()
    kept: JSON = {word: found[word] for word in ("properties", "required") if word in found}
    return {"type": "object", "properties": {}, **kept}


def without_branches(schema: JSON) -> JSON:
    """Return a schema with the properties of all its branches: Ollama reads none at the root."""
    branches = [without_branches(branch) for branch in schema.get("anyOf", ())]
    if not branches:
        return schema
    found: Dict[str, JSON] = {}  # for each property, its different schemas by their JSON
    for branch in branches:
        for name, part in branch.get("properties", {}).items():
            found.setdefault(name, {})[plain_json(part)] = part
    properties = {}
    for name, by_json in found.items():
        parts = [part for part in by_json.values() if part]  # {} adds nothing to the root's
        properties[name] = {"anyOf": parts} if len(parts) > 1 else parts[0] if parts else {}
    first, *others = (dict.fromkeys(branch.get("required", ())) for branch in branches)
    required = [name for name in first if all(name in names for names in others)]
    return merged(schema, {"properties": properties, "required": required})


class SchemaNarrower:
    """Keep what Ollama reads of one tool's schema. References are resolved: Ollama drops them."""

    def __init__(self, whole: JSON) -> None:
        self.budget = allowance(whole)  # bytes left to spend

    def narrow(self, schema: Schema, within: Tuple[str, ...] = ()) -> JSON:
        """Return what Ollama reads of one part, to which the references and steps in `within` led.
        Repeated references could make it huge: what exceeds the budget is left out."""
        kept: JSON = {}
        self.budget -= 20  # a part's own cost
        for word in schema.value if isinstance(schema.value, dict) else ():
            self.budget -= len(word)
            if self.budget < 0 or len(within) > SCHEMA_LEVELS:
                schema.ignore()
                break
            for found in self.narrow_word(schema.keyword(word), within):
                if word == "allOf":  # for each of its parts, `merged` copies all that is kept
                    self.budget -= sum(map(len, kept.values()))
                kept = merged(kept, found)
        return kept

    def narrow_word(self, at: Schema, within: Tuple[str, ...]) -> Iterator[JSON]:
        """Yield what a keyword stands for: several schemas for allOf, otherwise at most one."""
        word, value = str(at.name), at.value
        deeper = (*within, "")
        new = word == "$ref" and isinstance(value, str) and value not in within
        target = pointed_at(at.whole, value) if new else None
        if target is not None:
            yield self.narrow(Schema(target, at.parent, at.name, at.whole), (*within, value))
        elif word == "allOf":
            yield from (self.narrow(at.member(part, n), deeper)
                        for n, part in enumerate(list_of(value)))
        elif word == "properties" and isinstance(value, dict):
            self.budget -= sum(map(len, value))
            yield {word: {name: self.narrow(at.member(part, name), deeper)
                          for name, part in value.items()}}
        elif word in ("anyOf", "oneOf") and isinstance(value, list) and value:
            yield {"anyOf": [self.narrow(at.member(part, n), deeper)
                             for n, part in enumerate(value)]}
        elif word == "items":
            yield {word: self.narrow(at, deeper)}
        else:
            found = narrow_value(word, value)
            if found.get(word, value if found else None) != value and word not in SCHEMA_NOTES:
                at.ignore()
            self.budget -= len(plain_json(found))
            if self.budget >= 0:
                yield found


def narrow_value(word: str, value: Any) -> JSON:
    """Return what Ollama reads of a keyword that holds no schema."""
    texts = [text for text in list_of(value) if isinstance(text, str)]
    types = [name for name in texts if name in SCHEMA_TYPES]
    if word == "type" and types:
        return {word: types if isinstance(value, list) else types[0]}
    if word == "required" and isinstance(value, list):
        return {word: texts}
    if word == "description" and isinstance(value, str):
        return {word: value}
    if word == "enum" and isinstance(value, list) and value:
        return {word: value}
    return {"enum": [value]} if word == "const" else {}


def merged(one: JSON, two: JSON) -> JSON:
    """Return both schemas as one. `two` wins; but properties, required names and branches of both
    are kept, and of a property, what each says."""
    both = {**one, **two}
    if "properties" in one and "properties" in two:
        said = one["properties"]
        both["properties"] = {**said, **{
            name: {**said.get(name, {}), **part} for name, part in two["properties"].items()}}
    if "required" in one and "required" in two:
        names = one["required"] + two["required"]
        both["required"] = list(dict.fromkeys(names))
    if "anyOf" in one and "anyOf" in two:
        both["anyOf"] = one["anyOf"] + two["anyOf"]
    return both


# ---- Asking Ollama -------------------------------------------------------------------------------
# One address is asked, and no other: no proxies, no redirects. Answers are always streamed, even
# if the client wants one JSON object: so failing, waiting and cancelling work in one way only.
# `truncate: false` makes an overflow an error: by default Ollama drops messages silently.

class Ollama(contextlib.ExitStack):
    """Ask Ollama on behalf of one request. At the end of its `with` block, all connections that
    were opened are closed, even if iterators over them are still alive."""

    def __init__(self, server: Server, client: Client) -> None:
        super().__init__()
        self.config, self.rates, self.client = server.config, server.rates, client
        self.metrics = server.metrics
        self.first_at: float = 0.0  # of the first token
        self.finish: Optional[Finish] = None  # how it ended, for the log
        self.tools: str = ""  # the way that they took: native, bound or rescued
        self.knows_tools: Optional[bool] = None  # the model that is asked; None: not known yet
        self.abilities: Dict[str, List[Any]] = {}  # of models
        self.missed = 0  # how many of the names to try are not installed
        self.model: str = ""  # that has answered

    def events(self, asked: Question) -> Events:
        """Yield the events of the answer. Where there is a remedy for an error, ask in another
        way, as long as the client has seen no text."""
        said = False
        while True:
            try:
                for event in self.answer(asked):
                    said = said or isinstance(event, Text) and not event.text.isspace()
                    yield event
                return
            except APIError as error:
                instead = None if said else self.remedy(asked, error.code)
                if instead is None:
                    raise
                asked = instead

    def remedy(self, asked: Question, code: Optional[str]) -> Optional[Question]:
        """Return the question to ask after an error, if there is one: without thoughts, or their
        level, if the model knows none; bound, if it knows no tools, or a call is lost."""
        body = asked.body.copy()
        if code == "no_thinking" and "think" in body and not asked.as_is:
            del body["think"]
            return dataclasses.replace(asked, body=body)
        if code == "no_think_level" and isinstance(body.get("think"), str) and not asked.as_is:
            body["think"] = True
            return dataclasses.replace(asked, body=body)
        if code in (NO_TOOLS, CALL_LOST) and asked.tools and self.config.tools == "any":
            self.knows_tools = code == CALL_LOST
            try:
                instead = bound_instead(asked)
            except APIError:
                if code == CALL_LOST:  # a schema that no grammar can express, but Ollama took it
                    return None
                raise
            self.tools = "bound"
            return instead
        return None

    def answer(self, asked: Question) -> Events:
        body: JSON = {**asked.body, "stream": True}
        if not asked.as_is:
            body["truncate"] = False
        body = self.with_window(body)
        try:
            response = self.ask(asked.path, body, self.fitted)
        except PromptTooLong as error:
            raise error if asked.as_is else self.with_numbers(error, body) from error
        # Ollama's head comes with its first token.
        self.first_at = self.first_at or time.monotonic()
        self.tools = "native" if asked.tools else "bound" if asked.decode else ""
        chunks = chunks_of(response, self.config.line_bytes)
        for event in read_as(asked, events_of(chunks), self.config):
            if isinstance(event, ToolCall) and event.rescued:
                self.tools = "rescued"
            if isinstance(event, Finish):
                self.finish = event
                if event.stop_sequence is None:  # otherwise its counts are our estimates
                    self.learn(asked, event.prompt_tokens)
            yield event

    def learn(self, asked: Question, tokens: int) -> None:
        """Learn from Ollama's count, unless it has images in it, or a `format`: after thoughts,
        Ollama counts the prompt of that twice."""
        if asked.amounts and "format" not in asked.body and not images_in(asked.body):
            self.rates.learn(asked.body["model"], asked.amounts, tokens)

    def embed(self, body: JSON) -> JSON:
        body = self.with_window({**body, "truncate": False})
        try:
            return self.post("/api/embed", body)
        except PromptTooLong as error:
            raise self.with_numbers(error, body) from error

    def post(self, path: str, body: JSON) -> JSON:
        """Return a JSON object, however long that takes."""
        response = self.ask(path, body, dict)
        return parse_object(read_all(response, self.config.embed_bytes))

    def installed(self) -> List[JSON]:
        return models_in(self.get("/api/tags"))

    def with_abilities(self, models: List[JSON]) -> List[JSON]:
        """Return the models with what they can do. Ollama 0.33 lists no more than "completion" for
        one with a template of its own; /api/show tells, and is asked as long as time allows."""
        give_up = time.monotonic() + self.config.show_seconds
        return [self.with_shown(model, give_up - time.monotonic())
                if model.get("capabilities") == ["completion"] else model for model in models]

    def with_shown(self, model: JSON, seconds: float) -> JSON:
        try:
            asked = {"model": model_name(model)}
            shown = self.get("/api/show", seconds, asked) if seconds > 0 else {}
        except APIError:
            shown = {}
        abilities = shown.get("capabilities")
        return {**model, "capabilities": abilities} if isinstance(abilities, list) else model

    def find_model(self, name: str) -> JSON:
        """Return the installed model that would answer a request for `name`."""
        found = {tagged(model_name(model)): model for model in self.installed()}
        for candidate in self.names(name):
            if tagged(candidate) in found:
                return found[tagged(candidate)]
        raise self.missing(name)

    def get(self, path: str, seconds: float = 0, body: Optional[JSON] = None) -> JSON:
        """Return a small JSON object, asked for by POST if there is a `body`. 504 if it is late."""
        response = self.open(path, body, seconds or self.config.ask_seconds)
        return parse_object(read_all(response, self.config.line_bytes))

    def with_window(self, body: JSON) -> JSON:
        """Return the body with the context window of --num-ctx, unless it has one."""
        options = {} if body.get("options") is None else body["options"]
        known = isinstance(options, dict) and options.get("num_ctx") is None
        if self.config.num_ctx is None or not known:
            return body
        return {**body, "options": {**options, "num_ctx": self.config.num_ctx}}

    def ask(self, path: str, body: JSON, fit: Callable[[JSON], JSON]) -> Response:
        """Ask the model that the client named; if it is not installed, that of an alias. `fit`
        makes the body fit it."""
        origin = None
        for name in self.names(body["model"])[self.missed:]:
            try:
                response = self.open(path, fit({**body, "model": name}))
                self.model = tagged(str(name))
                return response
            except APIError as error:
                if error.code != "model_not_found" or not isinstance(name, str):
                    raise
                self.missed += 1
                origin = origin or error.origin
        raise self.missing(body["model"], origin)

    def fitted(self, body: JSON) -> JSON:
        """Return the body as its model can take it. Refuse images for one without vision: up to
        0.20 Ollama ignores them silently. If a bound answer is wanted of one without tools, tell
        earlier calls and results in words: its template would drop them."""
        name = body["model"]
        if images_in(body) and "vision" not in self.abilities_of(name):
            raise APIError(400, f"model: {dumps(name)} cannot see images.", param="model")
        if self.config.tools == "any" and body.get("format"):
            if self.knows_tools is None and calls_in(body):
                with contextlib.suppress(APIError):  # if nobody can say, its template may know
                    self.knows_tools = "tools" in self.abilities_of(name)
            if self.knows_tools is False:
                body["messages"] = in_words(body["messages"])
        return body

    def abilities_of(self, name: str) -> List[Any]:
        """Return what a model can do; ask once. Before 0.6.4 Ollama does not say: then it is taken
        for granted."""
        if name not in self.abilities:
            shown = self.get("/api/show", body={"model": name})
            self.abilities[name] = ollama_field(shown, "capabilities", ["vision", "tools"])
        return self.abilities[name]

    def names(self, name: str) -> List[str]:
        """Return the names to try: `name`, also without ANTHROPIC, and that of its alias."""
        if not isinstance(name, str):
            return [name]  # for Ollama to refuse
        plain = name[len(ANTHROPIC):] if name.startswith(ANTHROPIC) else ""
        return [name, *([plain] if plain else []), *self.alias_of(name)]

    def alias_of(self, name: str) -> List[str]:
        """Return the model of the first alias that matches, with or without ANTHROPIC, if any."""
        plain = name[len(ANTHROPIC):] if name.startswith(ANTHROPIC) else name
        aliases = (alias.partition("=") for alias in self.config.alias)
        return [model for pattern, _, model in aliases
                if any(fnmatch.fnmatchcase(each, pattern) for each in (name, plain))][:1]

    def missing(self, name: str, origin: Optional[Tuple[int, str]] = None) -> APIError:
        installed = ", ".join(map(model_name, self.installed())) or "none"
        last = self.names(name)[-1]
        nor = f", nor is {dumps(last)}, its --alias" if self.alias_of(name) else ""
        return APIError(
            404, f"model: {dumps(name)} is not installed in Ollama{nor}. "
                 f"Installed: {installed}. To install it: ollama pull {last}",
            param="model", code="model_not_found", origin=origin)

    def with_numbers(self, error: PromptTooLong, body: JSON) -> PromptTooLong:
        """Return the error with the numbers, which Ollama up to 0.29 leaves out."""
        if error.window:
            return error
        name = self.names(body["model"])[self.missed]
        window = body["options"].get("num_ctx")
        if not isinstance(window, int):
            window = self.window_of(name)
        tokens = self.rates.tokens(name, amounts_in(body))
        return PromptTooLong(max(tokens, window + 1), window, error.origin)

    def window_of(self, name: str) -> int:
        """Return the context window of a loaded model; 0 if it is unknown. Of models that are the
        same (`ollama cp`), Ollama up to 0.20 lists only the one that was loaded first."""
        loaded = models_in(self.get("/api/ps"))
        found = [model for model in loaded if is_named(model, name)]
        if not found:
            same = {ollama_field(model, "digest", "")
                    for model in self.installed() if is_named(model, name)} - {""}
            found = [model for model in loaded if ollama_field(model, "digest", "") in same]
        return ollama_field(found[0], "context_length", 0) if found else 0

    def open(self, path: str, body: Optional[JSON] = None,
             seconds: float = float("inf")) -> Response:
        """Send a request, and return Ollama's answer once its head is here. Fail if not 200."""
        give_up = time.monotonic() + seconds

        def watch(sock: socket.socket) -> UpstreamSocket:
            upstream = Upstream(sock, self.client, self.config.ping, give_up)
            self.callback(upstream.close)
            return UpstreamSocket(upstream)

        url = self.config.ollama
        key = self.config.ollama_key
        request = UpstreamRequest(url + path, body, key, watch)
        try:
            response: Response = OPENER.open(
                request, timeout=min(seconds, self.config.connect_seconds))
        except urllib.error.URLError as error:
            if getattr(error.reason, "errno", None) in NO_DESCRIPTOR:
                raise APIError(503, "The server has too many open files.", retry_after=1) from error
            self.metrics.set_up(False)
            raise APIError(
                503, f"Ollama does not answer at {url} ({error.reason}). Start it with `ollama "
                     "serve`, or say where it is with --ollama or OLLAMA_HOST.") from error
        except (OSError, http.client.HTTPException) as error:
            raise broken_answer(error) from error

        self.metrics.set_up(True)
        self.callback(response.close)  # runs before upstream.close, or Python 3.13 complains
        if response.status != 200:
            text = read_all(response, self.config.line_bytes).decode("utf-8", "replace")
            raise refused(response.status, text)
        return response


NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE, getattr(errno, "WSAEMFILE", errno.EMFILE)}


def tagged(name: str) -> str:
    """Return a model's full name. Ollama ignores case, and adds the tag `latest`."""
    return (name if ":" in name.rpartition("/")[2] else name + ":latest").lower()


def model_name(model: JSON) -> str:
    return ollama_field(model, "model", "") or ollama_field(model, "name", "")


def is_named(model: JSON, name: str) -> bool:
    return tagged(model_name(model)) == tagged(name)


def models_in(answer: JSON) -> List[JSON]:
    models: List[Any] = ollama_field(answer, "models", [])
    if not all(isinstance(model, dict) for model in models):
        raise broken_answer(f"models is {dumps(models)[:80]}")
    return models


class Refusal(NamedTuple):
    """Say what an error of Ollama means. How its text begins decides, and the status it comes with:
    the text of a crash quotes the last errors of other clients (seen on 0.33). Of several rows
    that fit, the last one counts."""
    begins: str  # a pattern
    came_with: Sequence[int]  # any, if it stands in a stream: then there is no status
    status: int  # for the client
    code: Optional[str] = None
    retry_after: Optional[int] = None


TOO_LONG = "context_length_exceeded"
NO_TOOLS = "tools_not_supported"
CALL_LOST = "tool_call_lost"
REFUSALS = (
    Refusal("(the )?input length exceeds the context length", [400], 400, TOO_LONG),  # to 0.29
    Refusal("input exceeds maximum context length", [400], 400, TOO_LONG),  # 0.12, to embed
    Refusal("the prompt is longer than the context length", [400], 400, TOO_LONG),  # 0.30.9
    Refusal(r"(request \(\d+ tokens\) )?exceeds the available", [400], 400, TOO_LONG),  # from 0.30
    Refusal(r"model (\S+ )?not found", [404], 404, "model_not_found"),
    Refusal(r"\S+ does not support thinking", [400], 400, "no_thinking"),
    Refusal("(invalid )?think value", [400], 400, "no_think_level"),
    Refusal(r"\S+ does not support tools", [400], 400, NO_TOOLS),
    Refusal("llama-server returned invalid tool call arguments", [500], 502, CALL_LOST),  # 0.32
    Refusal("error parsing tool call: ", [500], 502, CALL_LOST),  # gpt-oss (ollama #12884)
    Refusal("404 page not found|405 method not allowed", [404, 405], 502),  # a very old Ollama
    Refusal("invalid format: |invalid JSON schema in format", [500], 400),  # to 0.32
    Refusal("(Failed to create new sequence: )?unable to create sampling context", [500], 400),
    Refusal(r'option "\w+" must be of type', [500], 400),
    Refusal("image input is not supported", [500], 400),  # 0.32, native
    Refusal("an error was encountered while running|llama-server process has", [400, 500], 502),
    Refusal("an error was encountered while running the model: error: ", [400, 500], 502,
            retry_after=1))


def refused(status: int, text: str) -> APIError:
    """Return the error for the client if Ollama answers with `status` and `text`, or says `text`
    in a stream (200). 4xx and 503 stay, 501 is 400, all others 502: Codex hides that of a 500."""
    found = innermost_error(text)
    message = ollama_field(found, "message", "") or f"Ollama answered {status} without a message"
    otherwise = (status if status // 100 == 4 or status == 503 else
                 400 if status == 501 else 502)  # 501: it cannot do what the request asks for
    means = Refusal("", [], otherwise, retry_after=5 if status == 503 else None)
    for refusal in REFUSALS:
        if status in (*refusal.came_with, 200) and re.match(refusal.begins, message):
            means = refusal
    said = error_in(text)
    origin = status, said if isinstance(said, str) else text.strip()[:1000]
    if means.code == TOO_LONG:
        numbers = re.search(r"\((\d+) tokens\).*\((\d+) tokens\)", message)
        tokens, window = map(int, numbers.groups()) if numbers else (
            ollama_field(found, name, 0) for name in ("n_prompt_tokens", "n_ctx"))
        return PromptTooLong(tokens, window, origin)
    if means.status == 502:
        message = "Ollama failed: " + message
    return APIError(means.status, message, code=means.code, retry_after=means.retry_after,
                    origin=origin)


def innermost_error(text: str) -> JSON:
    """Return {"message": ...} from {"error": text}, where text may be such JSON again (0.30).
    For anything else, such as a proxy's error page, its first 1,000 characters."""
    error = error_in(text)
    if isinstance(error, str):
        return innermost_error(error)
    return error if isinstance(error, dict) else {"message": text.strip()[:1000]}


def error_in(text: str) -> Any:
    try:
        return json.loads(text)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def broken_answer(how: object) -> APIError:
    """Return the error for an answer that is cut, late, or not what Ollama sends."""
    if isinstance(how, TimeoutError):
        return APIError(504, "Ollama did not answer in time.")
    reason = how if isinstance(how, str) else repr(how)
    return APIError(502, f"Ollama's answer is broken: {reason}.")


# ---- Counting tokens -----------------------------------------------------------------------------
# Ollama has no tokenizer to ask, but reports afterwards how many tokens a prompt had. An
# estimate is the sum of what a prompt has (words, digits, letters of other scripts, messages)
# times what that costs a model. The costs begin as those of five tokenizers with their
# templates, measured on 420 prompts; each of Ollama's counts corrects them for its model.

class Weight(NamedTuple):
    """Say what a kind of text weighs, in tokens, for most tokenizers."""
    cost: str  # one of COSTS, which says how much more or less it is for a model
    letters: bytes  # of the text in UTF-8; other scripts are told by their first byte
    run: int  # so many of these letters in a row; 0: any number of them
    tokens: float


def bytes_from(first: int, last: int) -> bytes:
    return bytes(range(first, last + 1))


WEIGHTS = (
    Weight("words", string.ascii_letters.encode(), 0, 0.9),
    Weight("words", string.ascii_letters.encode(), 8, 0.57),
    Weight("words", b"bcdfghjklmnpqrstvwxzBCDFGHJKLMNPQRSTVWXZ", 4, 2.6),  # rare in English
    Weight("words", string.ascii_uppercase.encode(), 0, 0.19),
    Weight("digits", string.digits.encode(), 1, 0.5),
    Weight("numbers", string.digits.encode(), 0, 0.3),
    Weight("marks", string.punctuation.encode(), 0, 0.93),
    Weight("marks", b"-", 1, 0.3),
    Weight("marks", b" ", 2, 0.2),
    Weight("marks", b"\n", 0, 0.4),
    Weight("accents", string.ascii_uppercase.encode(), 0, 0.2),  # German has many of both
    Weight("accents", bytes_from(0xC2, 0xC9) + b"\xe1", 1, 2.6),
    Weight("alphabets", bytes_from(0xCA, 0xD4), 1, 0.42),  # Greek, Cyrillic
    Weight("alphabets", bytes_from(0xD5, 0xE0), 1, 0.65),  # Semitic, Indic
    Weight("alphabets", bytes_from(0xEA, 0xED), 1, 0.35),  # Korean
    Weight("chinese", bytes_from(0xE4, 0xE9) + b"\xef", 1, 1.0),
    Weight("kana", b"\xe3", 1, 1.0),
    Weight("symbols", b"\xe2", 1, 0.6),
    Weight("symbols", bytes_from(0xF0, 0xF4), 1, 3.0))  # emoji
TABLES = {  # make an a of each of the letters, and a blank of all else
    weight.letters: bytes(97 if byte in weight.letters else 32 for byte in range(256))
    for weight in WEIGHTS}
COSTS = ("words", "digits", "numbers", "marks", "accents", "alphabets", "chinese", "kana",
         "symbols", "text of tools", "a message", "tools at all", "template", "no system prompt",
         "an image")
TOKENIZERS = {  # how the names of a family's models begin, letters and digits only: its costs
    "gptoss": (0.99, 0.69, 1.78, 1.01, 0.3, 0.73, 0.83, 0.84, 0.82,
               0.55, 4.7, 24.5, 62.8, 0.0, 768),
    "phi": (1.0, 0.71, 1.81, 0.95, 1.02, 1.27, 1.26, 1.08, 1.04,
               0.9, 3.8, 20.0, 2.3, 0.6, 768),
    "llama3": (1.0, 0.72, 1.74, 0.94, 1.01, 0.84, 0.89, 0.71, 1.04,
               0.77, 4.8, 77.9, 14.7, 5.5, 768),
    "mistral": (1.12, 1.96, 0.0, 1.34, 1.15, 1.08, 1.18, 1.14, 1.43,
               0.93, 2.0, 0.0, 0.2, 1.9, 768),
    "qwen": (1.01, 2.12, 0.36, 0.92, 0.96, 0.94, 0.65, 0.75, 0.79,
               0.79, 4.7, 73.7, 2.6, 21.4, 768)}
# How far the costs of another model may be from what these five have in common
DEVIATIONS = (0.08, 0.08, 0.1, 0.06, 0.1, 0.1, 0.08, 0.08, 0.12, 0.08, 0.7, 8.0, 5.0, 4.0, 0)
RATES_KEPT = 1000  # models; with an alias for *, clients invent names
SAMPLE = 256, 256  # pieces of a long text, and letters of each

Vector = Sequence[float]  # of a number for each of COSTS


def dot(one: Vector, two: Vector) -> float:
    return float(sum(map(operator.mul, one, two)))


@functools.lru_cache(RATES_KEPT)
def first_costs(name: str) -> Vector:
    """Return the costs of a model of which no count is known: its family's, or those of all."""
    plain = re.sub("[^a-z0-9]", "", name.lower().rpartition("/")[2])
    families = [costs for family, costs in TOKENIZERS.items() if plain.startswith(family)]
    return families[0] if families else [
        sum(column) / len(column) for column in zip(*TOKENIZERS.values())]


class Costs:
    """Learn the costs of one model by recursive least squares (a Kalman filter without motion)."""

    def __init__(self, name: str) -> None:
        self.values = first_costs(name)
        columns = [[cost - mean for cost in column]
                   for column, mean in zip(zip(*TOKENIZERS.values()), first_costs(""))]
        self.spread = [[dot(one, two) / len(one) for two in columns] for one in columns]
        self.loosen(1)

    def loosen(self, share: float) -> None:
        """Trust the costs less. Done before each count, this lets earlier counts fade."""
        for index, deviation in enumerate(DEVIATIONS):
            self.spread[index][index] += share * deviation ** 2

    def learn(self, amounts: Vector, tokens: int) -> None:
        self.loosen(0.1)
        moves = [dot(row, amounts) for row in self.spread]
        noise = (0.04 * tokens) ** 2 + 9  # what an estimate misses even with the best costs
        gains = [move / (noise + dot(amounts, moves)) for move in moves]
        missed = tokens - dot(amounts, self.values)
        self.values = [value + gain * missed for value, gain in zip(self.values, gains)]
        self.spread = [[cell - gain * move for cell, move in zip(row, moves)]
                       for row, gain in zip(self.spread, gains)]


class TokenRates:
    """Estimate prompts, and learn from Ollama's counts. All requests of a server share it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.costs: Dict[str, Costs] = {}  # by model

    def tokens(self, name: str, amounts: Vector) -> int:
        """Return how many tokens a prompt with these `amounts` is for a model."""
        return max(1, round(dot(amounts, self.values(name))))

    def values(self, name: str) -> Vector:
        with self.lock:
            known = self.costs.get(name)
        return known.values if known else first_costs(name)

    def learn(self, name: str, amounts: Vector, tokens: int) -> None:
        """Learn from Ollama's count, unless it seems to leave out cached tokens (0.30.0)."""
        expected = self.tokens(name, amounts)
        if not expected / 4 < tokens < 4 * expected + 100:
            return
        with self.lock:
            costs = self.costs.pop(name, None) or Costs(name)
            if abs(tokens - expected) > 0.02 * tokens:  # it takes a twentieth of a millisecond
                costs.learn(amounts, tokens)
            self.costs[name] = costs
            if len(self.costs) > RATES_KEPT:
                del self.costs[next(iter(self.costs))]


def amounts_in(body: Prompt) -> Vector:
    """Return how much of each of COSTS a prompt has."""
    messages = body.get("messages", ())
    tools = body.get("tools", ())
    texts = [body.get("prompt", ""), body.get("suffix", ""), *list_of(body.get("input", ""))]
    for message in messages:
        texts += [message["content"], message.get("thinking", "")]
        texts += map(plain_json, message.get("tool_calls", ()))
    text = weights_of(texts)
    of_tools = weights_of(map(plain_json, tools))
    without_system = not messages or messages[0]["role"] != "system"
    return [*(text[cost] for cost in COSTS[:9]), sum(of_tools.values()), len(messages) or 1,
            bool(tools), 1, without_system, images_in(body)]


def weights_of(texts: Iterable[str]) -> Dict[str, float]:
    """Return what texts weigh, for each of the costs. If they are long, pieces are weighed."""
    text = "\n".join(filter(None, texts))
    pieces, size = SAMPLE
    step = len(text) // pieces
    some = text if step <= size else "".join(
        text[start:start + size] for start in range(0, step * pieces, step))
    scale = len(text) / len(some) if some else 1
    sample = some.encode()
    plain = sample.isascii()  # as most are: a third of the cost
    marked = {letters: sample.translate(table) for letters, table in TABLES.items()
              if sample and not (plain and letters[0] > 127)}
    found = dict.fromkeys(COSTS, 0.0)
    for cost, letters, run, tokens in WEIGHTS:
        if letters in marked:
            text_of_a = marked[letters]
            runs = text_of_a.count(b"a" * run) if run else len(text_of_a.split())
            found[cost] += scale * tokens * runs
    return found


def images_in(body: Prompt) -> int:
    in_messages = sum(len(message.get("images", ())) for message in body.get("messages", ()))
    return in_messages + len(body.get("images") or ())


# ---- Events of an answer -------------------------------------------------------------------------
# Ollama's chunks become events, and nothing else looks into a chunk. Filters over the events
# follow, one for each thing that Ollama does not do by itself; `read_as` chains those that a
# request needs. (The longest ones stand in Calls in text.)

def events_of(chunks: Iterator[JSON]) -> Events:
    """Take Ollama's chunks apart. Only `done` makes an answer whole. A tool call, and what follows
    it, waits for that: Claude Code would run it twice if the answer broke off."""
    held: List[Event] = []
    for chunk in chunks:
        if chunk.get("error"):  # under a 200
            raise refused(200, dumps(chunk))
        parts = parts_of(chunk)
        for event in parts:
            if held or isinstance(event, ToolCall):
                held.append(event)
            else:
                yield event
        if ollama_field(chunk, "done", False):
            finish = finish_of(chunk, held, parts)
            yield from held
            yield finish
            return
    # Up to 0.32, Ollama breaks off like this after 30 equal tokens in a row.
    raise broken_answer("it ended without saying that it was done")


TAKEN_APART = {"model", "created_at", "message", "response", "thinking", "tool_calls", "logprobs",
               "done", "done_reason"}


def parts_of(chunk: JSON) -> List[Event]:
    """Return the events in one chunk, often none. /api/generate has `response`, no message."""
    message: JSON = chunk if "response" in chunk else ollama_field(chunk, "message", {})
    thoughts = ollama_field(message, "thinking", "")
    text = ollama_field(message, "content", "") or ollama_field(message, "response", "")
    logprobs: List[Any] = ollama_field(chunk, "logprobs", [])
    calls: List[Any] = ollama_field(message, "tool_calls", [])
    parts: List[Event] = [Thinking(thoughts)] if thoughts else []
    if text or (logprobs and not thoughts):
        known = tuple(entry for entry in logprobs if isinstance(entry, dict))
        parts.append(Text(text, known))
    for call in calls:
        function: JSON = ollama_field(call, "function", {}) if isinstance(call, dict) else {}
        parts.append(tool_call(function, "arguments"))
    return parts


def tool_call(value: JSON, arguments: str) -> ToolCall:
    """Return a call that Ollama or the model gives as JSON. Only its name is required."""
    name = ollama_field(value, "name", "")
    if not name:
        raise broken_answer(f"a tool call without a name: {dumps(value)[:80]}")
    return ToolCall(name, ollama_field(value, arguments, {}))


def finish_of(chunk: JSON, held: List[Event], parts: List[Event]) -> Finish:
    """Return the Finish in the last chunk, of which `parts` are the others. If there are calls,
    they are `held`. The reasons load and unload answer no question."""
    reason = ollama_field(chunk, "done_reason", "") or "stop"
    if reason not in ("stop", "length"):
        raise broken_answer(f"done_reason is {dumps(reason)[:80]}")
    cached = None
    if "prompt_eval_cached_count" in chunk:
        cached = ollama_field(chunk, "prompt_eval_cached_count", 0)
    return Finish(
        "tool_calls" if held and reason == "stop" else reason,
        prompt_tokens=ollama_field(chunk, "prompt_eval_count", 0),
        completion_tokens=ollama_field(chunk, "eval_count", 0),
        cached_tokens=cached,
        has_calls=any(isinstance(part, ToolCall) for part in parts),
        own={name: value for name, value in chunk.items() if name not in TAKEN_APART})


def ollama_field(owner: JSON, name: str, otherwise: T) -> T:
    """Return a field that Ollama sent, of the same type as `otherwise`; that if it is absent."""
    value = owner.get(name)
    if value is None:
        return otherwise
    if not isinstance(value, type(otherwise)):
        raise broken_answer(f"{name} is {dumps(value)[:80]}")
    return value


def chunks_of(response: Response, limit: int) -> Iterator[JSON]:
    """Yield Ollama's chunks, one JSON object a line of at most `limit` bytes."""
    rest = bytearray()
    for data in arriving(response):
        rest += data
        if b"\n" in data:
            *lines, tail = bytes(rest).split(b"\n")
            rest = bytearray(tail)
            yield from map(parse_object, filter(bytes.strip, lines))
        elif len(rest) > limit:
            raise broken_answer(f"a line of more than {limit} bytes")
    if rest.strip():
        yield parse_object(bytes(rest))


def arriving(response: Response) -> Iterator[bytes]:
    """Yield the body as it arrives: read1 returns what is there, and readline costs more."""
    try:
        yield from iter(lambda: response.read1(64 * 1024), b"")
    except (OSError, http.client.HTTPException) as error:
        raise broken_answer(error) from error


def read_all(response: Response, limit: int) -> bytes:
    body = bytearray()
    for data in arriving(response):
        body += data
        if len(body) > limit:
            raise broken_answer(f"more than {limit} bytes")
    return bytes(body)


def parse_object(data: bytes) -> JSON:
    """Parse a JSON object. json.loads would guess the encoding, at twice the cost."""
    try:
        text = data.decode().strip(" \t\r\n")
        value, end = READER.raw_decode(text)
        if end < len(text):
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise broken_answer(f"not JSON: {data[:80]!r}") from error
    if not isinstance(value, dict):
        raise broken_answer(f"not an object: {data[:80]!r}")
    return value


def read_as(question: Question, events: Events, config: Config) -> Events:
    """Return the events, filtered as the request needs."""
    if question.only_counts:
        return only_counted(events)
    if question.body.get("think") is False and not question.as_is:
        events = without_thoughts(events)
    calls = bool(question.tools) and question.schema is None  # with a `format` there are none
    if calls:
        events = none_lost(events)
    if question.decode:
        events = decoded(events, question, question.decode, config.json_depth)
    elif prefill_of(question.body) and not question.as_is:
        events = unrepeated(events, prefill_of(question.body))
    if calls and config.tools == "any":
        events = rescued(events, [tool.name for tool in question.tools], config.json_depth)
    if question.one_call:
        events = first_call(events)
    if question.stop:
        events = until_stop(events, question.stop, question.prompt_tokens)
    return events


def prefill_of(body: OllamaRequest) -> str:
    """Return the beginning of the answer, if the client gave it as the last message."""
    last = body["messages"][-1] if "messages" in body else {}
    return last["content"] if last.get("role") == "assistant" else ""


def only_counted(events: Events) -> Events:
    """Drop all but the end of an answer of which no token was wanted: the prompt was."""
    for event in events:
        if isinstance(event, Finish):
            yield dataclasses.replace(event, reason="length", completion_tokens=0)


def without_thoughts(events: Events) -> Events:
    """Drop a <think> block at the start of the text: some models think even if they should not.
    One that never ends is dropped only if the token limit has cut it."""
    held: List[Event] = []
    text = ""  # of what is held, the part to look into
    thinking = False
    for event in events:
        if not isinstance(event, Text):
            cut = thinking and isinstance(event, Finish) and event.reason == "length"
            yield from () if cut else held
            yield event
            break
        held.append(event)
        text += event.text
        if not thinking and text.lstrip().startswith("<think>"):
            thinking = True
        elif not thinking and not "<think>".startswith(text.lstrip()):
            yield from held
            break
        if "</think>" in text:
            rest = Text(text.partition("</think>")[2])
            yield from without_blanks(itertools.chain((rest,), events))
            break
        text = text[-7:] if thinking else text  # the end may be the beginning of "</think>"
    yield from events


def without_blanks(events: Events) -> Events:
    """Drop blanks and line ends before the first text."""
    for event in events:
        if isinstance(event, Text):
            event = Text(event.text.lstrip(), event.logprobs)
        if event != Text(""):
            yield event
            break
    yield from events


def none_lost(events: Events) -> Events:
    """Fail if an answer has neither text nor call, although tokens were generated.
    Up to 0.32, Ollama swallows tool calls that it cannot parse or that it did not offer."""
    found = False
    for event in events:
        found = found or isinstance(event, ToolCall) or (
            isinstance(event, Text) and bool(event.text.strip()))
        lost = isinstance(event, Finish) and event.reason == "stop" and (
            event.completion_tokens > 1)
        if lost and not found:
            raise APIError(502, "The model ended without an answer. If it wrote a tool call, "
                                "Ollama could not read it, and it is lost.", code=CALL_LOST)
        yield event


def first_call(events: Events) -> Events:
    called = False
    for event in events:
        if not (called and isinstance(event, ToolCall)):
            yield event
        called = called or isinstance(event, ToolCall)


def unrepeated(events: Events, prefill: str) -> Events:
    """Drop the prefill from an answer that repeats it, as some models do since Ollama 0.30."""
    held = Text("")
    for event in events:
        if isinstance(event, Text):
            held += event
            if prefill.startswith(held.text) and held.text != prefill:
                continue
            repeated = prefill and held.text.startswith(prefill)
            event = held.split(len(prefill))[1] if repeated else held
            prefill, held = "", Text("")  # decided: all that follows goes through
        elif held.text:
            yield held
            prefill, held = "", Text("")
        if event != Text(""):
            yield event


def until_stop(events: Events, stops: Sequence[str], prompt_tokens: int) -> Events:
    """Cut the text at the first complete stop text, and say which it was: Ollama never says. The
    counts are our estimate and the number of events."""
    count = itertools.count()
    found = yield from before((event for event, _ in zip(events, count)), stops)
    if found:
        yield Finish("stop_sequence", prompt_tokens, next(count), found[0])


def before(events: Events,
           marks: Sequence[str]) -> Generator[Event, None, Optional[Tuple[str, Text]]]:
    """Yield what comes before the first complete mark; return it, and the text that begins with
    it. Text that may be the beginning of one is held back."""
    held, initials = Text(""), {mark[0] for mark in marks}
    for event in events:
        if not isinstance(event, Text):
            yield from () if held == Text("") else (held,)
            held = Text("")
            yield event
        elif not held.text and not held.logprobs and initials.isdisjoint(event.text):
            yield event  # the fast path
        else:
            held += event
            start, mark = find_stop(held.text, marks)
            if start:
                ready, held = held.split(start)
                yield ready
            if mark is not None:
                return mark, held
    return None


def find_stop(text: str, stops: Sequence[str]) -> Tuple[int, Optional[str]]:
    """Return where the text that may go out ends, and the stop text that follows, if complete.
    The one that ends first wins, so the result does not depend on how the text arrives."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if found:
        return min(found)[1:]
    longest = min(len(text), max(map(len, stops)) - 1)
    for length in range(longest, 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return len(text) - length, None
    return len(text), None


# ---- Calls in text -------------------------------------------------------------------------------
# A bound answer is JSON: a call in it is collected, the text of an "answer" streams. Where tools
# were offered natively, a call that the model wrote as text is rescued: but only if it is all
# that stands there, and certainly a call. A model that explains JSON must be left alone.

SPEECH = re.compile(r'\s*(\{\s*)?\{\s*"answer"\s*:\s*"')  # a prefill of { may stand before it


def decoded(events: Events, question: Question, decode: Decode, depth: int) -> Events:
    """Collect a JSON answer, and yield the event it stands for; only the Finish if it is cut.
    If the question `speaks`, the text of an "answer" goes out as it arrives."""
    text, quotes = "", 0
    for event in events:
        if isinstance(event, Text):
            text += event.text
            new = event.text.count('"')
            decides = question.speaks and quotes < 3 <= quotes + new  # SPEECH ends with the third
            quotes += new
            speech = SPEECH.match(text) if decides else None
            if speech:
                rest = text[speech.end():]
                begun = Text(rest, event.logprobs if rest else ())
                yield from spoken(itertools.chain((begun,), events), depth)
                return
            continue
        if isinstance(event, Finish) and event.reason == "stop":
            found = decode(bound_object(text, prefill_of(question.body), depth))
            yield found
            if isinstance(found, ToolCall):
                event = dataclasses.replace(event, reason="tool_calls")
        yield event


def bound_object(text: str, prefill: str, depth: int) -> JSON:
    """Return the object that an answer holds. The answer may begin with the prefill again."""
    candidates = [text]
    if text.startswith(prefill):
        candidates.append(text[len(prefill):])
    problem = ""
    for candidate in candidates:
        try:
            value = strict_json(candidate.encode(), depth)
        except ValueError as error:
            problem = f", {error}"
            continue
        if isinstance(value, dict):
            return value
    raise broken_answer(f"not a JSON object: {text[:80]!r}{problem}")


# The inside of a JSON string, as far as each escape is complete: half of a surrogate pair is not,
# as long as the other half may follow.
HEX, FIRST_HALF = "[0-9a-fA-F]", "u[dD][89abAB]"
INSIDE = re.compile(rf"""(?: [^"\\]+ | \\[^u] | \\(?!{FIRST_HALF})u{HEX}{{4}}
    | \\{FIRST_HALF}{HEX}{{2}} (?= [^\\] | \\[^u] | \\u{HEX}{{4}} ) )*""", re.VERBOSE)


def spoken(events: Events, depth: int) -> Events:
    """Yield the text of an "answer", from its opening quote on, piece by piece, then the Finish."""
    held = Text("")
    for event in events:
        if isinstance(event, Text):
            held += event
            inside = INSIDE.match(held.text)
            if inside and inside[0]:
                ready, held = held.split(inside.end())
                yield Text(unescaped(ready.text), ready.logprobs)
            continue
        if isinstance(event, Finish) and event.reason == "stop":
            bound_object('{"answer": "' + held.text, "", depth)  # or it is cut
        yield event


def unescaped(text: str) -> str:
    """Return what the inside of a JSON string stands for (RFC 8259, 7). Half of a surrogate pair,
    which nobody could encode, becomes U+FFFD, as in Go."""
    if "\\" not in text:
        return text
    try:
        value: str = json.loads(f'"{text}"', strict=False)
    except ValueError as error:
        raise broken_answer(f"not a JSON string: {text[:80]!r}") from error
    return re.sub("[\ud800-\udfff]", "\ufffd", value)


TAG = "<tool_call>"
OPENINGS = {TAG: "</tool_call>", "```json": "```", "```": "```", "": ""}  # and what closes them
CALL_KEYS = {"name", "arguments", "parameters", "type", "id"}
JSON_MARKS = re.compile(r'\\.|["\[\]{}]')
BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}


def rescued(events: Events, names: Sequence[str], depth: int) -> Events:
    """Yield the calls of `names` that an answer consists of: JSON of an object or a list of them,
    by itself, in a code fence or in TAGs, of which several may follow a text. Yield anything
    else unchanged, as soon as it can no longer be that."""
    for look in (before_text, before_tag):
        begun = yield from look(events)
        if begun is None:
            return
        held: List[Event] = []
        pieces = WrittenCalls(texts_ahead(itertools.chain((begun,), events), held))
        calls = written_calls(pieces.values(names), names, depth)
        end = held[-1]
        if calls and isinstance(end, Finish) and end.reason == "stop":
            yield from calls
            yield dataclasses.replace(end, reason="tool_calls")
            return
        events = itertools.chain(held, events)
    yield from events


def before_text(events: Events) -> Generator[Event, None, Optional[Text]]:
    """Yield what comes before the first text; return that."""
    for event in events:
        if isinstance(event, Text):
            return event
        yield event
    return None


def before_tag(events: Events) -> Generator[Event, None, Optional[Text]]:
    """Yield what comes before the first TAG; return the text that begins with it."""
    found = yield from before(events, [TAG])
    return found and found[1]


def texts_ahead(events: Events, held: List[Event]) -> Iterator[str]:
    """Yield the texts that come first. Hold all that is read, the first other event too."""
    for event in events:
        held.append(event)
        if not isinstance(event, Text):
            return
        yield event.text


class WrittenCalls:
    """Read JSON from text that arrives in pieces, as long as it may be calls."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces = pieces
        self.rest = ""  # has arrived, and is not read yet

    def more(self) -> bool:
        piece = next(self.pieces, None)
        self.rest += piece or ""
        return piece is not None

    def values(self, names: Sequence[str]) -> List[str]:
        """Return the JSON values that all of the text consists of; [] if it does not."""
        found, openings = [], list(OPENINGS)
        while True:
            opening = self.read_opening(openings, names)
            if opening is None:
                return []
            found.append(self.read_value())
            self.skip(OPENINGS[opening])
            self.skip("")
            if not self.rest:
                return found
            openings = [TAG] if opening == TAG else []

    def read_opening(self, openings: List[str], names: Sequence[str]) -> Optional[str]:
        """Return which one stands before the next value, if that begins as a call does."""
        bare, read = "", 0
        starts: Dict[str, str] = {}
        while True:
            bare += "".join(self.rest[read:].split())
            read = len(self.rest)
            if bare and bare[0] not in "{[`<":  # most texts
                return None
            starts = starts or {start: opening for opening in openings
                                for start in call_starts(opening, names)}
            for start in starts:
                if bare.startswith(start):
                    self.rest = self.rest.lstrip(starts[start] + string.whitespace)
                    return starts[start]
            if not any(start.startswith(bare) for start in starts) or not self.more():
                return None

    def read_value(self) -> str:
        """Return what comes up to the bracket that closes the first one; or all, without it."""
        read, depth, quoted = [], 0, False
        while True:
            end = 0
            for mark in JSON_MARKS.finditer(self.rest):
                end = mark.end()
                quoted ^= mark[0] == '"'
                depth += 0 if quoted else BRACKETS.get(mark[0], 0)
                if depth == 0:
                    break
            else:
                lone = self.rest[end:].endswith("\\")  # what follows it belongs to it
                end = len(self.rest) - lone
            read.append(self.rest[:end])
            self.rest = self.rest[end:]
            if depth == 0 or not self.more():
                return "".join(read)

    def skip(self, mark: str) -> None:
        """Read blanks, and the mark, if it comes next."""
        self.rest = self.rest.lstrip()
        while mark.startswith(self.rest) and self.more():
            self.rest = self.rest.lstrip()
        if self.rest.startswith(mark):
            self.rest = self.rest[len(mark):]


def call_starts(opening: str, names: Sequence[str]) -> Iterator[str]:
    """Yield how calls of the tools `names` may begin, without blanks: the longer these are, the
    sooner it shows that a text is none."""
    named = [f'"name":{plain_json(name)},' for name in names]
    kind = '"type":"function",'
    heads = ["", *named, *(kind + name for name in named), *(name + kind for name in named)]
    keys = [head + arguments for head in heads for arguments in ('"arguments":', '"parameters":')]
    keys += [name + '"id":' for name in named]
    for bracket, key in itertools.product(("{", "[{"), keys):
        yield "".join((opening + bracket + key).split())


def written_calls(values: Iterable[str], names: Sequence[str], depth: int) -> List[ToolCall]:
    """Return the calls that JSON values stand for; none if one of them is none."""
    try:
        return [written_call(value, names, depth) for text in values
                for value in list_of(strict_json(text.encode(), depth))]
    except ValueError:
        return []


def written_call(value: Any, names: Sequence[str], depth: int) -> ToolCall:
    """Return the call in an object; ValueError if it is none."""
    found: JSON = value if isinstance(value, dict) else {}
    given = [found[key] for key in ("arguments", "parameters") if key in found]
    arguments = given[0] if len(given) == 1 else None
    if isinstance(arguments, str):
        arguments = strict_json(arguments.encode(), depth)
    if (set(found) - CALL_KEYS or found.get("name") not in names
            or found.get("type", "function") != "function" or not isinstance(arguments, dict)):
        raise ValueError
    return ToolCall(found["name"], arguments, rescued=True)


# ---- Waiting for Ollama --------------------------------------------------------------------------
# Ollama sends nothing, not even a status line, before the first token exists. So whenever
# http.client wants more bytes, Upstream.readinto first flushes the client's pending frames,
# then watches both sockets: Ollama may send, the client may leave, a ping may fall due.

class Client:
    """Stand for the client on whose behalf we ask Ollama. This one never leaves, needs nothing."""
    sock: Optional[socket.socket] = None
    quiet_since = float("inf")  # when it was last sent something, or pinged

    def flush(self) -> None:
        """Send what is pending. ClientLeft if it cannot be sent."""

    def ping(self) -> None:
        """Show that the answer is worked on."""

    def take_early(self) -> bool:
        """Take what it sends while it waits for its reply; False if no more should be taken."""
        return False


# poll is cheaper to set up than epoll, and takes more than 1,024 descriptors. Not on Windows.
Selector = getattr(selectors, "PollSelector", selectors.DefaultSelector)
Watch = Callable[[socket.socket], "UpstreamSocket"]


def when_ready(act: Callable[[], T], wait: Callable[[int], None], event: int) -> T:
    """Return the result of a call on a non-blocking socket; `wait` for `event` as needed. (A socket
    with a timeout polls before each call, even if it is ready: twice the calls per token.)"""
    while True:
        try:
            return act()
        except BlockingIOError:
            wanted = event
        except ssl.SSLWantReadError:  # TLS may have to read in order to write
            wanted = selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            wanted = selectors.EVENT_WRITE
        wait(wanted)


def send_all(sock: socket.socket, data: Union[bytes, bytearray],
             wait: Callable[[int], None]) -> None:
    """Send all of `data`. Unlike sendall's, a timeout in `wait` applies to each step."""
    view = memoryview(data)
    while view:
        send = functools.partial(sock.send, view)
        view = view[when_ready(send, wait, selectors.EVENT_WRITE):]


class Upstream(io.RawIOBase):
    """Read the bytes that Ollama sends, for http.client to parse. Owns the real socket."""

    def __init__(self, sock: socket.socket, client: Client, ping: float, give_up: float) -> None:
        self.sock, self.client = sock, client
        self.ping, self.give_up = ping, give_up
        sock.setblocking(False)
        self.selector = Selector()
        self.selector.register(sock, selectors.EVENT_READ)
        if client.sock is not None:
            self.selector.register(client.sock, selectors.EVENT_READ)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # For bytes that TLS has decrypted, the socket does not become readable.
        if not (isinstance(self.sock, ssl.SSLSocket) and self.sock.pending()):
            self.wait(selectors.EVENT_READ)
        receive = functools.partial(self.sock.recv_into, buffer)
        return when_ready(receive, self.wait, selectors.EVENT_READ)

    def wait(self, event: int) -> None:
        """Wait until Ollama has sent something, or accepts more. Serve the client meanwhile."""
        self.client.flush()
        self.selector.modify(self.sock, event)
        while True:
            now = time.monotonic()
            if now >= self.give_up:
                raise TimeoutError("no answer in time")
            ping_at = self.client.quiet_since + self.ping
            if now >= ping_at:
                self.client.ping()
                continue

            seconds = min(ping_at, self.give_up) - now
            ready = {key.fileobj for key, _ in self.selector.select(seconds)}
            if self.client.sock in ready and not self.client.take_early():
                self.selector.unregister(self.client.sock)  # type: ignore[arg-type]
            if self.sock in ready:
                return

    def close(self) -> None:
        if not self.closed:
            self.selector.close()
            self.sock.close()
        super().close()


class UpstreamSocket:
    """Stand in for the socket of http.client. `close` does nothing: urllib calls it as soon as
    it has the head, and even to half-close would tell Ollama that we left."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.request = bytearray()

    def sendall(self, data: bytes) -> None:
        self.request += data  # http.client sends the head by itself first; we send all at once

    def send_request(self) -> None:
        """Send the request. If Ollama breaks it off, its answer may say why: we still read that."""
        try:
            send_all(self.upstream.sock, self.request, self.upstream.wait)
        except ConnectionError:
            pass
        except OSError as error:  # of a socket that is just being closed (macOS; CPython bpo-33450)
            if error.errno != errno.EPROTOTYPE:
                raise

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self.upstream, 64 * 1024)

    def close(self) -> None:
        pass


def connect_to(address: Tuple[str, int], *how: Any) -> socket.socket:
    """Connect like socket.create_connection; but of localhost, try IPv4 first: Ollama listens
    there, and on Windows a refusal of ::1 takes two seconds."""
    host, port = address
    first, others = ("127.0.0.1", ["::1"]) if host == "localhost" else (host, [])
    try:
        return socket.create_connection((first, port), *how)
    except ConnectionError:
        for other in others:
            with contextlib.suppress(OSError):  # that ::1 is no address here is no help
                return socket.create_connection((other, port), *how)
        raise


class UpstreamConnection(http.client.HTTPConnection):
    def __init__(self, watch: Watch, host: str, **how: Any) -> None:
        super().__init__(host, **how)
        self.watch = watch
        self._create_connection = connect_to  # what HTTPConnection.connect calls

    def connect(self) -> None:
        super().connect()
        self.sock = self.watched = self.watch(self.sock)

    def getresponse(self) -> Response:
        self.watched.send_request()
        return super().getresponse()


class UpstreamTLSConnection(UpstreamConnection, http.client.HTTPSConnection):
    pass


class UpstreamRequest(urllib.request.Request):
    def __init__(self, url: str, body: Optional[Mapping[str, Any]], key: str, watch: Watch) -> None:
        super().__init__(url, None if body is None else dumps(body).encode())
        self.watch = watch
        self.add_header("Content-Type", "application/json")
        if key and self.type == "https":
            self.add_header("Authorization", "Bearer " + key)


class UpstreamHandler(urllib.request.AbstractHTTPHandler):
    def http_open(self, request: UpstreamRequest) -> Response:
        tls = request.type == "https"
        connection = UpstreamTLSConnection if tls else UpstreamConnection
        return self.do_open(functools.partial(connection, request.watch), request)

    https_open = http_open
    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


# Without the handlers of build_opener: no proxy, no redirect, no exception for a status.
OPENER = urllib.request.OpenerDirector()
OPENER.add_handler(UpstreamHandler())


# ---- Reading HTTP --------------------------------------------------------------------------------
# BaseHTTPRequestHandler drops the headers after a malformed line, takes a bare CR for a line
# end, answers a bad version without a status line, has no deadline for a whole head, and runs
# an unread body as the next request. This reads bytes, and refuses whatever is ambiguous.

BARE_LF = re.compile(rb"(?<!\r)\n")
REQUEST_LINE = re.compile(
    rb"([A-Za-z]{1,20}) (?:https?://([!-.0-~]+))?(/[!-~]*|\*) HTTP/([0-9]\.[0-9])")
HEADER_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
SINGLE_FIELDS = {
    "host", "content-length", "transfer-encoding", "origin", "authorization", "x-api-key",
    "expect"}


def wait_for(sock: socket.socket, seconds: float, event: int) -> None:
    """Wait until a socket can be read or written. socket.timeout if that takes too long."""
    with Selector() as selector:
        selector.register(sock, event)
        if not selector.select(max(seconds, 0)):
            raise socket.timeout


class Incoming:
    """Read the bytes of one client, with a deadline for all that is read."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self.deadline = 0.0
        self.rate = float("inf")  # bytes that move the deadline by a second

    def set_deadline(self, seconds: float, rate: float = float("inf")) -> None:
        self.deadline = time.monotonic() + seconds
        self.rate = rate

    def wait(self, event: int) -> None:
        wait_for(self.sock, self.deadline - time.monotonic(), event)

    def receive(self) -> None:
        try:
            when_ready(self.take, self.wait, selectors.EVENT_READ)
        except socket.timeout as error:
            raise APIError(408, "The request did not arrive in time.") from error
        except OSError as error:
            raise ClientLeft from error

    def take_early(self, enough: int) -> bool:
        """Take what has arrived; return whether fewer than `enough` bytes are buffered.
        (MSG_PEEK would do, but not for TLS, where a readable socket may hold half a record.)"""
        try:
            self.take()
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except OSError as error:
            raise ClientLeft from error
        return len(self.buffer) < enough

    def take(self) -> None:
        data = self.sock.recv(64 * 1024)
        if not data:
            raise ClientLeft
        self.buffer += data
        self.deadline += len(data) / self.rate

    def wait_for_request(self, seconds: float) -> bool:
        """Return whether a request begins within `seconds`. Skip empty lines (RFC 9112, 2.2)."""
        self.set_deadline(seconds)
        try:
            for _ in range(8):  # not without end: each costs as much as a request
                self.buffer = self.buffer.lstrip(b"\r\n")
                if self.buffer:
                    return True
                self.receive()
        except (APIError, ClientLeft):
            pass
        return False

    def read_exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self.receive()
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def read_until(self, mark: bytes, limit: int) -> bytes:
        """Return what comes before `mark`; 431 if that is more than `limit` bytes."""
        start = 0
        while True:
            end = self.buffer.find(mark, start)
            if (end if end >= 0 else len(self.buffer) - len(mark)) > limit:
                raise APIError(431, "The head of the request, or a line in its body, is too large.")
            if end >= 0:
                return self.read_exactly(end + len(mark))[:end]
            if BARE_LF.search(self.buffer, start):  # `mark` may never come
                raise APIError(400, "A line of the request ends in LF without CR.")
            start = max(0, len(self.buffer) - len(mark))
            self.receive()


def read_head(incoming: Incoming, config: Config) -> Request:
    """Read the head (RFC 9112, 3 to 5)."""
    incoming.set_deadline(config.head_seconds)
    line, *fields = incoming.read_until(b"\r\n\r\n", config.head_bytes).split(b"\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise APIError(400, "The request line is malformed.")
    method, authority, target, version = (part.decode("ascii") for part in match.groups(b""))
    if version not in ("1.0", "1.1"):
        raise APIError(505, f"HTTP/{version} is not supported. Use HTTP/1.1.")
    if len(fields) > config.head_fields:
        raise APIError(431, f"The request has more than {config.head_fields} header fields.")
    headers = read_fields(fields)
    if "host" not in headers and version == "1.1":
        raise APIError(400, "The Host header is missing.")
    if authority:  # RFC 9112, 3.2.2: it overrides the Host header
        headers["host"] = authority
    path, _, query = target.partition("?")
    return Request(method, path, headers, version, query)


def read_fields(fields: Iterable[bytes]) -> Dict[str, str]:
    """Parse header fields. The names are in lower case, repeated values are joined."""
    headers: Dict[str, str] = {}
    for field in fields:
        match = HEADER_FIELD.fullmatch(field)
        if match is None:
            raise APIError(400, "A header field is malformed.")
        name = match[1].decode("ascii").lower()
        value = match[2].decode("latin-1").strip(" \t")
        if name in headers and name in SINGLE_FIELDS:
            raise APIError(400, f"The {name} header occurs twice.")
        headers[name] = headers[name] + ", " + value if name in headers else value
    return headers


def body_length(request: Request) -> Optional[int]:
    """Return how many bytes of body follow the head; None if the body comes in chunks."""
    headers = request.headers
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if coding is None:
        length = "0" if length is None else length
        if not re.fullmatch("[0-9]{1,18}", length):
            raise APIError(400, "The Content-Length header is malformed.")
        return int(length)
    if length is not None or request.version == "1.0":
        raise APIError(400, "Transfer-Encoding cannot be combined with Content-Length or HTTP/1.0.")
    if coding.lower() != "chunked":
        raise APIError(501, "The only transfer coding that is supported is chunked.")
    return None


def read_body(incoming: Incoming, length: Optional[int], config: Config) -> bytes:
    """Read a body of `length` bytes, or a chunked one (RFC 9112, 7.1)."""
    incoming.set_deadline(config.body_seconds, 1e6)
    if length is not None:
        check_size(length, config)
        return incoming.read_exactly(length)
    body = bytearray()
    while True:
        match = CHUNK_SIZE.fullmatch(incoming.read_until(b"\r\n", 256))
        if match is None:
            raise APIError(400, "The size of a chunk is malformed.")
        size = int(match[1], 16)
        if size == 0:
            break
        check_size(len(body) + size, config)
        body += incoming.read_exactly(size)
        if incoming.read_exactly(2) != b"\r\n":
            raise APIError(400, "A chunk does not end where its size says.")
    for _ in range(config.head_fields):
        trailer = incoming.read_until(b"\r\n", config.head_bytes)
        if not trailer:
            return bytes(body)
        read_fields([trailer])
    raise APIError(431, "There are too many trailer fields.")


def check_size(n: int, config: Config) -> None:
    if n > config.body_bytes:
        raise APIError(413, f"The body is larger than {config.body_bytes} bytes.")


def linger(sock: socket.socket, config: Config) -> None:
    """Half-close and read on, so a refusal arrives: to close over unread bytes would reset it."""
    incoming = Incoming(sock)
    with contextlib.suppress(OSError, APIError, ClientLeft):
        sock.shutdown(socket.SHUT_WR)
        incoming.set_deadline(config.linger_seconds)
        for _ in range(512):  # times 64 KB
            incoming.receive()
            incoming.buffer.clear()


# ---- Who may ask ---------------------------------------------------------------------------------
# Nobody but this machine by default. A web page of another site can reach us directly, or by
# a hostname of its own that resolves to 127.0.0.1 (DNS rebinding): Origin and Host tell.
# So a Host must be a name or an address that no owner of a page can lead here. Programs send
# no Origin, but those that are built on a browser have a scheme that no web page can have.
# Keys, if there are any, are demanded before a body is used; the page asks for one itself.

CONTAINER_HOSTS = ("host.docker.internal", "gateway.docker.internal", "host.containers.internal")
DESKTOP_SCHEMES = ("app", "file", "tauri", "vscode-file", "vscode-webview")  # of Electron, Tauri


def admit(request: Request, config: Config) -> None:
    """Refuse web pages of other sites; 403. Ours is served by every name that is certainly ours."""
    host = request.headers.get("host", "localhost")
    if is_loopback(config.host) and not is_ours(host, config):
        raise APIError(403, f"The Host {dumps(host[:200])} may be another machine. If it is this "
                            "one, start the server with --allow-host NAME.")
    origin = request.headers.get("origin")
    if origin is None:
        follows_link = wants_page(request) and request.headers.get("sec-fetch-dest") == "document"
        if request.headers.get("sec-fetch-site") == "cross-site" and not follows_link:
            raise APIError(403, "Web pages of other sites are not served.")
    elif not (may_read(origin, config) or is_page_of(host, origin, config)):
        raise APIError(403, "Web pages of other machines are not served, "
                            "except those of --allow-origin.")


def hostname_in(text: str) -> str:
    """Return a hostname or an address without port, brackets and last dot, in lower case."""
    if text.count(":") == 1 or "]" in text:
        text = re.sub(r":[0-9]*$", "", text)
    return re.sub(r"\.$", "", text.strip("[]").lower())


@functools.lru_cache(64)
def address_of(name: str) -> Union[ipaddress.IPv4Address, ipaddress.IPv6Address, None]:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name)
    return None


def is_loopback(host: str) -> bool:
    """Return whether a hostname or address, with or without a port, is a loopback one."""
    name = hostname_in(host)
    address = address_of(name)
    if address is None:
        return name == "localhost" or name.endswith(".localhost")
    return address.is_loopback


def is_ours(host: str, config: Config) -> bool:
    """Return whether a Host means this machine, and is no name that a page's owner could choose."""
    name = hostname_in(host)
    if is_loopback(host) or address_of(name) is not None:
        return True
    machine = socket.gethostname().lower()
    short = machine.partition(".")[0]
    known = [*CONTAINER_HOSTS, *map(hostname_in, config.allow_host)]
    return name in known or bool(short) and name in (machine, short, short + ".local")


def is_page_of(host: str, origin: str, config: Config) -> bool:
    """Return whether an origin is this server itself. A page's owner on the same network may
    answer for the names of containers, and then lead them here."""
    return (is_ours(host, config) and hostname_in(host) not in CONTAINER_HOSTS
            and origin in ("http://" + host, "https://" + host))


def may_read(origin: str, config: Config) -> bool:
    """Return whether pages of an origin are served: local ones, desktop programs, allowed ones."""
    scheme, mark, host = origin.partition("://")
    patterns = (re.sub(r":\\\*$", ":[0-9]+", re.escape(allowed)).replace(r"\*", "[^/:?#@]+")
                for allowed in config.allow_origin)
    return (is_loopback(host) or bool(mark) and scheme in DESKTOP_SCHEMES
            or any(re.fullmatch(pattern, origin) for pattern in patterns))


def demand_key(request: Request, config: Config) -> str:
    """Return which of the keys a request has, "" if there are none; 401 if it has none of them.
    Go's client for Ollama knows no keys, but sends the password in http://any:KEY@host."""
    authorization = request.headers.get("authorization", "")
    given = [request.headers.get("x-api-key", ""),
             re.sub("^bearer +", "", authorization, flags=re.I)]
    if authorization[:6].lower() == "basic ":
        with contextlib.suppress(ValueError):
            pair = base64.b64decode(authorization[6:]).decode("latin-1")
            given.append(pair.partition(":")[2])
    matches = [key for key in config.api_key for text in given
               if hmac.compare_digest(key.encode(), text.encode("latin-1"))]
    if config.api_key and not matches:
        raise APIError(401, "The API key is missing or wrong.")
    return matches[0] if matches else ""


def cross_origin(request: Request) -> Dict[str, str]:
    """Return the headers that let an admitted web page read the reply (Fetch standard, CORS).
    A preflight asks for header fields, and the SDKs send many: all are granted."""
    headers = request.headers
    if "origin" not in headers:
        return {}
    fields = {"access-control-allow-origin": headers["origin"], "vary": "origin"}
    if request.method != "OPTIONS":
        fields["access-control-expose-headers"] = (
            "request-id, x-request-id, retry-after, x-should-retry, x-ignored-fields, x-tools")
        return fields
    asked = headers.get("access-control-request-headers", "content-type")
    return {**fields, "access-control-allow-methods": allowed_methods(request.path),
            "access-control-allow-headers": asked, "access-control-max-age": "600"}


# ---- Answering -----------------------------------------------------------------------------------
# One request and its reply, from the first byte to the line in the log. The head of a reply
# leaves together with its first bytes, so whatever fails before them is a real status. What
# fails after them is the last frame, before the proper end of the reply.

class Exchange(Client):
    """Answer one request, as Ollama's client."""

    def __init__(self, server: Server, incoming: Incoming) -> None:
        self.server, self.config, self.incoming = server, server.config, incoming
        self.sock: socket.socket = incoming.sock
        self.id = new_id("req_")
        self.began: float = time.monotonic()
        self.quiet_since = self.began
        self.request: Optional[Request] = None  # None until its head has been read
        self.body: Optional[Body] = None  # None until it has been read
        self.body_pending = True  # still to come
        self.wording: Wording = openai_error
        self.route: str = "none"  # as in ROUTES
        self.status: int = 0  # 0: not sent yet
        self.extra: Dict[str, str] = {}  # header fields of the reply
        self.stream_fields: Dict[str, str] = {}  # more of them, once the reply is a stream
        self.pings: Iterator[bytes] = iter(())
        self.pending: List[bytes] = []  # frames
        self.counted = contextlib.ExitStack()  # as one of the running requests
        self.ollama: Optional[Ollama] = None

    def run(self) -> bool:
        """Answer; return whether the connection may carry another request. Never fail."""
        with self.counted:
            try:
                self.attempt()
            except ClientLeft:
                self.status, self.body_pending = 499, True
            self.server.metrics.count(self)
            log(self.summary())
        if self.body_pending:
            linger(self.sock, self.config)
        return self.reusable()

    def attempt(self) -> None:
        try:
            self.handle()
        except APIError as error:
            self.fail(error)
        except ClientLeft:
            raise
        except Exception:  # a bug of ours: for the log, not for the client
            log_traceback()
            self.fail(APIError(500, "Internal error of ollama_api.py; its log says more."))

    def handle(self) -> None:
        request = self.request = read_head(self.incoming, self.config)
        self.wording = wording_for(request)
        length = body_length(request)
        self.body_pending = length != 0

        admit(request, self.config)
        self.extra.update(cross_origin(request))
        if request.method == "OPTIONS":  # a preflight cannot carry a key
            self.write(self.begin(204, {"allow": allowed_methods(request.path)}))
            return
        if not wants_page(request):
            request.key = demand_key(request, self.config)
        route, request.argument = find_route(request)
        self.route = f"{route.method} {route.path}"

        limit = self.config.max_running if route.method == "POST" else float("inf")
        self.counted.enter_context(self.server.count_request(limit))
        if route.method == "POST":
            self.body = self.read_json(request, length)
        self.serve(route, request, self.body or Body({}, self.config))

    def read_json(self, request: Request, length: Optional[int]) -> Body:
        headers = request.headers
        if length == 0 and "content-length" not in headers:
            raise APIError(411, "The request needs a body with a Content-Length, or a chunked one.")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise APIError(415, "The body must not be compressed.")
        if headers.get("expect", "").lower() == "100-continue" and request.version != "1.0":
            check_size(length or 0, self.config)
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = read_body(self.incoming, length, self.config)
        self.body_pending = False
        try:
            value = strict_json(data, self.config.json_depth)
        except ValueError as error:
            raise APIError(400, f"The body is not JSON: {error}.") from error
        if not isinstance(value, dict):
            raise APIError(400, f"The body must be a JSON object, not {json_type(value)}.")
        return Body(value, self.config, data)

    def serve(self, route: Route, request: Request, body: Body) -> None:
        with Ollama(self.server, self) as self.ollama:
            reply = route.endpoint(Context(request, body, self.ollama, self.server))
            if isinstance(reply.content, (dict, bytes)):
                self.send_whole(reply)
            else:
                self.send_stream(reply, request.version != "1.0")

    def fail(self, error: APIError) -> None:
        """Tell the client: by an HTTP status if no frame is ready yet, else as the last frame."""
        if self.wording is native_error:
            error = as_ollama_said(error)
        content = self.wording(error, self.id)
        if self.status or self.pending:
            kind = self.stream_fields.get("content-type", EVENT_STREAM)
            self.pending.append(FRAMING[kind](content))
            self.send_pending(end=True)
            self.status = error.status  # for the log and the metrics: what was sent is 200
            return
        if error.retry_after is None:
            self.extra["x-should-retry"] = "false"
        else:
            self.extra["retry-after"] = str(error.retry_after)
        if error.status == 405 and self.request:
            self.extra["allow"] = allowed_methods(self.request.path)
        if error.status == 426:  # RFC 9110, 15.5.22 and 7.8
            self.extra.update(upgrade="HTTP/1.1", connection="upgrade")
        self.send_whole(Reply(content, error.status))

    def send_whole(self, reply: Reply) -> None:
        data = reply.content
        if not isinstance(data, bytes):
            data = json_line(cast(JSON, data))
        head = self.begin(reply.status, {
            "content-type": reply.content_type, "content-length": str(len(data)), **reply.fields})
        if self.request and self.request.method == "HEAD":
            data = b""
        self.write(head + data)  # in one send

    def send_stream(self, reply: Reply, chunked: bool) -> None:
        """Send pending frames, as one HTTP chunk, when we would wait for Ollama, or at 256 of them:
        a slow client must not fill the memory. HTTP/1.0 has no chunks."""
        self.pings = reply.pings
        self.stream_fields = {"content-type": reply.content_type, "cache-control": "no-cache",
                              **reply.fields}
        if chunked:
            self.stream_fields["transfer-encoding"] = "chunked"
        for frame in cast(Frames, reply.content):
            self.pending.append(frame)
            if len(self.pending) >= 256:
                self.flush()
        self.send_pending(end=True)

    def flush(self) -> None:
        if self.pending:
            self.send_pending(end=False)

    def send_pending(self, end: bool) -> None:
        """Send the head if it is not out, the pending frames, and, if `end`, the stream's end."""
        chunked = "transfer-encoding" in self.stream_fields
        data = b"".join(self.pending)
        self.pending.clear()
        if chunked and data:
            data = b"%x\r\n%s\r\n" % (len(data), data)
        if chunked and end:
            data += b"0\r\n\r\n"
        if not self.status:
            data = self.begin(200, self.stream_fields) + data
        self.write(data)

    def ping(self) -> None:
        self.quiet_since = time.monotonic()
        if self.stream_fields:
            self.pending.append(next(self.pings))
            self.flush()

    def take_early(self) -> bool:
        return self.incoming.take_early(self.config.head_bytes)

    def begin(self, status: int, fields: Mapping[str, str]) -> bytes:
        """Return the head of the reply; from here on its status is fixed."""
        fields = {"date": email.utils.formatdate(usegmt=True),
                  "request-id": self.id, "x-request-id": self.id,
                  "connection": "keep-alive" if self.reusable() else "close",
                  **self.extra, **fields, **(self.how_answered() if status == 200 else {})}
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}",
                 *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        self.status = status
        return "\r\n".join(lines).encode("latin-1")

    def how_answered(self) -> Dict[str, str]:
        """Return the fields that say how, as far as it is known when the head leaves."""
        fields = {}
        if self.body and self.body.ignored:
            fields["x-ignored-fields"] = ", ".join(reported(self.body.ignored))
        if self.ollama and self.ollama.tools:
            fields["x-tools"] = self.ollama.tools
        return fields

    def reusable(self) -> bool:
        """Return whether the connection may carry another request after this one."""
        if self.request is None or self.body_pending or self.server.draining:
            return False
        asked_to_close = "close" in self.request.headers.get("connection", "").lower()
        return self.request.version != "1.0" and not asked_to_close

    def write(self, data: bytes) -> None:
        """Send all of `data`, to a client that may be slow, but must make progress."""
        self.quiet_since = time.monotonic()
        try:
            send_all(self.sock, data,
                     functools.partial(wait_for, self.sock, self.config.write_seconds))
        except OSError as error:
            raise ClientLeft from error

    def summary(self) -> str:
        """Return the request's line in the log: no prompt, no key, no query."""
        now, request, ollama = time.monotonic(), self.request, self.ollama
        words = [request.method, request.path[:200]] if request else ["-", "-"]
        given = self.body.value.get("model") or self.config.model if self.body else "-"
        words += [str(given)[:200], str(self.status)]
        if ollama and ollama.first_at:
            words.append(f"first={ollama.first_at - self.began:.2f}s")
        if ollama and ollama.finish:
            tokens = ollama.finish.completion_tokens
            rate = tokens / max(now - ollama.first_at, 1e-3)
            words.append(f"in={ollama.finish.prompt_tokens}")
            if ollama.finish.cached_tokens is not None:
                words.append(f"cached={ollama.finish.cached_tokens}")
            words.append(f"out={tokens} {rate:.1f}/s")
        if ollama and ollama.tools:
            words.append("tools=" + ollama.tools)
        return " ".join([*words, f"total={now - self.began:.2f}s"])


def reported(paths: Iterable[str]) -> List[str]:
    """Return the paths for a header: clients choose the names, and some are unfit. Those deep
    inside give way, so that nginx and aiohttp still take the head, of 4 KB at most."""
    fit = {path if re.fullmatch(r"[\w.$-]{1,199}", path, re.ASCII) else "?" for path in paths}
    shallow = sorted(fit, key=lambda path: (path.count("."), path))
    ends = itertools.accumulate(len(path) + 2 for path in shallow)
    kept = sorted(path for path, end in zip(shallow, ends) if end < 2000)
    return kept + ["..."] * (len(kept) < len(fit))


def put(stream: str, text: str, end: str = "\n") -> None:
    """Write a line to sys.stdout or sys.stderr at once. If it is closed or absent, do nothing."""
    file = getattr(sys, stream)
    try:
        if file is not None:
            file.write(text + end)
            file.flush()
    except BrokenPipeError:
        setattr(sys, stream, None)  # or what is left in it fails at exit: status 120
    except (OSError, ValueError):
        pass


class Log:
    """Write lines to stderr, in a thread of its own: a pipe that nobody reads stops whoever writes
    to it. Then, after a second, lines are dropped, and counted. The thread wakes for many lines at
    once: to wake it for each would take a tenth of a request's time."""

    def __init__(self) -> None:
        self.changed = threading.Condition()  # guards all below
        self.lines: List[str] = []
        self.dropped = 0
        self.busy = False  # writing
        self.stuck = False  # nothing was written for a second, though lines waited

    def add(self, line: str) -> None:
        with self.changed:
            if not (self.has_room() or self.stuck):  # the writer may just be slower than we are
                self.stuck = not self.changed.wait_for(self.has_room, LOG_PATIENCE)
            if not self.has_room():
                self.dropped += 1
                return
            self.lines.append(line)
            if len(self.lines) == 1:
                self.changed.notify_all()

    def has_room(self) -> bool:
        return len(self.lines) < LOG_LINES

    def write(self) -> NoReturn:
        """Write what is added, without end."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.lines)
            time.sleep(LOG_SECONDS)
            with self.changed:
                lines, self.lines = self.lines, []
                if self.dropped:
                    lines.append(f"({self.dropped} lines were dropped, because nobody read them)")
                self.dropped, self.busy, self.stuck = 0, True, False
                self.changed.notify_all()
            put("stderr", "\n".join(lines))
            with self.changed:
                self.busy = False
                self.changed.notify_all()

    def finish(self, seconds: float) -> bool:
        """Return whether all lines are written; wait for that."""
        with self.changed:
            return self.changed.wait_for(lambda: not (self.lines or self.busy), seconds)


LOG = Log()
LOG_LINES = 1000  # that wait
LOG_SECONDS = 0.05  # to gather them
LOG_PATIENCE = 1  # second


def log(text: str) -> None:
    safe = re.sub(r"[^\x20-\x7e]", lambda match: f"\\x{ord(match[0]):02x}", text)
    LOG.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {safe}")


def log_traceback() -> None:
    for line in traceback.format_exc().splitlines():
        log(line)


# ---- The server ----------------------------------------------------------------------------------
# ThreadingHTTPServer accepts connections and gives each one a thread. Added here are bursts of
# clients, limits, TLS, and an end that lets running requests finish.

class Connection(socketserver.BaseRequestHandler):
    server: Server

    def handle(self) -> None:
        config = self.server.config
        sock = self.request
        with contextlib.suppress(OSError):  # EINVAL if the client has left already (macOS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        incoming = Incoming(sock)
        while incoming.wait_for_request(config.idle_seconds):
            if not Exchange(self.server, incoming).run():
                break


class Server(http.server.ThreadingHTTPServer):
    """Listen; keep what outlives requests."""
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = os.name != "nt"  # see server_bind

    def __init__(self, config: Config) -> None:
        self.config = config
        self.request_queue_size = config.backlog
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self.tls = tls_context(config)
        self.rates = TokenRates()
        self.stored = StoredResponses(config)
        self.metrics = Metrics()
        self.connected: Set[socket.socket] = set()
        self.running = 0  # requests
        self.idle = threading.Condition()  # guards `running`; notified when it shrinks
        self.draining = False
        super().__init__((config.host, config.port), Connection)
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Bind. On Windows, another process could share the port, and :: would not be IPv4 too."""
        if sys.platform == "win32":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the DNS for our name

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept a connection. TLS shakes hands when its thread first reads: here it would
        hold up all others."""
        try:
            sock, address = super().get_request()
        except OSError as error:
            if not isinstance(error, (BlockingIOError, ConnectionError)):
                time.sleep(0.1)  # out of descriptors: it would fail again at once
            raise
        if self.tls is not None:
            sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return sock, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread; close it if there are too many. Thread.start() would wait
        until the thread runs: the last of 200 clients would be 1 to 3 s later."""
        with contextlib.suppress(RuntimeError):  # the system has no more threads
            if len(self.connected) < self.config.max_connections:
                self.connected.add(request)
                _thread.start_new_thread(self.process_request_thread, (request, client_address))
                return
        self.shutdown_request(request)

    def service_actions(self) -> None:
        """Accept all waiting connections, and only then give them threads: serve_forever takes one
        per round, and at each accept another thread may take the interpreter. (The last of 200
        clients at once has its first token after 0.3 s; with threads started between, 0.4 s.)"""
        waiting = []
        with contextlib.suppress(OSError):  # BlockingIOError: nobody waits
            for _ in range(self.config.backlog):
                waiting.append(self.get_request())
        for connection in waiting:
            self.process_request(*connection)

    def shutdown_request(self, request: Any) -> None:
        self.connected.discard(request)
        if isinstance(request, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                request.unwrap()  # says that this is the end; does not wait
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log_traceback()

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        host = f"[{host}]" if ":" in host else host
        if self.tls:  # certificates name it so
            return f"https://{'localhost' if host == '127.0.0.1' else host}:{port}"
        return f"http://{host}:{port}"

    @contextlib.contextmanager
    def count_request(self, limit: float) -> Iterator[None]:
        """Count a running request. 503 if `limit` are running, or if the server shuts down."""
        with self.idle:
            if self.draining or self.running >= limit:
                busy = f"busy with {self.running} requests"
                doing = "shutting down" if self.draining else busy
                raise APIError(503, f"The server is {doing}.", retry_after=1)
            self.running += 1
        try:
            yield
        finally:
            with self.idle:
                self.running -= 1
                self.idle.notify_all()

    def drain(self) -> None:
        self.draining = True
        self.shutdown()
        self.server_close()
        with self.idle:
            self.idle.wait_for(lambda: not self.running, self.config.grace_seconds)


def tls_context(config: Config) -> Optional[ssl.SSLContext]:
    """Return the TLS settings; None for plain HTTP. OSError if a file cannot be used."""
    if not config.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(config.tls_cert, config.tls_key or None)
    return context


# ---- The page ------------------------------------------------------------------------------------
# What a browser gets at /: a small client of POST /v1/chat/completions, to talk to a model. It
# loads nothing from elsewhere, keeps the conversation to itself, and shows as plain text all
# that a model says. Its Content-Security-Policy holds it to that: this one style and this one
# script, known by their hashes; requests to this server alone; no page around it.

PAGE_HTML = r"""
<!doctype html><html lang="en"><meta charset="utf-8"><title>Ollama</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><style>{STYLE}</style>
<header id="head">
  <select id="model" aria-label="Model"><option value="">no model yet</option></select>
  <button id="fresh">New chat</button><span id="state" role="status"></span>
  <input id="key" type="password" placeholder="API key" aria-label="API key" hidden></header>
<main id="talk" aria-label="Conversation" aria-live="polite" tabindex="0"></main>
<footer><textarea id="text" aria-label="Message" placeholder="Message" autofocus></textarea>
  <input id="file" type="file" accept="image/*" hidden><img id="preview" src="" alt="">
  <button id="attach">Add image</button><button id="send">Send</button></footer>
<template id="turn"><article aria-busy="true"><p class="asked"><img alt="attached image"></p>
  <details hidden><summary>Thoughts</summary><p></p></details><div></div><p class="note">...</p>
</article></template>
<template id="prose"><div><p></p></div></template>
<template id="code"><div><pre></pre><button>Copy</button></div></template>
<script type="module">{SCRIPT}</script>
"""

PAGE_STYLE = r"""
:root { color-scheme: light dark; scrollbar-color: #808890 #0000; --paper: #fcfcfa; --ink: #24282c;
        --quiet: #5b6269; --line: #868c92; --tint: #eef1ee; --accent: #1d6b50; --alarm: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #17191b; --ink: #e3e5e7; --quiet: #a2a8ae;
        --line: #747a81; --tint: #24282a; --accent: #7fcfae; --alarm: #ffa198; } }
[hidden], p:empty, img[src=""] { display: none !important; }
body { display: flex; flex-direction: column; height: 100vh; height: 100dvh; margin: 0;
       background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
header, footer, article { width: min(46rem, 100% - 2rem); margin: 0 auto; padding: .75rem 0; }
header, footer { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
button, select, input, textarea { font: inherit; color: inherit; background: var(--paper);
  border: 1px solid var(--line); border-radius: .5rem; padding: .35rem .75rem; max-width: 100%; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
#talk { flex: 1; overflow-y: auto; border-block: 1px solid var(--tint); outline-offset: -2px; }
#text { flex: 1 1 100%; min-width: 0; max-height: 35vh; resize: none; field-sizing: content; }
#send { margin-left: auto; background: var(--accent); color: var(--paper); }
img { display: block; height: 4rem; max-width: 100%; object-fit: contain; border-radius: .5rem; }
p { margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.asked { width: fit-content; max-width: 85%; margin-left: auto; }
.asked, pre { padding: .5rem 1rem; background: var(--tint); border-radius: .75rem; }
pre { margin: .5rem 0; overflow: auto; font: .875rem/1.5 monospace; }
#state, .note, details, ::placeholder { color: var(--quiet); font-size: .875rem; opacity: 1; }
.failed .note { color: var(--alarm); }
article button { display: block; margin-left: auto; padding: .1rem .6rem; font-size: .8rem; }
"""

PAGE_SCRIPT = r"""
const page = {};  // its elements, by their ids
for (const element of document.querySelectorAll("[id]")) page[element.id] = element;
let history = [], image = "", running = null;  // messages; a data URL; what can stop the answer
async function ask(path, body, signal) {  // a refusal becomes an Error in the server's own words
  const key = String.fromCharCode(...new TextEncoder().encode(sessionStorage.getItem("key") ?? ""));
  const post = body && {method: "POST", body: JSON.stringify(body)};
  const reply = await fetch(path, {headers: {"x-api-key": key}, signal, ...post})
    .catch(() => { throw Error("ollama_api.py does not answer. Does it still run?"); });
  page.key.hidden = reply.status !== 401;
  if (reply.ok) return reply;
  const {error} = await reply.json().catch(() => ({error: `HTTP status ${reply.status}`}));
  throw Error(error.message ?? error);
}
async function look(speed) {  // at Ollama, and at its models, unless one has just answered
  try {
    const {version} = await (await ask("health")).json();
    page.state.textContent = `Ollama ${version}` + (speed ? `, ${speed.toFixed(1)} tokens/s` : "");
    const {data} = speed ? {data: []} : await (await ask("v1/models")).json();
    const able = data.filter(model => model.capabilities?.includes("completion") ?? true);
    const option = ({id}) => new Option(id, id, false, id === sessionStorage.model);
    if (able.length) page.model.replaceChildren(...able.map(option));
  } catch (error) { page.state.textContent = error.message; }
}
async function* chunksOf(reply) {  // of a stream, which is whole only if it ends in [DONE]
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let frames = [""];;) {
    const {value, done} = await reader.read();
    if (done) throw Error("The connection ended before the answer did.");
    frames = (frames.pop() + value).split("\n\n");  // the last one is not complete
    for (const frame of frames.slice(0, -1)) {
      if (frame === "data: [DONE]") return;
      if (frame.startsWith("data: ")) yield JSON.parse(frame.slice(6));  // else it is a ping
    }
  }
}
function show(place, text) {  // what stands between fences is code, all else is plain
  const parts = text.split(/\n?^[ \t]*(?:`{3,}|~{3,})[^\s`]*[ \t]*$\n*/m);
  while (place.children.length > parts.length) place.lastElementChild.remove();
  for (const [n, part] of parts.entries()) {
    if (!place.children[n]) place.append((n % 2 ? page.code : page.prose).content.cloneNode(true));
    const target = place.children[n].firstElementChild;
    if (target.textContent !== part) target.textContent = part;  // or a selection in it is lost
  }
}
async function listen(reply, said, thoughts, answer) {  // show the answer as it comes
  for await (const {error, choices: [choice] = [], usage} of chunksOf(await reply)) {
    if (error) throw Error(error.message);
    const {scrollHeight, scrollTop, clientHeight} = page.talk, now = performance.now();
    said.since ??= now;
    said.thoughts += choice?.delta.reasoning_content ?? "";
    said.text += choice?.delta.content ?? "";
    if (choice?.finish_reason === "length") said.note = "There was no room for the rest.";
    if (usage) said.speed = 1000 * usage.completion_tokens / Math.max(1, now - said.since);
    thoughts.hidden = !said.thoughts;
    thoughts.lastElementChild.textContent = said.thoughts;
    show(answer, said.text);
    if (scrollTop + clientHeight > scrollHeight - 40) page.talk.scrollTop = page.talk.scrollHeight;
  }
}
async function send() {  // what is in the box, after all that was said before
  const words = page.text.value.trim(), url = image;
  if (!words && !url) return;
  const seen = url ? [{type: "image_url", image_url: {url}}] : [];
  const messages = [...history, {role: "user", content: [{type: "text", text: words}, ...seen]}];
  page.talk.querySelector(".failed")?.remove();
  const turn = page.talk.appendChild(page.turn.content.firstElementChild.cloneNode(true));
  const [asked, thoughts, answer, note] = turn.children, said = {text: "", thoughts: "", note: ""};
  asked.append(words);
  asked.firstElementChild.src = url;
  compose("", "");
  page.talk.scrollTop = page.talk.scrollHeight;
  const {signal} = running = new AbortController(), model = page.model.value || undefined;
  const body = {model, messages, stream: true, stream_options: {include_usage: true}};
  page.send.textContent = "Stop";
  await listen(ask("v1/chat/completions", body, signal), said, thoughts, answer)
    .catch(({message}) => { if (signal.aborted) said.note = "Stopped"; else said.error = message });
  running = null;
  page.send.textContent = "Send";
  note.textContent = said.error ?? said.note;
  turn.removeAttribute("aria-busy");
  if (said.text && !said.error) history = [...messages, {role: "assistant", content: said.text}];
  else { turn.className = "failed"; compose(`${words}\n${page.text.value}`.trim(), url || image); }
  if (turn.className) note.scrollIntoView({block: "nearest"});
  look(said.speed);
}
function compose(words, url) {
  page.text.value = words;
  image = page.preview.src = url;
  page.attach.textContent = url ? "Remove image" : "Add image";
}
page.send.onclick = () => running ? running.abort() : send();
page.text.onkeydown = event => {
  if (event.keyCode !== 13 || event.shiftKey) return;  // it is 229 while an input method composes
  event.preventDefault();
  if (!running) page.send.click();
};
page.talk.onclick = ({target}) => {  // navigator.clipboard would need https or localhost
  if (target.tagName !== "BUTTON") return;
  getSelection().selectAllChildren(target.previousElementSibling);
  target.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
};
const reader = new FileReader();
reader.onload = () => { compose(page.text.value, reader.result); page.file.value = ""; };
page.file.onchange = () => page.file.files[0] && reader.readAsDataURL(page.file.files[0]);
page.attach.onclick = () => image ? compose(page.text.value, "") : page.file.click();
page.fresh.onclick = () => location.assign("./");  // the conversation goes with the old page
page.head.onchange = ({target: {id, value}}) => { sessionStorage.setItem(id, value); look(); };
addEventListener("pagehide", () => running?.abort());  // a page that is left may live on, frozen
addEventListener("focus", () => page.model.value || look());  // Ollama may have come up
look();
"""


def source_for(text: str) -> str:
    """Return what allows exactly this script or style (Content Security Policy 3, 8.4)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE = PAGE_HTML.strip().replace("{STYLE}", PAGE_STYLE).replace("{SCRIPT}", PAGE_SCRIPT).encode()
PAGE_FIELDS = {
    "content-security-policy": "; ".join((
        "default-src 'none'", f"script-src {source_for(PAGE_SCRIPT)}",
        f"style-src {source_for(PAGE_STYLE)}", "connect-src 'self'", "img-src data:",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'")),
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "cache-control": "no-cache", "vary": "accept, origin"}


def wants_page(request: Request) -> bool:
    """Return whether a browser asks for the page: it prefers HTML, or likes JSON no better."""
    accept = request.headers.get("accept", "")
    wanted = weight_of("text/html", accept)
    return (request.path == "/" and request.method in ("GET", "HEAD")
            and wanted > 0 and wanted >= weight_of("application/json", accept))


def weight_of(media_type: str, accept: str) -> float:
    """Return the weight that an Accept header gives to a type by its name (RFC 9110, 12.5.1)."""
    for entry in accept.lower().split(","):
        name, _, parameters = entry.partition(";")
        if name.strip() == media_type:
            weight = re.search(r"(?:^|;)\s*q=([01](?:\.\d+)?)\s*(?:;|$)", parameters)
            return float(weight[1]) if weight else 1.0
    return 0.0


# ---- The demo ------------------------------------------------------------------------------------
# `--demo` starts a stand-in for Ollama on a free port of this machine, so the whole real path
# runs. It speaks Ollama's own API as 0.32 does, and says what it is. demo-plain knows no tools.

def demo_model(name: str, *abilities: str) -> JSON:
    return {"name": name, "model": name, "modified_at": "2026-01-01T00:00:00Z", "size": 1,
            "digest": name.encode().hex(), "context_length": 8192,
            "details": {"family": "demo", "context_length": 8192},
            "model_info": {"general.architecture": "demo", "demo.context_length": 8192},
            "capabilities": ["completion", *abilities]}


def demo_end(body: JSON, words: Sequence[str], reason: str) -> JSON:
    times = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
    return {"done": True, "done_reason": reason, **dict.fromkeys(times, 1_000_000),
            "prompt_eval_count": len(dumps(body)) // 4, "eval_count": len(words) or 1}


class DemoOllama(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    models = {model["name"]: model for model in (
        demo_model("demo:latest", "tools", "thinking"), demo_model("demo-plain:latest"))}

    def do_GET(self) -> None:
        known: Dict[str, JSON] = {
            "/api/version": {"version": "demo"}, "/api/ps": {"models": [
                {**model, "size_vram": 0} for model in self.models.values()]},
            "/api/tags": {"models": list(self.models.values())}}
        self.send(200, [known[self.path]] if self.path in known else [])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = tagged(body["model"])
        if name not in self.models:
            self.send(404, [{"error": f"model '{body['model']}' not found"}])
            return
        model = self.models[name]
        for ability, wanted in (("thinking", body.get("think")), ("tools", body.get("tools"))):
            if wanted and ability not in model["capabilities"]:
                self.send(400, [{"error": f"{name} does not support {ability}"}])
                return
        answers = {"/api/show": lambda _: iter([model]), "/api/chat": self.chat_lines,
                   "/api/generate": self.generate_lines, "/api/embed": self.embed_lines,
                   "/api/embeddings": self.embed_lines}
        lines = answers[self.path](body)
        try:
            first = next(lines)
        except (KeyError, TypeError, AttributeError) as error:
            self.send(400, [{"error": f"the demo does not understand this: {error!r}"}])
        else:
            self.send(200, itertools.chain([first], lines))

    def chat_lines(self, body: JSON) -> Iterator[JSON]:
        """Yield an answer word by word, or a call of the first tool if the user says "tool"."""
        if not body.get("messages"):
            reason = "unload" if body.get("keep_alive") == 0 else "load"
            yield {"message": {"role": "assistant", "content": ""}, **demo_end(body, (), reason)}
            return
        last = body["messages"][-1]
        result = last["role"] == "tool" or last["content"].startswith(RESULT.partition("{")[0])
        wanted = "tool" in last["content"].lower() and not result
        text = f"This is a demo: no model is running. You said: {last['content']}"
        if "format" in body:
            text = plain_json(demo_object(body["format"], text, wanted))
        words = re.findall(r"\s*\S+", text)
        limit = (body.get("options") or {}).get("num_predict", -1)
        end = len(words) if limit < 0 else limit
        message: JSON = {"role": "assistant", "content": ""}
        if body.get("think"):
            yield {"message": {**message, "thinking": "What was said?"}}
        if "tools" in body and wanted:
            tool = body["tools"][0]["function"]
            arguments = sample(tool["parameters"], {})
            call = {"name": tool["name"], "arguments": arguments}
            words, message["tool_calls"] = [], [{"function": call}]

        for word in words[:end]:
            time.sleep(0.02)
            yield {"message": {**message, "content": word}, "done": False}
        reason = "stop" if end >= len(words) else "length"
        yield {"message": message, **demo_end(body, words[:end], reason)}

    def generate_lines(self, body: JSON) -> Iterator[JSON]:
        prompt = body.get("prompt")
        messages = [{"role": "user", "content": prompt}] if prompt else []
        for chunk in self.chat_lines({**body, "messages": messages}):
            yield {**chunk, "response": chunk["message"]["content"]}

    def embed_lines(self, body: JSON) -> Iterator[JSON]:
        texts = list_of(body["input"]) if "input" in body else [body["prompt"]]
        vectors = [[text.count(letter) / len(text) for letter in "etaoinsr"]
                   for text in texts if text]
        yield {"model": body["model"], "embeddings": vectors, "embedding": (vectors or [[]])[0],
               "prompt_eval_count": len(dumps(body)) // 4}

    def send(self, status: int, lines: Iterable[JSON]) -> None:
        self.send_response(status)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for line in lines:
                data = dumps(line).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        pass


def demo_object(form: JSON, text: str, wanted: bool) -> Any:
    """Return a value of the schema `form`: the text as an "answer", or a call if that is wanted."""
    choices = form.get("anyOf", [form])
    answers = len(choices) > 1 and choices[0].get("properties", {}).keys() == {"answer"}
    if answers and not wanted and choices[0]["properties"]["answer"] == {"type": "string"}:
        return {"answer": text}
    return sample(choices[answers and wanted], form.get("$defs", {}))


def sample(schema: JSON, definitions: JSON, level: int = 0) -> Any:
    """Return a small example value for a schema. Only the bound minimum counts; loops are cut."""
    if "$ref" in schema and level < 4:
        name = schema["$ref"].rpartition("/")[2]
        return sample(definitions[name], definitions, level + 1)
    if "anyOf" in schema:
        return sample(schema["anyOf"][0], definitions, level + 1)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if "properties" in schema:
        properties = schema["properties"]
        return {name: sample(properties[name], definitions, level + 1)
                for name in schema.get("required", ()) if name in properties}
    values = {"object": {}, "array": [], "string": "demo", "boolean": True, "null": None}
    number = max(0, schema.get("minimum", 0))
    return values.get(list_of(schema.get("type", "object"))[0], number)


class DemoServer(http.server.ThreadingHTTPServer):
    request_queue_size = Config.backlog  # or clients that come at once get a 503


def start_demo(config: Config) -> Config:
    """Start the stand-in. Return a configuration that asks it, for any model."""
    demo = DemoServer(("127.0.0.1", 0), DemoOllama)
    threading.Thread(target=demo.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{demo.server_port}"
    return dataclasses.replace(config, ollama=url, alias=(*config.alias, "*=demo"))


# ---- The check -----------------------------------------------------------------------------------
# `--check` asks the Ollama behind the server, through the server itself, and says in a dozen
# lines what it saw. What fails names its remedy, and ends the check with exit status 1.

AGENT_WINDOW = 16384  # tokens that Claude Code and Codex need at least
CHECK_TOOL: JSON = {"type": "function", "function": {
    "name": "get_time", "description": "Tell what time it is in a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
# To be pasted: {url} of the server, {key}, {model}, {window}.
CHECK_LINES = """
Claude Code  ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={key} ANTHROPIC_MODEL={model} \
CLAUDE_CODE_MAX_CONTEXT_TOKENS={window} claude
Codex        codex -m {model} -c model_provider=local -c 'model_providers.local={{name="local", \
base_url="{url}/v1", wire_api="responses", \
experimental_bearer_token="{key}"}}'
VS Code      "github.copilot.chat.byok.ollamaEndpoint": "{url}"
Python       anthropic.Anthropic(base_url="{url}", api_key="{key}")
Python       openai.OpenAI(base_url="{url}/v1", api_key="{key}")"""


class CheckFailed(Exception):
    """End the check; the text says what failed, and its remedy."""


class Check:
    """Ask a server what it can do. Each step yields the pieces of its line, once they are known."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.config = config = server.config
        self.give_up = time.monotonic() + config.check_seconds
        self.model, self.window = config.model, 0

    def ask(self, path: str, body: Optional[JSON] = None) -> Response:
        method, data = ("GET", None) if body is None else ("POST", dumps(body).encode())
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_address[1],
                                                timeout=10)
        connection.request(method, path, data, {"Connection": "close"})
        response = connection.getresponse()
        if response.status != 200:
            found = json.loads(response.read())
            error = found.get("error", found)
            raise CheckFailed(error["message"] if isinstance(error, dict) else error)
        return response

    def get(self, path: str) -> JSON:
        found: JSON = json.loads(self.ask(path).read())
        return found

    def chat(self, text: str, **more: Any) -> Generator[str, None, List[Tuple[float, JSON]]]:
        """Ask the model. Yield a dot for each ping; return the chunks, each with its time."""
        body = {"model": self.model, "stream": True, "reasoning_effort": "none",
                "stream_options": {"include_usage": True},
                "messages": [{"role": "user", "content": text}], **more}
        chunks: List[Tuple[float, JSON]] = []
        with self.ask("/v1/chat/completions", body) as response:
            self.way = response.headers.get("x-tools", "")
            for line in response:
                if line.startswith(b": ping"):
                    yield ". "
                chunk = json.loads(line[6:]) if line.startswith(b"data: {") else {}
                if "error" in chunk:
                    raise CheckFailed(chunk["error"]["message"])
                if chunk:
                    chunks.append((time.monotonic(), chunk))
                if time.monotonic() > self.give_up:
                    break
        return chunks

    def ollama(self) -> Iterator[str]:
        found = self.get("/health")
        yield f"{found['version']} at {found['ollama']}"

    def models(self) -> Iterator[str]:
        models = self.get("/v1/models")["data"]
        if not models:
            raise CheckFailed("none is installed: ollama pull phi4")
        yield "; ".join(" ".join([model["id"], *model.get("capabilities", ())]) for model in models)
        able = [model["id"] for model in models
                if "completion" in model.get("capabilities", ["completion"])]
        if not able:
            raise CheckFailed("none of them can talk: ollama pull phi4")
        if not self.names() & set(map(tagged, able)):
            self.model = able[0]
            yield f" (there is no {self.config.model}: trying {self.model})"

    def answer(self) -> Iterator[str]:
        began = time.monotonic()
        chunks = yield from self.chat("Count from 1 to 30.", max_tokens=64)
        if len(chunks) < 2:
            raise CheckFailed(
                f"no token within {self.config.check_seconds:g} s. The model is still being "
                "loaded, or too large for this machine (`ollama ps` says): try again, or take a "
                "smaller one.")
        first, last = chunks[1][0], chunks[-1][0]
        usage = chunks[-1][1].get("usage") or {"completion_tokens": len(chunks)}
        rate = usage["completion_tokens"] / max(last - first, 1e-3)
        yield f"first token after {first - began:.1f} s, then {rate:.1f} tokens/s"

    def names(self) -> Set[str]:
        """Return the names that the server tries for the model."""
        with Ollama(self.server, Client()) as ollama:
            return set(map(tagged, ollama.names(self.model)))

    def memory(self) -> Iterator[str]:
        loaded = []
        with contextlib.suppress(CheckFailed):  # an old Ollama has no /api/ps
            loaded = [model for model in models_in(self.get("/api/ps"))
                      if tagged(model_name(model)) in self.names()]
        if not loaded:
            yield "Ollama does not say where the model is"
            return
        size = ollama_field(loaded[0], "size", 0) or 1
        share = 100 * ollama_field(loaded[0], "size_vram", 0) / size
        self.window = ollama_field(loaded[0], "context_length", 0)
        yield f"{share:.0f} % of the model are on the GPU"

    def context(self) -> Iterator[str]:
        self.window = self.window or self.config.num_ctx or 4096
        yield f"{self.window} tokens"
        if self.window < AGENT_WINDOW:
            yield ": too few for Claude Code and Codex; start with --num-ctx 32768"

    def tools(self) -> Iterator[str]:
        chunks = yield from self.chat("What time is it in Paris? Call the tool.", max_tokens=200,
                                      tools=[CHECK_TOOL])
        deltas = [choice["delta"] for _, chunk in chunks for choice in chunk["choices"]]
        if any("tool_calls" in delta for delta in deltas):
            yield f"a call came back ({self.way})"
        elif time.monotonic() > self.give_up:
            yield "no call came back in the time that was left: too slow for an agent"
        else:
            yield "no call came back: for an agent, take a model that was made for tools"


def succeeds(step: Callable[[], Iterator[str]]) -> bool:
    """Print what a step says, or why it failed. Return whether it succeeded."""
    try:
        for piece in step():
            put("stdout", piece, end="")
    except (CheckFailed, APIError, OSError) as failed:
        put("stdout", f" FAILED: {getattr(failed, 'message', failed)}")
        return False
    put("stdout", "")
    return True


def check(config: Config) -> int:
    """Print what Ollama and the model can do here. Return the exit status."""
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    host = f"[{host}]" if ":" in host else host
    url = f"http{'s' if config.tls_cert else ''}://{host}:{config.port}"
    key = "YOUR_KEY" if config.api_key else "none"
    config = dataclasses.replace(config, host="127.0.0.1", port=0, api_key=(), tls_cert="", ping=2)
    server = Server(config)
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    asker = Check(server)
    with contextlib.ExitStack() as ending:
        ending.callback(server.drain)
        for title, step in (("Ollama", asker.ollama), ("models", asker.models),
                            ("answer", asker.answer), ("GPU", asker.memory),
                            ("window", asker.context), ("tools", asker.tools)):
            put("stdout", f"{title:<12} ", end="")
            if not succeeds(step):
                return 1
    put("stdout", CHECK_LINES.format(url=url, key=key, model=asker.model, window=asker.window))
    return 0


# ---- Options, start and end ----------------------------------------------------------------------
# Each field of Config that was made by `option` becomes --name and OLLAMA_API_NAME. The
# command line overrides the environment, and the environment overrides the default. In a
# variable, the values of a repeatable option are separated by commas.

EPILOG = """Each option has an environment variable: OLLAMA_API_PORT for --port, and so on; but
OLLAMA_HOST for --ollama, and OLLAMA_API_SERVER_KEY for --api-key. Several values are separated by
commas; 1, true, yes and on turn a switch on. The command line overrides the environment.
OLLAMA_API_KEY is the key that is sent to Ollama, over https only."""
OPTIONS = {"--" + field.name.replace("_", "-"): field
           for field in dataclasses.fields(Config) if "meaning" in field.metadata}


def parse_args(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Return the configuration; exit with a line that says why, if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="ollama_api.py", usage="python ollama_api.py [options]", add_help=False,
        allow_abbrev=False, description=(__doc__ or "").partition("\n\nContents")[0],
        epilog=EPILOG, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, width=100, max_help_position=28))
    group = parser.add_argument_group("options")
    for name, field in OPTIONS.items():
        how = {key: value for key, value in field.metadata["how"].items() if key != "env"}
        shown = "" if field.default in (None, (), False, "") else f" ({field.default})"
        group.add_argument(name, default=field.default or None,
                           help=field.metadata["meaning"] + shown, **how)
    group.add_argument("--version", action="version", version="ollama_api.py " + __version__,
                       help="print the version and exit")
    group.add_argument("--help", action="help", help="print this text and exit")

    given = vars(parser.parse_args([*arguments_in(environ, argv), *argv]))
    values: JSON = {name: tuple(value) if isinstance(value, list) else value
                    for name, value in given.items() if value is not None}
    try:
        values["ollama"] = ollama_url(values["ollama"])
        config = Config(**values, ollama_key=environ.get("OLLAMA_API_KEY", ""))
        tls_context(config)  # or it would fail later, with a traceback
    except ValueError as error:
        parser.error(f"--ollama: {error}")
    except OSError as error:  # or ssl.SSLError
        parser.error(f"--tls-cert, --tls-key: cannot be used: {error}")
    for problem in problems_of(config):
        parser.error(problem)
    return config


def arguments_in(environ: Mapping[str, str], argv: Sequence[str]) -> Iterator[str]:
    """Yield the arguments that the environment stands for, unless `argv` has the option."""
    given = {argument.partition("=")[0] for argument in argv}
    for name, field in OPTIONS.items():
        how = field.metadata["how"]
        text = environ.get(how.get("env", "OLLAMA_API_" + field.name.upper()), "")
        if name in given:
            continue
        if how.get("action") == "store_true":
            yield from [name] if text.lower() in ("1", "true", "yes", "on") else []
        else:
            texts = text.split(",") if how.get("action") == "append" else [text]
            yield from (f"{name}={part}" for part in texts if part)


def problems_of(config: Config) -> Iterator[str]:
    """Yield what is wrong with a configuration, as far as argparse cannot tell."""
    if not 0 <= config.port <= 65535:
        yield "--port: must be between 0 and 65535"
    if not 0 < config.ping <= 3600:
        yield "--ping: must be above 0, and 3600 at most"
    if config.num_ctx is not None and config.num_ctx < 1:
        yield "--num-ctx: must be at least 1"
    if not all(all(alias.partition("=")) for alias in config.alias):
        yield "--alias: must look like PATTERN=MODEL"
    if not all(re.fullmatch(r"[\w-]+(\.[\w-]+)*", name) for name in config.allow_host):
        yield "--allow-host: must be a name like box.example, without scheme, port and path"
    origin = re.compile(r"null|\w[\w.+-]*://(\*|(\*\.)?[^/\s:*]+|\[[^]/\s*]+\])(:([0-9]+|\*))?")
    if not all(origin.fullmatch(each) for each in config.allow_origin):
        yield ("--allow-origin: must look like https://chat.example, without a path; "
               "* stands for a host, the beginning of one, or a port")
    if any(key.strip() != key or not key for key in config.api_key):
        yield "--api-key: must not be empty, nor begin or end with a blank"
    if config.tls_key and not config.tls_cert:
        yield "--tls-key: needs a --tls-cert"
    if not (is_loopback(config.host) or config.api_key or config.insecure):
        yield f"--host: {config.host} can be reached by others: add an --api-key, or --insecure"


def ollama_url(text: str) -> str:
    """Return the URL that OLLAMA_HOST means to Ollama itself; ValueError if it means none. Any
    part may be missing; a scheme changes the default port; 0.0.0.0 means loopback."""
    scheme, mark, rest = text.strip(" \t\"'").rpartition("://")
    with contextlib.suppress(ValueError):
        rest = f"[{ipaddress.IPv6Address(rest)}]"
    if scheme not in ("", "http", "https") or not re.fullmatch(r"[]A-Za-z0-9._:/\[-]*", rest):
        raise ValueError(f"must be host, host:port or an http or https URL, not {text}")
    parts = urllib.parse.urlsplit(f"{scheme or 'http'}://{rest}")
    host = parts.hostname or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    port = parts.port or (11434 if not mark else 443 if scheme == "https" else 80)
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}"


def banner(server: Server) -> str:
    """Return where we listen, which Ollama was found or how to start it, and a line to try."""
    config = server.config
    lines = [f"ollama_api.py {__version__} listens on {server.url}"]
    body: JSON = {"messages": [{"role": "user", "content": "Hello!"}]}
    try:
        with Ollama(server, Client()) as ollama:
            version = ollama.get("/api/version", config.health_seconds).get("version")
            names = [model_name(model) for model in ollama.installed()]
            wanted = {tagged(name) for name in ollama.names(config.model)}
        if names and wanted.isdisjoint(map(tagged, names)):
            body["model"] = names[0]
        shown = ", ".join(names) or "none; try: ollama pull phi4"
        lines.append(f"Ollama {version} at {config.ollama}, models: {shown}")
    except APIError as error:
        lines.append(error.message)

    text, key = dumps(body), ' -H "x-api-key: KEY"' if config.api_key else ""
    quoted = f"'{text}'" if os.name != "nt" else '"' + text.replace('"', '\\"') + '"'
    lines.append(f"Try: curl {server.url}/v1/chat/completions{key} -d {quoted}")
    return "\n".join(lines)


def allow_many_sockets() -> None:
    """Raise this process's own limit on open files, by default 256 on macOS, 1,024 on Linux."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for most in (16384, 10240):  # macOS takes no more than OPEN_MAX, whatever `hard` says
            most = most if hard == resource.RLIM_INFINITY else min(hard, most)
            if soft == resource.RLIM_INFINITY or soft >= most:
                return
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
                return


# Bytes of a thread's stack. To find out that JSON is too deep, CPython 3.12 and 3.13 fill 1.3 MB of
# it, whatever there is: Alpine's has 1 MB, and crashes. Windows has enough.
STACK = 4 << 20


# The last one is Windows' Ctrl-Break.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK")
           if hasattr(signal, name)]


def serve_until_signal(server: Server) -> None:
    """Serve until one of SIGNALS, then let running requests finish. A second signal ends them.
    In serve_forever the exception would hit a new connection. A long sleep could miss a signal."""
    ended = threading.Event()
    try:
        threading.Thread(target=LOG.write, daemon=True).start()
        threading.Thread(target=server.serve_forever, args=(0.2,), daemon=True).start()
        for number in SIGNALS[1:]:
            signal.signal(number, signal.default_int_handler)  # raises KeyboardInterrupt
        kept = when_window_closes(ended)  # noqa: F841
        put("stdout", banner(server))
        while True:
            time.sleep(0.2)
    except KeyboardInterrupt:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
    server.drain()
    LOG.finish(1)
    ended.set()


def when_window_closes(ended: threading.Event) -> Any:
    """On Windows, do as for Ctrl-C when the console's window is closed, or the system shuts down,
    and hold up the end until `ended`, for which Windows allows 5 s. Return what has to be kept.
    That some user logs off is told to services only, which stay (Microsoft's HandlerRoutine)."""
    if sys.platform != "win32":
        return None
    import ctypes

    def on_event(event: int) -> bool:
        if event in (2, 6):  # CTRL_CLOSE_EVENT, CTRL_SHUTDOWN_EVENT
            _thread.interrupt_main()
            ended.wait()
        return event == 5  # CTRL_LOGOFF_EVENT: else C's handler would take it for Ctrl-Break

    handler = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)(on_event)
    ctypes.windll.kernel32.SetConsoleCtrlHandler(handler, True)
    return handler


def main() -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for what a code page has not
    config = parse_args(sys.argv[1:], os.environ)
    allow_many_sockets()
    if config.demo:
        config = start_demo(config)
    if config.check:
        return check(config)
    try:
        server = Server(config)
    except OSError as error:
        print(f"ollama_api.py: cannot listen on {config.host} port {config.port}: {error}",
              file=sys.stderr)
        return 1
    sys.setswitchinterval(0.02)  # how often each waiting thread asks for the interpreter
    if os.name != "nt":
        threading.stack_size(STACK)
    serve_until_signal(server)
    if not LOG.finish(0):
        os._exit(0)  # Python would abort, because a thread still writes to stderr
    return 0


if __name__ == "__main__":
    sys.exit(main())
