"""How gunicorn serves the application in production: `gunicorn wsgi:app`. Each setting with its reason."""

import os
import runpy
from pathlib import Path

# Refuse to start, here and once, if the environment lacks anything. Not imported: what the master imports its workers
# inherit, and a patched settings.py would then not be read at a reload.
settings = runpy.run_path(str(Path(__file__).with_name("settings.py")))["load"](os.environ)

# All interfaces: the container or the machine's firewall decides who gets this far.
bind = f"0.0.0.0:{settings['PORT']}"

# Two processes at the least, so that one that dies or reloads leaves another that serves.
workers = settings["WEB_CONCURRENCY"]

# Requests wait for WeChat, Redis and the database, not for the CPU; threads wait cheaply. They also wait for clients
# that send slowly, and without a limit: a proxy that buffers requests belongs in front.
worker_class = "gthread"
threads = settings["WEB_THREADS"]

# A worker whose main thread gives no sign of life for this long is replaced. A slow request is no reason: it has a
# thread of its own, and its waits for WeChat, Redis and the database end by themselves.
timeout = 30

# How long requests in hand may take to finish at a stop; under the 30 s after which most platforms kill.
graceful_timeout = 25

# Longer than the 60 s for which load balancers usually keep an idle connection, so that they close first
# and never send a request into a connection that is being closed.
keepalive = 75

# The heartbeat file in memory: on a slow disk a healthy worker would be taken for dead.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None

# The access log is the service's own, one JSON line a request.
accesslog = None

# No socket in the home directory through which the server could be steered.
control_socket_disable = True
