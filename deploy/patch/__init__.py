"""Patches a server while it serves: `patch.py`, `check.py` and `supervisor.py`."""
