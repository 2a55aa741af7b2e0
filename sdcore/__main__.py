"""Answers `python -m sdcore`: the command line, same as the console script `sdcore`."""

from sdcore.cli.main import app

if __name__ == "__main__":
    app(prog_name="sdcore")
