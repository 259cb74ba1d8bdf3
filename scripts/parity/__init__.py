"""Parts of scripts/make-parity-fixtures.py."""
