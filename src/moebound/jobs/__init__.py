"""Much work on few cores: in threads, in processes, on a cluster.

ordered.py    work on many things at once, results in order, memory of a few
workers.py    processes that each hold something expensive, such as a model
cluster.py    the same on a Ray cluster
"""
