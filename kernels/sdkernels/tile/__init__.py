"""What happens to one tile of logits: the products with a head, the formulas, and the backends that apply them."""
