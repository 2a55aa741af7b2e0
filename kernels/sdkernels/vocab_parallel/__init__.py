"""Computes a tile over ranks that each hold a slice of the vocabulary: who has what, what they tell each other."""
