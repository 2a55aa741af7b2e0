"""Drop-in pieces for other people's trainers: each renames, reshapes and calls what the rest of the library computes.

Not imported by anything else, and nothing is imported here: each module needs its own optional dependency.
"""
