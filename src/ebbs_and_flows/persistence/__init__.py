"""The database: tables, statements, repositories and the unit of work. Nothing above this package knows SQL."""
