"""Evaluation of a target: accuracy under attack, diagnosis, corruptions."""
