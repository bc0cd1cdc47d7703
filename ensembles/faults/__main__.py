"""Prints the kill matrix: `python -m ensembles.faults`."""

from ensembles.faults.catalogue import kill_matrix

if __name__ == "__main__":
    print(kill_matrix())
