"""The ways to run a plan's passes: naive, cached, packed and two_phase, each with one `hidden_states` per tree."""
