"""Formats of rows: each converts rows to documents, one format a module."""
