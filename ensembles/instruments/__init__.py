"""What several promises look with; what one alone uses stands in its folder."""
