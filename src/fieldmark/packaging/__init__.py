"""The package: one folder with all that serving needs, written, changed, read and proven here."""
