"""How a model is called, trained for a step, and put back as it was."""
