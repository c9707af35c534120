"""Integrations: where people train. Each module needs the library it is named after; the package itself needs none."""
