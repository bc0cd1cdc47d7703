"""Ensembles that each have one known defect, their healthy twins, and the checks that catch it."""
