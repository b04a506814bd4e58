"""Content encodings: reading request bodies, writing response bodies.

lz4 means LZ4 *frames* (what clients call ``lz4`` on HTTP), not ClickHouse's own block format.
"""

from __future__ import annotations

import gzip
import zlib
from typing import IO, Final, Protocol, cast

import lz4.frame
import zstandard

# In the order in which they cost least for what they save on one machine.
RESPONSE_ENCODINGS: Final = ("lz4", "zstd", "gzip", "deflate")


class Reader(Protocol):
    """Something whose decoded bytes can be read; an empty answer is the end."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes."""
        ...


class UnknownEncoding(ValueError):
    """A Content-Encoding that is not spoken here."""


class _Inflate:
    """Reads a zlib or raw-deflate body; senders of ``deflate`` use either."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        head = source.read(2)
        source.seek(0)
        wrapped = len(head) == 2 and head[0] & 0x0F == 8 and int.from_bytes(head, "big") % 31 == 0
        self._inflater = zlib.decompressobj(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS)

    def read(self, size: int, /) -> bytes:
        while not self._inflater.eof:
            pending = self._inflater.unconsumed_tail or self._source.read(65536)
            out = self._inflater.decompress(pending, size)
            if out:
                return out
            if not pending:
                raise EOFError("the deflate stream is cut off")
        return b""


def decoded(source: IO[bytes], encoding: str) -> Reader:
    """Return a reader of ``source`` decoded from ``encoding``; joined frames are read through.

    Raises UnknownEncoding. Reading raises what the codec raises when the body is broken; see
    ``BROKEN_BODY``.
    """
    match encoding.strip().lower():
        case "" | "identity" | "none":
            return source
        case "lz4":
            return cast("Reader", lz4.frame.LZ4FrameFile(source))
        case "gzip" | "x-gzip":
            return gzip.GzipFile(fileobj=source, mode="rb")
        case "zstd":
            return cast(
                "Reader",
                zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True),
            )
        case "deflate":
            return _Inflate(source)
        case other:
            known = ", ".join(RESPONSE_ENCODINGS)
            raise UnknownEncoding(f"Content-Encoding {other!r} is not supported; use {known}")


BROKEN_BODY: Final = (RuntimeError, EOFError, OSError, zlib.error, zstandard.ZstdError)


class Encoder(Protocol):
    """An incremental compressor of a response body."""

    def encode(self, data: bytes) -> bytes:
        """Take data in; return what is ready to be sent, possibly nothing."""
        ...

    def finish(self) -> bytes:
        """Return what ends the body."""
        ...


class _Identity:
    def encode(self, data: bytes) -> bytes:
        return data

    def finish(self) -> bytes:
        return b""


class _Lz4:
    def __init__(self) -> None:
        self._frame = lz4.frame.LZ4FrameCompressor()
        self._header = cast(bytes, self._frame.begin())

    def encode(self, data: bytes) -> bytes:
        header, self._header = self._header, b""
        return header + cast(bytes, self._frame.compress(data))

    def finish(self) -> bytes:
        header, self._header = self._header, b""
        return header + cast(bytes, self._frame.flush())


class _Flushing(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Compressor:
    def __init__(self, compressor: _Flushing) -> None:
        self._compressor = compressor

    def encode(self, data: bytes) -> bytes:
        return self._compressor.compress(data)

    def finish(self) -> bytes:
        return self._compressor.flush()


def encoder(encoding: str | None) -> Encoder:
    """Return an incremental encoder for one of RESPONSE_ENCODINGS, or one that copies."""
    match encoding:
        case "lz4":
            return _Lz4()
        case "zstd":
            return _Compressor(zstandard.ZstdCompressor(level=1).compressobj())
        case "gzip":
            return _Compressor(zlib.compressobj(1, wbits=31))
        case "deflate":
            return _Compressor(zlib.compressobj(1))
        case _:
            return _Identity()


def choose(accept_encoding: str) -> str | None:
    """Pick the response encoding from an Accept-Encoding header; None means none."""
    accepted: set[str] = set()
    for item in accept_encoding.split(","):
        name, _, weight = item.partition(";")
        if weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000"):
            accepted.add(name.strip().lower())
    return next((name for name in RESPONSE_ENCODINGS if name in accepted), None)
