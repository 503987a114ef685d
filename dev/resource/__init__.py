"""Writes a resource of your own: `make resource NAME=coupons`. docs/en/resource.md says what to do with it."""
