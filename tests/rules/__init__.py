"""Rules seen from outside: true respellings that must fuse, near misses that must not change a result."""
