"""Does the consistency term earn its keep? Recipes under one evaluator, with labels that are complete, few or wrong."""
