"""Runs a plan's passes in one of four ways: naive, cached, packed or two_phase, each a module with `hidden_states`."""
