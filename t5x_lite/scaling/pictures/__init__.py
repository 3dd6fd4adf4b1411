"""A fit's pictures, a module for each question that they answer."""
