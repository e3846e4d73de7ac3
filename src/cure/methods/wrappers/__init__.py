"""Wrappers around any method."""
