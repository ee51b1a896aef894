"""The kinds of task: rows in, examples and scores out."""
