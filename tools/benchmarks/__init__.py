"""What tools/bench is made of: one module a comparison, and what they share.

figures.py says what a figure is, rounds.py how samples are taken in turn, quiet.py when one is thrown away, parts.py
what is measured (back-ends, loads, networks), results.py, table.py and chart.py what becomes of it.
"""
