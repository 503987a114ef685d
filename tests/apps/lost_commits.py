"""The service with a database that loses each seventh answer to a COMMIT: `gunicorn tests.apps.lost_commits:app`.

With BLIND=1 it has a bug as well: it repeats what was lost, whether or not that was committed. For MariaDB.
"""

import itertools
import os
from typing import Any

from pymysql.err import OperationalError

from storage import failures
from wsgi import app

__all__ = ["app"]

numbers = itertools.count(1)
dialect = app.extensions["database"].dialect
commit, may_repeat = dialect.do_commit, failures.may_repeat


def lose_some(connection: Any) -> None:
    commit(connection)
    if next(numbers) % 7 == 0:
        raise OperationalError(2013, "Lost connection to MySQL server during query")


dialect.do_commit = lose_some
if os.environ.get("BLIND"):
    failures.may_repeat = lambda error, is_safe: may_repeat(error, is_safe=True)
