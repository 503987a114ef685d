"""One round trip for all that requests read at the same moment."""

from collections.abc import Callable, Mapping
from typing import Any

import gevent
from gevent import monkey
from gevent.event import AsyncResult


class SharedReads:
    """Reads what requests ask for at the same moment at once, where requests are greenlets. Nothing is kept.

    :param read: returns the values of keys, by key.
    """

    def __init__(self, read: Callable[[list[Any]], Mapping[Any, Any]]) -> None:
        self._read = read
        self._next: tuple[list[Any], AsyncResult] = [], AsyncResult()

    def get(self, key: Any) -> Any:
        """Return the value of a key; None if there is none. Raises what `read` does."""
        if not monkey.is_module_patched("socket"):
            return self._read([key]).get(key)
        keys, found = self._next
        keys.append(key)
        if len(keys) > 1:  # the first one asks for all
            values = found.get()
            return self._read([key]).get(key) if values is None else values.get(key)
        values = None
        try:
            gevent.sleep(0)  # until all requests that are ready have named their keys
            self._next = [], AsyncResult()
            values = self._read(keys)
            return values.get(key)
        except Exception as error:
            found.set_exception(error)
            raise
        finally:
            if self._next[1] is found:
                self._next = [], AsyncResult()
            if not found.ready():
                found.set(values)  # None if this request was given up, which concerns no other one
