"""The command line. `main.py` holds the app, every other file one command; importing it imports no torch."""
