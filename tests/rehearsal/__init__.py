"""Faults of machines, sites and networks under load, in front of a service that is set up as in production."""
