"""From data sources to encoded examples: read rows, recognise their format, render, encode, label, order."""
