"""Fine-tune and score models on GLUE and SQuAD 2.0.

`grid` runs the fine-tunings ("cells"), `summary` makes the tables, `command` is the command line.
"""
