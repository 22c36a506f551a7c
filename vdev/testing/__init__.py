"""Machinery for tests and demonstrations: real guests, network namespaces, other front-ends.

Nothing here is imported by the daemon.
"""
