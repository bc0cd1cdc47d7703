"""The gate: every claim of a subject is checked, in a script, under pytest, or by a command."""
