"""The operator of `counting_job`."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pyflink.common import Types
from pyflink.datastream import KeyedProcessFunction, RuntimeContext
from pyflink.datastream.state import MapStateDescriptor


class Count(KeyedProcessFunction):  # type: ignore[misc]
    """Emits `value:count:pid` for every value; pid is the interpreter's, so the JVM's."""

    def open(self, runtime_context: RuntimeContext) -> None:
        self._counts = runtime_context.get_map_state(
            MapStateDescriptor("counts", Types.STRING(), Types.PICKLED_BYTE_ARRAY())
        )

    def process_element(self, value: bytes, ctx: KeyedProcessFunction.Context) -> Iterator[bytes]:
        before = self._counts.get("n")
        count = int(before) + 1 if before else 1
        self._counts.put("n", str(count).encode())
        yield b"%s:%d:%d" % (bytes(value), count, os.getpid())
