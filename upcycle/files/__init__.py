"""Files: durable ones whose failures are the output's, and JSON that a user may have damaged."""
