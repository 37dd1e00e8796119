"""Data engines: raw sources in, rows on disk out."""
