"""Steering: change what a model writes by its features or by any direction, in stated units, and leave no trace."""
