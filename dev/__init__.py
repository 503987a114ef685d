"""The laptop's stand-ins, and the launcher behind `make run`. The service imports nothing of this."""
