"""Held-out loss, generated answers and their scores, and two models side by side."""
