"""Readers of text and rows for all commands: kinds of files, compression, encoding and limits."""
