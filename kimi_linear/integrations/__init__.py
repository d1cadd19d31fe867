"""Kimi Linear inside other people's software: one file per host, each a thin adapter onto our own operations.

Nothing is patched or registered by an import. A host's package is imported when its function is called.
"""
