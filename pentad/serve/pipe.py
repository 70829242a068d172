"""Lines between a worker and the front process."""

import json
import os
import select
from typing import Any

READ_BYTES = 1 << 20
_to_json = json.JSONEncoder(separators=(",", ":")).encode  # `json.dumps` makes an encoder each time


class Pipe:
    """A worker's end.

    Args:
        receive: file descriptor of the requests.
        send: file descriptor of the events.
    """

    def __init__(self, receive: int, send: int) -> None:
        self._receive_fd = receive
        self._send_fd = send
        self._unread: list[bytes] = []

    def send(self, message: dict[str, Any]) -> None:
        """Write one line."""
        data = memoryview(_to_json(message).encode() + b"\n")
        while data:
            data = data[os.write(self._send_fd, data) :]

    def receive(self, seconds: float | None = 0) -> list[bytes] | None:
        """The whole lines that have arrived; waits for some of them at most so long, or forever. None at the end."""
        while select.select([self._receive_fd], [], [], seconds)[0]:
            data = os.read(self._receive_fd, READ_BYTES)
            if not data:
                return None
            first, *others = data.split(b"\n")
            self._unread.append(first)
            if others:
                lines = [b"".join(self._unread), *others[:-1]]
                self._unread = [others[-1]]
                return lines
            if seconds == 0:
                return []
        return []
