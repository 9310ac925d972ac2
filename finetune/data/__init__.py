"""From files of rows to batches of tokens that know which of them are trained."""
