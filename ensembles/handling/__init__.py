"""Calls a model, trains it for a step, and puts it back as it was."""
