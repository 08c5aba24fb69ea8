"""How many rows blocks and shards have unless the caller says otherwise.

Imports nothing, so that a command line can print the defaults at once.
"""

ROWS_PER_BLOCK = 256
ROWS_PER_SHARD = 65_536
