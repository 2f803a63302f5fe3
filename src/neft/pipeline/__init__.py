"""A run from recipe to results: stages that are skipped when done and resumed when cut off."""
