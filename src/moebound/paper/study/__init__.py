"""A study: what an error does to a model, condition by condition, as the paper asks it.

suite.py       conditions, and how they are made for a model of any depth
builtin.py     the suites `paper` and `quick`
suite_file.py  a suite of one's own, from a file
folder.py      the folder of a study: which model, which suite, may it go on
rows.py        lines that are never lost
measure.py     one model under one condition after another
reading.py     teacher forcing: KL and agreement with the unperturbed model
flow.py        where an error goes: residual stream and routing
workers.py     who measures: this process, or several
cluster.py     a Ray cluster
run.py         all of it, in order, resumable
"""
