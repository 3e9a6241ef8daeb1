"""The main job on a real model: compress, verify, load, measure, show.

prompts.py    its sample prompts, as one padded batch
fidelity.py   how far a compressed model is from the original one
run.py        the cases, one after the other -> a report
report.py     the report: rows, facts, JSON
page.py       the report as one HTML page, with plots.py
"""
