"""The former place of `distance`, for files that import it from here."""

from ensembles.instruments.distances import distance

__all__ = ["distance"]
