"""gRPC as this server speaks it, over real sockets: grpcio's client, and h2's for what that one never does."""

import asyncio
import contextlib
import gzip
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import uvloop

from serving.grpc_protocol import Server
from serving.listener import listen
from tests.process import free_port
from tests.serving.versions import wait_for

pytestmark = pytest.mark.alone

LIMIT = 2**20
MAX_CALLS = 20
# A test's own pause must not look like a request that never ends; where one is to be given up, it is soon.
PATIENCE_S = 30.0
SHORT_PATIENCE_S = 1.0
PATH = "/test.Test/"
HEAD = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "x"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


class Service:
    """Methods whose messages are bytes."""

    def __init__(self) -> None:
        self.running = 0

    async def echo(self, request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata([("x-said", dict(context.invocation_metadata()).get("x-say", "nothing"))])
        return request

    async def grow(self, request: bytes, context: Any) -> bytes:
        return request * 100

    async def refuse(self, request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, request.decode())
        raise AssertionError("abort has returned")

    async def fail(self, request: bytes, context: Any) -> bytes:
        raise RuntimeError("a secret")

    async def last(self, request: bytes, context: Any) -> bytes:
        self.running += 1
        try:
            await asyncio.sleep(float(request))
            return b"done"
        finally:
            self.running -= 1

    async def count(self, request: bytes, context: Any) -> Any:
        for number in range(int(request)):
            yield str(number).encode()

    async def watch(self, request: bytes, context: Any) -> None:
        await context.write(b"first")
        await asyncio.sleep(3600)

    async def chat(self, requests: Any, context: Any) -> Any:
        async for request in requests:
            yield request.upper()

    def handlers(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"request_deserializer": bytes, "response_serializer": bytes}
        unary = {name: getattr(self, name) for name in ("echo", "grow", "refuse", "fail", "last")}
        return {name: grpc.unary_unary_rpc_method_handler(method, **plain) for name, method in unary.items()} | {
            "count": grpc.unary_stream_rpc_method_handler(self.count, **plain),
            "watch": grpc.unary_stream_rpc_method_handler(self.watch, **plain),
            "chat": grpc.stream_stream_rpc_method_handler(self.chat, **plain),
        }


@contextlib.contextmanager
def serving(patience_s: float = PATIENCE_S) -> Iterator[SimpleNamespace]:
    """A server on a loop and a thread of its own."""
    port = free_port()
    service = Service()
    loop = uvloop.new_event_loop()
    # What a connection's code raises unexpectedly ends up here.
    defects: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, defect: defects.append(defect))
    server = Server(LIMIT, MAX_CALLS, patience_s)
    server.add_registered_method_handlers("test.Test", service.handlers())
    server.add_registered_method_handlers("grpc.health.v1.Health", {"Check": service.handlers()["echo"]})
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def do(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    do(server.start(listen("127.0.0.1", port, "gRPC"), None))
    try:
        yield SimpleNamespace(port=port, service=service, server=server, do=do)
    finally:
        do(server.stop(0))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert not defects


@pytest.fixture(scope="module")
def running() -> Iterator[SimpleNamespace]:
    with serving() as started:
        yield started


@pytest.fixture(scope="module")
def impatient() -> Iterator[SimpleNamespace]:
    with serving(SHORT_PATIENCE_S) as started:
        yield started


@pytest.fixture
def channel(running: SimpleNamespace) -> Iterator[grpc.Channel]:
    """As a test leaves it, nothing is open."""
    with grpc.insecure_channel(f"127.0.0.1:{running.port}", [("grpc.use_local_subchannel_pool", 1)]) as opened:
        yield opened
    wait_for(lambda: running.server.open_calls == 0 and running.service.running == 0, "an idle server")


class Client:
    """A client that may do all that HTTP/2 allows."""

    def __init__(self, port: int, window: int = 65_535) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.http.local_settings = h2.settings.Settings(
            initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.http.initiate_connection()
        self.flush()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def flush(self) -> None:
        self.socket.sendall(self.http.data_to_send())

    def prepare(self, method: str, *headers: tuple[str, str], head: list[tuple[str, str]] = HEAD) -> int:
        """A call's head, which travels with what is sent next."""
        stream = self.http.get_next_available_stream_id()
        self.http.send_headers(stream, [(":path", PATH + method), *head, *headers])
        return stream

    def begin(self, method: str, *headers: tuple[str, str], head: list[tuple[str, str]] = HEAD) -> int:
        stream = self.prepare(method, *headers, head=head)
        self.flush()
        return stream

    def say(self, stream: int, content: bytes, *, is_last: bool = True) -> None:
        while content:
            room = min(self.http.local_flow_control_window(stream), 16_384)
            if room:
                self.http.send_data(stream, content[:room])
                content = content[room:]
            else:
                self.flush()
                self.events()
        if is_last:
            self.http.end_stream(stream)
        self.flush()

    def events(self) -> list[h2.events.Event]:
        data = self.socket.recv(65_536)
        if not data:
            raise ConnectionResetError
        events = self.http.receive_data(data)
        self.flush()
        return events

    def ended(self, stream: int) -> tuple[dict[str, str], bytes]:
        """All headers and trailers of an answer, and its data."""
        headers: dict[str, str] = {}
        data = b""
        while True:
            for event in self.events():
                if getattr(event, "stream_id", None) != stream:
                    continue
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    headers |= dict(event.headers)  # type: ignore[arg-type]
                elif isinstance(event, h2.events.DataReceived):
                    data += event.data or b""
                    self.http.acknowledge_received_data(event.flow_controlled_length or 0, stream)
                    self.flush()
                elif isinstance(event, h2.events.StreamEnded):
                    return headers, data

    def ask(self, method: str, content: bytes, *headers: tuple[str, str]) -> tuple[dict[str, str], bytes]:
        stream = self.prepare(method, *headers)
        self.say(stream, message(content))
        return self.ended(stream)


def message(content: bytes, *, is_compressed: bool = False) -> bytes:
    return struct.pack(">?I", is_compressed, len(content)) + content


def status(headers: dict[str, str]) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if str(code.value[0]) == headers["grpc-status"])


# grpcio's client.


@pytest.mark.parametrize("size", [0, 1, 100, 2**16, LIMIT])
def test_a_message_comes_back(channel, size):
    content = random.Random(size).randbytes(size)
    answer, call = channel.unary_unary(f"{PATH}echo").with_call(content, metadata=[("x-say", "hello")])
    assert answer == content
    assert dict(call.trailing_metadata())["x-said"] == "hello"


def test_many_calls_of_many_connections_at_one_time(running):
    def user(number: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{running.port}", [("grpc.use_local_subchannel_pool", 1)]) as own:
            echo = own.unary_unary(f"{PATH}echo")
            for step in range(50):
                content = f"{number} {step}".encode() * (step + 1)
                found.append(echo(content) == content)

    found: list[bool] = []
    users = [threading.Thread(target=user, args=(number,)) for number in range(8)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    assert found == [True] * 400


def test_an_answer_longer_than_every_window(channel):
    content = random.Random(0).randbytes(200_000)
    answer = channel.unary_unary(f"{PATH}grow")
    with pytest.raises(grpc.RpcError) as refused:
        answer(content)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "the client's own limit"


def test_a_refusal_s_words_survive(channel):
    words = "row 3: “höhe” is\nnot 100 % right"
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"{PATH}refuse")(words.encode())
    assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.NOT_FOUND, words)


def test_a_refusal_may_have_many_words(channel):
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"{PATH}refuse")(("ö" * 100_000).encode())
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert refused.value.details().startswith("ö" * 500)


def test_a_defect_tells_nothing(channel):
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"{PATH}fail")(b"")
    assert refused.value.code() is grpc.StatusCode.UNKNOWN
    assert "secret" not in refused.value.details()


@pytest.mark.parametrize("method", ["/test.Test/nothing", "/nothing"])
def test_an_unknown_method_is_unimplemented(channel, method):
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(method)(b"")
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_compressed_request_is_read(channel, algorithm):
    content = b"0123456789" * 5_000
    assert channel.unary_unary(f"{PATH}echo")(content, compression=algorithm) == content


def test_a_short_message_may_not_become_too_long(channel):
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"{PATH}echo")(bytes(50 * LIMIT), compression=grpc.Compression.Gzip)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_streams(channel):
    assert list(channel.unary_stream(f"{PATH}count")(b"300")) == [str(number).encode() for number in range(300)]
    said = [b"a", b"b", b"c" * 100_000]
    assert list(channel.stream_stream(f"{PATH}chat")(iter(said))) == [content.upper() for content in said]


def test_work_ends_with_its_deadline_or_its_client(running, channel):
    last = channel.unary_unary(f"{PATH}last")
    with pytest.raises(grpc.RpcError) as refused:
        last(b"60", timeout=0.2)
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: running.service.running == 0, "the end of the work at its deadline")
    call = last.future(b"60")
    wait_for(lambda: running.service.running == 1, "work")
    call.cancel()
    wait_for(lambda: running.service.running == 0, "the end of the work that nobody waits for")


def test_calls_over_the_limit_are_refused_and_the_others_answered(running, channel):
    last = channel.unary_unary(f"{PATH}last")
    calls = [last.future(b"2") for _ in range(MAX_CALLS + 5)]
    wait_for(lambda: running.service.running == MAX_CALLS, "as many calls as may be open")
    assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"alive?") == b"alive?", "a probe is no load"
    assert running.service.running == MAX_CALLS
    codes = [call.code() for call in calls]
    assert codes.count(grpc.StatusCode.OK) == MAX_CALLS
    assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 5
    assert last(b"0") == b"done"


def test_a_probe_that_is_open_takes_no_place(running, channel, client):
    probe = client.http.get_next_available_stream_id()
    client.http.send_headers(probe, [(":path", "/grpc.health.v1.Health/Check"), *HEAD])
    client.flush()
    wait_for(lambda: running.server.open_calls == 1, "the probe")
    last = channel.unary_unary(f"{PATH}last")
    calls = [last.future(b"0.2") for _ in range(MAX_CALLS)]
    assert {call.code() for call in calls} == {grpc.StatusCode.OK}
    client.http.reset_stream(probe)
    client.flush()


def test_a_stopping_server_ends_its_calls_first():
    with (
        serving() as own,
        grpc.insecure_channel(f"127.0.0.1:{own.port}", [("grpc.use_local_subchannel_pool", 1)]) as channel,
    ):
        watched = channel.unary_stream(f"{PATH}watch")(b"")
        assert next(watched) == b"first"
        running_call = channel.unary_unary(f"{PATH}last").future(b"1")
        wait_for(lambda: own.service.running == 1, "work")
        begun = time.monotonic()
        own.do(own.server.stop(10))
        assert time.monotonic() - begun < 5, "the stream, which has no end, was waited for"
        assert running_call.result(5) == b"done"
        with pytest.raises(grpc.RpcError) as ended:
            next(watched)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(f"{PATH}echo")(b"", timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


# What grpcio's client never does.


@pytest.fixture
def client(running: SimpleNamespace) -> Iterator[Client]:
    with Client(running.port) as opened:
        yield opened
        # Whatever it was, it was no end of the connection.
        assert opened.ask("echo", b"still here")[1] == message(b"still here")
    wait_for(lambda: running.server.open_calls == 0, "an idle server")


BAD_MESSAGES = {
    "none": (b"", grpc.StatusCode.INTERNAL),
    "half of a length": (b"\0\0", grpc.StatusCode.INTERNAL),
    "half of a message": (message(b"0123456789")[:-1], grpc.StatusCode.INTERNAL),
    "two": (message(b"a") + message(b"b"), grpc.StatusCode.INTERNAL),
    "too long": (struct.pack(">?I", False, LIMIT + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
    "compressed, nobody says how": (message(b"a", is_compressed=True), grpc.StatusCode.UNIMPLEMENTED),
}


@pytest.mark.parametrize(("content", "code"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_bad_message_is_refused(client, content, code):
    stream = client.begin("echo")
    client.say(stream, content)
    headers, _ = client.ended(stream)
    assert status(headers) is code, headers


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(bytes(1_000))[:-12]], ids=["noise", "cut"])
def test_a_message_that_cannot_be_decompressed_is_refused(client, content):
    stream = client.begin("echo", ("grpc-encoding", "gzip"))
    client.say(stream, message(content, is_compressed=True))
    assert status(client.ended(stream)[0]) is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("timeout", ["", "1", "-1S", "S", "1234567890S", "1x"])
def test_a_timeout_that_cannot_be_read_is_refused(client, timeout):
    assert status(client.ask("echo", b"", ("grpc-timeout", timeout))[0]) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("timeout", ["99999999H", "1M", "5S"])
def test_a_timeout_that_is_far_away_does_no_harm(client, timeout):
    assert client.ask("echo", b"a", ("grpc-timeout", timeout))[1] == message(b"a")


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({":method": "GET"}, "405"),
        ({"content-type": "application/json"}, "415"),
        ({"content-type": "application/grpc-web"}, "415"),
        ({"content-type": ""}, "415"),
    ],
    ids=str,
)
def test_what_is_no_grpc_is_refused_in_http_s_words(client, changed, code):
    stream = client.begin("echo", head=[(name, changed.get(name, value)) for name, value in HEAD])
    assert client.ended(stream)[0] == {":status": code}


def test_a_request_that_never_ends_is_given_up(impatient):
    with Client(impatient.port) as client:
        begun = time.monotonic()
        stream = client.begin("echo")
        assert status(client.ended(stream)[0]) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - begun >= SHORT_PATIENCE_S
        assert client.ask("echo", b"still here")[1] == message(b"still here")


def test_a_connection_without_a_request_is_closed(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port), 10) as silent:
        silent.sendall(b"PRI * HTTP/2.0\r\n\r\nSM")
        with contextlib.suppress(ConnectionResetError):
            while silent.recv(1024):
                pass


@pytest.mark.parametrize("content", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(100)], ids=["HTTP/1.1", "noise"])
def test_another_protocol_is_closed(running, content):
    with socket.create_connection(("127.0.0.1", running.port), 10) as other:
        other.sendall(content)
        with contextlib.suppress(ConnectionResetError):
            while other.recv(1024):
                pass


def test_an_answer_waits_for_room_and_then_goes_on(running):
    content = random.Random(0).randbytes(2_000)
    with Client(running.port, window=1_000) as narrow:
        assert narrow.ask("grow", content)[1] == message(content * 100)


def test_an_answer_that_is_not_read_is_given_up(impatient):
    with Client(impatient.port, window=0) as greedy:
        waiting = {greedy.prepare("echo") for _ in range(5)}
        for stream in waiting:
            greedy.say(stream, message(b"a"))
        while waiting:
            waiting -= {event.stream_id for event in greedy.events() if isinstance(event, h2.events.StreamReset)}
        wait_for(lambda: impatient.server.open_calls == 0, "an idle server")


def test_a_client_that_talks_of_other_things_does_not_keep_an_answer(impatient):
    with Client(impatient.port, window=0) as greedy:
        stream = greedy.begin("echo")
        greedy.say(stream, message(b"a"))
        greedy.socket.settimeout(0.1)
        ends = time.monotonic() + 20 * SHORT_PATIENCE_S
        is_reset = False
        while not is_reset and time.monotonic() < ends:
            # More room on the connection, none for the stream.
            greedy.http.increment_flow_control_window(1)
            greedy.flush()
            with contextlib.suppress(TimeoutError):
                is_reset = any(isinstance(event, h2.events.StreamReset) for event in greedy.events())
        assert is_reset


def test_a_stream_of_answers_that_is_not_read_is_given_up(impatient):
    with Client(impatient.port, window=0) as greedy:
        stream = greedy.begin("chat")
        with contextlib.suppress(h2.exceptions.StreamClosedError):
            for _ in range(100):
                greedy.say(stream, message(bytes(30_000)), is_last=False)
        wait_for(lambda: impatient.server.open_calls == 0, "its end")


def test_a_reset_ends_the_work(running, client):
    stream = client.begin("last")
    client.say(stream, message(b"60"))
    wait_for(lambda: running.service.running == 1, "work")
    client.http.reset_stream(stream)
    client.flush()
    wait_for(lambda: running.service.running == 0, "its end")


def test_calls_that_are_reset_at_once_do_no_harm(client):
    """In the same piece: the server hears of both before it can answer."""
    for _ in range(2_000):
        stream = client.http.get_next_available_stream_id()
        client.http.send_headers(stream, [(":path", f"{PATH}nothing"), *HEAD])
        client.http.reset_stream(stream)
    client.flush()


def test_frames_of_all_kinds_do_not_harm_the_others(running):
    """What a client may send, changed at random: the connection may end, the server goes on."""
    chosen = random.Random(3)
    with Client(running.port) as good:
        for _ in range(150):
            bad = h2.connection.H2Connection()
            bad.initiate_connection()
            for _ in range(chosen.randrange(1, 6)):
                stream = bad.get_next_available_stream_id()
                method = chosen.choice(["echo", "grow", "chat", "count", "nothing"])
                bad.send_headers(stream, [(":path", PATH + method), *HEAD])
                bad.send_data(stream, message(b"12"), end_stream=chosen.random() < 0.7)
                if chosen.random() < 0.3:
                    bad.reset_stream(stream)
                if chosen.random() < 0.3:
                    bad.ping(b"12345678")
            content = bytearray(bad.data_to_send())
            for _ in range(chosen.randrange(4)):
                content[chosen.randrange(24, len(content))] = chosen.randrange(256)
            with socket.create_connection(("127.0.0.1", running.port), 10) as connection:
                connection.sendall(content)
            assert good.ask("echo", b"a")[1] == message(b"a")
    wait_for(lambda: running.server.open_calls == 0 and not running.server.connections, "an idle server")
