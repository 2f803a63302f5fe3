"""Slow and obviously correct implementations, to check the fast ones against."""
