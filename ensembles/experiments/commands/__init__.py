"""The commands of the console script `ensembles`, one in each file.

Each file has a function `run`, whose signature and docstring are the command's options and help,
and which returns the exit status. Options are read by `ensembles.experiments.commands.parsing`.
"""
