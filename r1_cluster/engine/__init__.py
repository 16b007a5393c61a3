"""Who is computed next, on which pages, and what the roles do in a step."""
