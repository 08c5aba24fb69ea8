"""Fine-tune and score models on GLUE and SQuAD 2.0: a grid of cells, its tables and its command
line.
"""
