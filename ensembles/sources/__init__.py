"""Where a subject comes from: a factory, an object, or the path of either."""
