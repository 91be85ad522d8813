"""How programs drive the interface of the cache-manager mode: small connectors in the manner of inference frameworks.

Each connector holds real tensors and runs in processes of its own; tests compare every byte that it moves.
"""
