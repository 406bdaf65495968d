#!/usr/bin/env python3
"""Serve Anthropic's and OpenAI's HTTP APIs from the local Ollama: one file, standard library only.

Start it
    python ollama_api.py           serves http://localhost:8000 and asks Ollama on this machine
    python ollama_api.py --demo    needs no Ollama: a stand-in model repeats what you say

Point a client at it (the key is not looked at, but the SDKs want one)
    anthropic SDK, Claude Code     base URL http://localhost:8000       key "none"
    openai SDK                     base URL http://localhost:8000/v1    key "none"

Endpoints
    POST /v1/messages              Anthropic Messages, streamed on demand
    POST /v1/messages/count_tokens an estimate of a prompt's length
    POST /v1/chat/completions      OpenAI Chat Completions; curl and requests get a stream unless
                                   they say "stream": false
    POST /v1/responses             OpenAI Responses, for Codex
    POST /v1/completions           one text continued, or filled in
    POST /v1/embeddings            texts as vectors
    GET  /v1/models                what Ollama has installed, readable by both SDKs
    GET  /v1/models/{id}           one of them
    GET  /api/version              Ollama's own, for `codex --oss`
    GET  /api/tags                 the same
    GET  /health                   200 while Ollama answers, else 503
    GET  /                         what this is

Contents of this file, from top to bottom
    Configuration                  every option, default and limit
    Questions and events           what dialects share: Ollama's request, the events of a reply
    Reading requests               fields and their kinds, options, earlier tool calls
    Frames                         what replies are made of
    Anthropic Messages             a dialect
    OpenAI's words                 what the next three have in common
    OpenAI Chat Completions        a dialect
    Completions and Embeddings     OpenAI's smaller endpoints
    OpenAI Responses               a dialect
    Models and health              what is installed, and whether it answers
    Ollama's own API               what is passed on
    Routes                         the product on one screen
    Tools                          offered, forced, or beside a schema
    JSON schemas                   what Ollama can bear of a client's
    Asking Ollama                  what goes out, and what its refusals mean
    Counting tokens                how long a prompt is
    Events of an answer            Ollama's chunks, and all filters over what they say
    Waiting for Ollama             for two sockets at once
    Reading HTTP                   bytes to a request
    Who may ask                    web pages and keys
    Answering                      one request and its reply
    The server                     connections, limits, shutdown
    The demo                       a stand-in for Ollama
    Options, start and end         the command line

A request goes down that list as text and comes back up as bytes: the HTTP server reads it, a route
names its endpoint, the dialect turns it into a chat for Ollama and Ollama's answer into frames.
To add a dialect: write its section, add its rows to ROUTES. To add an option: a field of Config.
"""

from __future__ import annotations

import _thread
import argparse
import base64
import contextlib
import dataclasses
import email.utils
import fnmatch
import functools
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import os
import re
import selectors
import signal
import socket
import socketserver
import ssl
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
from typing import (Any, Callable, Dict, Generator, Iterable, Iterator, List, Mapping, NamedTuple,
                    NoReturn, Optional, Protocol, Sequence, Set, Tuple, Type, TypedDict, TypeVar,
                    Union)

__version__ = "0.1.0"


# ---- Configuration -------------------------------------------------------------------------------
# One frozen object holds every setting. A field made by `option` is a command line option and an
# environment variable as well (see Command line); the others are limits, changed here only.
# Nothing is read from the environment at import. Seconds and bytes, unless a name says otherwise.

def option(default: Any, meaning: str, **how: Any) -> Any:
    """A field of Config that the command line may set. `how` goes to argparse, but for `env`,
    the name of its environment variable where that is not OLLAMA_API_<OPTION>."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "how": how})


@dataclass(frozen=True)
class Config:
    host: str = option("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int = option(8000, "port to listen on; 0 takes a free one", type=int, metavar="N")
    ollama: str = option("127.0.0.1:11434", "where Ollama listens: host, host:port or a URL",
                         env="OLLAMA_HOST", metavar="URL")
    model: str = option("phi4:latest", "the model for requests that name none", metavar="NAME")
    alias: Tuple[str, ...] = option(
        (), "ask MODEL for names like PATTERN (* and ?) that are not installed; repeatable, "
        "the first that fits counts", action="append", metavar="PATTERN=MODEL")
    num_ctx: Optional[int] = option(
        None, "context window in tokens, the same for every request; absent, Ollama decides",
        type=int, metavar="N")
    default_stream: str = option(
        "auto", "chat completions without a `stream` key: on, off, or auto (a stream for curl and "
        "requests, one JSON object for SDKs)", choices=("auto", "on", "off"))
    ping: float = option(15.0, "seconds of silence before a stream gets a keep-alive ping",
                         type=float, metavar="SECONDS")
    api_key: Tuple[str, ...] = option(
        (), "demand this key of every client; repeatable", action="append",
        env="OLLAMA_API_SERVER_KEY", metavar="KEY")
    allow_origin: Tuple[str, ...] = option(
        (), "serve the web pages of this origin, like https://chat.example; repeatable",
        action="append", metavar="ORIGIN")
    tls_cert: str = option("", "speak https, with the certificate chain in this PEM file",
                           metavar="FILE")
    tls_key: str = option("", "its private key, where that is in a file of its own",
                          metavar="FILE")
    insecure: bool = option(False, "allow an address that others can reach without an --api-key",
                            action="store_true")
    demo: bool = option(False, "start a stand-in Ollama that repeats what it is told",
                        action="store_true")

    ollama_key: str = dataclasses.field(default="", repr=False)   # for an https Ollama only
    head_bytes: int = 64 * 1024
    head_fields: int = 100
    head_seconds: float = 15            # from the first byte of a request to the end of its head
    body_bytes: int = 64 * 1024 * 1024  # screenshots in base64 are large
    body_seconds: float = 30            # and one more for each megabyte that has arrived
    json_depth: int = 200
    idle_seconds: float = 60            # between two requests on one connection
    write_seconds: float = 30           # without progress, after which a client counts as gone
    linger_seconds: float = 2           # for a refusal to arrive before the connection closes
    running: int = 256                  # requests at a time
    connections: int = 4096             # at a time; each has a thread
    backlog: int = 1024                 # with 5, seven of ten bursts of 200 clients failed
    connect_seconds: float = 5          # to Ollama
    ask_seconds: float = 10             # for what Ollama answers without a model: tags, ps
    health_seconds: float = 2
    line_bytes: int = 32 * 1024 * 1024  # of Ollama's answer
    embed_bytes: int = 256 * 1024 * 1024
    grace_seconds: float = 10           # for running requests after SIGTERM


# ---- Questions and events ------------------------------------------------------------------------
# The neutral middle, lopsided on purpose. A request is Ollama's own /api/chat body, into which
# each dialect translates directly: there is no third vocabulary. A reply is a stream of small
# events, the same for clients that stream and clients that do not: any number of Thinking, Text
# and ToolCall in the model's order, then exactly one Finish; whatever else happens is an
# APIError. Frozen dataclasses rather than NamedTuples, for which Text("a") == Thinking("a").

JSON = Dict[str, Any]
T = TypeVar("T")


class OllamaMessage(TypedDict, total=False):
    role: str                  # system, user, assistant or tool
    content: str
    thinking: str              # of an assistant
    images: List[str]          # in base64
    tool_calls: List[JSON]     # of an assistant: {"id", "function": {"name", "arguments"}}
    tool_name: str             # of a tool: the name and the id of the call that it answers
    tool_call_id: str


class OllamaChat(TypedDict, total=False):
    """The body of POST /api/chat, or of /api/generate where it has a prompt."""
    model: str
    messages: List[OllamaMessage]
    prompt: str
    suffix: str                # what comes after the text that is to be filled in
    tools: List[JSON]          # {"type": "function", "function": {name, description, parameters}}
    format: JSON               # a JSON schema, made by SchemaReducer
    think: Union[bool, str]
    logprobs: bool
    top_logprobs: int
    keep_alive: Union[str, float]
    options: JSON


@dataclass
class Chat:
    """What a dialect makes of a request: Ollama's part, and the part that is kept on this side."""
    body: OllamaChat
    stream: Optional[bool] = False     # None: the client did not say
    stop: Sequence[str] = ()           # matched by until_stop, never sent to Ollama
    decode: Optional[Callable[[JSON], Event]] = None    # reads an answer that is a call in JSON
    one_call: bool = False             # drop all tool calls but the first
    function_call: bool = False        # tell of it in OpenAI's older form
    include_usage: bool = False
    kinds: Dict[str, JSON] = dataclasses.field(default_factory=dict)   # how calls of a tool begin
    echo: JSON = dataclasses.field(default_factory=dict)    # what an answer repeats of the request
    prompt_tokens: int = 0             # an estimate, until Ollama tells
    ignored: List[str] = dataclasses.field(default_factory=list)    # fields without effect


@dataclass(frozen=True)
class Thinking:
    text: str


@dataclass(frozen=True)
class Text:
    text: str
    logprobs: Tuple[JSON, ...] = ()    # Ollama's: {token, logprob, bytes, top_logprobs}

    def __add__(self, other: Text) -> Text:
        return Text(self.text + other.text, self.logprobs + other.logprobs)

    def split(self, at: int) -> Tuple[Text, Text]:
        """Two texts; the logprobs, which know no places, go with the first of them."""
        return Text(self.text[:at], self.logprobs), Text(self.text[at:])


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: JSON


@dataclass(frozen=True)
class Finish:
    reason: str                        # done_reason (stop, length); ours: tool_calls, stop_sequence
    prompt_tokens: int
    completion_tokens: int
    stop_sequence: Optional[str] = None
    cached_tokens: Optional[int] = None    # of the prompt; since 0.34


Event = Union[Thinking, Text, ToolCall, Finish]


@dataclass
class Request:
    """One HTTP request of a client. Header names are in lower case."""
    method: str
    path: str                          # without the query, still percent-encoded
    headers: Dict[str, str]
    version: str = "1.1"
    body: JSON = dataclasses.field(default_factory=dict)
    argument: str = ""                 # what stands for {id} in the route's path


@dataclass
class Answer:
    """What an endpoint gives back: one JSON object, or the frames of a stream."""
    content: Union[JSON, Iterator[bytes]]
    status: int = 200
    pings: Iterator[bytes] = iter(())  # frames for a stream that waits
    ignored: Sequence[str] = ()


class APIError(Exception):
    """A failure that a client is told of, in the words of its dialect.

    `param` is the path of the field to blame, `code` OpenAI's machine-readable reason, `details`
    Anthropic's. Without `retry_after` (seconds) clients are told not to ask again by themselves."""

    def __init__(self, status: int, message: str, param: Optional[str] = None,
                 code: Optional[str] = None, retry_after: Optional[int] = None,
                 details: Optional[JSON] = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.retry_after, self.details = code, retry_after, details


class PromptTooLong(APIError):
    """The prompt does not fit the context window. 0 is a number that Ollama did not tell."""

    def __init__(self, prompt_tokens: int = 0, context: int = 0) -> None:
        super().__init__(400, f"prompt is too long: {prompt_tokens} tokens > {context} maximum",
                         code="context_length_exceeded")
        self.prompt_tokens, self.context = prompt_tokens, context


class ClientLeft(Exception):
    """The client closed its connection: nothing that could still be done is of use to anybody."""


# ---- Reading requests ----------------------------------------------------------------------------
# What dialects read a body with. All that is wrong in it is a 400 that names the path of the field,
# as in messages.2.content.0.text; null counts as absent. What is accepted without effect is
# collected in Chat.ignored, and reported in the header x-ignored-fields.

KINDS: Dict[type, Tuple[str, Tuple[type, ...]]] = {
    str: ("a string", (str,)), bool: ("true or false", (bool,)), int: ("an integer", (int,)),
    float: ("a number", (int, float)), list: ("a list", (list,)), dict: ("an object", (dict,))}


def kind_of(value: Any) -> str:
    return "null" if value is None else KINDS[type(value)][0]


def invalid(path: str, problem: str) -> APIError:
    return APIError(400, f"{path}: {problem}", param=path)


def checked(value: Any, path: str, kind: Type[T]) -> T:
    """`value` if it is of `kind`, else a 400 that names `path`. true is not an integer here."""
    name, types = KINDS[kind]
    if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
        raise invalid(path, f"must be {name}, not {kind_of(value)}")
    return value  # type: ignore[return-value]


def optional(owner: JSON, path: str, kind: Type[T]) -> Optional[T]:
    """The field of `owner` that is last in `path`; null counts as absent."""
    value = owner.get(path.rpartition(".")[2])
    return None if value is None else checked(value, path, kind)


def required(owner: JSON, path: str, kind: Type[T]) -> T:
    value = optional(owner, path, kind)
    if value is None:
        raise invalid(path, "is required")
    return value


def one_of(owner: JSON, path: str, words: Iterable[str]) -> str:
    word = required(owner, path, str)
    if word not in words:
        raise invalid(path, f"must be one of {', '.join(words) or 'nothing'}, not {dumps(word)}")
    return word


def items(values: List[Any], path: str, kind: Type[T]) -> Iterator[Tuple[str, T]]:
    """Each of `values` with its path, all of one kind."""
    for index, value in enumerate(values):
        yield f"{path}.{index}", checked(value, f"{path}.{index}", kind)


def blocks_of(owner: JSON, path: str) -> Iterator[Tuple[str, JSON]]:
    """The content blocks in a field with their paths; a string is one text block."""
    content = owner.get(path.rpartition(".")[2])
    if isinstance(content, str):
        return iter(((path, {"type": "text", "text": content}),))
    if not isinstance(content, list) and content is not None:
        raise invalid(path, "must be a string or a list of blocks, not " + kind_of(content))
    return items(content or [], path, dict)


REPORTED_FIELDS = 64


def unread(body: JSON, fields: Iterable[str], path: str = "") -> Iterator[str]:
    """What was given, but is not among the `fields` that are read, for x-ignored-fields.

    A dotted name says which part of an object is read; the others are unread then."""
    for name, value in body.items():
        place = path + name
        if isinstance(value, dict) and any(field.startswith(place + ".") for field in fields):
            yield from unread(value, fields, place + ".")
        elif value is not None and place not in fields:
            yield place


class Option(NamedTuple):
    """How a field of a request becomes one of Ollama's options."""
    name: str
    kind: type
    at_least: float = float("-inf")


def options_of(body: JSON, table: Mapping[str, Option]) -> JSON:
    """Ollama's options, from those fields of `table` that the client gave; no value is invented."""
    options: JSON = {}
    for field, (name, kind, at_least) in table.items():
        value = optional(body, field, kind)
        if value is None:
            continue
        if value < at_least:
            raise invalid(field, f"must be at least {at_least:g}")
        if abs(value) >= 2**63:
            raise invalid(field, "is too large a number")
        options[name] = value
    return options


# What Ollama's own clients may set, and people miss most in foreign APIs.
OLLAMA_OPTIONS = {name: Option(name, kind) for kind, names in (
    (int, "num_ctx num_keep num_predict top_k repeat_last_n num_batch num_gpu main_gpu num_thread "
          "draft_num_predict"),
    (float, "min_p typical_p repeat_penalty"), (bool, "use_mmap")) for name in names.split()}


def ollama_options(body: JSON, table: Mapping[str, Option]) -> Tuple[JSON, List[str]]:
    """The options of fields in `table`, overridden by those in Ollama's own `options`; and its stop
    texts, which Ollama is not sent (see until_stop)."""
    own = optional(body, "options", dict) or {}
    stop = stop_texts(optional(own, "options.stop", list) or [], "options.stop")
    options = {**options_of(body, table), **own}
    return {name: value for name, value in options.items()
            if name != "stop" and value is not None}, stop


def ollama_keep_alive(body: JSON) -> Union[None, str, float]:
    """How long the model stays loaded: seconds, or text like 5m."""
    value = body.get("keep_alive")
    if isinstance(value, str):
        return value
    return optional(body, "keep_alive", float)


def stop_texts(values: List[Any], path: str) -> List[str]:
    """Stop texts, few and short enough to be looked for after each token."""
    if len(values) > 64:
        raise invalid(path, "must not be more than 64")
    for place, text in items(values, path, str):
        if not 0 < len(text) <= 1000:
            raise invalid(place, "must have from 1 to 1000 characters")
    return values


def system_first(messages: List[OllamaMessage]) -> List[OllamaMessage]:
    """Join the system texts of the beginning; later ones stay where they are, as user text.

    Hoisting a late one would change the beginning of the prompt, and with it Ollama would lose its
    KV cache on every turn (Claude Code has sent such messages since 2.1.154)."""
    first = next((n for n, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    early = [m["content"] for m in messages[:first] if m["role"] == "system"]
    system: List[OllamaMessage] = [{"role": "system", "content": "\n\n".join(early)}]
    turns = [m for m in messages[:first] if m["role"] != "system"]
    for message in messages[first:]:
        late = message["role"] == "system"
        turns.append({"role": "user", "content": message["content"]} if late else message)
    return system[:len(early)] + turns


class History:
    """What is to be remembered while the messages of a chat are read: the tool calls, for their
    results, and what is dropped.

    Ollama gets ids of its own: Mistral's templates demand nine letters and digits (llama.cpp
    #26359). They count up, so that each turn of a conversation repeats those of the turn before."""

    def __init__(self) -> None:
        self.calls: Dict[str, Tuple[str, str]] = {}      # the client's id: Ollama's, and the name
        self.count = 0
        self.ignored: List[str] = []

    def call(self, id: str, name: str, arguments: JSON) -> JSON:
        self.count += 1
        self.calls[id] = f"call{self.count:05}", name
        return {"id": self.calls[id][0], "function": {"name": name, "arguments": arguments}}

    def result(self, id: str, path: str) -> OllamaMessage:
        """The head of the message that answers a call; 400 blames `path` if there is none."""
        if id not in self.calls:
            raise invalid(path, f"no tool call before has the id {dumps(id)}")
        call, name = self.calls[id]
        return {"role": "tool", "tool_name": name, "tool_call_id": call}


Part = Tuple[str, Any]             # a key of Ollama's message that some content adds to, and what
NO_TEXT = "(no text)"              # of a tool: models take an empty result for a failure


def data_url(url: str, path: str) -> str:
    """The base64 of an image in a data: URL (RFC 2397)."""
    head = re.match(r"data:(image/[\w.+-]+)?(;[\w=.-]+)*;base64,", url)
    if head is None:
        raise invalid(path, "must be a data: URL of an image in base64: nothing is fetched here")
    return base64_checked(url[head.end():], path)


def base64_checked(data: str, path: str) -> str:
    if not data:
        raise invalid(path, "must not be empty")
    try:
        base64.b64decode(data, validate=True)
    except ValueError as error:
        raise invalid(path, f"is not base64: {error}") from error
    return data


def list_of(value: Any) -> List[Any]:
    return value if isinstance(value, list) else [value]


INTEGER_DIGITS = 4300              # as newer CPythons have it


def refuse(what: str) -> NoReturn:
    raise ValueError(f"{what} is not JSON")


def finite(digits: str) -> float:
    return float(digits) if abs(float(digits)) != float("inf") else refuse(digits)


def bounded(digits: str) -> int:
    return int(digits) if len(digits) <= INTEGER_DIGITS else refuse(digits[:20] + "...")


READER = json.JSONDecoder(parse_constant=refuse, parse_float=finite, parse_int=bounded)


def strict_json(data: bytes, depth: int) -> Any:
    """JSON (RFC 8259): strict UTF-8, of bounded depth, without what json.loads takes but Ollama
    does not: NaN, Infinity, floats out of range, lone surrogates. ValueError says why not. Of equal
    keys the last counts. Long integers take a time that grows with the square of their length."""
    if nested_deeper(data, depth):
        raise ValueError(f"it is nested deeper than {depth} levels")
    value = READER.decode(data.decode())
    if b"\\u" in data:
        json.dumps(value, ensure_ascii=False).encode()         # fails on a lone surrogate
    return value


STRINGS = re.compile(rb'"[^"]*"?')
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")     # as signed bytes, 1 and -1


def nested_deeper(data: bytes, depth: int) -> bool:
    """Whether brackets are nested deeper than that, where json.loads might overflow the stack.

    The time that it takes grows with the length alone, whatever is sent, since no other thread runs
    meanwhile. What does not pair is left to json.loads to refuse."""
    if data.count(b"[") + data.count(b"{") <= depth:         # a third of the time of a screenshot
        return False
    strings = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    steps = STRINGS.sub(b"", strings).translate(STEPS, NO_BRACKETS)
    return bool(steps) and max(itertools.accumulate(memoryview(steps).cast("b"))) > depth


# ---- Frames --------------------------------------------------------------------------------------
# What dialects make frames with: a frame is one server-sent event, or one line. JSON goes out as
# ASCII, so that it can always be encoded.

dumps = json.JSONEncoder(allow_nan=False).encode    # ASCII only, so that it can always be encoded
plain_json = json.JSONEncoder(ensure_ascii=False).encode      # for the eyes of a model


def new_id(prefix: str) -> str:
    return prefix + os.urandom(12).hex()


def sse(data: JSON) -> bytes:
    """One server-sent event (WHATWG HTML, section 9.2), named after its type where it has one.

    Chunks of chat completions have none, and must not: an `event:` line stops the openai SDK."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return (f"{name}data: {dumps(data)}\n\n").encode()


def prepared(frame: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """The same function of a text, with all but the text in JSON already: for each token it costs
    a sixth."""
    hole = new_id("hole_")                       # nobody can have it in a name
    parts = frame(hole).split(dumps(hole).encode())
    return lambda text: dumps(text).encode().join(parts)


def begun(events: Iterator[Event]) -> Iterator[Event]:
    """The same events, the first of which is there already.

    Every x_stream calls it before it yields a frame: until then a refusal is a real HTTP status."""
    return itertools.chain((next(events),), events)


def collected(events: Iterator[Event]) -> Tuple[List[Any], Finish]:
    """All of a reply: its parts, and how it ended."""
    *parts, finish = events
    assert isinstance(finish, Finish)
    return parts, finish


def runs_of(events: Iterable[Any]) -> Iterator[Tuple[type, Iterator[Any]]]:
    """Successive events of one kind, together: what dialects call a content block or an item.
    Tool calls are one each."""
    for kind, run in itertools.groupby(events, type):
        if kind is ToolCall:
            yield from ((kind, iter((call,))) for call in run)
        else:
            yield kind, run


# ---- Anthropic Messages --------------------------------------------------------------------------
# POST /v1/messages as the Messages API of 2023-06-01 and 2026-10-21 describes it, for the anthropic
# SDKs of both generations and Claude Code. Thinking is off unless asked for: programs read
# content[0].text. Signatures are neither made nor checked. Content blocks are the runs of equal
# events, so their indexes count up and never two are open. Claude Code's billing header in `system`
# is dropped: it changes with each request, and Ollama's KV cache would be lost with it.

MESSAGES_PINGS = itertools.repeat(sse({"type": "ping"}))


def messages(ollama: Ollama, request: Request) -> Answer:
    """POST /v1/messages"""
    return ollama.answer(messages_request(request.body), messages_reply, messages_stream,
                         MESSAGES_PINGS)


def count_tokens(ollama: Ollama, request: Request) -> Answer:
    """POST /v1/messages/count_tokens: an estimate, without a word to Ollama. Claude Code's /context
    asks for two dozen at once."""
    chat = messages_request(request.body)
    return Answer({"input_tokens": ollama.rates.tokens(chat.body)}, ignored=chat.ignored)


MESSAGES_OPTIONS = {
    "max_tokens": Option("num_predict", int, at_least=1),
    "temperature": Option("temperature", float),
    "top_p": Option("top_p", float),
    "top_k": Option("top_k", int)}
MESSAGES_FIELDS = {
    "model", "messages", "system", "stream", "stop_sequences", "thinking.type", "tools",
    "tool_choice.type", "tool_choice.name", "tool_choice.disable_parallel_tool_use",
    "output_config.effort", "output_config.format.type", "output_config.format.schema",
    "output_format.type", "output_format.schema", *MESSAGES_OPTIONS}


def messages_request(body: JSON) -> Chat:
    """A Messages request as a chat for Ollama; unlike Anthropic's it needs no max_tokens."""
    if body.get("thread") is not None:       # anthropic-python 2's tool runner then sends it whole
        raise APIError(400, "thread: threads are not kept here, send all messages", param="thread",
                       details={"error_code": "thread_unsupported_request",
                                "unsupported": ["thread"]})
    history = History()
    history.ignored += unread(body, MESSAGES_FIELDS)
    turns = [message for path, turn in items(required(body, "messages", list), "messages", dict)
             for message in messages_turn(turn, path, history)]
    if not turns:
        raise invalid("messages", "must not be empty")
    chat = Chat({"model": required(body, "model", str),
                 "messages": system_first(messages_system(body) + turns),
                 "think": messages_think(body, history),
                 "options": options_of(body, MESSAGES_OPTIONS)},
                stream=bool(optional(body, "stream", bool)),
                stop=stop_texts(optional(body, "stop_sequences", list) or [], "stop_sequences"),
                ignored=history.ignored)
    messages_choice(body, chat, messages_tools(body, history))
    return chat


def messages_system(body: JSON) -> List[OllamaMessage]:
    texts = [required(block, path + ".text", str) for path, block in blocks_of(body, "system")]
    texts = [text for text in texts
             if text and not text.startswith("x-anthropic-billing-header")]
    return [{"role": "system", "content": "\n\n".join(texts)}] if texts else []


def messages_turn(turn: JSON, path: str, history: History) -> List[OllamaMessage]:
    """One of `messages`; what it has of tool results goes before the rest of it."""
    role = one_of(turn, path + ".role", ("user", "assistant", "system"))
    if turn.get("content") is None:
        raise invalid(path + ".content", "is required")
    parts = messages_parts(turn, path + ".content", role, history)
    message: OllamaMessage = {"role": role, "content": "\n\n".join(parts["content"])}
    if any(parts["thinking"]):
        message["thinking"] = "\n\n".join(parts["thinking"])
    if parts["images"]:
        message["images"] = parts["images"]
    if parts["tool_calls"]:
        message["tool_calls"] = parts["tool_calls"]
    results: List[OllamaMessage] = parts["results"]
    nothing_else = message == {"role": role, "content": ""}
    return results if results and nothing_else else [*results, message]


def messages_parts(owner: JSON, path: str, role: str, history: History) -> Dict[str, List[Any]]:
    """The parts of the content blocks at `path`. A block that nobody here knows is dropped."""
    parts: Dict[str, List[Any]] = {
        key: [] for key in ("content", "thinking", "images", "tool_calls", "results")}
    for place, block in blocks_of(owner, path):
        kind = required(block, place + ".type", str)
        roles, read = MESSAGES_BLOCKS.get(kind, ((role,), dropped_block))
        if role not in roles:
            raise invalid(place + ".type", f"{kind} cannot be in content of role {role}")
        for key, part in read(block, place, history):
            parts[key].append(part)
    return parts


def text_block(block: JSON, path: str, _history: History) -> Iterator[Part]:
    yield "content", required(block, path + ".text", str)


def thinking_block(block: JSON, path: str, _history: History) -> Iterator[Part]:
    yield "thinking", required(block, path + ".thinking", str)


def dropped_block(_block: JSON, path: str, history: History) -> Iterator[Part]:
    history.ignored.append(path)
    return iter(())


def image_block(block: JSON, path: str, _history: History) -> Iterator[Part]:
    _, source = source_of(block, path, ("base64",))
    path += ".source.data"
    yield "images", base64_checked(required(source, path, str), path)


def document_block(block: JSON, path: str, history: History) -> Iterator[Part]:
    """A document, inlined. Of a PDF, which needs a reader, only a note: to refuse it would end a
    session of Claude Code that has read one."""
    kind, source = source_of(block, path, ("text", "content", "base64"))
    title = optional(block, path + ".title", str) or ""
    texts = [optional(block, path + ".context", str) or ""]
    if kind == "text":
        texts.append(required(source, path + ".source.data", str))
    elif kind == "content":
        parts = messages_parts(source, path + ".source.content", "tool", history)
        texts += parts["content"]
        yield from (("images", image) for image in parts["images"])
    else:
        history.ignored.append(path)
        texts.append(f"({source.get('media_type')}: cannot be read here)")
    text = "\n\n".join(filter(None, texts))
    yield "content", f"<document title={plain_json(title)}>\n{text}\n</document>"


def source_of(block: JSON, path: str, kinds: Sequence[str]) -> Tuple[str, JSON]:
    """The source of an image or a document, and its kind."""
    source = required(block, path + ".source", dict)
    kind = required(source, path + ".source.type", str)
    if kind not in kinds:
        raise invalid(path + ".source.type", f"must be {' or '.join(kinds)}, not {dumps(kind)}: "
                                             "this server fetches nothing")
    return kind, source


def search_result_block(block: JSON, path: str, history: History) -> Iterator[Part]:
    title, source = (required(block, f"{path}.{name}", str) for name in ("title", "source"))
    parts = messages_parts(block, path + ".content", "tool", history)
    yield "content", "\n\n".join([f"{title} ({source})", *parts["content"]])
    yield from (("images", image) for image in parts["images"])


def tool_use_block(block: JSON, path: str, history: History) -> Iterator[Part]:
    id, name = (required(block, f"{path}.{key}", str) for key in ("id", "name"))
    yield "tool_calls", history.call(id, name, required(block, path + ".input", dict))


def tool_result_block(block: JSON, path: str, history: History) -> Iterator[Part]:
    place = path + ".tool_use_id"
    message = history.result(required(block, place, str), place)
    parts = messages_parts(block, path + ".content", "tool", history)
    text = "\n\n".join(filter(None, parts["content"])) or NO_TEXT
    failed = optional(block, path + ".is_error", bool)
    message["content"] = "The tool failed: " + text if failed else text
    if parts["images"]:
        message["images"] = parts["images"]
    yield "results", message


def tool_reference_block(block: JSON, path: str, _history: History) -> Iterator[Part]:
    yield "content", "Tool loaded: " + required(block, path + ".tool_name", str)


def mid_conv_system_block(block: JSON, path: str, history: History) -> Iterator[Part]:
    parts = messages_parts(block, path + ".content", "system", history)
    return (("content", text) for text in parts["content"])


# The roles in whose content a block may stand (tool: in a tool result or a document); its reader.
MESSAGES_BLOCKS: Dict[str, Tuple[Sequence[str], Callable[[JSON, str, History], Iterator[Part]]]] = {
    "text": (("user", "assistant", "system", "tool"), text_block),
    "image": (("user", "tool"), image_block),
    "document": (("user", "tool"), document_block),
    "search_result": (("user", "tool"), search_result_block),
    "mid_conv_system": (("user",), mid_conv_system_block),
    "thinking": (("assistant",), thinking_block),
    "redacted_thinking": (("assistant",), dropped_block),
    "tool_use": (("assistant",), tool_use_block),
    "tool_result": (("user",), tool_result_block),
    "tool_reference": (("tool",), tool_reference_block)}


def messages_tools(body: JSON, history: History) -> List[Tool]:
    """The tools to offer: without Anthropic's own, which have a type, and deferred ones."""
    tools = []
    for path, tool in items(optional(body, "tools", list) or [], "tools", dict):
        kind = optional(tool, path + ".type", str) or "custom"
        if kind != "custom" or optional(tool, path + ".defer_loading", bool):
            history.ignored.append(path)
            continue
        name = required(tool, path + ".name", str)
        if not name:
            raise invalid(path + ".name", "must not be empty")
        tools.append(Tool(name, optional(tool, path + ".description", str) or "",
                          optional(tool, path + ".input_schema", dict) or {},
                          path + ".input_schema"))
    return tools


def messages_choice(body: JSON, chat: Chat, tools: List[Tool]) -> None:
    """Offer the tools as tool_choice says, and bind the answer to a schema if one is given."""
    choice = optional(body, "tool_choice", dict) or {"type": "auto"}
    kind = one_of(choice, "tool_choice.type", ("auto", "any", "tool", "none"))
    chat.one_call = bool(optional(choice, "tool_choice.disable_parallel_tool_use", bool))
    if kind == "tool":
        name = one_of(choice, "tool_choice.name", [tool.name for tool in tools])
        tools = [tool for tool in tools if tool.name == name][:1]
    if kind == "any" and not tools:
        raise invalid("tool_choice.type", "is any, but no tool is offered")
    schema, path = messages_format(body)
    if kind in ("any", "tool"):
        chat.ignored += ["thinking"] if chat.body["think"] else []
        chat.ignored += [path] if schema is not None else []
        force_call(chat, tools)
    else:
        offer_tools(chat, [] if kind == "none" else tools, schema, path)


def messages_format(body: JSON) -> Tuple[Optional[JSON], str]:
    """The schema that the answer shall have, and its path; output_format is the older name."""
    config = optional(body, "output_config", dict) or {}
    for owner, path in ((config, "output_config.format"), (body, "output_format")):
        wanted = optional(owner, path, dict)
        if wanted is not None:
            one_of(wanted, path + ".type", ("json_schema",))
            return required(wanted, path + ".schema", dict), path + ".schema"
    return None, ""


EFFORT_LEVELS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "max", "max": "max"}


def messages_think(body: JSON, history: History) -> Union[bool, str]:
    """Ollama's `think`: off when absent, else on or at the level of output_config.effort."""
    thinking = optional(body, "thinking", dict) or {"type": "disabled"}
    kind = one_of(thinking, "thinking.type", ("enabled", "adaptive", "between_tools", "disabled"))
    config = optional(body, "output_config", dict) or {}
    effort = config.get("effort")
    if effort is not None:
        effort = one_of(config, "output_config.effort", EFFORT_LEVELS)
    if kind == "disabled":
        history.ignored += ["output_config.effort"] if effort else []
        return False
    return EFFORT_LEVELS[effort] if effort else True


def messages_reply(chat: Chat, events: Iterator[Event]) -> JSON:
    """The Message object for a client that does not stream."""
    parts, finish = collected(events)
    content = [messages_block(kind, list(run)) for kind, run in runs_of(parts)]
    return messages_object(chat, content, finish)


def messages_object(chat: Chat, content: List[JSON], finish: Finish) -> JSON:
    return {"id": new_id("msg_"), "type": "message", "role": "assistant",
            "model": chat.body["model"], "content": content, **messages_stop(finish),
            "usage": messages_usage(finish)}


STOP_REASONS = {"length": "max_tokens", "stop_sequence": "stop_sequence", "tool_calls": "tool_use"}


def messages_stop(finish: Finish) -> JSON:
    return {"stop_reason": STOP_REASONS.get(finish.reason, "end_turn"),
            "stop_sequence": finish.stop_sequence}


def messages_usage(finish: Finish) -> JSON:
    cached = finish.cached_tokens or 0
    return {"input_tokens": finish.prompt_tokens - cached,
            "output_tokens": finish.completion_tokens,
            "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}


def messages_block(kind: type, parts: List[Any]) -> JSON:
    """A content block of what it has so far."""
    if kind is ToolCall:
        return {"type": "tool_use", "id": new_id("toolu_"), "name": parts[0].name,
                "input": parts[0].arguments}
    text = "".join(part.text for part in parts)
    if kind is Thinking:
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def messages_stream(chat: Chat, events: Iterator[Event]) -> Iterator[bytes]:
    """The frames for a client that streams: message_start, the blocks, message_delta, message_stop.

    Ollama counts the prompt in its last line only, so message_start has an estimate, and
    message_delta the count, which the SDKs let replace it."""
    events = begun(events)
    start = Finish("", chat.prompt_tokens, 0)
    yield sse({"type": "message_start",
               "message": {**messages_object(chat, [], start), "stop_reason": None}})
    for index, (kind, run) in enumerate(runs_of(events)):
        if kind is Finish:
            finish = next(run)
            yield sse({"type": "message_delta", "delta": messages_stop(finish),
                       "usage": messages_usage(finish)})
            yield sse({"type": "message_stop"})
        else:
            yield from messages_block_frames(index, kind, run)


def messages_block_frames(index: int, kind: type, run: Iterator[Any]) -> Iterator[bytes]:
    def delta(**fields: str) -> bytes:
        return sse({"type": "content_block_delta", "index": index, "delta": fields})

    def start(block: JSON) -> bytes:
        return sse({"type": "content_block_start", "index": index, "content_block": block})

    if kind is ToolCall:
        block = messages_block(kind, list(run))
        yield start({**block, "input": {}})
        yield delta(type="input_json_delta", partial_json=dumps(block["input"]))
    else:
        yield start(messages_block(kind, []))
        of_text = prepared(lambda text: delta(type="thinking_delta", thinking=text)
                           if kind is Thinking else delta(type="text_delta", text=text))
        yield from (of_text(part.text) for part in run)
    if kind is Thinking:
        yield delta(type="signature_delta", signature="")
    yield sse({"type": "content_block_stop", "index": index})


MESSAGES_ERRORS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                   413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error"}


def messages_error(error: APIError, request_id: str) -> JSON:
    """An error object; the same JSON, as an event, ends a stream that fails."""
    otherwise = "invalid_request_error" if error.status < 500 else "api_error"
    kind = "overloaded_error" if error.retry_after else MESSAGES_ERRORS.get(error.status, otherwise)
    details = {"details": error.details} if error.details else {}
    return {"type": "error", "error": {"type": kind, "message": error.message, **details},
            "request_id": request_id}


# ---- OpenAI's words ------------------------------------------------------------------------------
# What the dialects of OpenAI have in common: roles, parts of content, tools, reasoning, errors.
# Reasoning and Ollama's own settings are taken under every name that is in use for them.

OPENAI_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant",
                "tool": "tool", "function": "tool"}
OpenAIParts = Dict[str, Tuple[Sequence[str], Callable[[JSON, str], Part]]]


def openai_content(owner: JSON, path: str, role: str, kinds: OpenAIParts) -> OllamaMessage:
    """A message of a content that is a string or a list of parts. `kinds` has, for each kind of
    part, the roles in whose content it may stand, and its reader."""
    fitting_kinds = [kind for kind, (roles, _) in kinds.items() if role in roles]
    parts: Dict[str, List[str]] = {"content": [], "images": []}
    for place, part in blocks_of(owner, path):
        key, text = kinds[one_of(part, place + ".type", fitting_kinds)][1](part, place)
        parts[key].append(text)
    message: OllamaMessage = {"role": role, "content": "\n\n".join(parts["content"])}
    if parts["images"]:
        message["images"] = parts["images"]
    return message


def text_part(part: JSON, path: str) -> Part:
    return "content", required(part, path + ".text", str)


def refusal_part(part: JSON, path: str) -> Part:
    return "content", required(part, path + ".refusal", str)


def image_part(part: JSON, path: str) -> Part:
    """An image_url: an object with a data URL, or as some clients have it, the URL alone."""
    place = path + ".image_url"
    if not isinstance(part.get("image_url"), str):
        part, place = required(part, place, dict), place + ".url"
    return "images", data_url(required(part, place, str), place)


def openai_earlier_call(function: JSON, path: str, history: History, id: str = "") -> JSON:
    """An earlier call. The older function_call has no id, so its name stands in for it."""
    name = required(function, path + ".name", str)
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = strict_json(arguments.encode(), Config.json_depth)
        except ValueError as error:
            raise invalid(path + ".arguments", f"is not JSON: {error}") from error
    return history.call(id or name, name, checked(arguments, path + ".arguments", dict))


def openai_tool(function: JSON, path: str) -> Tool:
    name = required(function, path + ".name", str)
    if not name:
        raise invalid(path + ".name", "must not be empty")
    return Tool(name, optional(function, path + ".description", str) or "",
                optional(function, path + ".parameters", dict) or {}, path + ".parameters")


def openai_choice(chat: Chat, mode: str, tools: List[Tool], schema: Optional[JSON],
                  path: str) -> None:
    """Offer tools as tool_choice says, or bind the answer to a call or a schema."""
    if mode == "required":
        chat.ignored += ["reasoning_effort"] if chat.body.get("think") else []
        chat.ignored += [path] if schema is not None else []
        force_call(chat, tools)
    else:
        offer_tools(chat, [] if mode == "none" else tools, schema, path)


def openai_extras(body: JSON, chat: Chat) -> None:
    """Ollama's own settings that are not options."""
    keep_alive, think = ollama_keep_alive(body), openai_think(body)
    if keep_alive is not None:
        chat.body["keep_alive"] = keep_alive
    if think is not None:
        chat.body["think"] = think


REASONING_EFFORTS: Dict[str, Union[bool, str]] = {
    "none": False, "minimal": "low", "low": "low", "medium": "medium", "high": "high",
    "xhigh": "max", "ultra": "max", "max": "max"}


def openai_think(body: JSON) -> Union[None, bool, str]:
    """How much to think, by the first name that says so; None leaves it to Ollama."""
    reasoning = optional(body, "reasoning", dict) or {}
    for owner, path in ((body, "reasoning_effort"), (reasoning, "reasoning.effort")):
        if owner.get(path.rpartition(".")[2]) is not None:
            return REASONING_EFFORTS[one_of(owner, path, REASONING_EFFORTS)]
    if isinstance(body.get("think"), str):
        return one_of(body, "think", ("low", "medium", "high", "max"))
    think = optional(body, "think", bool)
    template = optional(body, "chat_template_kwargs", dict) or {}      # as for vLLM
    enabled = optional(template, "chat_template_kwargs.enable_thinking", bool)
    return enabled if think is None else think


OPENAI_ERRORS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                 429: "rate_limit_error"}


def openai_error(error: APIError, _request_id: str) -> JSON:
    """An error object, as all OpenAI endpoints have it; as a frame it ends a stream that fails."""
    otherwise = "invalid_request_error" if error.status < 500 else "api_error"
    message = error.message
    if isinstance(error, PromptTooLong):
        message = (f"This model's maximum context length is {error.context} tokens. "
                   f"However, your messages resulted in {error.prompt_tokens} tokens.")
    return {"error": {"message": message, "type": OPENAI_ERRORS.get(error.status, otherwise),
                      "param": error.param, "code": error.code}}


# ---- OpenAI Chat Completions ---------------------------------------------------------------------
# POST /v1/chat/completions as OpenAI documents it, for the openai SDKs and all that is built on
# them; for people with curl `system` at the top level, and a stream unless "stream" is false.
# Reasoning goes out under both names in use, reasoning_content (DeepSeek's, vLLM's) and reasoning
# (Ollama's). Keep-alives are comments, since openai-python to 3.54 parses every other line as JSON;
# role comes once and finish_reason in a chunk of its own, since its accumulator adds strings up.

CHAT_PINGS = itertools.repeat(b": ping\n\n")


def chat_completions(ollama: Ollama, request: Request) -> Answer:
    """POST /v1/chat/completions"""
    chat = chat_request(request.body)
    if chat.stream is None:
        chat.stream = wants_stream(request.headers, ollama.config.default_stream)
    return ollama.answer(chat, chat_reply, chat_stream, CHAT_PINGS)


def wants_stream(headers: Mapping[str, str], default: str) -> bool:
    """Whether a client that does not say so wants a stream.

    SDKs do not, and can be told by their headers; people with curl, requests or urllib do. The
    Vercel AI SDK 6 and Node's fetch send Accept */*, but Sec-Fetch-Mode."""
    accept = headers.get("accept", "")
    if default != "auto" or "text/event-stream" in accept:
        return default != "off"
    return not ("application/json" in accept or "sec-fetch-mode" in headers
                or any(name.startswith("x-stainless-") for name in headers)
                or headers.get("user-agent", "").startswith(("ai/", "ai-sdk/")))


CHAT_OPTIONS = {
    **OLLAMA_OPTIONS,
    "max_tokens": Option("num_predict", int, at_least=1),
    "max_completion_tokens": Option("num_predict", int, at_least=1),     # overrides the older
    "temperature": Option("temperature", float),
    "top_p": Option("top_p", float),
    "seed": Option("seed", int),
    "frequency_penalty": Option("frequency_penalty", float),
    "presence_penalty": Option("presence_penalty", float)}
CHAT_FIELDS = {
    "model", "messages", "system", "stream", "stream_options.include_usage", "stop", "n",
    "tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "response_format",
    "logprobs", "top_logprobs", "reasoning_effort", "reasoning.effort",
    "chat_template_kwargs.enable_thinking", "options", "keep_alive", "think", "format",
    *CHAT_OPTIONS}


def chat_request(body: JSON) -> Chat:
    """A chat completion request as a chat for Ollama."""
    history = History()
    turns = [chat_turn(turn, path, history)
             for path, turn in items(required(body, "messages", list), "messages", dict)]
    if not turns:
        raise invalid("messages", "must not be empty")
    system = openai_content(body, "system", "system", CHAT_PARTS)["content"]
    early: List[OllamaMessage] = [{"role": "system", "content": system}] if system else []
    chat = chat_settings(body, {"messages": system_first(early + turns)})
    chat.ignored += unread(body, CHAT_FIELDS)
    chat.body.update(chat_logprobs(body))
    openai_extras(body, chat)
    chat_choice(body, chat, chat_tools(body))
    return chat


def chat_settings(body: JSON, asked: OllamaChat) -> Chat:
    """A chat with what completions have in common with it."""
    if optional(body, "n", int) not in (None, 1):
        raise invalid("n", "must be 1: Ollama gives one answer at a time")
    stream_options = optional(body, "stream_options", dict) or {}
    options, stop = ollama_options(body, CHAT_OPTIONS)
    return Chat({"model": required(body, "model", str), **asked, "options": options},
                stream=optional(body, "stream", bool), stop=chat_stop(body) + stop,
                include_usage=bool(optional(stream_options, "stream_options.include_usage", bool)))


CHAT_PARTS: OpenAIParts = {
    "text": (("system", "user", "assistant", "tool"), text_part),
    "refusal": (("assistant",), refusal_part),
    "image_url": (("user", "tool"), image_part)}


def chat_turn(turn: JSON, path: str, history: History) -> OllamaMessage:
    """One of `messages`."""
    role = OPENAI_ROLES[one_of(turn, path + ".role", OPENAI_ROLES)]
    if turn.get("content") is None and role not in ("assistant", "tool"):
        raise invalid(path + ".content", "is required")
    message = openai_content(turn, path + ".content", role, CHAT_PARTS)
    if role == "assistant":
        message.update(chat_said(turn, path, history))
    if role == "tool":
        message["content"] = message["content"] or NO_TEXT
        message.update(chat_result(turn, path, history))
    return message


def chat_said(turn: JSON, path: str, history: History) -> OllamaMessage:
    """What an assistant's message has beside its content."""
    said: OllamaMessage = {}
    thoughts = (optional(turn, path + ".reasoning_content", str)
                or optional(turn, path + ".reasoning", str))
    if thoughts:
        said["thinking"] = thoughts
    calls = []
    for place, call in items(optional(turn, path + ".tool_calls", list) or [],
                             path + ".tool_calls", dict):
        function = required(call, place + ".function", dict)
        calls.append(openai_earlier_call(function, place + ".function", history,
                                         required(call, place + ".id", str)))
    legacy = optional(turn, path + ".function_call", dict)
    if legacy:
        calls.append(openai_earlier_call(legacy, path + ".function_call", history))
    if calls:
        said["tool_calls"] = calls
    return said


def chat_result(turn: JSON, path: str, history: History) -> OllamaMessage:
    """Which call a tool's message answers. Some clients give the name in place of the id."""
    name = optional(turn, path + ".name", str)
    id = optional(turn, path + ".tool_call_id", str) or name
    if name and id not in history.calls:
        return {"tool_name": name}
    return history.result(required({"tool_call_id": id}, path + ".tool_call_id", str),
                          path + ".tool_call_id")


def chat_tools(body: JSON) -> List[Tool]:
    """The tools on offer; `functions` is their older form."""
    tools = [openai_tool(function, path)
             for path, function in items(optional(body, "functions", list) or [],
                                         "functions", dict)]
    for path, tool in items(optional(body, "tools", list) or [], "tools", dict):
        if optional(tool, path + ".type", str) not in (None, "function"):
            raise invalid(path + ".type", f"must be function, not {dumps(tool['type'])}")
        tools.append(openai_tool(required(tool, path + ".function", dict), path + ".function"))
    return tools


def chat_choice(body: JSON, chat: Chat, tools: List[Tool]) -> None:
    """Offer the tools as tool_choice says, and bind the answer to a schema if one is given."""
    chat.function_call = body.get("functions") is not None
    chat.one_call = (chat.function_call
                     or optional(body, "parallel_tool_calls", bool) is False)
    openai_choice(chat, *chat_chosen(body, tools), *chat_format(body))


def chat_chosen(body: JSON, tools: List[Tool]) -> Tuple[str, List[Tool]]:
    """tool_choice: none, auto or required, and the tools that it is about."""
    by_name = {tool.name: tool for tool in tools}
    path = "function_call" if body.get("tool_choice") is None else "tool_choice"
    choice = body.get(path) or "auto"
    if isinstance(choice, str):
        mode = one_of({path: choice}, path, ("auto", "none", "required"))
    elif path == "function_call":
        name = one_of(checked(choice, path, dict), path + ".name", by_name)
        mode, tools = "required", [by_name[name]]
    elif one_of(checked(choice, path, dict), path + ".type", ("function", "allowed_tools")) \
            == "function":
        function = required(choice, path + ".function", dict)
        mode, tools = "required", [by_name[one_of(function, path + ".function.name", by_name)]]
    else:
        mode, tools = chat_allowed(required(choice, path + ".allowed_tools", dict), by_name)
    if mode == "required" and not tools:
        raise invalid(path, "is required, but no tool is offered")
    return mode, tools


def chat_allowed(allowed: JSON, by_name: Mapping[str, Tool]) -> Tuple[str, List[Tool]]:
    path = "tool_choice.allowed_tools"
    mode = one_of(allowed, path + ".mode", ("auto", "required"))
    tools = []
    for place, tool in items(required(allowed, path + ".tools", list), path + ".tools", dict):
        function = required(tool, place + ".function", dict)
        tools.append(by_name[one_of(function, place + ".function.name", by_name)])
    return mode, tools


def chat_format(body: JSON) -> Tuple[Optional[JSON], str]:
    """The schema that the answer shall have, and its path: OpenAI's field, else Ollama's own."""
    wanted = optional(body, "response_format", dict) or {"type": "text"}
    kind = one_of(wanted, "response_format.type", ("text", "json_object", "json_schema"))
    if kind == "json_schema":
        path = "response_format.json_schema"
        return required(required(wanted, path, dict), path + ".schema", dict), path + ".schema"
    if kind == "json_object" or body.get("format") == "json":
        return {"type": "object"}, "response_format" if kind == "json_object" else "format"
    return optional(body, "format", dict), "format"


def chat_stop(body: JSON) -> List[str]:
    stop = body.get("stop")
    if isinstance(stop, str):
        return stop_texts([stop], "stop")
    return stop_texts(optional(body, "stop", list) or [], "stop")


def chat_logprobs(body: JSON) -> OllamaChat:
    wanted, top = optional(body, "logprobs", bool), optional(body, "top_logprobs", int)
    if top is not None and not 0 <= top <= 20:
        raise invalid("top_logprobs", "must be between 0 and 20")
    if not wanted:
        return {}
    return {"logprobs": True, **({} if top is None else {"top_logprobs": top})}


def chat_reply(chat: Chat, events: Iterator[Event]) -> JSON:
    """The completion object for a client that does not stream."""
    parts, finish = collected(events)
    texts = [part for part in parts if isinstance(part, Text)]
    thoughts = "".join(part.text for part in parts if isinstance(part, Thinking))
    calls = chat_calls(chat, [chat_call(part) for part in parts if isinstance(part, ToolCall)])
    content = "".join(text.text for text in texts)
    message = {"role": "assistant", "content": None if calls and not content else content,
               "refusal": None, **chat_reasoning(thoughts), **calls}
    choice = {"index": 0, "message": message, "finish_reason": chat_finish(chat, finish),
              "logprobs": chat_scores(itertools.chain(*(text.logprobs for text in texts)))}
    return {**chat_head(chat, "chat.completion"), "choices": [choice], "usage": chat_usage(finish)}


def chat_head(chat: Chat, kind: str, prefix: str = "chatcmpl-") -> JSON:
    """What a completion and each of its chunks begin with."""
    return {"id": new_id(prefix), "object": kind, "created": int(time.time()),
            "model": chat.body["model"]}


def chat_usage(finish: Finish) -> JSON:
    cached = finish.cached_tokens
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": finish.prompt_tokens, "completion_tokens": finish.completion_tokens,
            "total_tokens": finish.prompt_tokens + finish.completion_tokens, **details}


def chat_reasoning(text: str) -> JSON:
    return {"reasoning_content": text, "reasoning": text} if text else {}


def chat_scores(logprobs: Iterable[JSON]) -> Optional[JSON]:
    """Ollama's log probabilities in OpenAI's words, which are almost the same."""
    content = [{"bytes": None, "top_logprobs": [], **entry} for entry in logprobs]
    return {"content": content, "refusal": None} if content else None


FINISH_REASONS = {"stop_sequence": "stop"}


def chat_finish(chat: Chat, finish: Finish) -> str:
    if chat.function_call and finish.reason == "tool_calls":
        return "function_call"
    return FINISH_REASONS.get(finish.reason, finish.reason)


def chat_call(call: ToolCall) -> JSON:
    return {"id": new_id("call_"), "type": "function",
            "function": {"name": call.name, "arguments": dumps(call.arguments)}}


def chat_calls(chat: Chat, calls: List[JSON]) -> JSON:
    """The part of a message or of a delta that has the tool calls, if there are any."""
    if chat.function_call and calls:
        return {"function_call": calls[0]["function"]}
    return {"tool_calls": calls} if calls else {}


CHAT_DONE = b"data: [DONE]\n\n"


def chat_stream(chat: Chat, events: Iterator[Event]) -> Iterator[bytes]:
    """The chunks for a client that streams, and [DONE]."""
    def chunk(delta: JSON, finish_reason: Optional[str] = None,
              logprobs: Iterable[JSON] = ()) -> bytes:
        return sse({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason,
                                         "logprobs": chat_scores(logprobs)}]})

    events = begun(events)
    head = chat_head(chat, "chat.completion.chunk")
    text = prepared(lambda text: chunk({"content": text}))
    reasoning = prepared(lambda text: chunk(chat_reasoning(text)))
    indexes = itertools.count()              # by which clients put deltas of calls together
    yield chunk({"role": "assistant", "content": ""})
    for event in events:
        if isinstance(event, Text):
            yield (chunk({"content": event.text}, logprobs=event.logprobs) if event.logprobs else
                   text(event.text))
        elif isinstance(event, Thinking):
            yield reasoning(event.text)
        elif isinstance(event, ToolCall):
            yield chunk(chat_calls(chat, [{"index": next(indexes), **chat_call(event)}]))
        else:
            yield chunk({}, chat_finish(chat, event))
            if chat.include_usage:
                yield sse({**head, "choices": [], "usage": chat_usage(event)})
    yield CHAT_DONE


# ---- Completions and Embeddings ------------------------------------------------------------------
# POST /v1/completions, for editors that fill in the middle of a text, and for older programs: asks
# /api/generate, so that the model's template applies. Thoughts have no place there and are not
# asked for. POST /v1/embeddings, whose SDKs ask for base64 by default: little-endian float32.

def completions(ollama: Ollama, request: Request) -> Answer:
    """POST /v1/completions"""
    return ollama.answer(completions_request(request.body), completions_reply, completions_stream,
                         CHAT_PINGS)


COMPLETIONS_FIELDS = {"model", "prompt", "suffix", "stream", "stream_options.include_usage", "stop",
                      "n", "options", "keep_alive", *CHAT_OPTIONS}


def completions_request(body: JSON) -> Chat:
    prompts = texts_of(body, "prompt")
    if len(prompts) > 1:
        raise invalid("prompt", "must be one text: ask for each of several in a request of its own")
    asked: OllamaChat = {"prompt": prompts[0], "think": False}
    suffix = optional(body, "suffix", str)
    if suffix:
        asked["suffix"] = suffix
    chat = chat_settings(body, asked)
    chat.ignored += unread(body, COMPLETIONS_FIELDS)
    openai_extras({"keep_alive": body.get("keep_alive")}, chat)
    return chat


def texts_of(body: JSON, path: str) -> List[str]:
    """A field that is a string or a list of strings, none of them empty."""
    value = body.get(path)
    texts: List[Any] = [value] if isinstance(value, str) else required(body, path, list)
    if not texts:
        raise invalid(path, "must not be empty")
    for index, text in enumerate(texts):
        place = path if texts is not value else f"{path}.{index}"
        if type(text) in (int, list):
            raise invalid(place, "must be text: ids of OpenAI's tokens mean nothing to Ollama's "
                                 "models (LangChain: check_embedding_ctx_length=False)")
        if not checked(text, place, str):
            raise invalid(place, "must not be empty")
    return texts


def completions_reply(chat: Chat, events: Iterator[Event]) -> JSON:
    parts, finish = collected(events)
    text = "".join(part.text for part in parts if isinstance(part, Text))
    return {**chat_head(chat, "text_completion", "cmpl-"),
            **completions_choice(text, chat_finish(chat, finish)), "usage": chat_usage(finish)}


def completions_stream(chat: Chat, events: Iterator[Event]) -> Iterator[bytes]:
    events = begun(events)
    head = chat_head(chat, "text_completion", "cmpl-")
    for event in events:
        if isinstance(event, Text):
            yield sse({**head, **completions_choice(event.text, None)})
        elif isinstance(event, Finish):
            yield sse({**head, **completions_choice("", chat_finish(chat, event))})
            if chat.include_usage:
                yield sse({**head, "choices": [], "usage": chat_usage(event)})
    yield CHAT_DONE


def completions_choice(text: str, finish_reason: Optional[str]) -> JSON:
    return {"choices": [{"index": 0, "text": text, "logprobs": None,
                         "finish_reason": finish_reason}]}


EMBEDDINGS_FIELDS = {"model", "input", "encoding_format", "dimensions", "options", "keep_alive",
                     *OLLAMA_OPTIONS}


def embeddings(ollama: Ollama, request: Request) -> Answer:
    """POST /v1/embeddings. A text that is too long is an error, which Ollama by default cuts."""
    body = request.body
    texts = texts_of(body, "input")
    form = (optional(body, "encoding_format", str) or "float").lower()
    one_of({"encoding_format": form}, "encoding_format", ("float", "base64"))
    asked: JSON = {"model": required(body, "model", str), "input": texts,
                   "options": ollama_options(body, OLLAMA_OPTIONS)[0],
                   "keep_alive": ollama_keep_alive(body), **options_of(body, {
                       "dimensions": Option("dimensions", int, at_least=1)})}
    answer = ollama.embed({name: value for name, value in asked.items() if value is not None})
    vectors: List[Any] = told(answer, "embeddings", [])
    if len(vectors) != len(texts):
        raise broken(f"{len(vectors)} embeddings for {len(texts)} texts")
    data = [{"object": "embedding", "index": index, "embedding": encoded(vector, form)}
            for index, vector in enumerate(vectors)]
    tokens = told(answer, "prompt_eval_count", 0)
    return Answer({"object": "list", "data": data, "model": body["model"],
                   "usage": {"prompt_tokens": tokens, "total_tokens": tokens}},
                  ignored=list(unread(body, EMBEDDINGS_FIELDS)))


def encoded(vector: Any, form: str) -> Union[str, List[float]]:
    try:
        packed = struct.pack(f"<{len(vector)}f", *vector)
    except (TypeError, struct.error, OverflowError) as error:
        raise broken(f"an embedding that is no list of numbers: {error}") from error
    return base64.b64encode(packed).decode() if form == "base64" else vector


# ---- OpenAI Responses ----------------------------------------------------------------------------
# POST /v1/responses, for Codex and the newest interface of the openai SDKs; stateless, so the whole
# conversation comes with each request. Frames are numbered, keep-alives among them: Codex to 0.169
# ignores comments, and every failure but response.failed, so that a stream words its own here.
# Items of an assistant in a row are one message to Ollama. A tool of a namespace is "space.name" to
# the model, and comes back in two; a custom tool is a function with one text, and comes back as it.

def responses(ollama: Ollama, request: Request) -> Answer:
    """POST /v1/responses"""
    chat = responses_request(request.body)
    stream = ResponseStream(chat)
    return ollama.answer(chat, responses_reply, lambda _, events: stream.frames(events),
                         stream.pings())


RESPONSES_OPTIONS = {
    **OLLAMA_OPTIONS,
    "max_output_tokens": Option("num_predict", int, at_least=1),
    "temperature": Option("temperature", float),
    "top_p": Option("top_p", float)}
RESPONSES_FIELDS = {
    "model", "input", "instructions", "stream", "tools", "tool_choice", "parallel_tool_calls",
    "text.format", "reasoning.effort", "reasoning_effort", "previous_response_id", "conversation",
    "prompt", "background", "options", "keep_alive", "think",
    "chat_template_kwargs.enable_thinking", *RESPONSES_OPTIONS}
RESPONSES_ECHO: JSON = {                 # what is repeated of a request, or else said
    "instructions": None, "metadata": {}, "parallel_tool_calls": True, "temperature": None,
    "top_p": None, "max_output_tokens": None, "tools": [], "tool_choice": "auto",
    "text": {"format": {"type": "text"}}, "reasoning": None}


def responses_request(body: JSON) -> Chat:
    """A request for a response as a chat for Ollama."""
    for field in ("previous_response_id", "conversation", "prompt"):
        if body.get(field) is not None:
            raise invalid(field, "is not known: nothing is kept here, send the whole conversation")
    if optional(body, "background", bool):
        raise invalid("background", "must be false: an answer comes at once, or as a stream")
    history = History()
    history.ignored += unread(body, RESPONSES_FIELDS)
    tools, kinds = responses_tools(body, history)
    instructions = optional(body, "instructions", str)
    system: List[OllamaMessage] = []
    if instructions:
        system.append({"role": "system", "content": instructions})
    options, stop = ollama_options(body, RESPONSES_OPTIONS)
    chat = Chat({"model": required(body, "model", str), "options": options,
                 "messages": system_first(system + responses_input(body, history))},
                stream=bool(optional(body, "stream", bool)), stop=stop, ignored=history.ignored,
                one_call=optional(body, "parallel_tool_calls", bool) is False, kinds=kinds,
                echo={name: body[name] if body.get(name) is not None else otherwise
                      for name, otherwise in RESPONSES_ECHO.items()})
    openai_extras(body, chat)
    responses_choice(body, chat, tools)
    return chat


def responses_input(body: JSON, history: History) -> List[OllamaMessage]:
    """`input`, a text or a list of items, as messages."""
    if isinstance(body.get("input"), str):
        return [{"role": "user", "content": body["input"]}]
    messages: List[OllamaMessage] = []
    for path, item in items(required(body, "input", list), "input", dict):
        kind = optional(item, path + ".type", str) or ("message" if "role" in item else None)
        if kind is None:
            raise invalid(path + ".type", "is required")
        for message in RESPONSES_ITEMS.get(kind, dropped_item)(item, path, history):
            if messages and messages[-1]["role"] == message["role"] == "assistant":
                message = joined(messages.pop(), message)
            messages.append(message)
    if not messages:
        raise invalid("input", "must not be empty")
    return messages


def joined(first: OllamaMessage, second: OllamaMessage) -> OllamaMessage:
    """Two messages of the assistant as one."""
    texts = [first["content"], second["content"]]
    thoughts = [first.get("thinking", ""), second.get("thinking", "")]
    calls = first.get("tool_calls", []) + second.get("tool_calls", [])
    both: OllamaMessage = {"role": "assistant", "content": "\n\n".join(filter(None, texts))}
    if any(thoughts):
        both["thinking"] = "\n\n".join(filter(None, thoughts))
    if calls:
        both["tool_calls"] = calls
    return both


def message_item(item: JSON, path: str, _history: History) -> Iterator[OllamaMessage]:
    role = OPENAI_ROLES[one_of(item, path + ".role", ("user", "assistant", "system", "developer"))]
    if item.get("content") is None:
        raise invalid(path + ".content", "is required")
    yield openai_content(item, path + ".content", role, RESPONSES_PARTS)


def call_item(item: JSON, path: str, history: History) -> Iterator[OllamaMessage]:
    id = required(item, path + ".call_id", str)
    name = spaced(optional(item, path + ".namespace", str), required(item, path + ".name", str))
    if item.get("type") == "custom_tool_call":
        item = {"arguments": {"input": required(item, path + ".input", str)}}
    yield {"role": "assistant", "content": "", "tool_calls": [
        openai_earlier_call({**item, "name": name}, path, history, id)]}


def output_item(item: JSON, path: str, history: History) -> Iterator[OllamaMessage]:
    place = path + ".call_id"
    message = openai_content(item, path + ".output", "tool", RESPONSES_PARTS)
    message["content"] = message["content"] or NO_TEXT
    message.update(history.result(required(item, place, str), place))
    yield message


def reasoning_item(item: JSON, path: str, _history: History) -> Iterator[OllamaMessage]:
    """Thoughts, which Codex sends back as they were; what is encrypted stays unread."""
    texts = [required(part, place + ".text", str) for name in ("summary", "content")
             for place, part in items(optional(item, f"{path}.{name}", list) or [],
                                      f"{path}.{name}", dict)]
    if texts:
        yield {"role": "assistant", "content": "", "thinking": "\n\n".join(texts)}


def tools_item(_item: JSON, _path: str, _history: History) -> Iterator[OllamaMessage]:
    return iter(())                                            # read by responses_tools


def dropped_item(_item: JSON, path: str, history: History) -> Iterator[OllamaMessage]:
    history.ignored.append(path)
    return iter(())


RESPONSES_ITEMS: Dict[str, Callable[[JSON, str, History], Iterator[OllamaMessage]]] = {
    "message": message_item, "reasoning": reasoning_item, "additional_tools": tools_item,
    "function_call": call_item, "function_call_output": output_item,
    "custom_tool_call": call_item, "custom_tool_call_output": output_item}
RESPONSES_PARTS: OpenAIParts = {
    "text": (("system", "user", "assistant", "tool"), text_part),       # what a string is read as
    "input_text": (("system", "user", "assistant", "tool"), text_part),
    "output_text": (("assistant", "user", "tool"), text_part),
    "refusal": (("assistant",), refusal_part),
    "input_image": (("user", "tool"), image_part)}


def spaced(namespace: Optional[str], name: str) -> str:
    """The name under which the model knows a tool of a namespace."""
    return name if not namespace or name.startswith(namespace + ".") else f"{namespace}.{name}"


TOOL_ITEMS = {"function": "function_call", "custom": "custom_tool_call"}


def responses_tools(body: JSON, history: History) -> Tuple[List[Tool], Dict[str, JSON]]:
    """The tools to offer, and what an item that calls one of them begins with, by its name."""
    tools: List[Tool] = []
    kinds: Dict[str, JSON] = {}

    def read(values: List[Any], path: str, namespace: str = "") -> None:
        for place, tool in items(values, path, dict):
            kind = required(tool, place + ".type", str)
            if kind == "namespace":
                name = spaced(namespace, required(tool, place + ".name", str))
                read(required(tool, place + ".tools", list), place + ".tools", name)
            elif kind in ("function", "custom"):
                found = custom_tool(tool, place) if kind == "custom" else openai_tool(tool, place)
                name = spaced(namespace, found.name)
                tools.append(found._replace(name=name))
                kinds[name] = {"type": TOOL_ITEMS[kind], "name": found.name,
                               **({"namespace": namespace} if namespace else {})}
            else:                                              # hosted by OpenAI
                history.ignored.append(place)

    read(optional(body, "tools", list) or [], "tools")
    for index, item in enumerate(list_of(body.get("input"))):
        if isinstance(item, dict) and item.get("type") == "additional_tools":
            path = f"input.{index}.tools"
            read(required(item, path, list), path)
    return tools, kinds


def custom_tool(tool: JSON, path: str) -> Tool:
    """A tool that takes a text; its grammar, if it has one, is left to the model to read."""
    plain = openai_tool({**tool, "parameters": None}, path)
    form = optional(tool, path + ".format", dict) or {}
    notes = [plain.description, optional(form, path + ".format.definition", str) or ""]
    return plain._replace(description="\n\n".join(filter(None, notes)),
                          schema=object_schema(input={"type": "string"}))


def responses_choice(body: JSON, chat: Chat, tools: List[Tool]) -> None:
    """Offer the tools as tool_choice says, and bind the answer to a schema if one is given."""
    choice = body.get("tool_choice") or "auto"
    by_name = {tool.name: tool for tool in tools}
    by_name.update({chat.kinds[tool.name]["name"]: tool for tool in tools})
    if isinstance(choice, str):
        mode = one_of(body if choice != "auto" else {"tool_choice": choice}, "tool_choice",
                      ("auto", "none", "required"))
    elif one_of(checked(choice, "tool_choice", dict), "tool_choice.type",
                ("function", "custom", "allowed_tools")) == "allowed_tools":
        mode = one_of(choice, "tool_choice.mode", ("auto", "required"))
        allowed = required(choice, "tool_choice.tools", list)
        tools = [by_name[one_of(tool, path + ".name", by_name)]
                 for path, tool in items(allowed, "tool_choice.tools", dict)]
    else:
        mode, tools = "required", [by_name[one_of(choice, "tool_choice.name", by_name)]]
    if mode == "required" and not tools:
        raise invalid("tool_choice", "is required, but no tool is offered")
    openai_choice(chat, mode, tools, *responses_format(body))


def responses_format(body: JSON) -> Tuple[Optional[JSON], str]:
    wanted = optional(optional(body, "text", dict) or {}, "text.format", dict) or {"type": "text"}
    kind = one_of(wanted, "text.format.type", ("text", "json_object", "json_schema"))
    if kind == "json_schema":
        return required(wanted, "text.format.schema", dict), "text.format.schema"
    return ({"type": "object"} if kind == "json_object" else None), "text.format"


def responses_reply(chat: Chat, events: Iterator[Event]) -> JSON:
    """The response object for a client that does not stream."""
    parts, finish = collected(events)
    output = [responses_item(chat, kind, list(run)) for kind, run in runs_of(parts)]
    return {**responses_object(chat), **responses_end(output, finish)}


def responses_object(chat: Chat) -> JSON:
    """A response that has only begun."""
    return {"id": new_id("resp_"), "object": "response", "created_at": int(time.time()),
            "status": "in_progress", "model": chat.body["model"], "output": [], "error": None,
            "incomplete_details": None, "usage": None, "store": False, **chat.echo}


def responses_end(output: List[JSON], finish: Finish) -> JSON:
    """What a response has at its end: of the length that was allowed, it is incomplete."""
    cut = finish.reason == "length"
    return {"status": "incomplete" if cut else "completed", "output": output,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": responses_usage(finish)}


def responses_usage(finish: Finish) -> JSON:
    return {"input_tokens": finish.prompt_tokens,
            "input_tokens_details": {"cached_tokens": finish.cached_tokens or 0,
                                     "cache_write_tokens": 0},
            "output_tokens": finish.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": finish.prompt_tokens + finish.completion_tokens}


def responses_item(chat: Chat, kind: type, parts: List[Any], id: str = "") -> JSON:
    """An item of the output, of all its parts."""
    if kind is ToolCall:
        return responses_call(chat, parts[0])
    text = "".join(part.text for part in parts)
    if kind is Thinking:
        return {"id": id or new_id("rs_"), "type": "reasoning",
                "summary": [{"type": "summary_text", "text": text}]}
    return {"id": id or new_id("msg_"), "type": "message", "status": "completed",
            "role": "assistant", "content": [responses_part(text)]}


def responses_part(text: str) -> JSON:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def responses_call(chat: Chat, call: ToolCall) -> JSON:
    kind = chat.kinds.get(call.name, {"type": "function_call", "name": call.name})
    item = {"id": new_id("fc_"), **kind, "call_id": new_id("call_"), "status": "completed"}
    if kind["type"] == "function_call":
        return {**item, "arguments": dumps(call.arguments)}
    text = call.arguments.get("input")
    return {**item, "id": new_id("ctc_"),
            "input": text if isinstance(text, str) else dumps(call.arguments)}


# For an item of text: the key of its parts, its frames' names, and what else those of a text have.
TEXT_FRAMES: Dict[type, Tuple[str, str, str, JSON]] = {
    Text: ("content", "content_part", "output_text", {"logprobs": []}),
    Thinking: ("summary", "reasoning_summary_part", "reasoning_summary_text", {})}


class ResponseStream:
    """The frames of one streamed response, which are numbered throughout."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.number = 0
        self.response = responses_object(chat)

    def frame(self, kind: str, **fields: Any) -> bytes:
        data = {"type": "response." + kind, "sequence_number": self.number, **fields}
        self.number += 1
        return sse(data)

    def opening(self) -> bytes:
        created = self.frame("created", response=self.response) if not self.number else b""
        return created + self.frame("in_progress", response=self.response)

    def pings(self) -> Iterator[bytes]:
        while True:
            yield self.opening()

    def frames(self, events: Iterator[Event]) -> Iterator[bytes]:
        """All of them. Once one is out, also a ping, a failure is a frame as well."""
        try:
            events = begun(events)
            yield self.opening()
            yield from self.items(events)
        except APIError as error:
            if not self.number:
                raise
            told = openai_error(error, "")["error"]
            yield self.frame("failed", response={**self.response, "status": "failed", "error": {
                "code": told["code"] or "server_error", "message": told["message"]}})

    def items(self, events: Iterator[Event]) -> Iterator[bytes]:
        output: List[JSON] = []
        for index, (kind, run) in enumerate(runs_of(events)):
            if kind is Finish:
                end = responses_end(output, next(run))
                yield self.frame(end["status"], response={**self.response, **end})
            else:
                frames = self.call(index, run) if kind is ToolCall else self.text(index, kind, run)
                output.append((yield from frames))

    def text(self, index: int, kind: type,
             run: Iterator[Union[Text, Thinking]]) -> Generator[bytes, None, JSON]:
        parts_key, part_frames, text_frames, more = TEXT_FRAMES[kind]
        item = responses_item(self.chat, kind, [])
        place = {"item_id": item["id"], "output_index": index, parts_key + "_index": 0}
        status = {"status": "in_progress"} if "status" in item else {}
        yield self.frame("output_item.added", output_index=index,
                         item={**item, **status, parts_key: []})
        yield self.frame(part_frames + ".added", **place, part=item[parts_key][0])
        parts = []
        for part in run:
            parts.append(part)
            yield self.frame(text_frames + ".delta", **place, delta=part.text, **more)
        item = responses_item(self.chat, kind, parts, item["id"])
        whole_part = item[parts_key][0]
        yield self.frame(text_frames + ".done", **place, text=whole_part["text"], **more)
        yield self.frame(part_frames + ".done", **place, part=whole_part)
        yield self.frame("output_item.done", output_index=index, item=item)
        return item

    def call(self, index: int, run: Iterator[ToolCall]) -> Generator[bytes, None, JSON]:
        item = responses_item(self.chat, ToolCall, list(run))
        word = "arguments" if "arguments" in item else "input"
        kind = "function_call_arguments" if word == "arguments" else "custom_tool_call_input"
        place = {"item_id": item["id"], "output_index": index}
        yield self.frame("output_item.added", output_index=index,
                         item={**item, "status": "in_progress", word: ""})
        yield self.frame(kind + ".delta", **place, delta=item[word])
        yield self.frame(kind + ".done", **place, **{word: item[word]})
        yield self.frame("output_item.done", output_index=index, item=item)
        return item


# ---- Models and health ---------------------------------------------------------------------------
# One model object satisfies both SDKs. Anthropic's needs has_more: false, or it asks for ever;
# OpenAI's clients break on `data: null`. Sizes and capabilities are passed on where Ollama tells
# them (0.30 and later).

def models(ollama: Ollama, _request: Request) -> Answer:
    """GET /v1/models: all of them, whatever page a client asks for"""
    data = [model_object(model) for model in ollama.models()]
    return Answer({"object": "list", "data": data, "has_more": False,
                   "first_id": data[0]["id"] if data else None,
                   "last_id": data[-1]["id"] if data else None})


def one_model(ollama: Ollama, request: Request) -> Answer:
    """GET /v1/models/{id}, by any name that a request may use"""
    name = request.argument
    return Answer({**model_object(ollama.model(name)), "id": name})


def model_object(model: JSON) -> JSON:
    """A model of /api/tags, with the keys of OpenAI's model object and of Anthropic's."""
    name = model_name(model)
    modified = timestamp(told(model, "modified_at", ""))
    owner = name.rpartition("/")[0].rpartition("/")[2] or "library"
    answer = {"id": name, "object": "model", "created": int(modified.timestamp()),
              "owned_by": owner, "type": "model", "display_name": name,
              "created_at": modified.strftime("%Y-%m-%dT%H:%M:%SZ")}
    context = told(told(model, "details", {}), "context_length", 0)
    if context:
        answer.update(context_length=context, max_input_tokens=context)
    abilities: List[Any] = told(model, "capabilities", [])
    return {**answer, "capabilities": abilities} if abilities else answer


def timestamp(text: str) -> datetime:
    """Go's RFC 3339, whose nine decimals and Z Python before 3.11 does not read."""
    match = re.match(r"(\d+-\d+-\d+T\d+:\d+:\d+)(?:\.\d+)?(?:Z|([+-]\d+:\d+))?$", text)
    try:
        when = datetime.fromisoformat(match[1] + (match[2] or "+00:00") if match else text)
        return when.astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return datetime.fromtimestamp(0, timezone.utc)


def health(ollama: Ollama, _request: Request) -> Answer:
    """GET /health: whether Ollama answers, within two seconds"""
    told: JSON = {"ollama": ollama.config.ollama}
    try:
        version = ollama.get("/api/version", ollama.config.health_seconds).get("version")
    except APIError as error:
        return Answer({"status": "unavailable", **told, "error": error.message}, status=503)
    return Answer({"status": "ok", **told, "version": version})


def about(ollama: Ollama, _request: Request) -> Answer:
    """GET /"""
    return Answer({"name": "ollama_api.py", "version": __version__, "ollama": ollama.config.ollama,
                   "endpoints": [f"{route.method} {route.path}" for route in ROUTES]})


# ---- Ollama's own API ----------------------------------------------------------------------------
# What clients of Ollama's own API ask before they come to the others: passed on as it is, for
# `codex --oss` and those who look for a version first.

def ollama_version(ollama: Ollama, _request: Request) -> Answer:
    """GET /api/version, as Ollama has it"""
    return Answer(ollama.get("/api/version"))


def ollama_tags(ollama: Ollama, _request: Request) -> Answer:
    """GET /api/tags, as Ollama has it"""
    return Answer(ollama.get("/api/tags"))


# ---- Routes --------------------------------------------------------------------------------------
# The product on one screen. Clients get base URLs wrong in known ways (claude-code #20416), so a
# request's path is compared without its leading /v1 segments, however many, and without a trailing
# slash. {id} is the rest of the path, unquoted: model names may contain slashes. HEAD is GET.

Wording = Callable[[APIError, str], JSON]


class Route(NamedTuple):
    method: str                          # GET or POST
    path: str
    endpoint: Callable[[Ollama, Request], Answer]
    error: Optional[Wording] = None      # None: by the anthropic-version header


ROUTES = (
    Route("POST", "/v1/messages", messages, messages_error),
    Route("POST", "/v1/messages/count_tokens", count_tokens, messages_error),
    Route("POST", "/v1/chat/completions", chat_completions, openai_error),
    Route("POST", "/v1/completions", completions, openai_error),
    Route("POST", "/v1/embeddings", embeddings, openai_error),
    Route("POST", "/v1/responses", responses, openai_error),
    Route("GET", "/v1/models", models),
    Route("GET", "/v1/models/{id}", one_model),
    Route("GET", "/api/version", ollama_version),
    Route("GET", "/api/tags", ollama_tags),
    Route("GET", "/health", health),
    Route("GET", "/", about))


def bare(path: str) -> str:
    return re.sub(r"^(/+v1(?=/|$))+", "", path).rstrip("/")


PATTERNS = tuple((re.compile(re.escape(bare(route.path)).replace(re.escape("{id}"), "(.+)")), route)
                 for route in ROUTES)


def routes_for(path: str) -> List[Tuple[Route, str]]:
    """The rows that have this path, one for each method, and what stands for {id} in it."""
    plain = bare(path)
    matches = ((pattern.fullmatch(plain), route) for pattern, route in PATTERNS)
    return [(route, urllib.parse.unquote(match[1] if match.groups() else ""))
            for match, route in matches if match]


def allowed_methods(path: str) -> str:
    methods = {route.method for route, _ in routes_for(path)}
    return ", ".join(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))


def find_route(request: Request) -> Tuple[Route, str]:
    found = routes_for(request.path)
    if not found:
        raise APIError(404, f"There is no {dumps(request.path)} here; GET / lists what there is.")
    for route, argument in found:
        if route.method == request.method or (route.method, request.method) == ("GET", "HEAD"):
            return route, argument
    raise APIError(405, f"{request.method} does not go with {request.path} here; "
                        f"it takes {allowed_methods(request.path)}.")


def wording_for(request: Request) -> Wording:
    """The dialect in which a client is told of an error, on unknown paths too."""
    for route, _ in routes_for(request.path):
        if route.error:
            return route.error
    anthropic = "anthropic-version" in request.headers or bare(request.path).startswith("/messages")
    return messages_error if anthropic else openai_error


# ---- Tools ---------------------------------------------------------------------------------------
# Ollama has no tool_choice: a call that must be made is an answer that `format` binds to the tools'
# schemas, on any model, and that becomes a call here. The same where a client has a schema as well,
# beside which Ollama would never call a tool.

class Tool(NamedTuple):
    """A tool as a client defines it."""
    name: str
    description: str
    schema: JSON                       # of its arguments
    path: str                          # of the schema in the request

    def for_ollama(self) -> JSON:
        return {"type": "function", "function": {
            "name": self.name, "description": self.description,
            "parameters": tool_schema(self.schema)}}

    def for_model(self) -> JSON:
        return {"name": self.name, "description": self.description, "parameters": self.schema}


CALL_ONE = "Call the tool {}: answer with the JSON object of its arguments, and nothing else: {}"
CALL_ANY = ('Call one of these tools: answer with a JSON object of its "name" and "parameters", '
            'and nothing else: {}')
CALL_OR_ANSWER = ('Answer with a JSON object, and nothing else: to call a tool, of its "name" and '
                  '"parameters"; else of an "answer" with the schema {}. The tools: {}')
ANSWER = "Answer with JSON of this schema, and nothing else: {}"


def force_call(chat: Chat, tools: Sequence[Tool]) -> None:
    """Make the model call one of the tools, without thoughts, which `format` lets come first."""
    reducer = SchemaReducer()
    chat.body["think"] = False
    if len(tools) == 1:
        chat.decode = functools.partial(ToolCall, tools[0].name)
        bind(chat, reducer, arguments_schema(reducer, tools[0]),
             CALL_ONE.format(tools[0].name, plain_json(tools[0].for_model())))
    else:
        chat.decode = functools.partial(chosen, [tool.name for tool in tools], False)
        bind(chat, reducer, {"anyOf": [call_schema(reducer, tool) for tool in tools]},
             CALL_ANY.format(plain_json([tool.for_model() for tool in tools])))


def offer_tools(chat: Chat, tools: Sequence[Tool], schema: Optional[JSON], path: str) -> None:
    """Let the model call tools or answer; with the `schema` that the client has at `path`, if any.

    Given both `tools` and `format`, Ollama never calls a tool; so the choice becomes a schema."""
    reducer = SchemaReducer()
    if schema is None:
        chat.body.update({"tools": [tool.for_ollama() for tool in tools]} if tools else {})
        return
    answer = reducer.read(schema, path)
    if not tools:
        bind(chat, reducer, answer, ANSWER.format(plain_json(schema)))
        return
    chat.decode = functools.partial(chosen, [tool.name for tool in tools], True)
    calls = [call_schema(reducer, tool) for tool in tools]
    described = plain_json([tool.for_model() for tool in tools])
    bind(chat, reducer, {"anyOf": [*calls, object_schema(answer=answer)]},
         CALL_OR_ANSWER.format(plain_json(schema), described))


def object_schema(**properties: JSON) -> JSON:
    """Of an object with just these; in this order, which is the alphabet's too, because on the
    native path of 0.30 and later Ollama keeps to that, and the name must come first."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def call_schema(reducer: SchemaReducer, tool: Tool) -> JSON:
    return object_schema(name={"const": tool.name}, parameters=arguments_schema(reducer, tool))


def arguments_schema(reducer: SchemaReducer, tool: Tool) -> JSON:
    return {**reducer.read(tool.schema, tool.path), "type": "object"}


def bind(chat: Chat, reducer: SchemaReducer, schema: JSON, how: str) -> None:
    """Make `format` of a schema, and describe it in the system prompt, which Ollama does not."""
    chat.body["format"] = reducer.finished(schema)
    chat.ignored += reducer.left_out
    messages = chat.body["messages"]
    start = 1 if messages[0]["role"] == "system" else 0
    system: OllamaMessage = {"role": "system", "content": how}
    chat.body["messages"] = system_first([*messages[:start], system, *messages[start:]])


def chosen(names: Sequence[str], may_answer: bool, value: JSON) -> Event:
    """The tool call, or the answer, that an answer to CALL_ANY or CALL_OR_ANSWER is."""
    if may_answer and "answer" in value and "name" not in value:
        return Text(plain_json(value["answer"]))
    call = tool_call(value, "parameters")
    if call.name not in names:
        raise broken(f"a call of {dumps(call.name)[:80]}, which was not offered")
    return call


# ---- JSON schemas --------------------------------------------------------------------------------
# Ollama makes a grammar of `format`, and there are JSON schemas that stop its runner, hang a model
# or end the whole process, for everybody. So no client's schema reaches it: grammar_schema builds a
# new one, of the keywords that every release takes, and says what it left out. tool_schema does so
# for `tools`, of which Ollama reads even less.

SCHEMA_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
SCHEMA_FORMATS = ("date-time", "date", "time", "uuid")
SCHEMA_SHAPES = ("$ref", "const", "enum", "properties", "anyOf", "oneOf", "allOf")
SCHEMA_NOTES = {"title", "description", "default", "example", "examples", "deprecated", "readOnly",
                "writeOnly", "$schema", "$id", "$comment", "$defs", "definitions"}
SCHEMA_ITEMS = (0, 64)                       # 10,000 stop the runner of 0.20
SCHEMA_INTEGERS = (1 - 2**31, 2**31 - 1)
SCHEMA_LEVELS = 60
SCHEMA_DEFINITIONS = 1000


def grammar_schema(schema: Any, path: str) -> Tuple[JSON, List[str]]:
    """A client's JSON Schema (2020-12 or draft 7) as one for `format`, and what was left out.

    `path` is where it stands in the request; 400 where it is malformed, too deep or endless."""
    reducer = SchemaReducer()
    return reducer.finished(reducer.read(schema, path)), reducer.left_out


class Subschema(NamedTuple):
    """A part of a client's schema, where it stands, and the whole, in which references lead."""
    schema: Any
    path: str
    root: Any
    level: int = 0

    def inside(self, schema: Any, *names: object) -> Subschema:
        path = ".".join([self.path, *(str(name)[:99] for name in names)])
        return Subschema(schema, path, self.root, self.level + 1)


class SchemaReducer:
    """Builds one schema for `format`, of one of a client's or of several.

    What references lead to is collected in $defs at the root: no release looks anywhere else."""

    def __init__(self) -> None:
        self.left_out: List[str] = []
        self.names: Dict[int, str] = {}                  # of what is referred to, by its identity
        self.budget = 0                                  # how many bytes more there may be
        self.waiting: List[Tuple[str, Subschema]] = []   # definitions that are still to be built
        self.readers: Dict[str, Callable[[Subschema, str], JSON]] = {
            "type": self.read_type, "format": self.read_format,
            "enum": self.read_values, "const": self.read_values,
            "properties": self.read_properties, "required": self.read_required,
            "additionalProperties": self.read_additional,
            "items": self.read_items, "prefixItems": self.read_members,
            "anyOf": self.read_any_of, "oneOf": self.read_any_of, "allOf": self.read_all_of,
            "minItems": self.read_bound, "maxItems": self.read_bound,
            "minimum": self.read_bound, "maximum": self.read_bound, "$ref": self.read_reference}

    def read(self, schema: Any, path: str) -> JSON:
        """A whole schema of the client's."""
        self.budget += 8 * len(plain_json(schema)) + 2000
        return self.reduced(Subschema(schema, path, schema))

    def spend(self, at: Subschema, size: int) -> None:
        self.budget -= size
        if self.budget < 0:
            raise invalid(at.path, "the schema is too large with all that it refers to")

    def reduced(self, at: Subschema) -> JSON:
        """The keywords that are known and harmless. Of rival SHAPES Ollama would look at one alone;
        here it is the first in their order, and the others are reported."""
        if isinstance(at.schema, bool):
            return {} if at.schema else self.leave_out(at.path)
        schema = checked(at.schema, at.path, dict)
        if at.level > SCHEMA_LEVELS:
            raise invalid(at.path, f"is nested deeper than {SCHEMA_LEVELS} levels")
        schema = {word: value for word, value in schema.items()
                  if value is not None or word == "const"}
        at = at._replace(schema=schema)
        shapes = [word for word in SCHEMA_SHAPES if word in schema]
        shape = next((word for word in shapes if schema[word] != {}), "".join(shapes[:1]))
        beside = {"properties": "allOf"}.get(shape)
        self.spend(at, 20 + sum(map(len, schema)))
        kept: JSON = {}
        for word in schema:
            rival = word in shapes and word not in (shape, beside)
            if word in self.readers and not rival:
                kept.update(self.readers[word](at, word))
            elif word not in SCHEMA_NOTES:
                self.leave_out(f"{at.path}.{word}")
        if "properties" in kept and "allOf" in kept:     # Ollama would look at the first alone
            own = {word: kept.pop(word) for word in ("properties", "required") if word in kept}
            kept["allOf"] = [own, *kept["allOf"]]
        if "allOf" in kept and "additionalProperties" in kept:     # and at this before allOf
            del kept["additionalProperties"]
            self.leave_out(f"{at.path}.additionalProperties")
        return {"$ref": kept["$ref"]} if "$ref" in kept else kept

    def leave_out(self, path: str) -> JSON:
        if len(self.left_out) < REPORTED_FIELDS:
            self.left_out.append(path)
        return {}

    def read_type(self, at: Subschema, word: str) -> JSON:
        value, path = at.schema[word], f"{at.path}.{word}"
        names = list_of(value)
        known = [name for _, name in items(names, path, str) if name in SCHEMA_TYPES]
        if len(known) < len(names) or not known:
            self.leave_out(path)
        return {word: known if isinstance(value, list) else known[0]} if known else {}

    def read_format(self, at: Subschema, word: str) -> JSON:
        fits = at.schema[word] in SCHEMA_FORMATS and at.schema.get("type", "string") == "string"
        return {word: at.schema[word]} if fits else self.leave_out(f"{at.path}.{word}")

    def read_values(self, at: Subschema, word: str) -> JSON:
        if word == "enum" and not checked(at.schema[word], f"{at.path}.{word}", list):
            raise invalid(f"{at.path}.{word}", "must not be empty")
        self.spend(at, len(plain_json(at.schema[word])))
        return {word: at.schema[word]}

    def read_properties(self, at: Subschema, word: str) -> JSON:
        parts = checked(at.schema[word], f"{at.path}.{word}", dict)
        self.spend(at, sum(map(len, parts)))
        return {word: {name: self.reduced(at.inside(part, word, name))
                       for name, part in parts.items()}}

    def read_required(self, at: Subschema, word: str) -> JSON:
        path = f"{at.path}.{word}"
        names = checked(at.schema[word], path, list)
        properties = at.schema.get("properties")
        known = [name for _, name in items(names, path, str)
                 if isinstance(properties, dict) and name in properties]
        if len(known) < len(names):
            self.leave_out(path)
        return {word: known} if known else {}

    def read_additional(self, at: Subschema, word: str) -> JSON:
        value = at.schema[word]
        return {word: value if isinstance(value, bool) else self.reduced(at.inside(value, word))}

    def read_items(self, at: Subschema, word: str) -> JSON:
        if isinstance(at.schema[word], list):            # draft 7 had no prefixItems
            return {"prefixItems": self.members(at, word)}
        if "prefixItems" in at.schema:
            return {} if isinstance(at.schema[word], bool) else self.leave_out(f"{at.path}.{word}")
        return {word: self.reduced(at.inside(at.schema[word], word))}

    def read_members(self, at: Subschema, word: str) -> JSON:
        return {word: self.members(at, word)}

    def read_any_of(self, at: Subschema, word: str) -> JSON:
        return {"anyOf": self.members(at, word)}

    def read_all_of(self, at: Subschema, word: str) -> JSON:
        """Ollama merges objects only; what is alone may be of any kind (pydantic 1 does so)."""
        members = [member for member in self.members(at, word) if member]
        if len(members) == 1 and "properties" not in at.schema:
            return members[0]
        return {word: members} if members else {}

    def members(self, at: Subschema, word: str) -> List[JSON]:
        parts = checked(at.schema[word], f"{at.path}.{word}", list)
        if not parts:
            raise invalid(f"{at.path}.{word}", "must not be empty")
        return [self.reduced(at.inside(part, word, n)) for n, part in enumerate(parts)]

    def read_bound(self, at: Subschema, word: str) -> JSON:
        """A bound, if it and its partner are numbers that every release can work with."""
        of_items = word.endswith("Items")
        least, most = SCHEMA_ITEMS if of_items else SCHEMA_INTEGERS
        pair = [at.schema[name] for name in (
            ("minItems", "maxItems") if of_items else ("minimum", "maximum"))
            if type(at.schema.get(name)) is int and least <= at.schema[name] <= most]
        fits = (at.schema[word] in pair and type(at.schema[word]) is int and pair == sorted(pair)
                and (of_items or "integer" in list_of(at.schema.get("type"))))
        return {word: at.schema[word]} if fits else self.leave_out(f"{at.path}.{word}")

    def read_reference(self, at: Subschema, word: str) -> JSON:
        path = f"{at.path}.{word}"
        pointer = checked(at.schema[word], path, str)
        target = pointed_at(at.root, pointer)
        if target is None:
            raise invalid(path, f"{dumps(pointer)} leads nowhere")
        key = id(target)
        if key not in self.names:
            if len(self.names) >= SCHEMA_DEFINITIONS:
                raise invalid(path, f"is one of more than {SCHEMA_DEFINITIONS} references")
            name = re.sub(r"[^A-Za-z0-9_]", "", pointer.rpartition("/")[2]) or "root"
            while name in self.names.values():
                name += str(len(self.names))
            self.names[key] = name
            self.waiting.append((name, Subschema(target, path, at.root)))
        return {word: "#/$defs/" + self.names[key]}

    def finished(self, schema: JSON) -> JSON:
        """`schema` with the definitions that it needs; refused if one of them has no end."""
        built: Dict[str, JSON] = {}
        paths: Dict[str, str] = {}
        while self.waiting:
            name, target = self.waiting.pop(0)
            built[name], paths[name] = self.reduced(target), target.path
        open_ends = {name: set(direct_references(built[name])) for name in built}
        while open_ends:
            left = set(open_ends)
            closed = [name for name, others in open_ends.items() if not others & left]
            if not closed:
                raise invalid(paths[min(open_ends)], "leads back to itself")
            for name in closed:
                del open_ends[name]
        return ({**schema, "$defs": built} if built else schema) or {"type": "object"}


def direct_references(schema: JSON) -> Iterator[str]:
    """The definitions that an answer stands in before a character of it has been written."""
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2]
    for member in (*schema.get("anyOf", ()), *schema.get("allOf", ())):
        yield from direct_references(member)


def pointed_at(root: Any, pointer: str) -> Any:
    """What a fragment with a JSON Pointer (RFC 6901) leads to; None for nowhere."""
    if not re.fullmatch("#(/.*)?", pointer, re.DOTALL):
        return None
    for part in pointer.split("/")[1:]:
        name = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(root, list) and re.fullmatch("[0-9]{1,9}", name):
            root = root[int(name)] if int(name) < len(root) else None
        else:
            root = root.get(name) if isinstance(root, dict) else None
    return root


def tool_schema(schema: JSON) -> JSON:
    """A tool's schema as far as Ollama reads it, of the kinds that it demands, in the same order
    (of which its KV cache is a matter)."""
    budget = [8 * len(plain_json(schema)) + 2000]
    found = narrowed(schema, schema, budget, ())
    return {"type": "object", "properties": {}, **{
        word: found[word] for word in ("properties", "required") if word in found}}


def narrowed(schema: Any, root: Any, budget: List[int], within: Tuple[str, ...]) -> JSON:
    """One part of it, references resolved, for Ollama drops them. `within` has the references and
    steps that led here; `budget` is how many bytes more there may be, since what is referred to
    often would make much of little. Beyond it all is {}."""
    def inner(part: Any, step: str = "") -> JSON:
        return narrowed(part, root, budget, (*within, step))

    kept: JSON = {}
    budget[0] -= 20                          # a part costs time as well
    for word, value in schema.items() if isinstance(schema, dict) else ():
        budget[0] -= len(word)
        if budget[0] < 0 or len(within) > SCHEMA_LEVELS:
            break
        if word == "$ref" and isinstance(value, str) and value not in within:
            kept = merged(kept, inner(pointed_at(root, value), value))
        elif word == "allOf":
            for part in list_of(value):
                budget[0] -= sum(map(len, kept.values()))      # as merging them costs, each time
                kept = merged(kept, inner(part))
        else:
            kept = merged(kept, narrowed_word(word, value, inner, budget))
    return kept


def merged(first: JSON, second: JSON) -> JSON:
    """Two schemas of which both hold, as far as Ollama reads them."""
    both = {**first, **second}
    if "properties" in first and "properties" in second:
        both["properties"] = {**first["properties"], **second["properties"]}
    if "required" in first and "required" in second:
        both["required"] = list(dict.fromkeys(first["required"] + second["required"]))
    return both


def narrowed_word(word: str, value: Any, inner: Callable[[Any], JSON], budget: List[int]) -> JSON:
    if word == "properties" and isinstance(value, dict):
        budget[0] -= sum(map(len, value))
        return {word: {name: inner(part) for name, part in value.items()}}
    if word in ("anyOf", "oneOf") and isinstance(value, list) and value:
        return {"anyOf": [inner(part) for part in value]}
    if word == "items":
        return {word: inner(value)}
    found = narrowed_value(word, value)
    budget[0] -= len(plain_json(found))
    return found if budget[0] >= 0 else {}


def narrowed_value(word: str, value: Any) -> JSON:
    """A keyword that holds no schema."""
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


# ---- Asking Ollama -------------------------------------------------------------------------------
# The only section that decides what goes out, to one address and nowhere else: no proxies, no
# redirects. Every chat is streamed from Ollama, also when the client wants one JSON object, so that
# there is one path on which to fail, to wait and to cancel.

class Ollama:
    """One request's way to Ollama: a context manager that closes, at the end of the request, every
    connection that it opened, whatever iterators over them are still alive."""

    def __init__(self, config: Config, client: Client, rates: TokenRates) -> None:
        self.config, self.client, self.rates = config, client, rates
        self.opened = contextlib.ExitStack()
        self.first_at = 0.0                            # when the first chunk came, for the log
        self.finish: Optional[Finish] = None           # the same

    def __enter__(self) -> Ollama:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.opened.close()

    def chat(self, chat: Chat) -> Iterator[Event]:
        """POST /api/chat or generate: the events of the answer. Asks when it is first advanced."""
        body: JSON = {**chat.body, "stream": True}
        path = "/api/generate" if "prompt" in body else "/api/chat"
        chunks = self.timed(chunks_of(self.ask(path, body), self.config.line_bytes))
        for event in read_as(chat, self.noted(chat, events_of(chunks))):
            if isinstance(event, Finish):
                self.finish = event
            yield event

    def timed(self, chunks: Iterator[JSON]) -> Iterator[JSON]:
        """Note when the first chunk comes, for the log."""
        for chunk in chunks:
            self.first_at = self.first_at or time.monotonic()
            yield chunk

    def noted(self, chat: Chat, events: Iterator[Event]) -> Iterator[Event]:
        """Learn from Ollama's own count of the prompt."""
        for event in events:
            if isinstance(event, Finish):
                self.rates.learn(chat.body, event.prompt_tokens)
            yield event

    def answer(self, chat: Chat, reply: Callable[[Chat, Iterator[Event]], JSON],
               stream: Callable[[Chat, Iterator[Event]], Iterator[bytes]],
               pings: Iterator[bytes]) -> Answer:
        """Ask, and have the dialect word the answer in the way that the client wants it."""
        chat.prompt_tokens = self.rates.tokens(chat.body)
        events = self.chat(chat)
        if chat.stream:
            return Answer(stream(chat, events), pings=pings, ignored=chat.ignored)
        return Answer(reply(chat, events), ignored=chat.ignored)

    def embed(self, body: JSON) -> JSON:
        """POST /api/embed: the whole answer."""
        return parse_line(whole(self.ask("/api/embed", body), self.config.embed_bytes))

    def ask(self, path: str, body: JSON) -> http.client.HTTPResponse:
        """Ask by the name that the client gave, else by the one that an alias gives.

        `truncate` false makes an overflow an error: by default Ollama drops messages silently."""
        context = {"num_ctx": self.config.num_ctx} if self.config.num_ctx is not None else {}
        body = {**body, "options": {**context, **body["options"]}, "truncate": False}
        for name in self.names_for(body["model"]):
            try:
                if images_in(body):
                    self.demand_vision(name)
                return self.ask_model(path, {**body, "model": name})
            except APIError as error:
                if error.code != "model_not_found":
                    raise
        raise self.not_installed(body["model"])

    def ask_model(self, path: str, body: JSON) -> http.client.HTTPResponse:
        """Ask; ask again, where it is `think` that Ollama refuses."""
        while True:
            try:
                return self.open(path, body)
            except PromptTooLong as error:
                raise self.with_numbers(error, body) from error
            except APIError as error:
                body = other_think(body, error)

    def demand_vision(self, name: str) -> None:
        """Refuse images for a model that is blind: up to 0.20 it would answer all the same. Before
        0.6.4 Ollama did not know what its models can do."""
        response = self.open("/api/show", {"model": name}, self.config.ask_seconds)
        abilities: List[Any] = told(parse_line(whole(response, self.config.line_bytes)),
                                    "capabilities", ["vision"])
        if "vision" not in abilities:
            raise APIError(400, f"model: {dumps(name)} cannot see images.", param="model")

    def names_for(self, name: str) -> List[str]:
        """The names to try: the one asked for, and that of the first --alias that fits."""
        aliases = (alias.partition("=") for alias in self.config.alias)
        fitting = [model for pattern, _, model in aliases if fnmatch.fnmatchcase(name, pattern)]
        return [name] + fitting[:1]

    def not_installed(self, name: str) -> APIError:
        installed = ", ".join(map(model_name, self.models())) or "none"
        *_, last = names = self.names_for(name)
        alias = f", nor is {dumps(last)}, its --alias" if len(names) > 1 else ""
        return APIError(404, f"model: {dumps(name)} is not installed in Ollama{alias}. "
                             f"Installed: {installed}. To install it: ollama pull {last}",
                        param="model", code="model_not_found")

    def with_numbers(self, error: PromptTooLong, body: JSON) -> PromptTooLong:
        """Up to 0.29 Ollama does not tell them: the window of the loaded model, and an estimate."""
        if error.context:
            return error
        loaded = (told(model, "context_length", 0) for model in listed(self.get("/api/ps"))
                  if tagged(model_name(model)) == tagged(body["model"]))
        asked = body["options"].get("num_ctx")
        context = asked if isinstance(asked, int) else next(loaded, 0)
        return PromptTooLong(max(self.rates.tokens(body), context + 1), context)

    def models(self) -> List[JSON]:
        """The models that are installed, as /api/tags lists them."""
        return listed(self.get("/api/tags"))

    def model(self, name: str) -> JSON:
        """The installed model that a request for `name` is answered by."""
        installed = {tagged(model_name(model)): model for model in self.models()}
        for candidate in self.names_for(name):
            if tagged(candidate) in installed:
                return installed[tagged(candidate)]
        raise self.not_installed(name)

    def get(self, path: str, patience: Optional[float] = None) -> JSON:
        """GET a small JSON object, within `patience` seconds."""
        response = self.open(path, None, patience or self.config.ask_seconds)
        return parse_line(whole(response, self.config.line_bytes))

    def open(self, path: str, body: Optional[JSON] = None,
             patience: float = float("inf")) -> http.client.HTTPResponse:
        """Ask Ollama, and wait for the head of its answer."""
        def watch(sock: socket.socket) -> UpstreamSocket:
            upstream = Upstream(sock, self.client, self.config.ping, give_up)
            self.opened.callback(upstream.close)
            return UpstreamSocket(upstream)

        give_up = time.monotonic() + patience
        request = UpstreamRequest(self.config.ollama + path, body, self.config.ollama_key, watch)
        try:
            response: http.client.HTTPResponse = OPENER.open(
                request, timeout=min(patience, self.config.connect_seconds))
        except urllib.error.URLError as error:
            raise unreachable(self.config.ollama, error.reason) from error
        except (OSError, http.client.HTTPException) as error:
            raise broken(error) from error
        self.opened.callback(response.close)          # before its socket, or it complains (3.13)
        if response.status != 200:
            text = whole(response, self.config.line_bytes).decode("utf-8", "replace")
            raise refusal(response.status, text)
        return response


def other_think(body: JSON, error: APIError) -> JSON:
    """`body` with a `think` that the model may take, if it was `think` that Ollama refused."""
    if "think" in body and "does not support thinking" in error.message:
        return {name: value for name, value in body.items() if name != "think"}
    if isinstance(body.get("think"), str) and "think value" in error.message:
        return {**body, "think": True}               # this model or release knows no levels
    raise error


def tagged(name: str) -> str:
    """The full name of a model: Ollama ignores case, and a missing tag means latest."""
    return (name if ":" in name.rpartition("/")[2] else name + ":latest").lower()


def model_name(model: JSON) -> str:
    return told(model, "model", "") or told(model, "name", "")


def listed(answer: JSON) -> List[JSON]:
    """The models that /api/tags or /api/ps tells of."""
    models: List[Any] = told(answer, "models", [])
    if not all(isinstance(model, dict) for model in models):
        raise broken(f"models is {dumps(models)[:80]}")
    return models


def unreachable(url: str, reason: object) -> APIError:
    if isinstance(reason, (ConnectionResetError, BrokenPipeError)):
        return broken(reason)                   # it took the connection, not the request
    return APIError(503, f"Ollama does not answer at {url} ({reason}). Start it with `ollama serve`"
                         ", or say where it is with --ollama or OLLAMA_HOST.")


def broken(how: object) -> APIError:
    if isinstance(how, TimeoutError):
        return APIError(504, "Ollama did not answer in time.")
    reason = how if isinstance(how, str) else repr(how)
    return APIError(502, f"Ollama's answer is broken: {reason}.")


# What Ollama's refusals mean: the first pattern that is found in the text decides the status. Texts
# that blame the request come as 500 from some releases; and before 0.12.6 all came as 200.
REFUSALS = tuple((re.compile(pattern), status, code) for pattern, status, code in (
    (r"exceeds? .*context (length|size)|longer than the context", 400, "context_length_exceeded"),
    (r"^model .*not found", 404, "model_not_found"),
    (r"^404 page not found|^405 method not allowed", 502, None),  # an Ollama that is too old
    (r"does not support|is not supported|invalid (format|JSON schema|think value|model name)"
     r"|^option .* must be of type", 400, None),
    (r"server busy", 503, None)))
NUMBERS = re.compile(r"\((\d+) tokens\).*\((\d+) tokens\)")


def refusal(status: int, text: str) -> APIError:
    """What an Ollama that answered `status` with `text` means for the client.

    4xx keep status and text. 501 is about the request too. Any other 5xx becomes a 502, since Codex
    hides the text of a 500."""
    error = innermost_error(text)
    message = told(error, "message", "") or f"Ollama answered {status} without a word"
    meant = ((ours, code) for pattern, ours, code in REFUSALS if pattern.search(message))
    status, code = next(meant, (status, None))
    if code == "context_length_exceeded":
        numbers = NUMBERS.search(message)
        if numbers:
            return PromptTooLong(int(numbers[1]), int(numbers[2]))
        return PromptTooLong(told(error, "n_prompt_tokens", 0), told(error, "n_ctx", 0))
    if status == 501:
        status = 400
    elif not 400 <= status < 500 and status != 503:
        status, message = 502, "Ollama failed: " + message
    return APIError(status, message, code=code, retry_after=5 if status == 503 else None)


def innermost_error(text: str) -> JSON:
    """{"message": ...} out of {"error": "text"}, whose text since 0.30 may be such JSON again. Of
    what is no such JSON, a page of a proxy's maybe, the beginning."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        error = None
    if isinstance(error, str):
        return innermost_error(error)
    return error if isinstance(error, dict) else {"message": text.strip()[:1000]}


# ---- Counting tokens -----------------------------------------------------------------------------
# Ollama has no tokenizer to ask, but tells afterwards how many tokens a prompt had. From that it is
# learned, for each model, how many bytes of a prompt make a token.

IMAGE_TOKENS = 768                 # as Ollama estimates them
RATES_KEPT = 1000                  # of models; with an alias for *, their names are the clients'


class TokenRates:
    """How many bytes of a prompt make a token, for each model: Ollama has no tokenizer to ask, but
    tells afterwards how many there were. One for all requests of a server."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seen: Dict[str, Tuple[float, float]] = {}     # bytes and tokens, older ones fading

    def tokens(self, body: Mapping[str, Any]) -> int:
        """An estimate of the length of a prompt."""
        with self.lock:
            size, tokens = self.seen.get(body["model"], (4.0, 1.0))
        return max(1, int(prompt_bytes(body) * tokens / size) + IMAGE_TOKENS * images_in(body))

    def learn(self, body: Mapping[str, Any], tokens: int) -> None:
        """Take note of Ollama's count; not of one that leaves out what was cached (0.30.0), counts
        twice (a `format` with thoughts before it), or has images in it."""
        size = prompt_bytes(body)
        if "format" in body or images_in(body) or not size / 16 < tokens < size:
            return
        with self.lock:
            old_size, old_tokens = self.seen.pop(body["model"], (0.0, 0.0))
            self.seen[body["model"]] = old_size / 2 + size, old_tokens / 2 + tokens
            if len(self.seen) > RATES_KEPT:
                del self.seen[next(iter(self.seen))]


def prompt_bytes(body: Mapping[str, Any]) -> int:
    """The length of what the model gets to read: texts and tools, and four bytes a message for what
    its template adds."""
    messages = body.get("messages", ())
    texts = [text for message in messages
             for text in (message["content"], message.get("thinking", ""),
                          *map(plain_json, message.get("tool_calls", ())))]
    texts += [body.get("prompt", ""), body.get("suffix", ""), *list_of(body.get("input", "")),
              *map(plain_json, body.get("tools", ()))]
    return sum(len(text.encode()) for text in texts) + 4 * (len(messages) or 1)


def images_in(body: Mapping[str, Any]) -> int:
    return sum(len(message.get("images", ())) for message in body.get("messages", ()))


# ---- Events of an answer -------------------------------------------------------------------------
# Ollama's chunks become events, and filters over the events do what Ollama does not do by itself.
# read_as puts the filters in a row for each request.

def received(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body as it arrives: read1 returns what is there, where readline would cost more."""
    try:
        yield from iter(lambda: response.read1(64 * 1024), b"")
    except (OSError, http.client.HTTPException) as error:
        raise broken(error) from error


def whole(response: http.client.HTTPResponse, limit: int) -> bytes:
    body = bytearray()
    for data in received(response):
        body += data
        if len(body) > limit:
            raise broken(f"more than {limit} bytes")
    return bytes(body)


def chunks_of(response: http.client.HTTPResponse, limit: int) -> Iterator[JSON]:
    """Ollama's chunks, one JSON object a line (NDJSON)."""
    rest = bytearray()
    for data in received(response):
        rest += data
        if b"\n" in data:
            *lines, tail = bytes(rest).split(b"\n")
            rest = bytearray(tail)
            yield from map(parse_line, filter(bytes.strip, lines))
        elif len(rest) > limit:
            raise broken(f"a line of more than {limit} bytes")
    if rest.strip():
        yield parse_line(bytes(rest))


def parse_line(line: bytes) -> JSON:
    """A JSON object. (json.loads guesses encodings and looks for blanks, at twice the cost.)"""
    try:
        text = line.decode().strip(" \t\r\n")
        value, end = READER.raw_decode(text)
        if end < len(text):
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise broken(f"not JSON: {line[:80]!r}") from error
    if not isinstance(value, dict):
        raise broken(f"not an object: {line[:80]!r}")
    return value


def events_of(chunks: Iterator[JSON]) -> Iterator[Event]:
    """Take Ollama's chunks apart; nobody else does. Only `done` makes an answer whole.

    A tool call, and what comes after it, waits for that: Claude Code runs a tool as soon as its
    block is closed, and would run it again when the answer breaks off and is asked for again."""
    held: List[Event] = []
    for chunk in chunks:
        if "error" in chunk:               # under a 200
            raise refusal(500, dumps(chunk))
        message: JSON = chunk if "response" in chunk else told(chunk, "message", {})
        for event in parts_of(chunk, message):
            if held or isinstance(event, ToolCall):
                held.append(event)
            else:
                yield event
        if told(chunk, "done", False):
            reason = told(chunk, "done_reason", "") or "stop"
            if reason not in ("stop", "length"):       # load and unload answer no question
                raise broken(f"done_reason is {dumps(reason)[:80]}")
            yield from held
            yield Finish("tool_calls" if held and reason != "length" else reason,
                         told(chunk, "prompt_eval_count", 0), told(chunk, "eval_count", 0),
                         cached_tokens=told(chunk, "prompt_eval_cached_count", 0)
                         if "prompt_eval_cached_count" in chunk else None)
            return
    # Up to 0.32 it does so after 30 equal tokens in a row.
    raise broken("it ended without saying that it was done")


def parts_of(chunk: JSON, message: JSON) -> List[Event]:
    """What one chunk has of an answer: any of them, or nothing. /api/generate has `response`."""
    thoughts = told(message, "thinking", "")
    text = told(message, "content", "") or told(message, "response", "")
    logprobs: List[Any] = told(chunk, "logprobs", [])
    calls: List[Any] = told(message, "tool_calls", [])
    parts: List[Event] = [Thinking(thoughts)] if thoughts else []
    if text or logprobs and not thoughts:
        parts.append(Text(text, tuple(entry for entry in logprobs if isinstance(entry, dict))))
    return parts + [
        tool_call(told(call if isinstance(call, dict) else {}, "function", {}), "arguments")
        for call in calls]


def tool_call(value: JSON, arguments: str) -> ToolCall:
    """A call that the model or Ollama gives as JSON; its arguments may be absent, its name not."""
    if not told(value, "name", ""):
        raise broken(f"a tool call without a name: {dumps(value)[:80]}")
    return ToolCall(value["name"], told(value, arguments, {}))


def told(chunk: JSON, name: str, otherwise: T) -> T:
    """A field of Ollama's, which must be of the kind of `otherwise`, its value when absent."""
    value = chunk.get(name)
    if value is None:
        return otherwise
    if not isinstance(value, type(otherwise)):
        raise broken(f"{name} is {dumps(value)[:80]}")
    return value


def prefill(body: OllamaChat) -> str:
    """The beginning of the answer that the client gave as the last message."""
    last = body["messages"][-1] if "messages" in body else {}
    return last["content"] if last.get("role") == "assistant" else ""


def read_as(chat: Chat, events: Iterator[Event]) -> Iterator[Event]:
    """The events of an answer as the request wants them read."""
    if "tools" in chat.body:
        events = none_lost(events)
    if chat.decode:
        events = decoded(events, chat.decode, prefill(chat.body))
    elif prefill(chat.body):
        events = unrepeated(events, prefill(chat.body))
    if chat.one_call:
        events = first_call(events)
    if chat.stop:
        events = until_stop(events, chat.stop, chat.prompt_tokens)
    return events


def none_lost(events: Iterator[Event]) -> Iterator[Event]:
    """Refuse an answer that says nothing, but for thoughts and blanks, although the model wrote
    something: up to 0.32 Ollama swallows tool calls that it cannot parse, or did not offer."""
    said = False
    for event in events:
        said = said or isinstance(event, ToolCall) or (
            isinstance(event, Text) and bool(event.text.strip()))
        if isinstance(event, Finish) and not said and event.reason == "stop" \
                and event.completion_tokens > 1:
            raise APIError(502, "The model ended without an answer. If it wrote a tool call, "
                                "Ollama could not read it, and it is lost.")
        yield event


def decoded(events: Iterator[Event], decode: Callable[[JSON], Event],
            beginning: str) -> Iterator[Event]:
    """Turn an answer that is bound to be JSON into what it stands for, a tool call. Of one that was
    cut short nothing is left but the Finish that says so. `beginning` is as for unrepeated."""
    texts = []
    for event in events:
        if isinstance(event, Text):
            texts.append(event.text)
            continue
        if isinstance(event, Finish) and event.reason == "stop":
            found = decode(bound_object("".join(texts), beginning))
            yield found
            if isinstance(found, ToolCall):
                event = dataclasses.replace(event, reason="tool_calls")
        yield event


def bound_object(text: str, beginning: str) -> JSON:
    """The object that an answer is, with or without the beginning that the model was given."""
    error = "no JSON"
    for candidate in (text, text[len(beginning):] if text.startswith(beginning) else text):
        try:
            value = strict_json(candidate.encode("utf-8", "surrogatepass"), Config.json_depth)
        except ValueError as found:
            error = str(found)
            continue
        if isinstance(value, dict):
            return value
    raise broken(f"not a JSON object: {text[:80]!r}, {error}")


def first_call(events: Iterator[Event]) -> Iterator[Event]:
    """Drop all tool calls but the first."""
    calls = itertools.count()
    return (event for event in events if not isinstance(event, ToolCall) or next(calls) == 0)


def unrepeated(events: Iterator[Event], beginning: str) -> Iterator[Event]:
    """Drop the beginning of an answer where the model was given it: the native path of 0.30 and
    later repeats it at once, other releases go on from there."""
    held = Text("")
    for event in events:
        if isinstance(event, Text):
            held += event
            if beginning.startswith(held.text) and held.text != beginning:
                continue
            repeated = beginning and held.text.startswith(beginning)
            event = held.split(len(beginning))[1] if repeated else held
            beginning, held = "", Text("")
        elif held.text:
            yield held
            beginning, held = "", Text("")
        if event != Text(""):
            yield event


def until_stop(events: Iterator[Event], stops: Sequence[str],
               prompt_tokens: int) -> Iterator[Event]:
    """Cut the text at the stop text that is complete first, and say which it was.

    Sent to Ollama as `stop` they would replace the model's own list, and Ollama never tells which
    one it met. What may be the beginning of one is held back. Since Ollama's counts come last, the
    prompt's is the caller's estimate then, and the answer's the number of chunks."""
    held, chunks = Text(""), 0
    for event in events:
        chunks += 1
        if not isinstance(event, Text):
            if held != Text(""):
                yield held
            held = Text("")
            yield event
            continue
        held += event
        start, stop = first_stop(held.text, stops)
        if start:
            ready, held = held.split(start)
            yield ready
        if stop is not None:
            yield Finish("stop_sequence", prompt_tokens, chunks, stop)
            return


def first_stop(text: str, stops: Sequence[str]) -> Tuple[int, Optional[str]]:
    """Where the text ends that may go out, and the stop text that begins there, if it is complete.

    The one that ends first wins, so that the result does not depend on how the text arrives."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if found:
        return min(found)[1:]
    longest = min(len(text), max(map(len, stops)) - 1)
    for length in range(longest, 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return len(text) - length, None
    return len(text), None


# ---- Waiting for Ollama --------------------------------------------------------------------------
# Ollama sends not even a status line before the first token exists. So whenever http.client wants
# more bytes than have arrived, Upstream.readinto first flushes what the client has coming, and then
# waits for both sockets at once: for Ollama to send, for the client to leave, for a ping.

class Client(Protocol):
    """What the upstream needs of the client that it works for."""
    sock: socket.socket
    quiet_since: float                 # when it was last sent something, or pinged

    def flush(self) -> None:
        """Send what is pending; ClientLeft if it cannot be sent."""

    def ping(self) -> None:
        """Show that the answer is still being worked on."""

    def heard(self) -> bool:
        """Take what it sends early; False if that is enough. ClientLeft if it is the end."""


# Cheaper to make than epoll or kqueue, and unlike select without a limit of 1,024 descriptors.
Selector = getattr(selectors, "PollSelector", selectors.DefaultSelector)     # none on Windows


def when_ready(act: Callable[[], T], wait: Callable[[int], None], event: int) -> T:
    """The result of a call on a socket that does not block, made again after each wait for `event`.

    A socket with a timeout would be asked whether it is ready before each call: twice the calls for
    each token, and at each of them another thread may take the interpreter."""
    while True:
        try:
            return act()
        except BlockingIOError:
            wanted = event
        except ssl.SSLWantReadError:             # TLS may have to read to write, and vice versa
            wanted = selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            wanted = selectors.EVENT_WRITE
        wait(wanted)


def send_all(sock: socket.socket, data: Union[bytes, bytearray],
             wait: Callable[[int], None]) -> None:
    """As sendall, but each wait is for progress alone, and the caller's."""
    view = memoryview(data)
    while view:
        view = view[when_ready(functools.partial(sock.send, view), wait, selectors.EVENT_WRITE):]


class Upstream(io.RawIOBase):
    """The bytes that Ollama sends, for http.client to parse. Owns the real socket."""

    def __init__(self, sock: socket.socket, client: Client, ping: float, give_up: float) -> None:
        self.sock, self.client, self.ping, self.give_up = sock, client, ping, give_up
        sock.setblocking(False)
        self.selector = Selector()
        self.selector.register(sock, selectors.EVENT_READ)
        self.selector.register(client.sock, selectors.EVENT_READ)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.held():                      # to try first would be a call more for each token
            self.wait(selectors.EVENT_READ)
        return when_ready(functools.partial(self.sock.recv_into, buffer), self.wait,
                          selectors.EVENT_READ)

    def held(self) -> int:
        """How many bytes TLS has decrypted already, for which no socket becomes readable."""
        return self.sock.pending() if isinstance(self.sock, ssl.SSLSocket) else 0

    def wait(self, event: int) -> None:
        """Return when Ollama has sent something, or takes more; serve the client meanwhile."""
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
            ready = {key.fileobj for key, _ in
                     self.selector.select(min(ping_at, self.give_up) - now)}
            if self.client.sock in ready and not self.client.heard():
                self.selector.unregister(self.client.sock)
            if self.sock in ready:
                return

    def close(self) -> None:
        if not self.closed:
            self.selector.close()
            self.sock.close()
        super().close()


class UpstreamSocket:
    """What http.client takes for the socket. urllib closes it as soon as it has the head, while the
    body is still to come, and half-closing would tell Ollama that we left: so `close` is empty."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.request = bytearray()

    def sendall(self, data: bytes) -> None:
        self.request += data                          # the head comes first, and alone

    def send(self) -> None:
        """Send the request. If Ollama cuts it off, it may have said why: reading will tell."""
        with contextlib.suppress(ConnectionError):
            send_all(self.upstream.sock, self.request, self.upstream.wait)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self.upstream, 64 * 1024)

    def close(self) -> None:
        pass


Watch = Callable[[socket.socket], UpstreamSocket]


class UpstreamConnection(http.client.HTTPConnection):
    def __init__(self, watch: Watch, host: str, **how: Any) -> None:
        super().__init__(host, **how)
        self.watch = watch

    def connect(self) -> None:
        super().connect()
        self.sock = self.watched = self.watch(self.sock)

    def getresponse(self) -> http.client.HTTPResponse:
        self.watched.send()
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
    def http_open(self, request: UpstreamRequest) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(UpstreamConnection, request.watch), request)

    def https_open(self, request: UpstreamRequest) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(UpstreamTLSConnection, request.watch), request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


# Without build_opener's handlers: no proxy, no redirect, and every status comes back as an answer.
OPENER = urllib.request.OpenerDirector()
OPENER.add_handler(UpstreamHandler())


# ---- Reading HTTP --------------------------------------------------------------------------------
# BaseHTTPRequestHandler is unused: it drops the headers after a malformed line, takes a bare CR
# for a line end, answers a bad version without a status line, knows no deadline for a whole head,
# and runs an unread body as the next request. Here a head is read as bytes, under one deadline,
# and what is ambiguous is refused.

def wait_for(sock: socket.socket, seconds: float, event: int) -> None:
    """Wait until a socket can be read or written; socket.timeout if that takes too long."""
    with Selector() as selector:
        selector.register(sock, event)
        if not selector.select(max(seconds, 0)):
            raise socket.timeout


BARE_LF = re.compile(rb"(?<!\r)\n")


class Incoming:
    """The bytes that come from one client; with read_head and read_body all that touches them."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self.deadline = 0.0
        self.rate = float("inf")                 # bytes that earn a second more

    def within(self, seconds: float, rate: float = float("inf")) -> None:
        """Set the deadline for all that is read from here on."""
        self.deadline, self.rate = time.monotonic() + seconds, rate

    def until_deadline(self, event: int) -> None:
        wait_for(self.sock, self.deadline - time.monotonic(), event)

    def receive(self) -> None:
        """Wait for more bytes, until the deadline."""
        try:
            when_ready(self.take, self.until_deadline, selectors.EVENT_READ)
        except socket.timeout as error:
            raise APIError(408, "The request did not arrive in time.") from error
        except OSError as error:
            raise ClientLeft from error

    def early(self, enough: int) -> bool:
        """Take what has arrived already; whether that is not `enough` yet. (A peek would do, if TLS
        knew one; and there a readable socket may hold but half a record.)"""
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

    def begins(self, seconds: float) -> bool:
        """Wait for a request; False if none comes. RFC 9112, 2.2: skip empty lines before it."""
        self.within(seconds)
        try:
            for _ in range(8):                   # not for ever: it costs as much as a request
                self.buffer = self.buffer.lstrip(b"\r\n")
                if self.buffer:
                    return True
                self.receive()
        except (APIError, ClientLeft):
            pass
        return False

    def exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self.receive()
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def until(self, mark: bytes, limit: int) -> bytes:
        """What comes before `mark`, without it; 431 if that is more than `limit` bytes."""
        start = 0
        while True:
            end = self.buffer.find(mark, start)
            if (end if end >= 0 else len(self.buffer) - len(mark)) > limit:
                raise APIError(431, "The head of the request is too large.")
            if end >= 0:
                return self.exactly(end + len(mark))[:end]
            if BARE_LF.search(self.buffer, start):     # `mark` may never come
                raise APIError(400, "A line of the request ends in LF without CR.")
            start = max(0, len(self.buffer) - len(mark))
            self.receive()


REQUEST_LINE = re.compile(
    rb"([A-Za-z]{1,20}) (?:https?://([!-.0-~]+))?(/[!-~]*|\*) HTTP/([0-9]\.[0-9])")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
SINGLE_FIELDS = {"host", "content-length", "transfer-encoding", "content-type", "origin",
                 "authorization", "x-api-key", "expect"}


def read_head(incoming: Incoming, config: Config) -> Request:
    """Read the head of a request (RFC 9112, 3 to 5)."""
    incoming.within(config.head_seconds)
    line, *fields = incoming.until(b"\r\n\r\n", config.head_bytes).split(b"\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise APIError(400, "The request line is malformed.")
    method, authority, target, version = (part.decode("ascii") for part in match.groups(b""))
    if version not in ("1.0", "1.1"):
        raise APIError(505, f"HTTP {version} is not spoken here, HTTP/1.1 is.")
    if len(fields) > config.head_fields:
        raise APIError(431, f"The request has more than {config.head_fields} header fields.")
    headers = read_fields(fields)
    if "host" not in headers and version == "1.1":
        raise APIError(400, "The Host header is missing.")
    if authority:                                # RFC 9112, 3.2.2: it goes before the header
        headers["host"] = authority
    return Request(method, target.partition("?")[0], headers, version)


def read_fields(fields: Iterable[bytes]) -> Dict[str, str]:
    headers: Dict[str, str] = {}
    for field in fields:
        match = FIELD.fullmatch(field)
        if match is None:
            raise APIError(400, "A header field is malformed.")
        name, value = match[1].decode("ascii").lower(), match[2].decode("latin-1").strip(" \t")
        if name in headers and name in SINGLE_FIELDS:
            raise APIError(400, f"The {name} header occurs twice.")
        headers[name] = headers[name] + ", " + value if name in headers else value
    return headers


def body_length(request: Request) -> Optional[int]:
    """How many bytes of body follow the head; None says that it comes in chunks."""
    coding, length = (request.headers.get(name) for name in ("transfer-encoding", "content-length"))
    if coding is None:
        length = "0" if length is None else length
        if not re.fullmatch("[0-9]{1,18}", length):
            raise APIError(400, "The Content-Length header is malformed.")
        return int(length)
    if length is not None or request.version == "1.0":
        raise APIError(400, "Transfer-Encoding goes with neither Content-Length nor HTTP/1.0.")
    if coding.lower() != "chunked":
        raise APIError(501, "The only transfer coding that is understood is chunked.")
    return None


def read_body(incoming: Incoming, length: Optional[int], config: Config) -> bytes:
    """Read a body of `length` bytes, or a chunked one (RFC 9112, 7.1)."""
    incoming.within(config.body_seconds, 1e6)
    if length is not None:
        return incoming.exactly(fitting(length, config))
    body = bytearray()
    while True:
        match = CHUNK_SIZE.fullmatch(incoming.until(b"\r\n", 256))
        if match is None:
            raise APIError(400, "The size of a chunk is malformed.")
        size = int(match[1], 16)
        if size == 0:
            break
        fitting(len(body) + size, config)
        body += incoming.exactly(size)
        if incoming.exactly(2) != b"\r\n":
            raise APIError(400, "A chunk does not end where its size says.")
    for _ in range(config.head_fields):
        field = incoming.until(b"\r\n", config.head_bytes)
        if not field:
            return bytes(body)
        read_fields([field])                     # trailers mean nothing here
    raise APIError(431, "There are too many trailer fields.")


def fitting(size: int, config: Config) -> int:
    if size > config.body_bytes:
        raise APIError(413, f"The body is larger than {config.body_bytes} bytes.")
    return size


def parse_body(data: bytes, depth: int) -> JSON:
    """A body as a JSON object; 400 says what is wrong with it."""
    try:
        body = strict_json(data, depth)
    except ValueError as error:
        raise APIError(400, f"The body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise APIError(400, f"The body must be a JSON object, not {kind_of(body)}.")
    return body


def linger(sock: socket.socket, config: Config) -> None:
    """Close so that a refusal arrives: closing over unread bytes would reset the connection."""
    incoming = Incoming(sock)
    with contextlib.suppress(OSError, APIError, ClientLeft):
        sock.shutdown(socket.SHUT_WR)
        incoming.within(config.linger_seconds)
        for _ in range(512):                     # times 64 KB
            incoming.receive()
            incoming.buffer.clear()


# ---- Who may ask ---------------------------------------------------------------------------------
# Web pages are refused, but for those of this machine and of --allow-origin, and keys are demanded
# where there are some. Programs send no Origin.

def is_loopback(host: str) -> bool:
    """Whether a host name or address, with or without a port, is this machine's own."""
    name = re.sub(r":[0-9]*$", "", host) if host.count(":") == 1 or "]" in host else host
    name = name.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return False


def admit(request: Request, config: Config) -> None:
    """Refuse whom a web page sent. Programs send no Origin.

    A page of another site reaches us directly, or by a name of its own that leads to 127.0.0.1."""
    if is_loopback(config.host) and not is_loopback(request.headers.get("host", "localhost")):
        raise APIError(403, "The Host header names another machine than this one.")
    origin = request.headers.get("origin")
    if origin is None:
        if request.headers.get("sec-fetch-site") == "cross-site":
            raise APIError(403, "Web pages of other sites are not served.")
    elif origin not in config.allow_origin and not is_loopback(origin.partition("://")[2]):
        raise APIError(403, "Web pages of other machines are not served, but for --allow-origin.")


def demand_key(request: Request, config: Config) -> None:
    bearer = re.sub("^bearer +", "", request.headers.get("authorization", ""), flags=re.I)
    given = [key.encode("latin-1") for key in (request.headers.get("x-api-key", ""), bearer)]
    fits = [hmac.compare_digest(key.encode(), other) for key in config.api_key for other in given]
    if config.api_key and not any(fits):
        raise APIError(401, "The API key is missing or wrong.")


def cross_origin(request: Request) -> Dict[str, str]:
    """What lets the web page of an origin that was admitted read the reply (the Fetch standard,
    CORS). A preflight asks for header fields, and the SDKs send many: all are granted."""
    if "origin" not in request.headers:
        return {}
    fields = {"access-control-allow-origin": request.headers["origin"], "vary": "origin"}
    if request.method != "OPTIONS":
        return {**fields, "access-control-expose-headers": "request-id, x-request-id, retry-after, "
                                                           "x-should-retry, x-ignored-fields"}
    return {**fields, "access-control-allow-methods": allowed_methods(request.path),
            "access-control-allow-headers":
                request.headers.get("access-control-request-headers", "content-type"),
            "access-control-max-age": "600"}


# ---- Answering -----------------------------------------------------------------------------------
# One request and its reply. The reply's head leaves with its first bytes, so that whatever fails
# before them is a real status.

def reported(fields: Iterable[str]) -> str:
    """Names that clients chose, as a header field that no name can break."""
    plain = (name if re.fullmatch(r"[\w.$-]{1,199}", name, re.ASCII) else "?" for name in fields)
    return ", ".join(sorted(set(itertools.islice(plain, REPORTED_FIELDS))))


class Exchange:
    """One request and its reply. To the upstream it is the Client."""

    def __init__(self, server: Server, incoming: Incoming) -> None:
        self.server, self.config, self.incoming = server, server.config, incoming
        self.sock = incoming.sock
        self.id = new_id("req_")
        self.began = self.quiet_since = time.monotonic()
        self.request = Request("-", "-", {}, version="1.0")   # until the head has been read
        self.wording: Wording = openai_error
        self.unread = True                       # of the request, bytes are still on their way
        self.status = 0                          # 0 until the head of the reply is out
        self.pending: List[bytes] = []           # frames that have not been sent
        self.extra: Dict[str, str] = {}          # header fields of the reply
        self.counted = contextlib.ExitStack()    # among the requests that run
        self.pings: Optional[Iterator[bytes]] = None          # not None for a stream
        self.ollama: Optional[Ollama] = None

    def run(self) -> bool:
        """Answer one request; whether the connection may carry another. All failures end here."""
        with self.counted:
            try:
                self.attempt()
            except ClientLeft:
                self.status, self.unread = 499, True
            log(self.summary())
        if self.unread:
            linger(self.sock, self.config)
        return self.reusable()

    def attempt(self) -> None:
        try:
            self.answer()
        except APIError as error:
            self.fail(error)
        except ClientLeft:
            raise
        except Exception:                        # a bug of ours: for the log, not for the client
            log_traceback()
            self.fail(APIError(500, "Internal error of ollama_api.py; its log says more."))

    def answer(self) -> None:
        request = self.request = read_head(self.incoming, self.config)
        self.wording = wording_for(request)
        length = body_length(request)
        self.unread = length != 0
        admit(request, self.config)
        self.extra.update(cross_origin(request))
        if request.method == "OPTIONS":          # a preflight cannot carry a key
            self.write(self.head(204, {"allow": allowed_methods(request.path)}))
            return
        demand_key(request, self.config)
        route, request.argument = find_route(request)
        limit = self.config.running if route.method == "POST" else float("inf")
        self.counted.enter_context(self.server.one_more(limit))
        if route.method == "POST":
            request.body = self.read_json(length)
        self.serve(route)

    def read_json(self, length: Optional[int]) -> JSON:
        headers = self.request.headers
        if length == 0 and "content-length" not in headers:
            raise APIError(411, "The request needs a body with a Content-Length, or a chunked one.")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise APIError(415, "The body must not be compressed.")
        if headers.get("expect", "").lower() == "100-continue" and self.request.version != "1.0":
            fitting(length or 0, self.config)
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = read_body(self.incoming, length, self.config)
        self.unread = False
        body = parse_body(data, self.config.json_depth)
        if body.get("model") is None:
            body["model"] = self.config.model
        return body

    def serve(self, route: Route) -> None:
        with Ollama(self.config, self, self.server.rates) as self.ollama:
            answer = route.endpoint(self.ollama, self.request)
            if answer.ignored:
                self.extra["x-ignored-fields"] = reported(answer.ignored)
            if isinstance(answer.content, dict):
                self.send_json(answer.status, answer.content)
            else:
                self.send_stream(answer.content, answer.pings)

    def fail(self, error: APIError) -> None:
        """Say it with a status if there is still time, else with the last frame of the stream."""
        content = self.wording(error, self.id)
        if self.status or self.pending:
            self.pending.append(sse(content))
            self.end_stream()
            return
        if error.retry_after is None:
            self.extra["x-should-retry"] = "false"
        else:
            self.extra["retry-after"] = str(error.retry_after)
        if error.status == 405:
            self.extra["allow"] = allowed_methods(self.request.path)
        self.send_json(error.status, content)

    def send_json(self, status: int, content: JSON) -> None:
        body = (dumps(content) + "\n").encode()
        head = self.head(status, {"content-type": "application/json",
                                  "content-length": str(len(body))})
        self.write(head if self.request.method == "HEAD" else head + body)   # in one send

    def send_stream(self, frames: Iterable[bytes], pings: Iterator[bytes]) -> None:
        """Frames leave when the upstream is waited for, those that came together in one chunk; but
        some do when they are many, lest a fast upstream fills the memory for a slow client."""
        self.pings = pings
        for frame in frames:
            self.pending.append(frame)
            if len(self.pending) >= 256:
                self.flush()
        self.end_stream()

    def flush(self) -> None:
        if self.pending:
            self.write(self.taken())

    def ping(self) -> None:
        self.quiet_since = time.monotonic()
        if self.pings:
            self.pending.append(next(self.pings))
            self.flush()

    def heard(self) -> bool:
        return self.incoming.early(self.config.head_bytes)

    def end_stream(self) -> None:
        self.write(self.taken() + (b"0\r\n\r\n" if self.chunked() else b""))

    def taken(self) -> bytes:
        """The pending frames as bytes to send, after the head where it is not out yet."""
        data = b"".join(self.pending)
        self.pending.clear()
        if self.chunked() and data:
            data = b"%x\r\n%s\r\n" % (len(data), data)
        if self.status:
            return data
        fields = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        if self.chunked():
            fields["transfer-encoding"] = "chunked"
        return self.head(200, fields) + data

    def chunked(self) -> bool:
        return self.request.version != "1.0"     # for 1.0 the end of the connection is the end

    def reusable(self) -> bool:
        asked_to_close = "close" in self.request.headers.get("connection", "").lower()
        return not (self.unread or asked_to_close or not self.chunked() or self.server.draining)

    def head(self, status: int, fields: Mapping[str, str]) -> bytes:
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}",
                 "date: " + email.utils.formatdate(usegmt=True),
                 "request-id: " + self.id, "x-request-id: " + self.id,
                 "connection: " + ("keep-alive" if self.reusable() else "close")]
        lines += [f"{name}: {value}" for name, value in {**fields, **self.extra}.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        self.status = status
        return head

    def write(self, data: bytes) -> None:
        """Send all of data, to a client that may be slow, but not idle."""
        self.quiet_since = time.monotonic()
        try:
            send_all(self.sock, data,
                     functools.partial(wait_for, self.sock, self.config.write_seconds))
        except OSError as error:
            raise ClientLeft from error

    def summary(self) -> str:
        """The request's line in the log: never a prompt, a key or a query."""
        now = time.monotonic()
        words = [self.request.method, self.request.path[:200],
                 str(self.request.body.get("model", "-"))[:200], str(self.status)]
        finish = self.ollama and self.ollama.finish
        if self.ollama and self.ollama.first_at:
            words.append(f"first={self.ollama.first_at - self.began:.2f}s")
        if self.ollama and finish:
            rate = finish.completion_tokens / max(now - self.ollama.first_at, 1e-3)
            words.append(f"in={finish.prompt_tokens} out={finish.completion_tokens} {rate:.1f}/s")
        return " ".join([*words, f"total={now - self.began:.2f}s"])


def put(stream: str, text: str) -> None:
    """Write a line to stdout or stderr, in one go; if that is closed or absent, nothing happens."""
    file = getattr(sys, stream)
    try:
        if file is not None:
            file.write(text + "\n")
            file.flush()
    except BrokenPipeError:
        setattr(sys, stream, None)               # or what is left in it fails at exit: status 120
    except (OSError, ValueError):
        pass


def log(text: str) -> None:
    """A line to stderr, control bytes escaped."""
    safe = re.sub(r"[^\x20-\x7e]", lambda match: f"\\x{ord(match[0]):02x}", text)
    put("stderr", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {safe}")


def log_traceback() -> None:
    for line in traceback.format_exc().splitlines():
        log(line)


# ---- The server ----------------------------------------------------------------------------------
# ThreadingHTTPServer accepts and gives each connection a thread. This is about many clients at
# once: limits, bursts, and the end.

class Connection(socketserver.BaseRequestHandler):
    """One client's connection: its requests, one after the other."""
    server: Server

    def handle(self) -> None:
        config, sock = self.server.config, self.request
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        incoming = Incoming(sock)
        while incoming.begins(config.idle_seconds) and Exchange(self.server, incoming).run():
            pass


def tls_context(config: Config) -> Optional[ssl.SSLContext]:
    """The certificate to show; None for plain HTTP. OSError if it cannot be read."""
    if not config.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(config.tls_cert, config.tls_key or None)
    return context


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = os.name != "nt"        # there it would let two servers share a port

    def __init__(self, config: Config) -> None:
        self.config = config
        self.request_queue_size = config.backlog
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self.tls = tls_context(config)
        self.draining = False
        self.running = 0
        self.connected: Set[socket.socket] = set()
        self.rates = TokenRates()
        self.ended = threading.Condition()
        super().__init__((config.host, config.port), Connection)
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)     # HTTPServer's asks DNS for our name, slowly

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept a connection. TLS shakes hands when its thread first reads, within idle_seconds:
        here it would hold up all others."""
        try:
            sock, address = super().get_request()
        except OSError as error:
            if not isinstance(error, (BlockingIOError, ConnectionError)):
                time.sleep(0.1)                  # out of descriptors: it would fail again at once
            raise
        if self.tls is None:
            return sock, address
        return self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread; close one that would be too many.

        Not by threading.Thread, whose start waits until the thread runs: of 200 clients that come
        at once, the last one had its first token 1 to 3 s later."""
        with contextlib.suppress(RuntimeError):  # the system has no more threads
            if len(self.connected) < self.config.connections:
                self.connected.add(request)
                _thread.start_new_thread(self.process_request_thread, (request, client_address))
                return
        self.shutdown_request(request)

    def service_actions(self) -> None:
        """Accept all that wait: serve_forever takes one a round, and at each of its calls another
        thread may take the interpreter. (The last of the 200: after 0.4 s, not 0.7.)"""
        with contextlib.suppress(OSError):       # BlockingIOError: nobody else is there
            for _ in range(self.config.backlog):
                self.process_request(*self.get_request())

    def shutdown_request(self, request: Any) -> None:
        self.connected.discard(request)
        if isinstance(request, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                request.unwrap()                 # says that this is the end, and waits for nothing
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log_traceback()

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        name = "localhost" if host == "127.0.0.1" else f"[{host}]" if ":" in host else host
        return f"{'https' if self.tls else 'http'}://{name}:{port}"

    @contextlib.contextmanager
    def one_more(self, limit: float) -> Iterator[None]:
        """Count a running request; 503 when `limit` run already, or when we are about to leave."""
        with self.ended:
            if self.draining or self.running >= limit:
                raise APIError(503, "The server is shutting down." if self.draining else
                               f"The server is busy with {self.running} requests.", retry_after=1)
            self.running += 1
        try:
            yield
        finally:
            with self.ended:
                self.running -= 1
                self.ended.notify_all()

    def drain(self) -> None:
        """Accept nothing more, and give what runs its time to end."""
        self.draining = True
        self.shutdown()
        self.server_close()
        with self.ended:
            self.ended.wait_for(lambda: not self.running, self.config.grace_seconds)


# ---- The demo ------------------------------------------------------------------------------------
# `--demo` starts a stand-in for Ollama on a free port of this machine and points the server at it,
# so that the whole real path runs. It speaks the native wire as 0.32 does, and says what it is.

class DemoOllama(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: JSON = {"name": "demo:latest", "model": "demo:latest",
                   "modified_at": "2026-01-01T00:00:00Z", "details": {"context_length": 8192},
                   "capabilities": ["completion", "tools", "thinking"]}

    def do_GET(self) -> None:
        answers: Dict[str, JSON] = {"/api/version": {"version": "demo"},
                                    "/api/tags": {"models": [self.model]}}
        self.reply(200, [answers[self.path]] if self.path in answers else [])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = tagged(body["model"]) == self.model["name"]
        answers = {"/api/show": lambda _: [self.model], "/api/chat": self.chat,
                   "/api/generate": self.generate, "/api/embed": self.embed}
        self.reply(200 if known else 404, answers[self.path](body) if known else
                   [{"error": f"model '{body['model']}' not found"}])

    def chat(self, body: JSON) -> Iterator[JSON]:
        """An answer word by word, or a call of the first tool to who says "tool"."""
        last = body["messages"][-1]
        words = re.findall(r"\s*\S+", self.text(body, last["content"]))
        end = body["options"].get("num_predict", len(words))
        message: JSON = {"role": "assistant", "content": ""}
        if body.get("think"):
            yield {"message": {**message, "thinking": "What was said?"}}
        if "tools" in body and last["role"] == "user" and "tool" in last["content"].lower():
            function = body["tools"][0]["function"]
            words, message["tool_calls"] = [], [{"function": {
                "name": function["name"], "arguments": sample(function["parameters"], {})}}]
        for word in words[:end]:
            time.sleep(0.02)
            yield {"message": {**message, "content": word}, "done": False}
        yield {"message": message, "done": True,
               "done_reason": "stop" if end >= len(words) else "length",
               "prompt_eval_count": prompt_bytes(body) // 4, "eval_count": len(words[:end]) or 1}

    def generate(self, body: JSON) -> Iterator[JSON]:
        question: JSON = {"messages": [{"role": "user", "content": body["prompt"]}]}
        for chunk in self.chat({**body, **question}):
            yield {**chunk, "response": chunk["message"]["content"]}

    def embed(self, body: JSON) -> Iterator[JSON]:
        vectors = [[text.count(letter) / len(text) for letter in "etaoinsr"]
                   for text in body["input"]]
        yield {"embeddings": vectors, "prompt_eval_count": prompt_bytes(body) // 4}

    def text(self, body: JSON, said: str) -> str:
        if "format" in body:
            return plain_json(sample(body["format"], body["format"].get("$defs", {})))
        return f"This is a demo: no model is running. You said: {said}"

    def reply(self, status: int, lines: Iterable[JSON]) -> None:
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


def sample(schema: JSON, definitions: JSON, level: int = 0) -> Any:
    """A small value of a schema's kind; of one without end, a beginning. Bounds are not kept."""
    if "$ref" in schema and level < 4:
        return sample(definitions[schema["$ref"].rpartition("/")[2]], definitions, level + 1)
    if "anyOf" in schema:
        return sample(schema["anyOf"][0], definitions, level + 1)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if "properties" in schema:
        return {name: sample(schema["properties"][name], definitions, level + 1)
                for name in schema.get("required", ()) if name in schema["properties"]}
    values = {"object": {}, "array": [], "string": "demo", "boolean": True, "null": None}
    return values.get(list_of(schema.get("type", "object"))[0], max(0, schema.get("minimum", 0)))


def start_demo(config: Config) -> Config:
    """The configuration under which the server asks the stand-in, whatever model a client names."""
    demo = http.server.ThreadingHTTPServer(("127.0.0.1", 0), DemoOllama)
    threading.Thread(target=demo.serve_forever, daemon=True).start()
    return dataclasses.replace(config, alias=(*config.alias, "*=demo"),
                               ollama=f"http://127.0.0.1:{demo.server_address[1]}")


# ---- Options, start and end ----------------------------------------------------------------------
# Every field of Config that was made by `option` becomes --name and OLLAMA_API_NAME here. The
# command line overrides the environment, and that the default. The variable of an option that may
# be repeated has commas between its values.

EPILOG = """Each option is an environment variable as well: OLLAMA_API_PORT for --port, and so on;
but OLLAMA_HOST for --ollama, and OLLAMA_API_SERVER_KEY for --api-key. Several values have commas
between them; 1, true, yes and on mean that a switch is on. The command line overrides them.
OLLAMA_API_KEY is the key that is sent to an Ollama behind https."""


def parse_args(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """The configuration that was asked for; exits, with a line that says why, when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="ollama_api.py", usage="python ollama_api.py [options]", add_help=False, epilog=EPILOG,
        allow_abbrev=False, description=(__doc__ or "").partition("\n\nContents")[0],
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, width=100, max_help_position=28))
    group = parser.add_argument_group("options")
    for field in dataclasses.fields(Config):
        if "meaning" in field.metadata:
            group.add_argument("--" + field.name.replace("_", "-"), **argument(field, environ))
    group.add_argument("--version", action="version", version="ollama_api.py " + __version__,
                       help="print the version and exit")
    group.add_argument("--help", action="help", help="print this text and exit")
    values = vars(parser.parse_args(argv))
    try:
        values.update({name: tuple(value) for name, value in values.items()
                       if isinstance(value, list)}, ollama=ollama_url(values["ollama"]))
        config = checked_config(Config(**values, ollama_key=environ.get("OLLAMA_API_KEY", "")))
        tls_context(config)                      # here it can still be said in a line
        return config
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:                     # so is ssl.SSLError
        parser.error(f"--tls-cert, --tls-key: cannot be used: {error}")


class Repeated(argparse.Action):
    """Collects the values of an option that may be repeated. (argparse's own `append` would add
    them to those of the environment.)"""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(given if given is not self.default else ()), values])


def argument(field: Any, environ: Mapping[str, str]) -> JSON:
    """What argparse is told of an option. It converts a text from the environment by itself."""
    how = dict(field.metadata["how"])
    text = environ.get(how.pop("env", "OLLAMA_API_" + field.name.upper()), "")
    default: Any = text or field.default
    if how.get("action") == "append":
        how["action"], default = Repeated, [part for part in text.split(",") if part]
    elif how.get("action") == "store_true":
        default = text.lower() in ("1", "true", "yes", "on")
    shown = f" ({field.default})" if field.default not in (None, (), False, "") else ""
    return {**how, "default": default, "help": field.metadata["meaning"] + shown}


def checked_config(config: Config) -> Config:
    """What argparse cannot check; ValueError says it."""
    for ok, problem in (
            (0 <= config.port <= 65535, "--port: must be between 0 and 65535"),
            (0 < config.ping <= 3600, "--ping: must be above 0, and 3600 at most"),
            (config.num_ctx is None or config.num_ctx > 0, "--num-ctx: must be at least 1"),
            (config.default_stream in ("auto", "on", "off"), "--default-stream: auto, on or off"),
            (all(all(alias.partition("=")) for alias in config.alias),
             "--alias: must look like PATTERN=MODEL"),
            (all(re.fullmatch(r"null|\w[\w.+-]*://[^/\s]+", each) for each in config.allow_origin),
             "--allow-origin: must look like https://chat.example, without a path"),
            (all(key.strip() == key != "" for key in config.api_key),
             "--api-key: must not be empty, nor begin or end with a blank"),
            (config.tls_cert or not config.tls_key, "--tls-key: needs a --tls-cert"),
            (is_loopback(config.host) or config.api_key or config.insecure,
             f"--host: {config.host} can be reached by others: add an --api-key, or --insecure")):
        if not ok:
            raise ValueError(problem)
    return config


def ollama_url(text: str) -> str:
    """The URL that OLLAMA_HOST means to Ollama itself: host, host:port or a URL, of which anything
    may be missing; a scheme changes the default port. 0.0.0.0 is for servers: loopback is meant."""
    scheme, mark, rest = text.strip(" \t\"'").rpartition("://")
    with contextlib.suppress(ValueError):
        rest = f"[{ipaddress.IPv6Address(rest)}]"
    if scheme not in ("", "http", "https") or not re.fullmatch(r"[]A-Za-z0-9._:/\[-]*", rest):
        raise ValueError(f"--ollama: must be host, host:port or an http or https URL, not {text}")
    parts = urllib.parse.urlsplit(f"{scheme or 'http'}://{rest}")
    host = parts.hostname or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    port = parts.port or (11434 if not mark else 443 if scheme == "https" else 80)
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}"


def main() -> int:
    config = parse_args(sys.argv[1:], os.environ)
    allow_many_sockets()
    if config.demo:
        config = start_demo(config)
    try:
        server = Server(config)
    except OSError as error:
        print(f"ollama_api.py: cannot listen on {config.host} port {config.port}: {error}",
              file=sys.stderr)
        return 1
    sys.setswitchinterval(0.02)      # each thread that waits for the interpreter wakes that often
    work(server)
    return 0


def work(server: Server) -> None:
    """Serve until a signal comes, then let what runs end. A second signal ends the process."""
    try:
        threading.Thread(target=server.serve_forever, args=(0.2,), daemon=True).start()
        signal.signal(signal.SIGTERM, signal.default_int_handler)    # SIGINT has it, if not ignored
        put("stdout", banner(server))
        # Not in serve_forever, where the exception would fall upon a new connection; and not in one
        # long sleep, which a signal that another thread gets does not end.
        while True:
            time.sleep(0.2)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
    server.drain()


def banner(server: Server) -> str:
    """Where we listen, which Ollama was found or how to start it, and a line to try."""
    config = server.config
    lines = [f"ollama_api.py {__version__} listens on {server.url}"]
    body: JSON = {"messages": [{"role": "user", "content": "Hello!"}]}
    try:
        with contextlib.closing(Nobody()) as nobody, Ollama(config, nobody, server.rates) as ollama:
            version = ollama.get("/api/version", config.health_seconds).get("version")
            names = [model_name(model) for model in ollama.models()]
            wanted = {tagged(name) for name in ollama.names_for(config.model)}
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


class Nobody:
    """The client for whom the banner asks: it neither leaves nor waits for anything."""
    quiet_since = float("inf")

    def __init__(self) -> None:
        self.sock, self.other = socket.socketpair()

    def close(self) -> None:
        self.sock.close()
        self.other.close()

    def flush(self) -> None:
        pass

    def ping(self) -> None:
        pass

    def heard(self) -> bool:
        return False


def allow_many_sockets() -> None:
    """Raise this process's own limit of open files (256 on macOS, 1,024 on most Linux)."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource                          # not on Windows
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 16384 if hard == resource.RLIM_INFINITY else min(hard, 16384)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


if __name__ == "__main__":
    sys.exit(main())
