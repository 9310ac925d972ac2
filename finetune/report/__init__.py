"""HTML reports of runs: self-contained pages of charts and tables, without scripts and external resources."""
