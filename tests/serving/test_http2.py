"""HTTP/2's framing against h2, an independent implementation, and against RFC 9113's own list of mistakes."""

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.http2 import (
    FRAME_BYTES,
    HEADER_BYTES,
    PREFACE,
    Code,
    ConnectionFailed,
    Http2,
    Kind,
    encoded,
)

HEAD = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", "/a")]
LARGEST = 2**31 - 1
END_STREAM, END_HEADERS, PADDED, ACK = 1, 4, 8, 1


class Echo:
    """Answers each stream with its data, and remembers what happened."""

    def __init__(self) -> None:
        self.http = Http2(self)
        self.headers: dict[int, dict[bytes, bytes]] = {}
        self.content: dict[int, bytes] = {}
        self.waiting: dict[int, bytes] = {}
        self.gone: list[int] = []

    def begin(self, stream: int, headers: dict[bytes, bytes]) -> None:
        self.headers[stream] = headers
        self.content[stream] = b""

    def data(self, stream: int, content: memoryview) -> None:
        self.content[stream] += content

    def end(self, stream: int) -> None:
        self.http.send_headers(stream, encoded([(b":status", b"200")]))
        self.waiting[stream] = self.content[stream]
        self.room()

    def reset(self, stream: int) -> None:
        self.gone.append(stream)
        self.waiting.pop(stream, None)

    def room(self) -> None:
        for stream, content in list(self.waiting.items()):
            self.waiting[stream] = content[self.http.send_data(stream, content) :]
            if not self.waiting[stream]:
                del self.waiting[stream]
                self.http.send_headers(stream, encoded([(b"ended", b"yes")]), is_end=True)


class Peer:
    """h2's client and our server, without a socket."""

    def __init__(self, window: int = 65_535) -> None:
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.client.local_settings = h2.settings.Settings(
            initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.client.initiate_connection()
        self.server = Echo()
        self.answers: dict[int, bytes] = {}
        self.ended: dict[int, dict[str, str]] = {}
        self.exchange()

    def exchange(self) -> None:
        """Until neither has anything to say."""
        while (said := self.client.data_to_send()) or (answer := self.server.http.take()):
            if said:
                self.server.http.receive(said)
                continue
            for event in self.client.receive_data(answer):
                if isinstance(event, h2.events.DataReceived):
                    stream = event.stream_id
                    self.answers[stream] = self.answers.get(stream, b"") + (event.data or b"")
                    self.client.acknowledge_received_data(event.flow_controlled_length or 0, stream)
                elif isinstance(event, h2.events.TrailersReceived):
                    self.ended[event.stream_id] = dict(event.headers)  # type: ignore[arg-type]

    def ask(self, content: bytes, *headers: tuple[str, str]) -> int:
        stream = self.client.get_next_available_stream_id()
        self.client.send_headers(stream, [*HEAD, *headers])
        while content:
            room = min(self.client.local_flow_control_window(stream), self.client.max_outbound_frame_size)
            if not room:
                self.exchange()
                continue
            self.client.send_data(stream, content[:room])
            content = content[room:]
        self.client.end_stream(stream)
        self.exchange()
        return stream


@settings(deadline=None)
@given(
    contents=st.lists(st.binary(max_size=300), min_size=1, max_size=8),
    factor=st.sampled_from([1, 100, 5_000]),
    window=st.sampled_from([1, 100, 65_535, LARGEST]),
)
def test_what_h2_says_comes_back(contents, factor, window):
    peer = Peer(window=window if factor < 100 else max(window, 65_535))
    for content in contents:
        stream = peer.ask(content * factor)
        assert peer.answers.get(stream, b"") == content * factor
        assert peer.ended[stream] == {"ended": "yes"}


_HEADERS = st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.sampled_from([b"1", b"2", b"3" * 1_500]))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.lists(_HEADERS, max_size=2, unique_by=lambda header: header[0]), min_size=1, max_size=30))
def test_headers_mean_what_was_meant_whatever_the_table_holds(said):
    """The same bytes mean something else once the table has changed: with so few headers, they do all the time."""
    server, encoder = Echo(), Encoder()
    server.http.receive(START)
    for stream, headers in enumerate(said):
        server.http.receive(frame(Kind.HEADERS, END_HEADERS | END_STREAM, 2 * stream + 1, encoder.encode(headers)))
        assert server.headers[2 * stream + 1] == dict(headers)


def test_a_new_size_of_the_table_counts_each_time_that_it_is_said():
    """Bytes that have come before, and change nothing in an empty table but how much goes into it."""
    small, large = b"\x3f\x45", b"\x3f\xe1\x1f"  # 100 and 4,096 bytes
    plain = encoded([(b"a", b"1")])
    entries = [b"\x40\x01" + name + b"\x14" + name * 20 for name in (b"b", b"c")]  # 53 bytes in the table, each
    server = Echo()
    server.http.receive(START)
    for place, block in enumerate([large + plain, small + plain, large + plain, *entries, b"\xbf"]):
        server.http.receive(frame(Kind.HEADERS, END_HEADERS | END_STREAM, 2 * place + 1, block))
    assert server.headers[11] == {b"b": b"b" * 20}, "the table's second entry"


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), max_size=50), st.integers(0, 1))
def test_bytes_may_be_cut_anywhere(sizes, is_reset):
    client = h2.connection.H2Connection()
    client.initiate_connection()
    for stream in (1, 3, 5):
        client.send_headers(stream, HEAD)
        client.send_data(stream, bytes([stream]) * 100, end_stream=stream != 5)
    if is_reset:
        client.reset_stream(5)
    said = client.data_to_send()
    whole, cut = Echo(), Echo()
    whole.http.receive(said)
    start = 0
    for size in [*sizes, len(said)]:
        cut.http.receive(said[start : start + size])
        start += size
    assert cut.content == whole.content == {stream: bytes([stream]) * 100 for stream in (1, 3, 5)}
    assert cut.gone == whole.gone == [5] * is_reset
    assert cut.http.take() == whole.http.take()


def test_a_response_may_be_longer_than_any_window():
    peer = Peer(window=10_000)
    content = bytes(range(256)) * 4_000
    assert peer.answers[peer.ask(content)] == content


def test_a_client_that_leaves_is_answered():
    peer = Peer()
    stream = peer.client.get_next_available_stream_id()
    peer.client.send_headers(stream, HEAD)
    peer.server.http.receive(peer.client.data_to_send() + frame(Kind.GOAWAY, 0, 0, bytes(8)))
    peer.client.send_data(stream, b"abc", end_stream=True)
    peer.exchange()
    assert peer.answers[stream] == b"abc"


def test_a_server_that_leaves_takes_no_stream_and_ends_the_open_ones():
    peer = Peer()
    stream = peer.client.get_next_available_stream_id()
    peer.client.send_headers(stream, HEAD)
    peer.server.http.receive(peer.client.data_to_send())
    peer.server.http.leave()
    late = peer.client.get_next_available_stream_id()
    peer.client.send_headers(late, HEAD)
    peer.client.send_data(late, b"late", end_stream=True)
    peer.client.send_data(stream, b"abc", end_stream=True)
    peer.server.http.receive(peer.client.data_to_send())
    said = peer.server.http.take()
    assert frame(Kind.GOAWAY, 0, 0, stream.to_bytes(4, "big") + bytes(4)) in said
    assert b"abc" in said
    assert late not in peer.server.headers


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content


def number(value: int) -> bytes:
    return value.to_bytes(4, "big")


def setting(name: int, value: int) -> bytes:
    return name.to_bytes(2, "big") + number(value)


SETTINGS = frame(Kind.SETTINGS, 0, 0)
START = PREFACE + SETTINGS
HEADERS = Encoder().encode(HEAD)
OPEN = frame(Kind.HEADERS, END_HEADERS, 1, HEADERS)
# A header of 4,000 bytes put into the table, and then said again and again by its number.
BOMB = Encoder().encode([(b"x", b"y" * 3_900)], huffman=False) + b"\xbe" * 1_000

BROKEN = {
    "no preface": (b"GET / HTTP/1.1\r\n\r\n", Code.PROTOCOL_ERROR),
    "no settings": (PREFACE + frame(Kind.PING, 0, 0, bytes(8)), Code.PROTOCOL_ERROR),
    "settings that only acknowledge": (PREFACE + frame(Kind.SETTINGS, ACK, 0), Code.PROTOCOL_ERROR),
    "a frame that is too long": (START + frame(99, 0, 0, bytes(FRAME_BYTES + 1)), Code.FRAME_SIZE_ERROR),
    "data on the connection": (START + frame(Kind.DATA, 0, 0, b"a"), Code.PROTOCOL_ERROR),
    "data on no stream": (START + frame(Kind.DATA, 0, 1, b"a"), Code.PROTOCOL_ERROR),
    "data that is all padding": (
        START + OPEN + frame(Kind.DATA, PADDED, 1, b"\5abc"),
        Code.PROTOCOL_ERROR,
    ),
    "data without its padding": (START + OPEN + frame(Kind.DATA, PADDED, 1), Code.PROTOCOL_ERROR),
    "headers on the connection": (START + frame(Kind.HEADERS, 5, 0, HEADERS), Code.PROTOCOL_ERROR),
    "headers on a stream of ours": (START + frame(Kind.HEADERS, 5, 2, HEADERS), Code.PROTOCOL_ERROR),
    "headers with half a priority": (START + frame(Kind.HEADERS, 0x25, 1, b"abc"), Code.FRAME_SIZE_ERROR),
    "headers that are none": (START + frame(Kind.HEADERS, 5, 1, b"\xff\xff\xff"), Code.COMPRESSION_ERROR),
    "headers that become long": (START + frame(Kind.HEADERS, 5, 1, BOMB), Code.ENHANCE_YOUR_CALM),
    "trailers that do not end": (START + OPEN + OPEN, Code.PROTOCOL_ERROR),
    "a frame amid headers": (START + frame(Kind.HEADERS, 0, 1, HEADERS) + SETTINGS, Code.PROTOCOL_ERROR),
    "another stream's continuation": (
        START + frame(Kind.HEADERS, 0, 1, HEADERS) + frame(Kind.CONTINUATION, 4, 3, b"a"),
        Code.PROTOCOL_ERROR,
    ),
    "a continuation of nothing": (START + frame(Kind.CONTINUATION, 4, 1, HEADERS), Code.PROTOCOL_ERROR),
    "an empty continuation": (
        START + frame(Kind.HEADERS, 0, 1, HEADERS) + frame(Kind.CONTINUATION, 0, 1),
        Code.ENHANCE_YOUR_CALM,
    ),
    "continuations without end": (
        START
        + frame(Kind.HEADERS, 0, 1, HEADERS)
        + frame(Kind.CONTINUATION, 0, 1, bytes(1_000)) * (HEADER_BYTES // 1_000 + 1),
        Code.ENHANCE_YOUR_CALM,
    ),
    "a priority of the wrong size": (START + frame(Kind.PRIORITY, 0, 1, b"a"), Code.FRAME_SIZE_ERROR),
    "a reset of the connection": (START + frame(Kind.RST_STREAM, 0, 0, number(8)), Code.PROTOCOL_ERROR),
    "a reset of no stream": (START + frame(Kind.RST_STREAM, 0, 1, number(8)), Code.PROTOCOL_ERROR),
    "a reset of the wrong size": (
        START + OPEN + frame(Kind.RST_STREAM, 0, 1, b"a"),
        Code.FRAME_SIZE_ERROR,
    ),
    "settings on a stream": (START + frame(Kind.SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
    "settings of the wrong size": (START + frame(Kind.SETTINGS, 0, 0, b"a"), Code.FRAME_SIZE_ERROR),
    "an acknowledgement that says more": (
        START + frame(Kind.SETTINGS, ACK, 0, setting(1, 1)),
        Code.FRAME_SIZE_ERROR,
    ),
    "a window that is too wide": (
        START + frame(Kind.SETTINGS, 0, 0, setting(4, LARGEST + 1)),
        Code.FLOW_CONTROL_ERROR,
    ),
    "a window made too wide": (
        START
        + OPEN
        + frame(Kind.WINDOW_UPDATE, 0, 1, number(LARGEST - 65_535))
        + frame(Kind.SETTINGS, 0, 0, setting(4, 65_536)),
        Code.FLOW_CONTROL_ERROR,
    ),
    "frames that may be too short": (
        START + frame(Kind.SETTINGS, 0, 0, setting(5, 100)),
        Code.PROTOCOL_ERROR,
    ),
    "a push": (START + OPEN + frame(Kind.PUSH_PROMISE, 4, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "a ping on a stream": (START + frame(Kind.PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "a ping of the wrong size": (START + frame(Kind.PING, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
    "no more room": (START + frame(Kind.WINDOW_UPDATE, 0, 0, number(0)), Code.PROTOCOL_ERROR),
    "too much room": (START + frame(Kind.WINDOW_UPDATE, 0, 0, number(LARGEST)), Code.FLOW_CONTROL_ERROR),
    "room on no stream": (START + frame(Kind.WINDOW_UPDATE, 0, 1, number(1)), Code.PROTOCOL_ERROR),
    "room of the wrong size": (START + frame(Kind.WINDOW_UPDATE, 0, 0, b"a"), Code.FRAME_SIZE_ERROR),
}


@pytest.mark.parametrize(("said", "code"), BROKEN.values(), ids=BROKEN)
def test_a_mistake_ends_the_connection_and_is_named(said, code):
    server = Echo()
    with pytest.raises(ConnectionFailed, match=code.name):
        server.http.receive(said)
    assert server.http.take()[-4:] == number(code)


STREAM_MISTAKES = {
    "data after the end": (frame(Kind.HEADERS, 5, 3, HEADERS) + frame(Kind.DATA, 0, 3, b"a"), Code.STREAM_CLOSED),
    "no more room": (
        frame(Kind.HEADERS, 4, 3, HEADERS) + frame(Kind.WINDOW_UPDATE, 0, 3, number(0)),
        Code.PROTOCOL_ERROR,
    ),
    "too much room": (
        frame(Kind.HEADERS, 4, 3, HEADERS) + frame(Kind.WINDOW_UPDATE, 0, 3, number(LARGEST)),
        Code.FLOW_CONTROL_ERROR,
    ),
}


class Silent(Echo):
    """Leaves its streams open."""

    def end(self, stream: int) -> None: ...


@pytest.mark.parametrize(("said", "code"), STREAM_MISTAKES.values(), ids=STREAM_MISTAKES)
def test_a_mistake_of_a_stream_ends_that_stream_only(said, code):
    server = Silent()
    server.http.receive(START + OPEN + said)
    assert server.http.take().endswith(frame(Kind.RST_STREAM, 0, 3, number(code)))
    assert server.gone == [3]
    server.http.receive(frame(Kind.DATA, END_STREAM, 1, b"still here"))
    assert server.content[1] == b"still here"


_CONTENTS = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([HEADERS, b"\xbe", bytes(4), number(1), number(LARGEST), setting(4, 0), setting(5, 2**14)]),
)
_FRAMES = st.builds(frame, st.integers(0, 10), st.integers(0, 0x3F), st.sampled_from([0, 1, 1, 2, 3, 5]), _CONTENTS)


@settings(deadline=None, max_examples=500)
@given(st.lists(st.one_of(_FRAMES, st.just(OPEN)), max_size=30))
def test_whatever_comes_ends_in_a_named_mistake_or_in_none(frames):
    server = Echo()
    server.http.receive(START)
    for said in frames:
        try:
            server.http.receive(said)
        except ConnectionFailed:
            return
    # Whoever is told that a stream is gone hears of it no more.
    assert len(server.gone) == len(set(server.gone))


def test_what_may_be_ignored_is():
    server = Echo()
    priority = frame(Kind.PRIORITY, 0, 7, bytes(5))
    server.http.receive(START + priority + frame(0x42, 0xFF, 9, b"what?") + frame(Kind.PING, ACK, 0, bytes(8)))
    server.http.take()
    padded = b"\3" + bytes(5) + HEADERS + bytes(3)
    server.http.receive(frame(Kind.HEADERS, END_HEADERS | PADDED | 0x20, 1, padded))
    server.http.receive(frame(Kind.DATA, PADDED, 1, b"\2abc\0\0") + frame(Kind.HEADERS, 5, 1, b""))
    assert server.headers[1][b":path"] == b"/a"
    assert server.content[1] == b"abc"
    # What comes for a stream that has ended: nobody is there to read it.
    late = frame(Kind.DATA, 0, 1, b"late") + frame(Kind.RST_STREAM, 0, 1, number(0))
    server.http.receive(late + frame(Kind.WINDOW_UPDATE, 0, 1, number(1)) + frame(Kind.HEADERS, 5, 1, b""))
    assert server.content[1] == b"abc"


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 254, 255, 256, 10_000])
def test_literals_are_read_by_hpack_as_they_were_meant(length):
    headers = [(b"a" * max(length, 1), b"b" * length), (b"c", b"")]
    assert Decoder().decode(encoded(headers), raw=True) == headers
