"""Ways to look into a model that several checks use, and that leave it as it was."""
