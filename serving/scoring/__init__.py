"""Files in, the same rows with their uncertainty out: `dropserve score`.

The only part of serving that needs pyarrow, and with `--ray` Ray; the server imports nothing of it.

sources.py   which files, and their cut into parts
rows.py      columns of a file -> the arrays of a model's inputs, and why a row is refused
columns.py   the arrays of a model's outputs -> columns
scorer.py    a batch of rows -> its answers and refusals
parts.py     a part of a file -> a part of the output, all of it or nothing
job.py       a whole scoring, that can be cut off at any time and taken up again
on_ray.py    the same parts, scored by the workers of Ray Data
"""
