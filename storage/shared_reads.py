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
        if len(keys) == 1:  # the first one asks for all
            try:
                gevent.sleep(0)  # until all requests that are ready have named their keys
                self._next = [], AsyncResult()
                found.set(self._read(keys))
            except Exception as error:  # noqa: BLE001  raised below, in each of them
                found.set_exception(error)
            except BaseException:  # this request is given up, which concerns no other one
                self._next = [], AsyncResult()
                found.set()
                raise
        values = found.get()
        return (self._read([key]) if values is None else values).get(key)
