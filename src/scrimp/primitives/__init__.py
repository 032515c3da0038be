"""What more than one layer shares: errors, files, random draws. Knows nothing of the rest."""
