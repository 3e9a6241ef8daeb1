"""The command line: one file per command, each a thin skin over the folder that does the work.

A command parses its options, calls one function, and hands the result to `output`. Backends are
imported inside the commands, so that `moebound --help` does not wait for torch.
"""
