"""Thin Ray shells around the roles, the engine and the HTTP edge."""
