"""Where a subject comes from: a factory, a live object, a name."""
