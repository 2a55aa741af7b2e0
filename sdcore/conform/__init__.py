"""Holds everybody's distillation loss to one set of situations: `sdcore conform`.

`situations.py` lists what is asked, `cases.py` makes its inputs and float64 truth, `adapters.py` calls the public
losses, `runner.py` runs one after the other in a process each and judges, `table.py` writes `docs/conformance.md`.
"""
