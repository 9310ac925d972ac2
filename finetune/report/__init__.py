"""Pages that one can send: charts and tables made of a run's files, without scripts and without anything fetched."""
