"""The door: what gunicorn, or any other WSGI server, calls."""

import gc

from service import create_app

app = create_app()
gc.collect()
gc.freeze()  # no garbage collection looks at what is loaded again, which took 75 ms each time
gc.set_threshold(700, 10, 1000)  # seldom at all that waits, which took 200 ms with 1,000 logins
