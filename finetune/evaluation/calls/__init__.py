"""Tool calls in answers: the form of a chat template's calls, their reading and their scores."""
