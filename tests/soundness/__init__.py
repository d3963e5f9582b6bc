"""Mutants of every rule: spellings with 0 to 2 mistakes in them, judged by eager on inputs of their own."""
