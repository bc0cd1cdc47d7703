"""Ensembles with one known defect each, their healthy twins, and the checks that must tell them."""
