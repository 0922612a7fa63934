"""An HTTP proxy that puts faults between a client and its server, S3 or other (standard library alone).

usage: python s3_fault_proxy.py TARGET_PORT

Listens on two free ports of 127.0.0.1 and prints them as one line of JSON, {"port": ..., "control": ...}. A POST of a
`Fault` as JSON to the control port replaces the fault and zeroes the counts; each answer there shows the counts. Every
request gets a connection of its own, so that each one passes the gate.
"""

import asyncio
import json
import re
import socket
import struct
import sys
from asyncio import StreamReader, StreamWriter
from dataclasses import dataclass

ERRORS = {
    "http429": ("429 Too Many Requests", "TooManyRequests"),
    "http500": ("500 Internal Server Error", "InternalError"),
    "http503": ("503 Slow Down", "SlowDown"),
    "timeout400": ("400 Bad Request", "RequestTimeout"),
    "expired": ("400 Bad Request", "ExpiredToken"),
    "conflict409": ("409 Conflict", "OperationAborted"),
}
LATE_S = 30


@dataclass
class Fault:
    """What happens to which requests.

    Attributes:
        mode: ok; one of ERRORS (answered here); blackhole (never answered); reset (connection reset, after `after`
            bytes of body if given); lost (the server acts, its answer is lost); truncate (the answer ends after `after`
            bytes, headers included); corrupt (byte `after` of the upload's body, or else of the answer, is altered);
            slow (bytes pass at 1 kB/s each way, for as long as this is the fault); late (the server acts at once, its
            answer comes 30 s later).
        methods: HTTP methods concerned; empty for all.
        count: how many requests are hit; None for all.
        after: a number of bytes, see the modes.
        skip: how many requests pass before the first that is hit.
        then: what happens to every request after the `count` that were hit, of these methods or not: a mode.
    """

    mode: str = "ok"
    methods: tuple[str, ...] = ()
    count: int | None = None
    after: int = 0
    skip: int = 0
    then: str = "ok"


class Cut(Exception):
    """The fault ends the connection here."""


class Proxy:
    """Forwards requests to a port of 127.0.0.1 and injects the current fault."""

    def __init__(self, target: int):
        self.target = target
        self.fault = Fault()
        self.counts = {"requests": 0, "injected": 0}

    async def serve(self) -> None:
        data = await asyncio.start_server(self.request, "127.0.0.1", 0, limit=1 << 20)
        control = await asyncio.start_server(self.control, "127.0.0.1", 0)
        ports = [server.sockets[0].getsockname()[1] for server in (data, control)]
        print(json.dumps({"port": ports[0], "control": ports[1]}), flush=True)
        await asyncio.gather(data.serve_forever(), control.serve_forever())

    def mode_for(self, method: str) -> str:
        """The mode for one request, which uses up one of the fault's count."""
        self.counts["requests"] += 1
        fault = self.fault
        if fault.count == 0:
            return fault.then
        if fault.mode == "ok" or (fault.methods and method not in fault.methods):
            return "ok"
        if fault.skip:
            fault.skip -= 1
            return "ok"
        if fault.count is not None:
            fault.count -= 1
        self.counts["injected"] += 1
        return fault.mode

    async def request(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method = head.split(b" ", 1)[0].decode()
            mode = self.mode_for(method)
            if mode == "blackhole":
                await asyncio.sleep(3600)
            elif mode in ERRORS:
                await answer(writer, *ERRORS[mode])
            elif mode == "reset" and not self.fault.after:
                reset(writer)
            else:
                await self.forward(head, method, mode, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()  # one side went away, as clients under test do

    async def forward(self, head: bytes, method: str, mode: str, reader: StreamReader, writer: StreamWriter) -> None:
        head = re.sub(rb"\r\n[Cc]onnection:[^\r]*", b"", head)
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        to_server.write(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        upload = method in ("PUT", "POST") and mode in ("reset", "corrupt")
        up = asyncio.create_task(self.pump(reader, to_server, mode if upload or mode == "slow" else "ok"))
        down = asyncio.create_task(self.pump(from_server, writer, "ok" if upload else mode))
        try:
            done, _ = await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            if down in done or up.exception() is None:
                await down  # the server's answer is complete, or still to come
            else:
                await up
            writer.close()
        except Cut:
            if mode == "truncate":
                writer.close()
            else:
                reset(writer)
        finally:
            up.cancel()
            down.cancel()
            to_server.transport.abort()

    async def pump(self, reader: StreamReader, writer: StreamWriter, mode: str) -> None:
        """Carries bytes until the sender ends, or raises Cut where the fault ends it."""
        after, passed = self.fault.after, 0
        while chunk := await reader.read(100 if self.fault.mode == mode == "slow" else 1 << 16):
            if mode == "late" and not passed:
                await asyncio.sleep(LATE_S)
            if self.fault.mode == mode == "slow":
                await asyncio.sleep(0.1)
            if mode in ("truncate", "reset") and passed + len(chunk) >= after:
                writer.write(chunk[: after - passed])
                await writer.drain()
                raise Cut
            if mode == "corrupt" and passed <= after < passed + len(chunk):
                at = after - passed
                chunk = chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]
            passed += len(chunk)
            if mode != "lost":
                writer.write(chunk)
                await writer.drain()
        if mode == "lost":
            raise Cut

    async def control(self, reader: StreamReader, writer: StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if length:
            self.fault = Fault(**json.loads(await reader.readexactly(int(length[1]))))
            self.counts = {"requests": 0, "injected": 0}
        await answer(writer, "200 OK", json.dumps(self.counts))


async def answer(writer: StreamWriter, status: str, content: str) -> None:
    """Sends a short answer: JSON as it is, an S3 error code as S3's XML."""
    body = content if content.startswith("{") else f"<Error><Code>{content}</Code><Message>injected</Message></Error>"
    head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    await writer.drain()
    await asyncio.sleep(0.05)  # closing at once on unread input would reset the connection instead
    writer.close()


def reset(writer: StreamWriter) -> None:
    """Ends a connection by RST instead of FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


if __name__ == "__main__":
    asyncio.run(Proxy(int(sys.argv[1])).serve())
