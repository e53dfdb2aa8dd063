"""Answers over HTTP, many at once, on one bundle."""
