"""What a run will take, foreseen from shapes: memory by part, and time."""
