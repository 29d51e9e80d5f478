"""Several servers of one model: which is asked next, and which is left out."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

LOST = 3  # requests in a row that a server loses before it is left out
REST = 60.0  # seconds until one request tries it again


@dataclass(eq=False)
class Server:
    """One address, and how it fares."""

    url: httpx.URL  # where requests go
    name: str  # the address as it may be shown: without a password
    busy: int = 0  # slots taken
    lost: set[str] = field(default_factory=set)  # requests that it lost since it last answered
    back: float = 0.0  # left out: when it is tried again, by the monotonic clock; else 0
    said: bool = False  # that it was left out: once


class Pool:
    """Servers with so many slots each. One that is alone is never left out."""

    def __init__(self, servers: Sequence[Server], slots: int) -> None:
        self.servers, self.slots = servers, slots

    def begin(self) -> None:
        """Make ready for another event loop."""
        self.turns = asyncio.Semaphore(self.slots * len(self.servers))  # first come, first served
        self._freed = asyncio.Event()

    def best(self, tried: Sequence[Server]) -> Server:
        """The next to be asked: not left out, tried in vain least often, least busy."""
        now = time.monotonic()
        return min(self.servers, key=lambda s: (s.back > now, tried.count(s), s.busy))

    @asynccontextmanager
    async def slot(self, tried: Sequence[Server]) -> AsyncIterator[Server]:
        """A slot of the best server, as soon as it has one."""
        while (server := self.best(tried)).busy >= self.slots:
            self._freed.clear()
            await self._freed.wait()
        server.busy += 1
        if server.back:  # one request tries it, not all of them
            server.back = time.monotonic() + REST
        try:
            yield server
        finally:
            server.busy -= 1
            self._freed.set()

    def lose(self, server: Server, request: str, reason: str) -> None:
        """Leave a server out that lost several requests in a row, if there are others. Several
        different ones: a single one may be at fault itself."""
        server.lost.add(request)
        if len(server.lost) >= LOST and len(self.servers) > 1:
            if not server.said:
                print(f"{server.name} is left out: {reason}; one request tries it again every "
                      f"{REST:g} s", file=sys.stderr)
            server.said, server.back = True, time.monotonic() + REST
