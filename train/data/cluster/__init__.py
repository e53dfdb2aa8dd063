"""Preparation of datasets on many machines, which share a file system or an object store."""
