"""What is multiplied: a matrix known by its products, and the algebra of such matrices."""
