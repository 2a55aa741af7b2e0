"""Computes one tile of logits and what is made of it: products with a head, formulas, and backends that apply them."""
