"""Validation loss, generated answers and their scores, and the agreement of two models."""
