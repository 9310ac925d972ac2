"""What a run leaves behind: its directory, its metrics, where it came from."""
