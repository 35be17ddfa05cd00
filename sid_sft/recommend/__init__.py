"""From a model to recommendations and what they are worth."""
