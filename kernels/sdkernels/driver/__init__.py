"""Leads from a call to tiles of logits: how it is run, as which operator, in which pass, in which chunks of rows."""
