"""What is trained on a frozen base, and how it merges."""
