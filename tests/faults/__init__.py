"""Faults under load, and what was lost: a table of them, a stage on which they happen, and a checker."""
