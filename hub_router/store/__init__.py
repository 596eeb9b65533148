"""The catalog's database: tables, sessions, queries."""
