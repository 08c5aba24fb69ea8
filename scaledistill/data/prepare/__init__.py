"""From text to shards: sources, compression, tokenisation, packing."""
