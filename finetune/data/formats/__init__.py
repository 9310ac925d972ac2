"""Formats of rows: each turns a row into a document, one format a file."""
