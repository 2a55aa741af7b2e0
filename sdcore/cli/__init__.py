"""Answers the command line: `main.py` has the app, every other file one command; importing it imports no torch."""
