"""Exchange of trained models with RecBole 1.2.1: its checkpoint files, its ids, its names and shapes of weights."""
