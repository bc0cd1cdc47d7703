"""The commands of the console script `ensembles`, one in each file.

Each file has a function `run`, which returns the exit status. Its signature and docstring are the
command's options and help. Options are read by `ensembles.experiments.commands.parsing`.
"""
