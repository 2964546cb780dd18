"""Access to PostgreSQL: connections, migrations, checks, roles."""
