"""The gate checks every claim of a subject: in a script, under pytest, or from the command line."""
