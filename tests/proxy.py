"""A TCP proxy, as the one address of a service in front of servers that take each other's place, or misbehave."""

import select
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Self

from tests.harness import free_port


class Proxy:
    """Forwards each new connection to `target`; those that are open stay where they are.

    A context manager, which closes all connections at its end.

    :param target: the path of a server's socket, or its host and port.
    """

    delay = 0.0
    """Seconds for which all that a client sends is held back."""
    share: float | None = None
    """The share of a response that arrives before the connection ends; 0 resets it. None forwards all."""

    def __init__(self, target: str | tuple[str, int]) -> None:
        self.target = target
        self.accepted = self.cut = 0
        self._open: set[socket.socket] = set()
        self.port = free_port("127.0.0.1")
        self.listen()

    def listen(self) -> None:
        """Accept connections, on the same port each time."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def refuse(self) -> None:
        """End all connections, and let new ones be refused."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def drop(self) -> None:
        """End all connections."""
        for opened in list(self._open):
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                self.accepted += 1
                server = socket.socket(socket.AF_UNIX if isinstance(self.target, str) else socket.AF_INET)
                try:
                    server.connect(self.target)
                except OSError:
                    client.close()
                    server.close()
                    continue
                self._open |= {client, server}
                threading.Thread(target=self._relay, args=(client, server), daemon=True).start()

    def _send(self, data: bytes, sink: socket.socket) -> None:
        time.sleep(self.delay)
        sink.sendall(data)

    def _answer(self, data: bytes, sink: socket.socket) -> None:
        if self.share is None:
            sink.sendall(data)
            return
        self.cut += 1
        sink.sendall(data[: int(len(data) * self.share)])
        if not self.share:
            sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sink.close()
        raise ConnectionAbortedError

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        """One thread for both ways, so that a socket that it closes is closed."""
        ways = {client.fileno(): (client, server, self._send), server.fileno(): (server, client, self._answer)}
        readable = select.poll()
        for number in ways:
            readable.register(number, select.POLLIN)
        with client, server, suppress(OSError):
            while True:
                for number, _ in readable.poll():
                    source, sink, pass_on = ways[number]
                    data = source.recv(65536)
                    if not data:
                        raise ConnectionAbortedError
                    pass_on(data, sink)
        self._open -= {client, server}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
