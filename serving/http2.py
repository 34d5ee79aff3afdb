"""HTTP/2's framing, the server's side, without input and output: bytes in, calls of a handler, bytes out.

With h2, which makes objects and a textual form of every frame, framing took 60 % of a gRPC call's time: it is the
oracle of the tests. HPACK's decoding is hpack's work. What is sent is never put into HPACK's table, so that encoding
has no state. Source: RFC 9113, RFC 7541.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol, TypeVar

from hpack import Decoder, HPACKError, OversizedHeaderListError

from serving.varint import varint

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Bytes that a client may send before it hears back, of one stream and of a whole connection.
STREAM_WINDOW = 2**20
CONNECTION_WINDOW = 2**24
# The longest frame that a client may send: a message of many rows comes in few of them.
FRAME_BYTES = 2**18
# Headers of one stream, as they are sent and as they are read.
HEADER_BYTES = 2**16
# A connection may open as many streams as it likes: who reads them refuses those that are too many, one by one.
OPEN_STREAMS = 2**20
# Header blocks that are kept with what they mean, and the longest of them, in bytes.
KEPT_BLOCKS = 256
LONGEST_KEPT_BLOCK = 1024

_LARGEST_WINDOW = 2**31 - 1
_FIRST_WINDOW = 65_535
_FRAME_HEAD = 9


class Kind(IntEnum):
    """Of a frame."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Code(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


_END_STREAM = _ACK = 0x1
_END_HEADERS = 0x4
_PADDED = 0x8
_PRIORITY = 0x20

_HEADER_TABLE_SIZE, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE, _MAX_HEADER_LIST_SIZE = (
    1,
    3,
    4,
    5,
    6,
)

_Content = TypeVar("_Content", bytes, memoryview)


class ConnectionFailed(Exception):
    """The client has broken the protocol: it has been told so in what is left to send, and the connection is over."""


class _Broken(Exception):
    def __init__(self, code: Code) -> None:
        super().__init__(code.name)
        self.code = code


class Handler(Protocol):
    """What happens on the streams. A stream is open from `begin` to `reset`, or to the end of both sides."""

    def begin(self, stream: int, headers: dict[bytes, bytes]) -> None: ...

    def data(self, stream: int, content: memoryview) -> None:
        """content: to be copied, not kept, as it holds on to all that was read with it."""
        ...

    def end(self, stream: int) -> None:
        """The client has sent all."""
        ...

    def reset(self, stream: int) -> None:
        """The client has given the stream up, or broken its rules: it is closed."""
        ...

    def room(self) -> None:
        """More may be sent than before, of any stream."""
        ...


class _Stream:
    """One that is open."""

    __slots__ = ("is_read", "received", "window")

    def __init__(self, window: int, is_read: bool) -> None:
        # What may be sent.
        self.window = window
        # What has been received since the client's window was last opened.
        self.received = 0
        # Whether the client has sent all.
        self.is_read = is_read


class Http2:
    """One connection. What is to be sent gathers until `take` gives it."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._streams: dict[int, _Stream] = {}
        self._latest = 0
        # What has come of something that is not whole, and at how many bytes to look again.
        self._rest = bytearray()
        self._needed = 0
        # A frame of data whose rest is to come: its flags, its stream, and how much is missing.
        self._unfinished: tuple[int, int, int] | None = None
        self._has_preface = self._has_settings = False
        self._decoder = Decoder(max_header_list_size=HEADER_BYTES)
        self._blocks: dict[bytes, dict[bytes, bytes]] = {}
        # A header block whose frames are not all there: its stream, whether the stream ends with it, and its bytes.
        self._headers: tuple[int, bool, bytearray] | None = None
        self._received = 0
        self._window = _FIRST_WINDOW
        self._stream_window = _FIRST_WINDOW
        self._frame_bytes = 2**14
        self._is_leaving = False
        settings = {
            _MAX_CONCURRENT_STREAMS: OPEN_STREAMS,
            _INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            _MAX_FRAME_SIZE: FRAME_BYTES,
            _MAX_HEADER_LIST_SIZE: HEADER_BYTES,
        }
        content = b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in settings.items())
        self._output = [
            _frame(Kind.SETTINGS, 0, 0, content),
            _frame(Kind.WINDOW_UPDATE, 0, 0, (CONNECTION_WINDOW - _FIRST_WINDOW).to_bytes(4, "big")),
        ]

    def take(self) -> bytes:
        """What is to be sent."""
        output, self._output = self._output, []
        return b"".join(output)

    # What is sent.

    def send_headers(self, stream: int, block: bytes, is_end: bool = False) -> None:
        """Headers or trailers, as `encoded` gives them; at most as long as the client's shortest frame, 16 KiB."""
        self._output.append(_frame(Kind.HEADERS, _END_HEADERS | (_END_STREAM if is_end else 0), stream, block))
        if is_end:
            self._close(stream)

    def send_data(self, stream: int, content: bytes) -> int:
        """As much of it as the client's windows allow: how many bytes these were."""
        state = self._streams[stream]
        sent = 0
        while sent < len(content):
            room = min(state.window, self._window, self._frame_bytes)
            if room <= 0:
                break
            piece = content[sent : sent + room]
            self._output.append(_frame(Kind.DATA, 0, stream, piece))
            sent += len(piece)
            state.window -= len(piece)
            self._window -= len(piece)
        return sent

    def send_reset(self, stream: int, code: Code) -> None:
        self._output.append(_frame(Kind.RST_STREAM, 0, stream, code.to_bytes(4, "big")))
        self._streams.pop(stream, None)

    def leave(self) -> None:
        """Tell the client that no new stream is taken; those that are open go on."""
        self._is_leaving = True
        self._goodbye(Code.NO_ERROR)

    def _goodbye(self, code: Code) -> None:
        self._output.append(
            _frame(Kind.GOAWAY, 0, 0, self._latest.to_bytes(4, "big") + code.to_bytes(4, "big")),
        )

    def _close(self, stream: int) -> None:
        """Our side has ended. What the client has not sent, nobody reads: it need not go on."""
        if self._streams[stream].is_read:
            del self._streams[stream]
        else:
            self.send_reset(stream, Code.NO_ERROR)

    # What comes.

    def receive(self, data: bytes) -> None:
        """Raises ConnectionFailed."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return
            data = bytes(self._rest)
            self._rest.clear()
        try:
            self._receive(data)
        except _Broken as error:
            self._goodbye(error.code)
            raise ConnectionFailed(error.code.name) from None

    def _receive(self, data: bytes) -> None:
        start = 0
        if not self._has_preface:
            if not PREFACE.startswith(data[: len(PREFACE)]):
                raise _Broken(Code.PROTOCOL_ERROR)
            if len(data) < len(PREFACE):
                self._keep(data, 0)
                return
            self._has_preface = True
            start = len(PREFACE)
        elif self._unfinished:
            flags, stream, length = self._unfinished
            start = min(length, len(data))
            self._take_data(flags, stream, length, memoryview(data)[:start])
        needed = _FRAME_HEAD
        while len(data) - start >= _FRAME_HEAD:
            length = int.from_bytes(data[start : start + 3], "big")
            if length > FRAME_BYTES:
                raise _Broken(Code.FRAME_SIZE_ERROR)
            body = start + _FRAME_HEAD
            kind, flags = data[start + 3], data[start + 4]
            is_data = kind == Kind.DATA and not flags & _PADDED
            if len(data) < body + length and not is_data:
                needed = _FRAME_HEAD + length
                break
            stream = int.from_bytes(data[start + 5 : body], "big") & _LARGEST_WINDOW
            self._expect(kind, flags, stream)
            if is_data:
                self._take_data(flags, stream, length, memoryview(data)[body : body + length])
            else:
                self._take_frame(kind, flags, stream, data[body : body + length])
            start = body + length
        self._keep(data[start:], needed)

    def _keep(self, rest: bytes, needed: int) -> None:
        self._rest += rest
        self._needed = needed

    def _take_data(self, flags: int, stream: int, length: int, content: memoryview) -> None:
        """As much of a frame as is there: the rest is taken as if it were a frame of its own.

        Large messages come in such frames, and are not copied until their reader does.
        """
        missing = length - len(content)
        self._unfinished = (flags, stream, missing) if missing else None
        self._on_data(flags & ~_END_STREAM if missing else flags, stream, content)

    def _expect(self, kind: int, flags: int, stream: int) -> None:
        """Settings come first, and nothing comes between the parts of a block of headers."""
        if not self._has_settings:
            if kind != Kind.SETTINGS or flags & _ACK:
                raise _Broken(Code.PROTOCOL_ERROR)
            self._has_settings = True
        if self._headers is not None and (kind != Kind.CONTINUATION or stream != self._headers[0]):
            raise _Broken(Code.PROTOCOL_ERROR)

    def _take_frame(self, kind: int, flags: int, stream: int, content: bytes) -> None:
        if kind == Kind.DATA:
            self._on_data(flags, stream, memoryview(content))
        elif kind == Kind.HEADERS:
            self._on_headers(flags, stream, content)
        elif kind == Kind.CONTINUATION:
            self._on_continuation(flags, content)
        elif kind == Kind.WINDOW_UPDATE:
            self._on_window_update(stream, content)
        elif kind == Kind.RST_STREAM:
            self._on_reset(stream, content)
        elif kind == Kind.SETTINGS:
            self._on_settings(flags, stream, content)
        elif kind == Kind.PING:
            self._on_ping(flags, stream, content)
        elif kind == Kind.PRIORITY:
            if len(content) != 5:
                raise _Broken(Code.FRAME_SIZE_ERROR)
        elif kind == Kind.PUSH_PROMISE:
            raise _Broken(Code.PROTOCOL_ERROR)
        # GOAWAY says only that the client takes no streams of ours, of which there are none. Other kinds are ignored.

    def _on_headers(self, flags: int, stream: int, content: bytes) -> None:
        if stream % 2 == 0:
            raise _Broken(Code.PROTOCOL_ERROR)
        content = _unpadded(flags, content)
        if flags & _PRIORITY:
            if len(content) < 5:
                raise _Broken(Code.FRAME_SIZE_ERROR)
            content = content[5:]
        is_end = bool(flags & _END_STREAM)
        if flags & _END_HEADERS:
            self._take_headers(stream, is_end, content)
        else:
            self._headers = (stream, is_end, bytearray(content))

    def _on_continuation(self, flags: int, content: bytes) -> None:
        if self._headers is None:
            raise _Broken(Code.PROTOCOL_ERROR)
        stream, is_end, block = self._headers
        # An empty one brings nothing, and could come for ever.
        if not content or len(block) + len(content) > HEADER_BYTES:
            raise _Broken(Code.ENHANCE_YOUR_CALM)
        block += content
        if flags & _END_HEADERS:
            self._headers = None
            self._take_headers(stream, is_end, bytes(block))

    def _take_headers(self, stream: int, is_end: bool, block: bytes) -> None:
        # Always read: what it changes in HPACK's table counts for all that come after.
        headers = self._decoded(block)
        if stream > self._latest:
            self._latest = stream
            if self._is_leaving:
                return
            self._streams[stream] = _Stream(self._stream_window, is_end)
            self._handler.begin(stream, headers)
            if is_end:
                self._end(stream)
        elif stream in self._streams:
            # Trailers.
            if not is_end or self._streams[stream].is_read:
                raise _Broken(Code.PROTOCOL_ERROR)
            self._streams[stream].is_read = True
            self._end(stream)
        # Else trailers of a stream that we have closed: the client has not heard of it.

    def _decoded(self, block: bytes) -> dict[bytes, bytes]:
        found = self._blocks.get(block)
        if found is not None:
            return found
        entries = self._decoder.header_table.dynamic_entries
        before = (len(entries), entries[0] if entries else None)
        try:
            found = {bytes(header[0]): bytes(header[1]) for header in self._decoder.decode(block, raw=True)}
        except OversizedHeaderListError:
            raise _Broken(Code.ENHANCE_YOUR_CALM) from None
        except HPACKError:
            raise _Broken(Code.COMPRESSION_ERROR) from None
        entries = self._decoder.header_table.dynamic_entries
        if len(entries) != before[0] or (entries and entries[0] is not before[1]):
            # With another table the same bytes mean something else; and these change it again each time.
            self._blocks.clear()
        elif len(block) <= LONGEST_KEPT_BLOCK and not _changes_table_size(block):
            if len(self._blocks) >= KEPT_BLOCKS:
                self._blocks.clear()
            self._blocks[block] = found
        return found

    def _on_data(self, flags: int, stream: int, content: memoryview) -> None:
        if stream == 0 or stream > self._latest:
            raise _Broken(Code.PROTOCOL_ERROR)
        # Windows are opened again long before they are used up, so that none can be overrun: how much of a message is
        # taken is decided by who reads it.
        size = len(content)
        self._received += size
        if self._received > CONNECTION_WINDOW // 2:
            self._output.append(_frame(Kind.WINDOW_UPDATE, 0, 0, self._received.to_bytes(4, "big")))
            self._received = 0
        content = _unpadded(flags, content)
        state = self._streams.get(stream)
        if state is None:
            # Closed by us; or a mistake, which does no harm.
            return
        if state.is_read:
            self._fail(stream, Code.STREAM_CLOSED)
            return
        if flags & _END_STREAM:
            state.is_read = True
            self._handler.data(stream, content)
            self._end(stream)
            return
        state.received += size
        if state.received > STREAM_WINDOW // 2:
            self._output.append(_frame(Kind.WINDOW_UPDATE, 0, stream, state.received.to_bytes(4, "big")))
            state.received = 0
        self._handler.data(stream, content)

    def _end(self, stream: int) -> None:
        """The client has sent all, of a stream that we may have closed meanwhile."""
        if stream in self._streams:
            self._handler.end(stream)

    def _fail(self, stream: int, code: Code) -> None:
        self.send_reset(stream, code)
        self._handler.reset(stream)

    def _on_reset(self, stream: int, content: bytes) -> None:
        if len(content) != 4:
            raise _Broken(Code.FRAME_SIZE_ERROR)
        if stream == 0 or stream > self._latest:
            raise _Broken(Code.PROTOCOL_ERROR)
        if self._streams.pop(stream, None) is not None:
            self._handler.reset(stream)

    def _on_window_update(self, stream: int, content: bytes) -> None:
        if len(content) != 4:
            raise _Broken(Code.FRAME_SIZE_ERROR)
        more = int.from_bytes(content, "big") & _LARGEST_WINDOW
        if stream == 0:
            self._window += more
            if more == 0 or self._window > _LARGEST_WINDOW:
                raise _Broken(Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR)
        elif stream > self._latest:
            raise _Broken(Code.PROTOCOL_ERROR)
        else:
            state = self._streams.get(stream)
            if state is None:
                return
            state.window += more
            if more == 0 or state.window > _LARGEST_WINDOW:
                self._fail(stream, Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR)
        self._handler.room()

    def _on_settings(self, flags: int, stream: int, content: bytes) -> None:
        if stream != 0:
            raise _Broken(Code.PROTOCOL_ERROR)
        if len(content) % 6 or (flags & _ACK and content):
            raise _Broken(Code.FRAME_SIZE_ERROR)
        if flags & _ACK:
            return
        for start in range(0, len(content), 6):
            name = int.from_bytes(content[start : start + 2], "big")
            value = int.from_bytes(content[start + 2 : start + 6], "big")
            if name == _INITIAL_WINDOW_SIZE:
                self._change_windows(value)
            elif name == _MAX_FRAME_SIZE:
                if not 2**14 <= value < 2**24:
                    raise _Broken(Code.PROTOCOL_ERROR)
                # Longer ones would hold up what other streams have to say.
                self._frame_bytes = min(value, FRAME_BYTES)
        self._output.append(_frame(Kind.SETTINGS, _ACK, 0, b""))
        self._handler.room()

    def _change_windows(self, value: int) -> None:
        if value > _LARGEST_WINDOW:
            raise _Broken(Code.FLOW_CONTROL_ERROR)
        for state in self._streams.values():
            state.window += value - self._stream_window
            if state.window > _LARGEST_WINDOW:
                raise _Broken(Code.FLOW_CONTROL_ERROR)
        self._stream_window = value

    def _on_ping(self, flags: int, stream: int, content: bytes) -> None:
        if stream != 0:
            raise _Broken(Code.PROTOCOL_ERROR)
        if len(content) != 8:
            raise _Broken(Code.FRAME_SIZE_ERROR)
        if not flags & _ACK:
            self._output.append(_frame(Kind.PING, _ACK, 0, content))


def encoded(headers: list[tuple[bytes, bytes]]) -> bytes:
    """A header block of literals that no table keeps."""
    parts: list[bytes] = []
    for name, value in headers:
        parts += (b"\x00", _length(len(name)), name, _length(len(value)), value)
    return b"".join(parts)


def _length(number: int) -> bytes:
    """A string's, as HPACK's integer with a prefix of seven bits."""
    if number < 127:
        return bytes((number,))
    return b"\x7f" + varint(number - 127)


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return b"".join(
        (len(content).to_bytes(3, "big"), bytes((kind, flags)), stream.to_bytes(4, "big"), content),
    )


def _changes_table_size(block: bytes) -> bool:
    """Whether a header block begins with a new size of HPACK's table, which it sets again each time (RFC 7541, 6.3)."""
    return bool(block) and block[0] & 0xE0 == 0x20


def _unpadded(flags: int, content: _Content) -> _Content:
    if not flags & _PADDED:
        return content
    if not content or content[0] >= len(content):
        raise _Broken(Code.PROTOCOL_ERROR)
    return content[1 : len(content) - content[0]]
