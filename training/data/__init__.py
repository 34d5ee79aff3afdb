"""Data that ships with the project; README.md has where it is from and its licence."""
