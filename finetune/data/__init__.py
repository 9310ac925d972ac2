"""Data: from files to batches of token ids and labels.

The stages, each with its module: a row of a file (`rows`, read by `readers`) becomes a document (`documents`, by one of
`formats`), the document an example of tokens and a mask of targets (`encode`, `truncation`), examples are stored
(`token_store`, `tokenized_source`), mixed and split (`dataset`, `mixing`), packed (`packing`), and laid out in
micro-batches (`batch_plan`, `collate`).
"""
