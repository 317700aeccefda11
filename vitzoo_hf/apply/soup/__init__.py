"""Average the weights of related models."""
