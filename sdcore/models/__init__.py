"""Finds what a transformers model consists of for us: the body that gives hidden states, the output layer above it."""

from .body import Body, find_body, head_of, without_dropout
from .heads import Head, Matrix, lifted

__all__ = ["Body", "Head", "Matrix", "find_body", "head_of", "lifted", "without_dropout"]
