"""How a linear layer's frozen weight is stored, and how to have it back."""
