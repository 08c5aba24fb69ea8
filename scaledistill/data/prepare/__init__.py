"""Make shards from text: read sources, decompress, tokenise, pack."""
