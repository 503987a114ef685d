"""The door: what gunicorn, or any other WSGI server, calls."""

import gc

from service import create_app

app = create_app()
gc.collect()
gc.freeze()  # no garbage collection looks at what is loaded again, which took 75 ms each time
# Seldom at all that waits, which took 200 ms with 1,000 logins. Nor as often as usual (700, 10, 10) at what is new:
# what is looked at twice before its request ends is kept for long.
gc.set_threshold(5_000, 5, 80)
