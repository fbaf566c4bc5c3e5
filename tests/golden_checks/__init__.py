"""Checkers of reference fixtures, one module for each area of the package."""
