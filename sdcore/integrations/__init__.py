"""Brings the library into other people's trainers: each module renames and reshapes what the rest computes.

Nothing else imports these modules, and nothing is imported here, since each needs its own optional dependency.
"""
