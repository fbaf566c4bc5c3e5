"""Data preparation: every corpus becomes folders of shar shards as IPAPack++ has them."""
